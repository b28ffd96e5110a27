"""Which values travel in weights, through a learner and a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from codec_trees import assert_same

from rlbroker import Batch, UnsupportedType, WorkerClient, WorkerCommunicator

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def received(comm: WorkerCommunicator, client: WorkerClient, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a worker loads into an empty dictionary."""
    comm.send_model_weights(weights)
    target: dict[str, Any] = {}
    client.load_weights(target)
    return target


@pytest.mark.parametrize("size", [3, 100_000])
def test_lazy_views_of_one_memory_arrive_with_their_own_values(
    learner: Learner, worker: Worker, size: int
) -> None:
    z = torch.randn(size, dtype=torch.complex64)
    weights = {"z": z, "conjugate": z.conj(), "again": z.conj(), "imag": z.imag, "negative": z.conj().imag}
    got = received(learner(), worker(), weights)
    for name, tensor in weights.items():
        assert torch.equal(got[name], tensor.resolve_conj().resolve_neg()), name
    assert got["conjugate"] is got["again"]


def test_any_mapping_of_weights_travels(learner: Learner, worker: Worker) -> None:
    tree = {"w": np.ones((300, 300), ml_dtypes.bfloat16), "b": np.zeros(3, ml_dtypes.float8_e4m3fn), "n": 3}
    comm, client = learner(), worker()
    for wrap in (MappingProxyType, Batch):
        got = received(comm, client, wrap({"params": wrap(tree)}))
        assert_same(got, {"params": tree})


def test_a_mapping_with_a_state_dict_method_is_no_model(learner: Learner, worker: Worker) -> None:
    """As a TensorDict is."""

    class TensorDict(dict[str, Any]):
        def state_dict(self) -> dict[str, Any]:
            raise AssertionError

    got = received(learner(), worker(), TensorDict(w=torch.ones(3)))
    assert_same(got, {"w": torch.ones(3)})


def containing_itself() -> dict[str, Any]:
    weights: dict[str, Any] = {}
    weights["again"] = weights
    return weights


def freed() -> dict[str, Any]:
    tensor = torch.ones(100_000)
    tensor.untyped_storage().resize_(0)
    return {"w": tensor}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (containing_itself, "contains itself"),
        (freed, r"^\['w'\]: a tensor whose storage was freed"),
        (lambda: {"w": torch.eye(3).to_sparse()}, r"^\['w'\]: .*to_dense\(\)"),
    ],
)
@pytest.mark.parametrize("wait", [True, False])
def test_weights_that_cannot_travel_are_refused_and_the_next_ones_are_published(
    learner: Learner, worker: Worker, make: Callable[[], Any], reason: str, wait: bool
) -> None:
    comm, client = learner(), worker()
    with pytest.raises(UnsupportedType, match=reason):
        comm.send_model_weights(make(), wait=wait)
    assert comm.version == 0
    assert_same(received(comm, client, {"w": torch.ones(3)}), {"w": torch.ones(3)})
    assert client.version == 1
