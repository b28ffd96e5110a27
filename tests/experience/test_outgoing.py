"""Batches as bytes: what does not get smaller is seldom tried, and what would is noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlbroker.codec.message import decode, encode_pieces
from rlbroker.experience import outgoing
from rlbroker.experience.outgoing import MOST_SKIPPED, TRIED_IN_VAIN, Packer, PendingBatch
from rlbroker.types import SendReceipt

pytestmark = pytest.mark.unit

NOISE = {"obs": np.random.default_rng(0).integers(0, 256, (8, 8192), np.uint8)}
ZEROS = {"obs": np.zeros((8, 8192), np.uint8)}


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether compressing was tried, batch by batch."""
    found: list[bool] = []

    def spy(batch: object, *, compression: bool) -> Any:
        found.append(compression)
        return encode_pieces(batch, compression=compression)

    monkeypatch.setattr(outgoing, "encode_pieces", spy)
    return found


def test_what_does_not_get_smaller_is_seldom_tried(tries: list[bool]) -> None:
    packer = Packer(compression=True)
    for _ in range(20 * MOST_SKIPPED):
        message = packer.pack(NOISE)
        assert message.raw_bytes <= message.stored_bytes < 1.02 * message.raw_bytes
    assert all(tries[:TRIED_IN_VAIN])
    assert TRIED_IN_VAIN < sum(tries) < TRIED_IN_VAIN + 25


def test_what_begins_to_get_smaller_is_noticed(tries: list[bool]) -> None:
    packer = Packer(compression=True)
    for _ in range(10 * MOST_SKIPPED):
        packer.pack(NOISE)
    sizes = [packer.pack(ZEROS).stored_bytes for _ in range(2 * MOST_SKIPPED)]
    first = next(number for number, size in enumerate(sizes) if size < 8192)
    assert first <= MOST_SKIPPED
    assert all(tries[-len(sizes) + first :])


def test_what_gets_smaller_now_and_then_is_always_tried(tries: list[bool]) -> None:
    packer = Packer(compression=True)
    for _ in range(50):
        packer.pack(ZEROS)
        packer.pack(NOISE)
    assert all(tries)


def test_without_compression_nothing_is_tried(tries: list[bool]) -> None:
    packer = Packer(compression=False)
    assert packer.pack(ZEROS).stored_bytes > 65536
    assert not any(tries)


def test_a_batch_that_is_kept_does_not_change_with_the_arrays_of_the_caller() -> None:
    batch = {"obs": NOISE["obs"].copy()}
    message = Packer(compression=True).pack(batch)
    receipt = SendReceipt(0, 1, 1, 0, message.rows, message.raw_bytes, message.stored_bytes, accepted=True)
    parcel = PendingBatch(1, ["data", message.pieces], receipt)
    parcel.copy_message()
    batch["obs"][:] = 0
    np.testing.assert_array_equal(decode(parcel.fields[-1])["obs"], NOISE["obs"])
