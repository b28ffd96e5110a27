"""Plan and Assembly: segments in any order, from any thread."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from codec_trees import any_tree, array_of, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbroker.codec import compression
from rlbroker.codec.assembly import Assembly
from rlbroker.codec.message import decode, describe, encode
from rlbroker.codec.plan import Plan
from rlbroker.codec.plan import plan as make_plan
from rlbroker.errors import WireError

pytestmark = pytest.mark.unit


def encoded(plan: Plan) -> tuple[bytes, list[bytes]]:
    parts = [plan.encode_segment(i) for i in range(plan.segment_count)]
    return plan.header([facts for facts, _ in parts]), [bytes(stored) for _, stored in parts]


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
    header, stored = encoded(make_plan(tree, segment_bytes=segment_bytes))
    assembly = Assembly(header)
    for index in order.sample(range(len(stored)), len(stored)):
        assembly.decode_segment(index, stored[index])
    assert_same(assembly.tree(), tree)


@pytest.mark.parametrize("compression", [True, False])
@pytest.mark.parametrize("segment_bytes", [10_000, 100_001, 4 << 20])
def test_threads_may_encode_and_decode_segments_together(segment_bytes: int, compression: bool) -> None:
    tree = weights()
    plan = make_plan(tree, compression=compression, segment_bytes=segment_bytes)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(plan.encode_segment, range(plan.segment_count)))
        assembly = Assembly(plan.header([facts for facts, _ in parts]))
        list(pool.map(assembly.decode_segment, range(len(parts)), [stored for _, stored in parts]))
    assert_same(assembly.tree(), tree)


def test_segments_keep_to_their_size_and_to_whole_elements() -> None:
    plan = make_plan(weights(), segment_bytes=10_001)
    sizes = [plan.segment_raw_bytes(i) for i in range(plan.segment_count)]
    assert max(sizes) <= 10_001
    assert sum(sizes) == plan.raw_bytes == Assembly(encoded(plan)[0]).raw_bytes
    assert 10_000 in sizes


def test_small_leaves_together_keep_to_the_segment_size_too() -> None:
    plan = make_plan([np.full(100, i) for i in range(60)], segment_bytes=10_000)
    assert [plan.segment_raw_bytes(i) for i in range(plan.segment_count)] == [9600] * 5


def test_an_element_larger_than_a_segment_is_not_cut() -> None:
    plan = make_plan(np.ones(9, np.complex128), segment_bytes=1)
    assert [plan.segment_raw_bytes(i) for i in range(plan.segment_count)] == [16] * 9


def test_the_header_tells_size_and_digest_of_each_segment() -> None:
    plan = make_plan(weights())
    parts = [plan.encode_segment(i) for i in range(plan.segment_count)]
    assembly = Assembly(plan.header([facts for facts, _ in parts]))
    assert list(assembly.segments) == [facts for facts, _ in parts]
    assert all(facts.stored_bytes == len(stored) for facts, stored in parts)
    assert {facts.codec for facts, _ in parts} == {compression.RAW, compression.BLOSC2}


def test_a_missing_segment_is_a_wire_error() -> None:
    header, stored = encoded(make_plan(weights()))
    assembly = Assembly(header)
    for index in range(1, len(stored)):
        assembly.decode_segment(index, stored[index])
    with pytest.raises(WireError, match=f"segment 0 of {len(stored)} is missing"):
        assembly.tree()
    assembly.decode_segment(0, stored[0])
    assembly.tree()


def test_a_damaged_segment_is_refused_and_can_be_given_again() -> None:
    tree = weights()
    header, stored = encoded(make_plan(tree))
    assembly = Assembly(header)
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


def test_a_header_alone_can_be_described() -> None:
    header, stored = encoded(make_plan({"w": np.zeros(1_000_000)}))
    summary = describe(header)
    assert summary["raw_bytes"] == 8_000_000
    assert summary["stored_bytes"] == sum(map(len, stored))
    assert summary["segments"] == summary["compressed_segments"] == 2


def test_views_of_other_items_than_bytes_are_read_as_bytes() -> None:
    tree = {"x": np.arange(100_000)}
    message = encode(tree)
    padded = np.frombuffer(message, np.int8).data
    assert_same(decode(padded), tree)


def test_blosc2_releases_the_interpreter_while_it_works() -> None:
    """Else a learner's threads would stand still while one of them compresses."""
    raw = (np.random.default_rng(1).standard_normal(1 << 20) * 0.02).astype(np.float32)
    done = threading.Event()
    ticks: list[int] = []

    def work() -> None:
        blosc2.compress2(raw, typesize=4, clevel=9, codec=blosc2.Codec.ZSTD, nthreads=1)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.wait(0.001):
        ticks.append(1)
    thread.join()
    assert len(ticks) > 3


@pytest.mark.parametrize("typesize", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("size", [1, 2047, 2048, 5000, 100_000, 1_000_000])
def test_whatever_is_stored_is_restored(size: int, typesize: int) -> None:
    size = max(size // typesize, 1) * typesize
    for raw in (
        bytes(size),
        b"\x01" * size,
        (b"abcdefg" * size)[:size],
        array_of("|u1", (size,), 1).tobytes(),
    ):
        codec, stored = compression.compress(memoryview(raw), typesize)
        if codec == compression.RAW:
            assert stored == raw
        else:
            assert len(stored) <= 0.97 * size
            out = bytearray(size)
            compression.decompress(memoryview(stored), typesize, memoryview(out))
            assert out == raw


def test_only_a_sample_of_noise_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    chunk = compression._chunk

    def counted(raw: bytes | memoryview, typesize: int) -> bytes:
        sizes.append(len(raw))
        return chunk(raw, typesize)

    monkeypatch.setattr(compression, "_chunk", counted)
    compression.compress(array_of("|u1", (4 << 20,), 1).data, 4)
    assert sum(sizes) <= (4 << 20) / 32


def test_a_chunk_that_blosc2_would_not_read_as_ours_is_stored_raw(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLOSC_* variables of the environment can change what blosc2 writes; readers would refuse it."""
    monkeypatch.setitem(compression._PARAMETERS, "codec", blosc2.Codec.LZ4)
    assert compression.compress(memoryview(bytes(10_000)), 1)[0] == compression.RAW
