"""Headers of images and deltas as a hostile peer could write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hostile_messages import forge

from rlbroker.codec.format import StoredSegment
from rlbroker.codec.image import ImageFormat
from rlbroker.codec.limits import Limits
from rlbroker.codec.message import MessageAssembly
from rlbroker.errors import WireError

pytestmark = pytest.mark.unit

LIMITS = Limits(max_raw_bytes=1 << 20)
EMPTY = xxhash.xxh3_64_intdigest(b"")


def header(leaves: list[Any], lanes: list[Any]) -> bytes:
    return forge({"tree": None, "leaves": leaves, "lanes": lanes}, b"")


def one_segment(row: list[Any]) -> bytes:
    """Return a header, without a body, of one leaf of 100 bytes, whose segment has the description `row`."""
    message = bytearray(header([["array", "|u1", [100]]], [[1, [0], [row]]]))
    stored = row[2] if len(row) > 2 and type(row[2]) is int else 0
    message[12:20] = max(stored, 0).to_bytes(8, "little")
    return bytes(message)


@pytest.mark.parametrize(
    "row",
    [
        [0, 100, 100, 1],
        [1, 100, 50, 1],
        [2, 100, 0, EMPTY, 5, 5],
        [3, 100, 32, 1, 5, 6],
        [4, 100, 14, 1, 5, 6],
    ],
    ids=str,
)
def test_a_valid_segment_row_of_each_codec_is_read(row: list[int]) -> None:
    image_format = ImageFormat(one_segment(row), LIMITS)
    assert list(image_format.segments) == [StoredSegment(*row)]
    assert image_format.is_delta == (row[0] >= 2)


@pytest.mark.parametrize(
    "row",
    [
        [2, 100, 0, EMPTY],
        [3, 100, 32, 1],
        [4, 100, 14, 1, 5],
        [0, 100, 100, 1, 0, 0],
        [1, 100, 50, 1, 5, 6],
        [2, 100, 0, EMPTY, 5, 6],
        [2, 100, 1, EMPTY, 5, 5],
        [3, 100, 31, 1, 5, 6],
        [3, 100, 100, 1, 5, 6],
        [4, 100, 13, 1, 5, 6],
        [4, 100, 100, 1, 5, 6],
        [4, 100, -1, 1, 5, 6],
        [4, 100, 14, 1, -5, 6],
        [4, 100, 14, 1, 5, 1.5],
        [4, 100, 14, 1, 5, None],
        [4, 100, 14, 1, True, 6],
        [5, 100, 50, 1, 5, 6],
        [-1, 100, 50, 1, 5, 6],
        [4, 100, 14, 1, 5, 6, 7],
    ],
    ids=str,
)
def test_an_impossible_segment_row_is_refused(row: list[Any]) -> None:
    for read in (ImageFormat, MessageAssembly):
        with pytest.raises(WireError):
            read(one_segment(row), LIMITS)


@pytest.mark.parametrize(
    "row",
    [
        ["tensor", "bfloat16", [0], "float32"],
        ["tensor", "float32", [0], "float64"],
        ["tensor", "float8_e5m2", [0], "bfloat16"],
        ["array", "bfloat16", [0], ">f4"],
        ["array", "<f2", [0], "<f8"],
    ],
    ids=str,
)
def test_a_leaf_that_was_cast_is_read(row: list[Any]) -> None:
    lanes = [[2, [0], []]]
    for original in ({"keep_dtype": False}, {"keep_dtype": True}):
        ImageFormat(header([row], lanes), LIMITS).tree(np.zeros(0, np.uint8), **original)


@pytest.mark.parametrize(
    "row",
    [
        ["tensor", "bfloat16", [0], "int32"],
        ["tensor", "bfloat16", [0], "float16"],
        ["tensor", "bfloat16", [0], "bfloat16"],
        ["tensor", "bfloat16", [0], "complex64"],
        ["tensor", "bfloat16", [0], "<f4"],
        ["tensor", "float64", [0], "float64"],
        ["tensor", "int16", [0], "float32"],
        ["tensor", "bfloat16", [0], None],
        ["tensor", "bfloat16", [0], 4],
        ["tensor", "bfloat16", [0], ["float32"]],
        ["tensor", "bfloat16", [0], "float32", "float32"],
        ["array", "bfloat16", [0], "<i4"],
        ["array", "bfloat16", [0], "bfloat16"],
        ["array", "float8_e5m2", [0], "<f4"],
        ["array", "float8_e5m2", [0], "bfloat16"],
        ["array", "int4", [0]],
        ["array", "bfloat16", [0], "<f2"],
        ["array", "bfloat16", [0], "<c8"],
        ["array", ">f2", [0], "<f4"],
        ["array", "<f2", [0], "float32"],
        ["scalar", "bfloat16", [], "<f4"],
        ["scalar", "<f2", [], "<f4"],
        ["bytes", "|u1", [0], "<f4"],
        ["array", "bfloat16", [0, 1 << 60], "<f8"],
    ],
    ids=str,
)
def test_a_leaf_that_cannot_have_been_cast_is_refused(row: list[Any]) -> None:
    for read in (ImageFormat, MessageAssembly):
        with pytest.raises(WireError):
            read(header([row], [[2, [0], []]]), LIMITS)


@pytest.mark.parametrize("kind", [("tensor", "float32"), ("array", "<f4")])
@pytest.mark.parametrize("shape", [[0, 1 << 58], [1 << 58, 0], [1 << 30, 0, 1 << 28]], ids=str)
def test_empty_leaves_of_vast_shapes_take_no_memory(kind: tuple[str, str], shape: list[int]) -> None:
    image_format = ImageFormat(header([[*kind, shape]], [[4, [0], []]]), LIMITS)
    assert image_format.image_bytes == 0
    image_format.tree(np.zeros(0, np.uint8))
    cast = "bfloat16", "<f8" if kind[0] == "array" else "float64"
    image_format = ImageFormat(header([[kind[0], cast[0], shape, cast[1]]], [[2, [0], []]]), LIMITS)
    image_format.tree(np.zeros(0, np.uint8))


def test_many_small_lanes_take_little_memory() -> None:
    rows = [["array", "|u1", [1]]] * 10_000
    raw = b"\0" * 10_000
    digest = xxhash.xxh3_64_intdigest(b"\0")
    lanes = [[1, [i], [[0, 1, 1, digest]]] for i in range(10_000)]
    message = forge({"tree": None, "leaves": rows, "lanes": lanes}, raw)
    image_format = ImageFormat(message[: -len(raw)], LIMITS)
    assert image_format.image_bytes == 64 * 10_000


def test_the_size_after_casting_back_is_bounded() -> None:
    shape = [1 << 18]
    segment = [0, 1 << 18, 1 << 18, 0]
    for original, fits in (("float32", True), ("float64", False)):
        rows = [["tensor", "float8_e5m2", shape, original]]
        message = bytearray(header(rows, [[1, [0], [segment]]]))
        message[12:20] = (1 << 18).to_bytes(8, "little")
        if fits:
            ImageFormat(bytes(message), LIMITS)
        else:
            with pytest.raises(WireError, match="cast back"):
                ImageFormat(bytes(message), LIMITS)
    assert torch.float8_e5m2.itemsize == 1
