"""Loading weights into a target: all of them fit, or nothing is changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlbroker.errors import WeightsMismatch
from rlbroker.weights.loading import load

pytestmark = pytest.mark.unit


def test_an_empty_dictionary_is_filled() -> None:
    target: dict[str, Any] = {}
    load({"w": np.ones(2), "nested": {"step": 3}}, target)
    assert target["nested"] == {"step": 3}


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"w": np.zeros(2)}, "not in the weights: nested.b"),
        ({"w": np.zeros(2), "nested": {"b": np.zeros(1)}, "x": 1}, "not in the model: x"),
        (
            {"w": np.zeros(3), "nested": {"b": np.zeros(1)}},
            r"w is \(3,\) in the weights and \(2,\) in the model",
        ),
        ({"w": 1, "nested": {"b": np.zeros(1)}}, r"w is int in the weights and \(2,\) in the model"),
        ([np.zeros(2)], "the weights are a list, not a dictionary"),
        ({f"k{number}": 0 for number in range(9)}, "k0, k1, k2, k3, k4 and 4 more"),
    ],
)
def test_a_mismatch_is_named_and_changes_nothing(weights: Any, named: str) -> None:
    target = {"w": np.ones(2), "nested": {"b": np.ones(1)}}
    with pytest.raises(WeightsMismatch, match=named):
        load(weights, target)
    assert target["w"].tolist() == [1, 1]  # type: ignore[attr-defined]


def test_weights_that_are_not_a_dictionary_fill_nothing() -> None:
    with pytest.raises(WeightsMismatch):
        load([1], {})


def test_loaded_weights_share_no_memory_with_the_received_ones() -> None:
    """That memory belongs to all processes of a host, and will hold another version."""

    class Module(torch.nn.Module):
        extra = torch.zeros(3)

        def get_extra_state(self) -> torch.Tensor:
            return self.extra

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.extra = state

    received, module = torch.ones(3), Module()
    target: dict[str, Any] = {"moments": [torch.zeros(3)]}
    load({"moments": [received]}, target)
    load({"_extra_state": received}, module)
    received.zero_()
    assert [target["moments"][0].sum(), module.extra.sum()] == [3, 3]
