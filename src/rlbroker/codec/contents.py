"""What a message holds, leaf by leaf, without making any of it: neither torch nor the array bytes are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rlbroker.codec.format import Header
from rlbroker.codec.tree import walk_packed


class Content(NamedTuple):
    """One leaf or plain value of a tree.

    Attributes:
        path: keys and indices that lead to it.
        kind: `tensor`, `array`, `scalar` or `bytes`; for a plain value the name of its type.
        dtype: as it travels; empty for a plain value.
        shape: of a leaf.
        nbytes: of a leaf, as it travels.
        original: the dtype that it had before it was cast; None if it was not.
        leaf: its number; tied ones have the same. None for a plain value.
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
        """Its path with dots, as state dictionaries have it."""
        return dotted(self.path)


def dotted(path: Sequence[object]) -> str:
    """Write a path with dots.

    >>> dotted(["layers", 0, "weight"])
    'layers.0.weight'
    """
    return ".".join(map(str, path))


def contents_of(header: Header) -> list[Content]:
    """Give what a header announces, in order."""
    found = []
    for node in walk_packed(header.tree):
        if node.leaf is None:
            found.append(Content(node.path, node.kind, value=node.value))
        else:
            leaf = header.leaves[node.leaf]
            found.append(
                Content(node.path, leaf.kind, leaf.dtype, leaf.shape, leaf.nbytes, leaf.original, node.leaf)
            )
    return found


def ties(contents: Iterable[Content]) -> dict[str, str]:
    """Give for each leaf that is tied to an earlier one the name of that."""
    first: dict[int, str] = {}
    found = {}
    for one in contents:
        if one.leaf is not None and first.setdefault(one.leaf, one.name) != one.name:
            found[one.name] = first[one.leaf]
    return found
