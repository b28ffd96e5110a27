"""The shape of a batch, from its message; needs no torch."""

from __future__ import annotations

from rlbroker.codec.contents import Content as Content
from rlbroker.codec.message import contents
from rlbroker.errors import WireError


def shape_of(data: bytes) -> tuple[tuple[Content, ...], str]:
    """Give what a message holds, or why it does not decode."""
    try:
        return tuple(contents(data)), ""
    except WireError as error:
        return (), f"{type(error).__name__}: {error}"
