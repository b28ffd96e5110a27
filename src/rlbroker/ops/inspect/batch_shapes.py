"""The shape of a batch, from its message; needs no torch."""

from __future__ import annotations

from rlbroker.codec.describe import Content as Content
from rlbroker.codec.describe import describe
from rlbroker.errors import WireError


def shape_of(data: bytes) -> tuple[tuple[Content, ...], str]:
    """Give what a message holds, or why it does not decode."""
    try:
        return tuple(describe(data)), ""
    except WireError as error:
        return (), f"{type(error).__name__}: {error}"
