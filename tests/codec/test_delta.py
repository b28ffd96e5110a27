"""Differences between two states of one segment: bit-exact, small, and checked before they are applied."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlbroker.codec import compression, delta
from rlbroker.codec.format import DENSE, SAME, SPARSE, StoredSegment, digest_of
from rlbroker.errors import WireError

pytestmark = pytest.mark.unit

Bytes = NDArray[np.uint8]
HEAD = struct.Struct("<III")
#: The word size of a segment, by element size.
WORDS = {1: 1, 2: 2, 3: 1, 4: 4, 8: 8, 16: 8, 32: 1}


def describe_segment(
    codec: int, stored: bytes | bytearray | memoryview, base: Bytes, new: Bytes
) -> StoredSegment:
    digests = digest_of(stored), digest_of(base.data), digest_of(new.data)
    return StoredSegment(codec, len(new), len(stored), *digests)


def apply_both_ways(base: Bytes, new: Bytes, typesize: int) -> tuple[int, int]:
    """Encode, apply to a copy and in place, compare; return (codec, stored size)."""
    codec, stored = delta.encode(new, base, typesize)
    if codec < SAME:
        assert len(stored) <= len(new)
        return codec, len(stored)
    assert len(stored) < len(new)
    segment = describe_segment(codec, stored, base, new)
    kept = base.copy()
    out = np.full(len(base), 0xAA, np.uint8)
    delta.apply(segment, memoryview(stored), typesize, base, out)
    assert (out == new).all()
    assert (base == kept).all()
    delta.apply(segment, memoryview(stored), typesize, kept, kept)
    assert (kept == new).all()
    return codec, len(stored)


def noise(size: int, seed: int = 0) -> Bytes:
    return np.frombuffer(np.random.default_rng(seed).bytes(size), np.uint8).copy()


def change_words(base: Bytes, word: int, part: float, step: int, seed: int = 1) -> Bytes:
    """Return a copy in which this part of the words is larger or smaller by `step`."""
    rng = np.random.default_rng(seed)
    new = base.copy()
    words = new.view(f"<u{word}")
    at = np.flatnonzero(rng.random(len(words)) < part)
    words[at] += rng.choice([-step, step], len(at)).astype(f"<i{word}").view(words.dtype)
    return new


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(WORDS)),
    st.integers(1, 700) | st.integers(30_000, 40_000),
    st.sampled_from([0, 0.001, 0.01, 0.1, 0.3, 0.45, 1]),
    st.sampled_from([1, 100]),
    st.integers(0, 1 << 32),
)
def test_any_change_is_restored(typesize: int, elements: int, part: float, step: int, seed: int) -> None:
    base = noise(elements * typesize, seed)
    apply_both_ways(base, change_words(base, WORDS[typesize], part, step, seed), typesize)


@settings(max_examples=100, deadline=None)
@given(
    st.binary(min_size=1, max_size=300), st.binary(min_size=300, max_size=300), st.sampled_from([1, 2, 4, 8])
)
def test_segments_of_incomplete_words_are_restored(before: bytes, after: bytes, typesize: int) -> None:
    base = np.frombuffer(before, np.uint8)
    apply_both_ways(base, np.frombuffer(after[: len(before)], np.uint8), typesize)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 65_535, 65_536])
def test_gaps_of_any_length_are_encoded(gap: int) -> None:
    base = noise(200_000)
    for places in ((gap,), (0, gap + 1), (gap, 2 * gap + 1), (199_999 - gap, 199_999)):
        new = base.copy()
        new[list(places)] += 1
        assert apply_both_ways(base, new, 1)[0] == SPARSE


def test_unaligned_memory_is_supported() -> None:
    buffer = noise(100_001)
    base = buffer[1:]
    new = np.empty(100_001, np.uint8)[1:]
    new[:] = change_words(base.copy(), 4, 0.02, 1)
    assert apply_both_ways(base, new, 4)[0] == SPARSE
    new[:] = change_words(base.copy(), 4, 0.9, 1)
    assert apply_both_ways(base, new, 4)[0] == DENSE


def bfloat16(size: int) -> Bytes:
    values = np.random.default_rng(0).standard_normal(size // 2).astype(np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> np.uint32(16)).astype("<u2").view(np.uint8)


@pytest.mark.parametrize(("part", "ratio"), [(0.01, 130), (0.03, 55), (0.1, 22), (0.3, 10)])
def test_few_small_steps_of_bfloat16_take_few_bytes(part: float, ratio: float) -> None:
    base = bfloat16(4 << 20)
    codec, stored_bytes = apply_both_ways(base, change_words(base, 2, part, 1), 2)
    assert codec == SPARSE
    assert len(base) / stored_bytes >= ratio


@pytest.mark.parametrize(("rate", "ratio"), [(3e-6, 2.2), (3e-4, 1.5)])
def test_steps_of_adam_in_float32_are_smaller_than_the_weights(rate: float, ratio: float) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(1 << 20).astype(np.float32) * np.float32(0.02)
    step = rng.standard_normal(1 << 20) / (np.abs(rng.standard_normal(1 << 20)) + 1)
    new = (base - rate * step).astype(np.float32)
    codec, stored_bytes = apply_both_ways(base.view(np.uint8), new.view(np.uint8), 4)
    assert codec == DENSE
    assert base.nbytes / stored_bytes >= ratio


def test_the_smallest_encoding_is_stored() -> None:
    size = 300_000
    base = noise(size)
    assert apply_both_ways(base, base.copy(), 4) == (SAME, 0)
    assert apply_both_ways(base, noise(size, 7), 4) == (compression.RAW, size)
    assert apply_both_ways(base, np.zeros(size, np.uint8), 4)[0] == compression.BLOSC2
    assert apply_both_ways(np.arange(size // 4, dtype="<u4").view(np.uint8), base, 4)[0] == compression.RAW


def test_small_segments_are_stored_as_deltas_too() -> None:
    base = noise(64)
    new = base.copy()
    new[5] += 1
    assert apply_both_ways(base, new, 1) == (SPARSE, HEAD.size + 2)
    assert apply_both_ways(base[:8], new[:8], 1)[0] == compression.RAW


def small_deltas() -> Iterator[tuple[int, bytes, int, Bytes, Bytes]]:
    """Yield (codec, stored bytes, element size, base, new) of small segments of each codec."""
    for size, typesize, part, codec in (
        (3000, 1, 0.01, SPARSE),
        (60_000, 2, 0.05, SPARSE),
        (4000, 4, 0.2, SPARSE),
        (6000, 4, 1.0, DENSE),
        (6000, 2, 0.6, DENSE),
    ):
        base = noise(size)
        new = change_words(base, typesize, part, 1)
        found, stored = delta.encode(new, base, typesize)
        assert found == codec
        yield codec, bytes(stored), typesize, base, new


@pytest.mark.parametrize("case", range(5))
def test_no_damage_to_stored_bytes_goes_unnoticed(case: int) -> None:
    """The digest of the damaged bytes is correct, as an attacker would make it."""
    codec, stored, typesize, base, new = list(small_deltas())[case]
    out = np.zeros(len(base), np.uint8)

    def refused(damaged: bytes | bytearray) -> bool:
        try:
            delta.apply(describe_segment(codec, damaged, base, new), memoryview(damaged), typesize, base, out)
        except WireError:
            return True
        # The same content in another encoding, such as in the padding of a compressed part.
        return bool((out == new).all())

    assert refused(stored)
    damaged = bytearray(stored)
    for position in range(0, len(stored), max(len(stored) // 300, 1)):
        assert refused(stored[:position])
        for flip in (0x01, 0x80, 0xFF):
            damaged[position] ^= flip
            assert refused(damaged)
            damaged[position] ^= flip
    assert refused(stored + b"\0")
    assert refused(stored + stored)


def sparse(changes: int, gaps: bytes, differences: bytes, gap_bytes: int | None = None) -> bytes:
    claimed = len(gaps) if gap_bytes is None else gap_bytes
    return HEAD.pack(changes, claimed, len(gaps)) + gaps + differences


def chunk_of_zeros(raw_bytes: int) -> bytes:
    sizes = struct.pack("<iii", raw_bytes, raw_bytes, 32)
    return b"\x05\x01\x85\x01" + sizes + b"\x01\0\0\0\0\0\x05" + bytes(8) + b"\x10"


BOMB = chunk_of_zeros(1 << 20)


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"\0" * 11,
        sparse(0, b"", b""),
        sparse(1, b"\x64", b"\x81"),  # a position beyond the end
        sparse(2, b"\x63\0", b"\x81\x81"),
        sparse(2, b"\0\x63", b"\x81\x81"),
        sparse(1, b"\xff", b"\x81"),  # an escape without a change after it
        sparse(1, b"\xff\0", b"\x81"),
        sparse(1, b"\0\0", b"\x81"),  # more positions than changes
        sparse(3, b"\0\0", b"\x81" * 3),  # and fewer
        sparse(101, bytes(101), b"\x81" * 101),
        sparse((1 << 32) - 1, b"\0", b"\x81", gap_bytes=(1 << 32) - 1),
        sparse(1, b"\0", b"\x81", gap_bytes=1 << 20),
        sparse(2, b"\0\0", b"\x81"),
        sparse(1, b"\0", b"\x81\x81"),
        sparse(1, b"\0", b""),
        HEAD.pack(1, 1, 90) + b"\0\x81",
        sparse(80, BOMB, b"\x81" * 80, gap_bytes=80),
        sparse(80, bytes(80), BOMB),
        sparse(1, BOMB, b"\x81", gap_bytes=1 << 20),
        sparse(1 << 20, b"\0", BOMB, gap_bytes=1 << 20),
        sparse(20, chunk_of_zeros(20), b"\x81" * 20, gap_bytes=20),  # longer than its raw bytes
        sparse(20, bytes(20), chunk_of_zeros(20)),
    ],
)
def test_impossible_sparse_segments_are_refused_before_anything_is_written(stored: bytes) -> None:
    base = noise(100)
    out = np.full(100, 7, np.uint8)
    tracemalloc.start()
    with pytest.raises(WireError):
        delta.apply_unchecked(SPARSE, memoryview(stored), 1, base, out)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (out == 7).all()
    assert peak_bytes < 100_000


def test_gaps_that_end_without_a_change_are_refused() -> None:
    base = noise(1000)
    for gaps, fits in ((b"\xff\0", True), (b"\0\xff", False), (b"\xff\0\xff", False)):
        stored = memoryview(sparse(1, gaps, b"\x81"))
        if fits:
            delta.apply_unchecked(SPARSE, stored, 1, base, base)
        else:
            with pytest.raises(WireError, match="gaps"):
                delta.apply_unchecked(SPARSE, stored, 1, base, base)


@pytest.mark.parametrize("stored", [b"", bytes(40), BOMB])
def test_impossible_dense_segments_are_refused_before_anything_is_written(stored: bytes) -> None:
    base = noise(100)
    out = np.full(100, 7, np.uint8)
    with pytest.raises(WireError):
        delta.apply_unchecked(DENSE, memoryview(stored), 1, base, out)
    assert (out == 7).all()


@pytest.mark.parametrize("case", range(5))
def test_another_base_is_refused_before_anything_is_written(case: int) -> None:
    codec, stored, typesize, base, new = list(small_deltas())[case]
    segment = describe_segment(codec, stored, base, new)
    out = np.full(len(base), 7, np.uint8)
    for wrong in (new, base[:-1], base[: len(base) // 2]):
        with pytest.raises(WireError, match="base"):
            delta.apply(segment, memoryview(stored), typesize, wrong, out)
    assert (out == 7).all()
    with pytest.raises(WireError, match="announced"):
        delta.apply(segment._replace(raw_digest=1), memoryview(stored), typesize, base, out)
