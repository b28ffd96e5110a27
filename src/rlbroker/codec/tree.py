"""The nesting of a message: dictionaries, lists, tuples and plain values around numbered leaves.

A tree is packed into values that msgpack can write, and unpacked from values that msgpack has read, once these were
checked. Leaves, long ints and tuples, for which msgpack has no type, travel as three extension types.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any

import msgpack

from rlbroker.codec.foreign import read_foreign
from rlbroker.codec.limits import DEFAULT_LIMITS
from rlbroker.codec.refusals import RefusedError, shorten_object, type_name
from rlbroker.errors import UnsupportedType, WireError

#: A leaf: its number in the leaf table, u32 little endian.
EXT_LEAF = 1
#: An int beyond 64 bits: two's complement, little endian.
EXT_INT = 2
#: The first element of an array that stands for a tuple; no payload.
EXT_TUPLE = 3

#: The longest int, in bytes. Arithmetic on longer ones could take as long as an attacker likes.
MAX_INT_BYTES = 1024

#: Shorter bytes travel within the header, longer ones as leaves, so that they can be compressed.
SMALL_BYTES = 1024

#: The most items that a writer accepts in all containers of a tree together.
MAX_VALUES = 1_500_000

_TUPLE = msgpack.ExtType(EXT_TUPLE, b"")
_INT64_MIN = -(1 << 63)
_UINT64_MAX = (1 << 64) - 1

_PLAIN = frozenset((bool, int, float, str, bytes))

#: Adds a value to the leaf table and returns its number; returns None for a value that is no leaf, and raises
#: RefusedError for one that cannot travel.
AddLeaf = Callable[[Any], int | None]


def shorten(value: object) -> str:
    """Return a value from the wire as short text for an error message; its whole repr could be of any length."""
    return f"{value!r:.80}" if type(value) in _PLAIN else type(value).__name__


class TreePacker:
    """Packs one tree for msgpack, and passes each leaf to `add_leaf`.

    Attributes:
        found: the depth and the number of each leaf, in the order of the tree; tied leaves occur repeatedly.
    """

    def __init__(self, add_leaf: AddLeaf) -> None:
        """Number leaves with `add_leaf`."""
        self._add_leaf = add_leaf
        self._values = 0
        self.found: list[tuple[int, int]] = []

    def pack(self, tree: object) -> object:
        """Return the packed tree; raise UnsupportedType, which names the path, for a value that cannot travel."""
        try:
            return self._pack(tree, 0)
        except RefusedError as refused:
            raise refused.unsupported() from refused.__cause__
        except RecursionError as error:  # little of the caller's stack is left
            raise UnsupportedType("the tree is nested too deeply for the rest of Python's stack") from error
        except RuntimeError as error:
            if "during iteration" not in str(error):
                raise
            raise UnsupportedType(
                "a dictionary changed while it was read; do not write to it during the call"
            ) from error

    def _pack(self, value: Any, depth: int) -> object:
        kind = type(value)
        if kind is str:
            return _check_str(value)
        if kind is float or kind is bool or value is None:
            return value
        if kind is int:
            return value if _INT64_MIN <= value <= _UINT64_MAX else _long_int(value)
        if kind is dict or kind is OrderedDict or kind is defaultdict:
            return self._pack_items(value.items(), len(value), depth)
        if kind is list:
            return self._pack_sequence(value, depth, [])
        if kind is tuple:
            return self._pack_sequence(value, depth, [_TUPLE])
        if kind is bytes and len(value) < SMALL_BYTES:
            return value
        number = self._add_leaf(value)
        if number is None:
            found = read_foreign(value, MAX_VALUES + 1)
            if type(found) is list:
                return self._pack_items(found, len(found), depth)
            number = self._add_leaf(found)
            assert number is not None, f"{type(found)} is not an array"
        self.found.append((depth, number))
        return _leaf_reference(number)

    def _pack_items(self, items: Iterable[tuple[object, Any]], length: int, depth: int) -> object:
        self._enter(depth, length)
        packed: dict[object, object] = {}
        for key, item in items:
            name = self._key(key)
            try:
                packed[name] = self._pack(item, depth + 1)
            except RefusedError as refused:
                refused.keys.append(key)
                raise
        if len(packed) != length:
            raise RefusedError("a key occurs twice in a mapping; a dictionary has each key once")
        return packed

    def _pack_sequence(self, items: Sequence[Any], depth: int, packed: list[object]) -> object:
        self._enter(depth, len(items))
        for index, item in enumerate(items):
            try:
                packed.append(self._pack(item, depth + 1))
            except RefusedError as refused:
                refused.keys.append(index)
                raise
        return packed

    def _enter(self, depth: int, length: int) -> None:
        if depth >= DEFAULT_LIMITS.max_depth:
            raise RefusedError(
                f"containers are nested deeper than {DEFAULT_LIMITS.max_depth} levels, or one contains itself"
            )
        # Bounds the work for a tree that reaches the same list by very many paths.
        self._values += length
        if self._values > MAX_VALUES:
            raise RefusedError(f"more than {MAX_VALUES} values in lists, tuples and dictionaries; use arrays")

    def _key(self, key: object) -> object:
        kind = type(key)
        if kind is str:
            return _check_str(key)  # type: ignore[arg-type] # `kind` says that it is a str
        if kind is int:
            return key if _INT64_MIN <= key <= _UINT64_MAX else _long_int(key)  # type: ignore # `kind` says that it is an int
        raise RefusedError(
            f"the key {shorten_object(key)} is of type {type_name(key)}; "
            f"keys must be str or int: send {_call_for_key(key)} of it"
        )


def _call_for_key(key: object) -> str:
    if isinstance(key, Enum):
        return "the value"
    return "int()" if hasattr(type(key), "__index__") and not isinstance(key, bool) else "str()"


def pack_metadata(metadata: object) -> object:
    """Return the metadata of a state dict as msgpack can write it: plain values by the prefix of a module.

    Raises UnsupportedType, which names the path, for anything else.
    """

    def refuse(value: object) -> int:
        raise RefusedError(
            f"a {type_name(value)} in the metadata of a state dict; it may hold plain values only"
        )

    packed: Any = TreePacker(refuse).pack({"_metadata": metadata})
    found = packed["_metadata"]
    if not isinstance(found, dict) or not all(
        isinstance(prefix, str) and isinstance(values, dict) for prefix, values in found.items()
    ):
        raise UnsupportedType("['_metadata']: the metadata of a state dict is a dictionary for each module")
    return found


#: The references to the first leaves, made once; most trees have no more leaves.
_LEAF_REFERENCES = [msgpack.ExtType(EXT_LEAF, i.to_bytes(4, "little")) for i in range(256)]


def _leaf_reference(number: int) -> msgpack.ExtType:
    if number < len(_LEAF_REFERENCES):
        return _LEAF_REFERENCES[number]
    return msgpack.ExtType(EXT_LEAF, number.to_bytes(4, "little"))


def _check_str(value: str) -> str:
    if len(value) > DEFAULT_LIMITS.max_header_bytes:
        raise RefusedError(f"a str of {len(value)} characters is too long; send bytes")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RefusedError(
                'a str with lone surrogates is not valid Unicode; send encode("utf-8", "surrogatepass") of it'
            ) from None
    return value


def _long_int(value: int) -> msgpack.ExtType:
    size = (value if value >= 0 else ~value).bit_length() // 8 + 1
    if size > MAX_INT_BYTES:
        raise RefusedError(
            f"an int of {value.bit_length()} bits is too long; the limit is {MAX_INT_BYTES * 8 - 1}"
        )
    return msgpack.ExtType(EXT_INT, value.to_bytes(size, "little", signed=True))


class LeafNumber(int):
    """The number of a leaf in a packed tree, which distinguishes it from a plain int."""


class TupleMark:
    """The first item of a list that stands for a tuple in a packed tree."""


_TUPLE_MARK = TupleMark()


def ext_hook(code: int, payload: bytes) -> object:
    """Read one extension value for msgpack; raise ValueError unless it is one of the three of this format."""
    if code == EXT_LEAF and len(payload) == 4:
        return LeafNumber.from_bytes(payload, "little")
    if code == EXT_INT and 0 < len(payload) <= MAX_INT_BYTES:
        return int.from_bytes(payload, "little", signed=True)
    if code == EXT_TUPLE and not payload:
        return _TUPLE_MARK
    raise ValueError(f"extension type {code} with {len(payload)} bytes")


def pairs_hook(pairs: list[tuple[object, object]]) -> dict[object, object]:
    """Make a dictionary for msgpack; raise ValueError unless its keys are distinct and each is a str or an int."""
    for key, _ in pairs:
        if type(key) is not str and type(key) is not int:
            raise ValueError(f"a key of type {type(key).__name__}")
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key that occurs twice")
    return result


def check_packed(value: object, leaf_count: int, max_depth: int, depth: int = 0) -> None:
    """Raise WireError unless `value`, as msgpack has read it, is a packed tree over `leaf_count` leaves."""
    kind = type(value)
    if kind is dict or kind is list:
        if depth >= max_depth:
            raise WireError(f"containers are nested deeper than {max_depth} levels")
        items: Any = value.values() if kind is dict else value  # type: ignore[attr-defined] # see `kind`
        for position, item in enumerate(items):
            if type(item) is TupleMark:
                if kind is dict or position:
                    raise WireError("a tuple's mark in the wrong place")
            else:
                check_packed(item, leaf_count, max_depth, depth + 1)
    elif kind is LeafNumber:
        if value >= leaf_count:  # type: ignore[operator]
            raise WireError(f"leaf {value} of {leaf_count}")
    elif value is not None and kind not in _PLAIN:
        raise WireError(f"a value of type {kind.__name__} in the tree")


def unpack(value: Any, leaves: Sequence[object]) -> Any:
    """Return the tree for a packed tree that was checked, with `leaves` in their places."""
    kind = type(value)
    if kind is LeafNumber:
        return leaves[value]
    if kind is dict:
        return {key: unpack(item, leaves) for key, item in value.items()}
    if kind is list:
        if value and type(value[0]) is TupleMark:
            return tuple([unpack(item, leaves) for item in value[1:]])
        return [unpack(item, leaves) for item in value]
    return value
