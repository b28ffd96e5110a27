"""The nesting of a message: dictionaries, lists, tuples and plain values around numbered leaves.

Packing turns a tree into what msgpack can carry; unpacking checks what came and puts the leaves back. What
msgpack has no word for travels in three extension types.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgpack

from rlbroker.codec.limits import DEFAULT_LIMITS
from rlbroker.errors import UnsupportedType, WireError

#: A leaf: its number in the leaf table, u32 little endian.
EXT_LEAF = 1
#: An int beyond 64 bits: two's complement, little endian.
EXT_INT = 2
#: The first element of an array that stands for a tuple; no payload.
EXT_TUPLE = 3

#: The longest int, in bytes. Arithmetic on longer ones takes a time that an attacker could choose.
MAX_INT_BYTES = 1024

#: The most items of all containers of a tree together that a writer takes.
MAX_VALUES = 1_500_000

_TUPLE = msgpack.ExtType(EXT_TUPLE, b"")
_INT64_MIN = -(1 << 63)
_UINT64_MAX = (1 << 64) - 1

_PLAIN = frozenset((bool, int, float, str, bytes))

Path = Sequence[object]
#: Takes a value that is no container and no plain value; returns its leaf number or raises UnsupportedType.
TakeLeaf = Callable[[Any], int]


class RefusedError(Exception):
    """Why a value cannot travel; collects its path while it passes up through the tree."""

    def __init__(self, reason: str) -> None:
        """Say why, as the end of a sentence."""
        super().__init__(reason)
        self.reason = reason
        self.keys: list[object] = []

    def unsupported(self) -> UnsupportedType:
        """Return the caller's error, which names the path."""
        return UnsupportedType(f"{format_path(self.keys[::-1])}: {self.reason}")


def format_path(keys: Path) -> str:
    """Write a path as Python would index it.

    >>> format_path(["experiences", "obs", 0])
    "['experiences']['obs'][0]"
    """
    if not keys:
        return "the top level"
    if len(keys) > 12:
        return f"{format_path(keys[:10])}…"
    return "".join(f"[{key!r}]" for key in keys)


def brief(value: object) -> str:
    """Show a value from the wire in an error; its repr could be deep or long beyond any limit."""
    return f"{value!r:.80}" if type(value) in _PLAIN else type(value).__name__


class TreePacker:
    """Turns one tree into what msgpack packs, handing each leaf to `take_leaf`."""

    def __init__(self, take_leaf: TakeLeaf) -> None:
        """Number leaves with `take_leaf`."""
        self._take_leaf = take_leaf
        self._values = 0

    def pack(self, tree: object) -> object:
        """Return the packable tree; raise UnsupportedType naming the path of what cannot travel."""
        try:
            return self._pack(tree, 0)
        except RefusedError as refused:
            raise refused.unsupported() from None

    def _pack(self, value: Any, depth: int) -> object:
        kind = type(value)
        if kind is str:
            return _checked_str(value)
        if kind is float or kind is bool or value is None:
            return value
        if kind is int:
            return value if _INT64_MIN <= value <= _UINT64_MAX else _long_int(value)
        if kind is dict or kind is OrderedDict or kind is defaultdict:
            self._enter(depth, len(value))
            return {self._key(key): self._item(key, item, depth) for key, item in value.items()}
        if kind is list:
            self._enter(depth, len(value))
            return [self._item(index, item, depth) for index, item in enumerate(value)]
        if kind is tuple:
            self._enter(depth, len(value))
            return [_TUPLE, *(self._item(index, item, depth) for index, item in enumerate(value))]
        if kind is bytes and len(value) < SMALL_BYTES:
            return value
        return leaf_reference(self._take_leaf(value))

    def _item(self, key: object, item: object, depth: int) -> object:
        try:
            return self._pack(item, depth + 1)
        except RefusedError as refused:
            refused.keys.append(key)
            raise

    def _enter(self, depth: int, length: int) -> None:
        if depth >= DEFAULT_LIMITS.max_depth:
            raise RefusedError(
                f"containers are nested deeper than {DEFAULT_LIMITS.max_depth} levels, or one contains itself"
            )
        # Bounds the work on a tree that reaches the same list by very many paths.
        self._values += length
        if self._values > MAX_VALUES:
            raise RefusedError(f"more than {MAX_VALUES} values in lists, tuples and dictionaries; use arrays")

    def _key(self, key: object) -> object:
        kind = type(key)
        if kind is str:
            return _checked_str(key)  # type: ignore[arg-type]
        if kind is int:
            return key if _INT64_MIN <= key <= _UINT64_MAX else _long_int(key)  # type: ignore
        raise RefusedError(f"the key {key!r:.80} is of type {kind.__name__}; keys must be str or int")


#: Shorter bytes travel within the header, longer ones as leaves, so that they can be compressed.
SMALL_BYTES = 1024

_LEAF_REFERENCES = [msgpack.ExtType(EXT_LEAF, i.to_bytes(4, "little")) for i in range(256)]


def leaf_reference(number: int) -> msgpack.ExtType:
    """Return what stands for leaf `number` in a packed tree."""
    if number < len(_LEAF_REFERENCES):
        return _LEAF_REFERENCES[number]
    return msgpack.ExtType(EXT_LEAF, number.to_bytes(4, "little"))


def _checked_str(value: str) -> str:
    if len(value) > DEFAULT_LIMITS.max_header_bytes:
        raise RefusedError(f"a str of {len(value)} characters is too long; send bytes")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RefusedError("a str with lone surrogates is not valid Unicode") from None
    return value


def _long_int(value: int) -> msgpack.ExtType:
    size = (value if value >= 0 else ~value).bit_length() // 8 + 1
    if size > MAX_INT_BYTES:
        raise RefusedError(
            f"an int of {value.bit_length()} bits is too long; {MAX_INT_BYTES * 8 - 1} is the most"
        )
    return msgpack.ExtType(EXT_INT, value.to_bytes(size, "little", signed=True))


class _LeafNumber(int):
    """The number of a leaf, where an int would be taken for a plain value."""


class _TupleMark:
    """Stands first in a list that is to become a tuple."""


_TUPLE_MARK = _TupleMark()


def ext_hook(code: int, payload: bytes) -> object:
    """Read one extension value for msgpack; ValueError if it is not one of ours."""
    if code == EXT_LEAF and len(payload) == 4:
        return _LeafNumber.from_bytes(payload, "little")
    if code == EXT_INT and 0 < len(payload) <= MAX_INT_BYTES:
        return int.from_bytes(payload, "little", signed=True)
    if code == EXT_TUPLE and not payload:
        return _TUPLE_MARK
    raise ValueError(f"extension type {code} with {len(payload)} bytes")


def pairs_hook(pairs: list[tuple[object, object]]) -> dict[object, object]:
    """Make a dictionary for msgpack; ValueError unless its keys are distinct and str or int."""
    for key, _ in pairs:
        if type(key) is not str and type(key) is not int:
            raise ValueError(f"a key of type {type(key).__name__}")
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key that occurs twice")
    return result


def check_packed(value: object, leaf_count: int, max_depth: int, depth: int = 0) -> None:
    """Raise WireError unless `value`, fresh from msgpack, is a tree over `leaf_count` leaves."""
    kind = type(value)
    if kind is dict or kind is list:
        if depth >= max_depth:
            raise WireError(f"containers are nested deeper than {max_depth} levels")
        items: Any = value.values() if kind is dict else value  # type: ignore[attr-defined]
        for position, item in enumerate(items):
            if type(item) is _TupleMark:
                if kind is dict or position:
                    raise WireError("a tuple's mark in the wrong place")
            else:
                check_packed(item, leaf_count, max_depth, depth + 1)
    elif kind is _LeafNumber:
        if value >= leaf_count:  # type: ignore[operator]
            raise WireError(f"leaf {value} of {leaf_count}")
    elif value is not None and kind not in _PLAIN:
        raise WireError(f"a value of type {kind.__name__} in the tree")


def unpack(value: Any, leaves: Sequence[object]) -> Any:
    """Return the tree that a checked packed tree stands for, with `leaves` in their places."""
    kind = type(value)
    if kind is _LeafNumber:
        return leaves[value]
    if kind is dict:
        return {key: unpack(item, leaves) for key, item in value.items()}
    if kind is list:
        if value and type(value[0]) is _TupleMark:
            return tuple([unpack(item, leaves) for item in value[1:]])
        return [unpack(item, leaves) for item in value]
    return value


class PackedNode(NamedTuple):
    """One leaf or plain value of a tree, and where it is.

    ``leaf`` is its number in the leaf table, None for a plain value; ``kind`` is then the name of its type. Empty
    containers are plain values.
    """

    path: tuple[object, ...]
    leaf: int | None
    kind: str = ""
    value: object = None


def walk_packed(value: Any, path: tuple[object, ...] = ()) -> Iterator[PackedNode]:
    """Give each leaf and plain value of a checked packed tree, in order."""
    kind = type(value)
    if kind is dict and value:
        for key, item in value.items():
            yield from walk_packed(item, (*path, key))
    elif kind is list and any(type(item) is not _TupleMark for item in value):
        items = value[1:] if type(value[0]) is _TupleMark else value
        for index, item in enumerate(items):
            yield from walk_packed(item, (*path, index))
    elif kind is _LeafNumber:
        yield PackedNode(path, int(value))
    else:
        yield PackedNode(path, None, "tuple" if kind is list and value else kind.__name__, unpack(value, ()))


def describe_packed(value: Any, leaves: Sequence[Any]) -> dict[str, Any]:
    """Return path to description, ready for JSON, of each leaf and plain value of a checked packed tree."""
    found: dict[str, Any] = {}
    for node in walk_packed(value):
        if node.leaf is None:
            found[format_path(node.path)] = {"kind": node.kind}
        else:
            leaf = leaves[node.leaf]
            found[format_path(node.path)] = {
                "kind": leaf.kind,
                "dtype": leaf.dtype,
                "shape": list(leaf.shape),
            }
    return found
