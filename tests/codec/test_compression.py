"""Segments compressed with blosc2, or stored raw where that is better."""

from __future__ import annotations

import threading
from typing import Any

import blosc2
import numpy as np
import pytest
from codec_trees import array_of

from rlbroker.codec import compression

pytestmark = pytest.mark.unit


def test_blosc2_releases_the_interpreter_while_it_works() -> None:
    """Otherwise a learner's threads would stand still while one of them compresses."""
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
def test_a_stored_segment_is_restored(size: int, typesize: int) -> None:
    size = max(size // typesize, 1) * typesize
    for raw in (
        bytes(size),
        b"\x01" * size,
        (b"abcdefg" * size)[:size],
        array_of("|u1", (size,), 1).tobytes(),
    ):
        codec, stored = compression.compress(memoryview(raw), typesize)
        out = np.zeros(size, np.uint8)
        compression.decompress(codec, memoryview(stored), typesize, out)
        assert out.tobytes() == raw
        if codec == compression.RAW:
            assert stored == raw
        else:
            assert len(stored) <= 0.97 * size


def test_only_a_sample_of_noise_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    compress2 = blosc2.compress2

    def count(raw: bytes | memoryview, **parameters: Any) -> Any:
        sizes.append(len(raw))
        return compress2(raw, **parameters)

    monkeypatch.setattr(blosc2, "compress2", count)
    assert compression.compress(array_of("|u1", (4 << 20,), 1).data, 4)[0] == compression.RAW
    assert 0 < sum(sizes) <= (4 << 20) / 32


def test_a_chunk_that_readers_would_refuse_is_stored_raw(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLOSC_* variables of the environment can change what blosc2 writes."""
    assert compression.compress(memoryview(bytes(10_000)), 1)[0] == compression.BLOSC2
    compress2 = blosc2.compress2

    def compress_with_lz4(raw: bytes | memoryview, **parameters: Any) -> Any:
        return compress2(raw, **(parameters | {"codec": blosc2.Codec.LZ4}))

    monkeypatch.setattr(blosc2, "compress2", compress_with_lz4)
    assert compression.compress(memoryview(bytes(10_000)), 1)[0] == compression.RAW
