"""Tied leaves, ownership of memory, and copies."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

from rlbroker.codec.message import MessagePlan, decode, encode

pytestmark = pytest.mark.unit

SIZES = [5, 50_000]


def round_trip(tree: Any) -> Any:
    return decode(encode(tree))


@pytest.mark.parametrize("rows", SIZES)
def test_tied_tensors_are_stored_once_and_come_back_tied(rows: int) -> None:
    weight = torch.nn.Parameter(torch.randn(rows, 3))
    tree = {"in": weight, "out": weight.detach(), "view": weight.data[:], "copy": weight.detach().clone()}
    got = round_trip(tree)
    assert got["in"] is got["out"] is got["view"]
    assert got["copy"] is not got["in"]
    assert MessagePlan(tree).raw_bytes == 2 * weight.nbytes


@pytest.mark.parametrize("rows", SIZES)
def test_tied_arrays_are_stored_once_and_come_back_tied(rows: int) -> None:
    array = np.arange(rows * 2.0).reshape(rows, 2)
    got = round_trip([array, array[:], array.T, array[:, :1], array.view(np.int64), array.copy()])
    assert got[0] is got[1]
    assert len({id(item) for item in got}) == 5


def test_tied_strided_tensors_come_back_tied() -> None:
    base = torch.randn(6, 6)
    got = round_trip([base.t(), base.t(), base])
    assert got[0] is got[1]
    assert got[0] is not got[2]


def test_other_views_of_the_same_memory_are_not_tied() -> None:
    base = torch.zeros(8)
    got = round_trip([base, base.view(torch.int32), base.view(2, 4), base[:4], base[::2], base.numpy()])
    assert len({id(item) for item in got}) == 6


def test_empty_leaves_are_never_tied() -> None:
    empty = np.empty((0, 3))
    got = round_trip([empty, empty, torch.empty(0), torch.empty(0)])
    assert got[0] is not got[1]
    assert got[2] is not got[3]


def test_temporary_copies_do_not_look_tied() -> None:
    """A copy made while packing must not be mistaken for the next one at the same address."""
    base = torch.randn(40, 40)
    parts = [base[:, i : i + 2] for i in range(38)] + [(base * 1j)[:, i].conj() for i in range(38)]
    got = round_trip(parts)
    assert all(torch.equal(a, b) for a, b in zip(got, parts, strict=True))
    assert len({id(item) for item in got}) == len(parts)


def test_each_leaf_owns_its_memory() -> None:
    """A caller that keeps or saves one small tensor must not keep the whole batch."""
    tree = {f"t{i}": torch.full((i,), 1.0) for i in range(1, 9)} | {f"a{i}": np.ones(i) for i in range(9)}
    tree["large"] = torch.ones(100_000)
    got = round_trip(tree)
    for key, value in got.items():
        if isinstance(value, np.ndarray):
            assert value.flags.owndata, key
        else:
            assert value.untyped_storage().nbytes() == value.nbytes, key
    saved = io.BytesIO()
    torch.save(got["t3"], saved)
    assert saved.tell() < 4000


def test_a_decoded_tree_shares_no_memory_with_the_message() -> None:
    for size in (8, 100_000):
        message = bytearray(encode({"x": np.ones(size)}, compression=False))
        got = decode(message)
        message[-size * 8 :] = bytes(size * 8)
        assert got["x"].all()


def test_a_plan_does_not_copy_large_leaves() -> None:
    array = np.zeros(100_000)
    tensor = torch.zeros(100_000)
    plan = MessagePlan([array, tensor], compression=False)
    array[0] = tensor[0] = 7
    stored = [plan.encode_segment(i)[1] for i in range(2)]
    assert np.shares_memory(np.frombuffer(stored[0], np.float64), array)
    assert np.frombuffer(stored[1], np.float32)[0] == 7


@pytest.mark.parametrize("rows", SIZES)
def test_booleans_come_back_as_zero_or_one(rows: int) -> None:
    """Compiled code counts on it: other bytes make numpy and torch miscount what a mask selects."""
    odd = np.full(rows, 0xFE, np.uint8)
    odd[::2] = 0
    tree = {"array": odd.view(bool), "tensor": torch.from_numpy(odd.copy()).view(torch.bool), "n": np.ones(3)}
    got = round_trip(tree)
    assert set(got["array"].view(np.uint8).tolist()) == {0, 1}
    assert set(got["tensor"].view(torch.uint8).tolist()) == {0, 1}
    assert got["array"].sum() == rows // 2
