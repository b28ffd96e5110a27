"""Attacks that random mutation would hardly find; each is refused before anything large is allocated."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
import xxhash
from hostile_messages import (
    PRELUDE,
    change_header,
    forge,
    is_decodable,
    read_header_map,
    samples,
    seal,
    split_message,
)

from rlbroker.codec import compression
from rlbroker.codec.limits import Limits
from rlbroker.codec.message import decode, encode
from rlbroker.errors import IncompatibleFormat, WireError

pytestmark = pytest.mark.unit

ZEROS = encode({"x": np.zeros(10_000, np.float32)})
SMALL = encode({"x": np.arange(4), "y": np.arange(3)})


#: Any reason but damage: an attack must be refused for its content, not for a digest that does not match.
NOT_DAMAGE = r"^(?!the digest of segment)"


def refuse(data: bytes, match: str = NOT_DAMAGE, limits: Limits | None = None) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=match):
            decode(data, limits=limits or Limits())
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 300_000 + 20 * len(data)


def header(leaves: list[Any], lanes: list[Any], tree: object = None) -> bytes:
    return forge({"tree": tree, "leaves": leaves, "lanes": lanes})


def zeros_chunk(raw_bytes: int, flags: int = 0x10) -> bytes:
    start = struct.pack("<BBBBiii", 5, 1, 0x85, 4, raw_bytes, min(raw_bytes, 4096), 32)
    return start + bytes([1, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, flags])


def one_chunk(raw_bytes: int, chunk: bytes, limits: Limits | None = None) -> Any:
    digest = xxhash.xxh3_64_intdigest(chunk)
    header_map = {
        "tree": msgpack.ExtType(1, bytes(4)),
        "leaves": [["array", "|u1", [raw_bytes]]],
        "lanes": [[4, [0], [[1, raw_bytes, len(chunk), digest]]]],
    }
    return decode(forge(header_map, chunk), limits=limits or Limits())


def test_another_format_version_is_refused_by_its_number() -> None:
    with pytest.raises(IncompatibleFormat, match="format version 2; this release reads 1"):
        decode(SMALL[:4] + b"\2\0" + SMALL[6:])


@pytest.mark.parametrize(
    ("start", "match"),
    [
        (PRELUDE.pack(b"RLBW", 1, 0, 0xFFFFFFFF, 0, 0), "arrived as"),
        (PRELUDE.pack(b"RLBW", 1, 0, 4, (1 << 64) - 1, 0), "arrived as"),
        (PRELUDE.pack(b"RLBW", 1, 1, 0, 0, 0), "reserved"),
        (PRELUDE.pack(b"PK\3\4", 1, 0, 0, 0, 0), "first four bytes"),
        (PRELUDE.pack(b"RLBW", 1, 0, 0, 0, 0), "header is empty"),
        (b"", "too short"),
    ],
)
def test_an_inconsistent_prelude_is_refused(start: bytes, match: str) -> None:
    refuse(start, match)


def test_a_header_beyond_its_limit_is_refused_before_it_is_read() -> None:
    refuse(seal(b"\xc0" * 1001), "the limit is 1000", Limits(max_header_bytes=1000))


@pytest.mark.parametrize(
    "packed",
    [
        (b"\xdd" + struct.pack(">I", 1 << 24)) * 1000,  # nested arrays that all claim to be long
        (b"\xdd" + struct.pack(">I", 4900)) * 1000,  # each claim alone would fit into the header
        (b"\xdf" + struct.pack(">I", 1 << 31)) * 1000,
        b"\x91" * 5000 + b"\xc0",  # deeper than any parser's stack
        b"\x81\xa1a" * 900 + b"\xc0",
        b"\xdb" + struct.pack(">I", 1 << 31) + b"x",  # a str, bytes and extension that claim to be long
        b"\xc6" + struct.pack(">I", 1 << 31) + b"x",
        b"\xc9" + struct.pack(">I", 1 << 31) + b"\1x",
        b"\xc1",
        b"",
        b"\xc0\xc0",
    ],
    ids=lambda packed: packed[:4].hex(),
)
def test_a_header_of_unacceptable_msgpack_is_refused(packed: bytes) -> None:
    refuse(seal(packed), "not acceptable msgpack|map of tree|header is empty")


def with_tree(packed: bytes) -> bytes:
    return seal(b"\x83\xa4tree" + packed + b"\xa6leaves\x90\xa5lanes\x90")


@pytest.mark.parametrize(
    "packed",
    [
        b"\xd4\xff\0",  # a broken timestamp
        b"\xa1\xff",  # not UTF-8
        b"\x81\x90\x01",  # a key that cannot be a key
        b"\x82\xa1a\x01\xa1a\x02",  # a key twice
        b"\x81\xc3\x01",  # True as a key
        b"\xc7\x03\x01abc",  # a leaf number of three bytes
        b"\xc8\x04\x01\x02" + bytes(1025),  # an int beyond the longest
        b"\xd4\x03\0",  # a tuple's mark with a payload
        b"\xd4\x07\0",  # an unknown extension
    ],
    ids=lambda packed: packed[:4].hex(),
)
def test_a_tree_of_unacceptable_msgpack_is_refused(packed: bytes) -> None:
    assert is_decodable(with_tree(b"\x81\x01\xc0"))
    refuse(with_tree(packed), "not acceptable msgpack")


def test_nested_empty_containers_stop_at_the_depth_limit() -> None:
    for nest in (lambda x: [x], lambda x: {"a": x}, lambda x: [msgpack.ExtType(3, b""), x]):
        tree: Any = None
        for _ in range(65):
            tree = nest(tree)
        refuse(header([], [], tree), "deeper than 64")


@pytest.mark.parametrize(
    "header",
    [
        [b"leaves\x91\x93", b"\xa3<f4\x91\x01\xa5lanes\x90"],
        [b"leaves\x91\x93\xa5array", b"\x91\x01\xa5lanes\x90"],
        [b"leaves\x91\x93\xa5array\xa3<f4\x91", b"\xa5lanes\x90"],
        [b"leaves\x91\x93\xa5array\xa3<f4", b"\xa5lanes\x90"],
        [b"leaves\x90\xa5lanes\x91\x93", b"\x90\x90"],
        [b"leaves\x90\xa5lanes\x91\x93\x01\x91", b"\x90"],
        [b"leaves\x90\xa5lanes\x91\x93\x01\x90\x91", b""],
        [b"leaves\x90\xa5lanes\x91\x93\x01\x90\x91\x94", b"\x01\x01\x01"],
    ],
    ids=range(8),
)
def test_a_deep_value_where_a_number_belongs_is_refused(header: list[bytes]) -> None:
    """It is so deep that its repr alone raises RecursionError."""
    deep = b"\x91" * 1000 + b"\x90"
    refuse(seal(b"\x83\xa4tree\xc0\xa6" + deep.join(header)), r"^(?!the header is not acceptable)")


@pytest.mark.parametrize(
    "shape",
    [
        *([1 << 60], [1 << 31, 1 << 31, 1 << 31], [1 << 63], [0, 1 << 62], [0, 1 << 40, 1 << 40]),
        *([-1], [True], [1.0], [None], [1] * 65, None, {}, "1"),
    ],
    ids=str,
)
def test_an_impossible_shape_is_refused(shape: Any) -> None:
    raw = 1
    if isinstance(shape, list) and all(type(n) is int for n in shape):
        for dimension in shape:
            raw *= dimension
    lanes = [[4, [0], [[0, raw, raw, 0]] if raw and abs(raw) < 1 << 63 else []]]
    refuse(header([["array", "<f4", shape]], lanes))


def test_arrays_beyond_the_limit_are_refused_before_they_are_allocated() -> None:
    chunk = zeros_chunk(1 << 30)
    one = [1, 1 << 30, len(chunk), xxhash.xxh3_64_intdigest(chunk)]
    leaves = [["array", "|u1", [4 << 30]]]
    refuse(forge({"tree": None, "leaves": leaves, "lanes": [[4, [0], [one] * 4]]}, chunk * 4), "more than")
    with pytest.raises(WireError, match="more than 39999 bytes"):
        decode(ZEROS, limits=Limits(max_raw_bytes=39_999))
    assert is_decodable(ZEROS, Limits(max_raw_bytes=40_000))


def test_a_failed_allocation_is_a_wire_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("rlbroker.codec.message.np.empty", empty)
    with pytest.raises(WireError, match="no memory for 40000 bytes"):
        decode(ZEROS)


def test_more_leaves_than_the_limit_are_refused() -> None:
    leaves = [["array", "<f4", [0]]] * 11
    lanes = [[4, list(range(11)), []]]
    assert is_decodable(header(leaves, lanes), Limits(max_leaves=11))
    refuse(header(leaves, lanes), "longer than 10", Limits(max_leaves=10))


@pytest.mark.parametrize(
    "row",
    [
        ["array", "|O", [1]],
        ["array", "<U1", [1]],
        ["array", "<f16", [1]],
        ["array", "float32", [1]],
        ["tensor", "<f4", [1]],
        ["tensor", "qint8", [1]],
        ["tensor", "load", [1]],
        ["scalar", "<f4", [1]],
        ["bytes", "<f4", [1]],
        ["bytes", "|u1", []],
        ["pickle", "<f4", [1]],
        ["array", "<f4"],
        ["array", "<f4", [1], 0],
        ["array", "int4", [1]],
        ["array", "float8_e5m2", [1], "<f4"],
        ["bytes", "float8_e5m2", [1]],
        "array",
        None,
        ["array", 1, [1]],
        [1, "<f4", [1]],
    ],
    ids=str,
)
def test_a_leaf_of_unknown_kind_or_dtype_is_refused(row: Any) -> None:
    raw = 16 if "<f16" in str(row) else 4
    refuse(header([row], [[1, [0], [[0, raw, raw, 0]]]]), "leaf|row")


Change = Callable[[Any], None]


def assign(path: list[Any], value: Any) -> Change:
    def change(header_map: Any) -> None:
        for key in path[:-1]:
            header_map = header_map[key]
        header_map[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["lanes", 0, 1], [0, 0]),
        (["lanes", 0, 1], [0]),
        (["lanes", 0, 1], []),
        (["lanes", 0, 1], [0, 2]),
        (["lanes", 0, 1], [0, -1]),
        (["lanes", 0, 1], [0, True]),
        (["lanes", 0, 1], None),
        (["lanes", 0, 0], 0),
        (["lanes", 0, 0], 256),
        (["lanes", 0, 2], []),
        (["lanes", 0, 2, 0, 0], 2),
        (["lanes", 0, 2, 0, 0], 1),
        (["lanes", 0, 2, 0, 0], False),
        (["lanes", 0, 2, 0, 1], 0),
        (["lanes", 0, 2, 0, 1], 57),
        (["lanes", 0, 2, 0, 1], -56),
        (["lanes", 0, 2, 0, 2], 55),
        (["lanes", 0, 2, 0, 3], -1),
        (["lanes", 0, 2], [[0, 28, 28, 0], [0, 28, 28, 0]]),
        (["lanes"], []),
        (["lanes"], None),
        (["leaves"], None),
        (["leaves"], []),
        (["tree"], msgpack.ExtType(1, b"\2\0\0\0")),
        (["tree"], msgpack.ExtType(3, b"")),
        (["tree"], [1, msgpack.ExtType(3, b"")]),
        (["tree"], {"a": msgpack.ExtType(3, b"")}),
        (["tree"], msgpack.Timestamp(1, 1)),
        (["extra"], 1),
    ],
    ids=str,
)
def test_a_header_that_contradicts_itself_is_refused(path: list[Any], value: Any) -> None:
    assert read_header_map(SMALL)["lanes"][0][1] == [0, 1]
    refuse(change_header(SMALL, assign(path, value)))


def test_a_wrong_digest_is_refused() -> None:
    refuse(change_header(SMALL, assign(["lanes", 0, 2, 0, 3], 1 << 63)), "digest of segment 0")


def test_a_leaf_in_no_lane_is_refused() -> None:
    """It would expose uninitialised memory."""
    refuse(header([["array", "<f4", [4]]], []), "in no lane")


def test_a_leaf_in_two_lanes_is_refused() -> None:
    """Otherwise one small header could make a reader fill the same memory many times."""
    lane = [4, [0], [[0, 16, 16, xxhash.xxh3_64_intdigest(bytes(16))]]]
    leaves = [["array", "<f4", [4]]]
    assert is_decodable(forge({"tree": None, "leaves": leaves, "lanes": [lane]}, bytes(16)))
    refuse(forge({"tree": None, "leaves": leaves, "lanes": [lane, lane]}, bytes(32)), "has a lane already")


def test_the_body_length_must_be_the_sum_of_the_segments() -> None:
    packed, body = split_message(SMALL)
    refuse(seal(packed, body + b"x"), "the segments have")
    refuse(seal(packed, body[:-1]), "the segments have")


def test_a_chunk_of_zeros_is_read() -> None:
    assert not one_chunk(4000, zeros_chunk(4000)).any()


@pytest.mark.parametrize(
    ("position", "value"),
    [
        *((0, 2), (0, 6), (1, 2)),  # versions
        *((2, 0x87), (2, 0x07), (2, 0x05), (2, 0x25), (2, 0xC5), (2, 0x8D)),  # flags and codec
        *((3, 1), (3, 0)),  # element size
        *((7, 1), (11, 0x80), (11, 0x7F), (12, 33)),  # sizes
        *((16, 0), (16, 2), (16, 3), (17, 1), (21, 160)),  # filters
        *((22, 0), (22, 32), (23, 1), (24, 1), (30, 1)),  # codec and parameters
        *((31, 0x20), (31, 0x30), (31, 0x40), (31, 0x01), (31, 0x08), (31, 0x90)),  # special values, and more
    ],
)
def test_a_chunk_that_this_format_does_not_write_never_reaches_blosc2(
    monkeypatch: pytest.MonkeyPatch, position: int, value: int
) -> None:
    """Such as the "uninitialised" chunk, which would expose old memory, and one that overruns the output buffer."""
    monkeypatch.setattr("blosc2.decompress2", None)
    chunk = bytearray(zeros_chunk(4000))
    chunk[position] = value
    with pytest.raises(WireError, match="not acceptable"):
        one_chunk(4000, bytes(chunk))


@pytest.mark.parametrize("position", [17, 21, 22, 30])
def test_a_chunk_of_bytes_may_lack_the_filter_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    chunk = bytearray(compression.compress(memoryview(bytes(4000)), 1)[1])
    assert chunk[16] == 0
    out = np.ones(4000, np.uint8)
    compression.decompress_chunk(memoryview(bytes(chunk)), 1, out.data)
    assert not out.any()
    monkeypatch.setattr("blosc2.decompress2", None)
    chunk[position] += 1
    with pytest.raises(WireError, match="not acceptable"):
        compression.decompress_chunk(memoryview(bytes(chunk)), 1, out.data)


def test_a_chunk_that_is_too_short_is_refused() -> None:
    with pytest.raises(WireError, match="impossible"):
        one_chunk(4000, zeros_chunk(4000)[:31])


@pytest.mark.parametrize("name", sorted(samples()))
def test_a_decoded_message_is_encoded_to_the_same_bytes(name: str) -> None:
    """A tree has one encoding only."""
    message = encode(samples()[name])
    assert encode(decode(message)) == message
