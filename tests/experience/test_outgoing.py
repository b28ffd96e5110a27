"""Packing batches: incompressible ones are seldom compressed, and a kept batch owns its memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlbroker.codec.message import MessagePlan, decode
from rlbroker.experience import outgoing
from rlbroker.experience.outgoing import INCOMPRESSIBLE_TRIES, MOST_SKIPPED, Packer, PendingBatch
from rlbroker.types import SendReceipt

pytestmark = pytest.mark.unit

NOISE = {"obs": np.random.default_rng(0).integers(0, 256, (8, 8192), np.uint8)}
ZEROS = {"obs": np.zeros((8, 8192), np.uint8)}


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each batch was compressed."""
    found: list[bool] = []

    def spy(batch: object, *, compression: bool) -> Any:
        found.append(compression)
        return MessagePlan(batch, compression=compression)

    monkeypatch.setattr(outgoing, "MessagePlan", spy)
    return found


def test_incompressible_batches_are_seldom_compressed(attempts: list[bool]) -> None:
    packer = Packer(compression=True)
    for _ in range(20 * MOST_SKIPPED):
        message = packer.pack(NOISE)
        assert message.raw_bytes <= message.stored_bytes < 1.02 * message.raw_bytes
    assert all(attempts[:INCOMPRESSIBLE_TRIES])
    assert INCOMPRESSIBLE_TRIES < sum(attempts) < INCOMPRESSIBLE_TRIES + 25


def test_batches_that_become_compressible_are_compressed(attempts: list[bool]) -> None:
    packer = Packer(compression=True)
    for _ in range(10 * MOST_SKIPPED):
        packer.pack(NOISE)
    sizes = [packer.pack(ZEROS).stored_bytes for _ in range(2 * MOST_SKIPPED)]
    first = next(number for number, size in enumerate(sizes) if size < 8192)
    assert first <= MOST_SKIPPED
    assert all(attempts[-len(sizes) + first :])


def test_batches_that_sometimes_compress_are_always_compressed(attempts: list[bool]) -> None:
    packer = Packer(compression=True)
    for _ in range(50):
        packer.pack(ZEROS)
        packer.pack(NOISE)
    assert all(attempts)


def test_without_compression_nothing_is_compressed(attempts: list[bool]) -> None:
    packer = Packer(compression=False)
    assert packer.pack(ZEROS).stored_bytes > 65536
    assert not any(attempts)


def test_a_kept_batch_does_not_change_with_the_callers_arrays() -> None:
    batch = {"obs": NOISE["obs"].copy()}
    message = Packer(compression=True).pack(batch)
    receipt = SendReceipt(0, 1, 1, 0, message.rows, message.raw_bytes, message.stored_bytes, accepted=True)
    pending = PendingBatch(1, ["data", message.pieces], receipt)
    pending.copy_message()
    batch["obs"][:] = 0
    np.testing.assert_array_equal(decode(pending.fields[-1])["obs"], NOISE["obs"])
