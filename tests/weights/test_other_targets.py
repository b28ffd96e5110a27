"""Targets and dtypes of other libraries: weights are loaded into them, or a refusal names what to give instead."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from rlbroker.errors import UnsupportedType, WeightsMismatch
from rlbroker.weights.loading import load

pytestmark = pytest.mark.unit

BFLOAT16 = np.array([1.5, -2.0], ml_dtypes.bfloat16)
FLOAT8 = np.array([1.5, -2.0], ml_dtypes.float8_e4m3fn)


class TensorDict(MutableMapping[str, Any]):
    """As in tensordict: it has no truth value, its length is its batch size, and it iterates over rows."""

    batch_size = (7,)

    def __init__(self, **items: Any) -> None:
        self._items = items

    def to_dict(self) -> dict[str, Any]:
        return self._items

    def __bool__(self) -> bool:
        raise RuntimeError("Converting a tensordict to boolean value is not permitted")

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("rows, not keys")

    def keys(self) -> Any:
        return self._items.keys()

    def items(self) -> Any:
        return self._items.items()

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._items[key] = value

    def __delitem__(self, key: str) -> None:
        del self._items[key]

    def update(self, other: Any) -> None:  # type: ignore[override]
        self._items.update(other)


def test_a_tensordict_is_filled_and_then_overwritten_in_place() -> None:
    empty = TensorDict()
    load({"w": torch.ones(2), "next": {"b": torch.ones(3)}}, empty)
    assert torch.equal(empty["w"], torch.ones(2))
    tensors = torch.zeros(2), torch.zeros(3)
    full = TensorDict(w=tensors[0], next=TensorDict(b=tensors[1]))
    load({"w": torch.ones(2), "next": {"b": torch.ones(3)}}, full)
    assert full["w"] is tensors[0]
    assert [tensor.tolist() for tensor in tensors] == [[1, 1], [1, 1, 1]]
    with pytest.raises(WeightsMismatch, match=r"not in the weights: next\.b"):
        load({"w": torch.zeros(2)}, full)
    assert tensors[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (BFLOAT16, np.zeros(2, np.float32)),
        (BFLOAT16, np.zeros(2, ml_dtypes.float8_e5m2)),
        (BFLOAT16, torch.zeros(2, dtype=torch.bfloat16)),
        (BFLOAT16, torch.zeros(2)),
        (FLOAT8, np.zeros(2, np.float64)),
        (FLOAT8, torch.zeros(2).to(torch.float8_e4m3fn)),
        (FLOAT8[::-1][::-1], torch.zeros(2)),
        (FLOAT8.astype(ml_dtypes.float8_e3m4), torch.zeros(2)),  # torch has no such dtype
        (np.array([1.5, -2.0]), np.zeros(2, ml_dtypes.bfloat16)),
        (torch.tensor([1.5, -2.0]).bfloat16(), np.zeros(2, ml_dtypes.bfloat16)),
        (torch.tensor([1.5, -2.0]), np.zeros(2, ml_dtypes.float8_e4m3fn)),
    ],
)
def test_floats_of_ml_dtypes_are_cast_as_all_floats_are(new: Any, old: Any) -> None:
    target, dtype = {"x": old}, old.dtype
    load({"x": new}, target)
    assert target["x"] is old
    assert old.dtype == dtype
    assert old.astype(np.float64).tolist() == [1.5, -2] if isinstance(old, np.ndarray) else True
    assert old.float().tolist() == [1.5, -2] if isinstance(old, torch.Tensor) else True


def test_bits_of_ml_dtypes_reach_torch_as_they_are() -> None:
    array = np.arange(1 << 16).astype(np.uint16).view(ml_dtypes.bfloat16)
    target = {"x": torch.zeros(1 << 16, dtype=torch.bfloat16)}
    load({"x": array}, target)
    assert target["x"].view(torch.int16).numpy().tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("new", "old", "reason"),
    [
        (BFLOAT16, np.zeros(2, np.int32), "bfloat16 .* int32 .*, which would lose values"),
        (np.array([257, 1]), np.zeros(2, ml_dtypes.bfloat16), "int64 that do not fit into bfloat16"),
        (np.ones(2, np.float32), np.zeros(2, ml_dtypes.float8_e8m0fnu), "float32 .* float8_e8m0fnu"),
    ],
)
def test_a_cast_from_or_to_ml_dtypes_that_loses_values_is_refused(new: Any, old: Any, reason: str) -> None:
    with pytest.raises(WeightsMismatch, match=f"x (is|has values of) {reason}"):
        load({"x": new}, {"x": old})
    assert not old.astype(np.float64).any() or old.dtype == ml_dtypes.float8_e8m0fnu


class _Immutable:
    """As a `jax.Array`."""

    shape, dtype = (2,), np.dtype(np.float32)


def test_an_array_that_cannot_be_overwritten_is_refused_with_what_to_give() -> None:
    with pytest.raises(
        WeightsMismatch, match="x is _Immutable in the model, which cannot be overwritten; give a numpy"
    ):
        load({"x": np.ones(2, np.float32)}, {"x": _Immutable()})


def test_a_mapping_that_cannot_be_changed_is_refused_with_what_to_give() -> None:
    with pytest.raises(UnsupportedType, match="not a mappingproxy; give an empty dictionary"):
        load({"x": np.ones(2)}, MappingProxyType({}))


class _Broken(TensorDict):
    def keys(self) -> Any:
        raise OSError("the file is gone")

    items = keys


def test_a_mapping_whose_own_code_raises_is_refused() -> None:
    with pytest.raises(WeightsMismatch, match="OSError: the file is gone"):
        load({"x": np.ones(2)}, _Broken(x=np.zeros(2)))
