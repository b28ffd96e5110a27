"""MessagePlan and MessageAssembly: segments in any order, from any thread."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from codec_trees import any_tree, array_of, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbroker.codec import compression
from rlbroker.codec.format import read_header
from rlbroker.codec.limits import Limits
from rlbroker.codec.message import MessageAssembly, MessagePlan, decode, encode
from rlbroker.errors import WireError

pytestmark = pytest.mark.unit


def encoded(plan: MessagePlan) -> tuple[bytes, list[bytes]]:
    parts = [plan.encode_segment(i) for i in range(plan.segment_count)]
    return plan.header([segment for segment, _ in parts]), [bytes(stored) for _, stored in parts]


def weights() -> dict[str, Any]:
    tree: dict[str, Any] = {f"layer{i}": torch.randn(100 + i, 333) * 0.02 for i in range(6)}
    tree |= {f"bias{i}": torch.randn(i + 1) for i in range(20)}
    tree |= {"half": torch.randn(50_000).bfloat16(), "steps": np.arange(40_000), "frames": bytes(200_000)}
    return tree | {"noise": array_of("<f8", (30_000,), 1), "mask": torch.rand(150_000) < 0.5}


@settings(max_examples=60, deadline=None)
@given(any_tree, st.integers(1, 200), st.randoms(use_true_random=False))
def test_any_segment_size_and_any_order_give_the_same_tree(
    tree: Any, segment_bytes: int, order: random.Random
) -> None:
    header, stored = encoded(MessagePlan(tree, segment_bytes=segment_bytes))
    assembly = MessageAssembly(header)
    for index in order.sample(range(len(stored)), len(stored)):
        assembly.decode_segment(index, stored[index])
    assert_same(assembly.tree(), tree)


@pytest.mark.parametrize("compression", [True, False])
@pytest.mark.parametrize("segment_bytes", [10_000, 100_001, 4 << 20])
def test_threads_may_encode_and_decode_segments_together(segment_bytes: int, compression: bool) -> None:
    tree = weights()
    plan = MessagePlan(tree, compression=compression, segment_bytes=segment_bytes)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(plan.encode_segment, range(plan.segment_count)))
        assembly = MessageAssembly(plan.header([segment for segment, _ in parts]))
        list(pool.map(assembly.decode_segment, range(len(parts)), [stored for _, stored in parts]))
    assert_same(assembly.tree(), tree)


def test_segments_keep_to_their_size_and_to_whole_elements() -> None:
    plan = MessagePlan(weights(), segment_bytes=10_001)
    sizes = [plan.encode_segment(i)[0].raw_bytes for i in range(plan.segment_count)]
    assert max(sizes) <= 10_001
    assert sum(sizes) == plan.raw_bytes == MessageAssembly(encoded(plan)[0]).raw_bytes
    assert 10_000 in sizes


def test_a_lane_of_small_leaves_keeps_to_the_segment_size() -> None:
    plan = MessagePlan([np.full(100, i) for i in range(60)], segment_bytes=10_000)
    assert [plan.encode_segment(i)[0].raw_bytes for i in range(plan.segment_count)] == [9600] * 5


def test_an_element_larger_than_a_segment_is_not_cut() -> None:
    plan = MessagePlan(np.ones(9, np.complex128), segment_bytes=1)
    assert [plan.encode_segment(i)[0].raw_bytes for i in range(plan.segment_count)] == [16] * 9


def test_the_header_has_size_and_digest_of_each_segment() -> None:
    plan = MessagePlan(weights())
    parts = [plan.encode_segment(i) for i in range(plan.segment_count)]
    assembly = MessageAssembly(plan.header([segment for segment, _ in parts]))
    assert list(assembly.segments) == [segment for segment, _ in parts]
    assert all(segment.stored_bytes == len(stored) for segment, stored in parts)
    assert {segment.codec for segment, _ in parts} == {compression.RAW, compression.BLOSC2}


def test_a_missing_segment_is_a_wire_error() -> None:
    header, stored = encoded(MessagePlan(weights()))
    assembly = MessageAssembly(header)
    for index in range(1, len(stored)):
        assembly.decode_segment(index, stored[index])
    with pytest.raises(WireError, match=f"segment 0 of {len(stored)} is missing"):
        assembly.tree()
    assembly.decode_segment(0, stored[0])
    assembly.tree()


def test_a_damaged_segment_is_refused_and_can_be_decoded_again() -> None:
    tree = weights()
    header, stored = encoded(MessagePlan(tree))
    assembly = MessageAssembly(header)
    for index, data in enumerate(stored):
        damaged = bytearray(data)
        damaged[len(data) // 2] ^= 1
        for bad, reason in (
            (damaged, "digest"),
            (data[:-1], "bytes"),
            (data + b"x", "bytes"),
            (b"", "bytes"),
        ):
            with pytest.raises(WireError, match=reason):
                assembly.decode_segment(index, bad)
        with pytest.raises(WireError, match="is missing"):
            assembly.tree()
        assembly.decode_segment(index, memoryview(data))
    assert_same(assembly.tree(), tree)


def test_a_header_alone_gives_sizes_and_codecs() -> None:
    header, stored = encoded(MessagePlan({"w": np.zeros(1_000_000)}))
    found = read_header(memoryview(header), Limits())
    assert found.raw_bytes == 8_000_000
    assert found.body_bytes == sum(map(len, stored))
    assert [segment.codec for segment in found.segments] == [compression.BLOSC2] * 2


def test_views_with_items_other_than_bytes_are_read_as_bytes() -> None:
    tree = {"x": np.arange(100_000)}
    message = encode(tree)
    padded = np.frombuffer(message, np.int8).data
    assert_same(decode(padded), tree)
