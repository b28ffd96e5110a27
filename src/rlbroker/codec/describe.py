"""The contents of a message, leaf by leaf, read without building it: needs neither torch nor the array bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rlbroker.codec.format import Buffer, Header, byte_view, check_segment, find_body, read_header
from rlbroker.codec.leaves import Leaf
from rlbroker.codec.limits import DEFAULT_LIMITS, Limits
from rlbroker.codec.tree import LeafNumber, TupleMark, unpack


class Content(NamedTuple):
    """One leaf or plain value of a tree. Empty containers are plain values.

    Attributes:
        path: the keys and indices that lead to it.
        kind: `tensor`, `array`, `scalar` or `bytes`; for a plain value the name of its type.
        dtype: of a leaf, as it travels; empty for a plain value.
        shape: of a leaf.
        nbytes: of a leaf, as it travels.
        original: the dtype that a leaf had before it was cast; None if it was not.
        leaf: the number of a leaf; tied leaves share one. None for a plain value.
        value: of a plain value.
    """

    path: tuple[object, ...]
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    nbytes: int = 0
    original: str | None = None
    leaf: int | None = None
    value: object = None

    @property
    def name(self) -> str:
        """The path with dots, as in the keys of a state dictionary."""
        return dotted(self.path)


def dotted(path: Sequence[object]) -> str:
    """Write a path with dots.

    >>> dotted(["layers", 0, "weight"])
    'layers.0.weight'
    """
    return ".".join(map(str, path))


def describe(data: Buffer, *, limits: Limits = DEFAULT_LIMITS) -> list[Content]:
    """Return the contents of a whole message, in order.

    Nothing is decompressed, but the digest of every segment is checked.

    Raises:
        WireError: the message is cut short, damaged, or beyond `limits`.
    """
    view = byte_view(data)
    end = find_body(view)
    header = read_header(view[:end], limits)
    for index, segment in enumerate(header.segments):
        check_segment(index, segment, view[end : end + segment.stored_bytes])
        end += segment.stored_bytes
    return describe_header(header)


def describe_header(header: Header) -> list[Content]:
    """Return the contents that a header announces, in order."""
    return list(_walk(header.tree, (), header.leaves))


def ties(contents: Iterable[Content]) -> dict[str, str]:
    """Return the name of the earlier leaf for each leaf that is tied to one, by name."""
    first: dict[int, str] = {}
    found = {}
    for one in contents:
        if one.leaf is not None and first.setdefault(one.leaf, one.name) != one.name:
            found[one.name] = first[one.leaf]
    return found


def _walk(value: Any, path: tuple[object, ...], leaves: Sequence[Leaf]) -> Iterator[Content]:
    kind = type(value)
    is_tuple = kind is list and bool(value) and type(value[0]) is TupleMark
    items: list[tuple[object, Any]] = []
    if kind is dict:
        items = list(value.items())
    elif kind is list:
        items = list(enumerate(value[1:] if is_tuple else value))
    if items:
        for key, item in items:
            yield from _walk(item, (*path, key), leaves)
    elif kind is LeafNumber:
        leaf = leaves[value]
        yield Content(path, leaf.kind, leaf.dtype, leaf.shape, leaf.nbytes, leaf.original, int(value))
    else:
        yield Content(path, "tuple" if is_tuple else kind.__name__, value=unpack(value, ()))
