"""The types of the public calls tell the truth: what a type checker accepts works, and what it refuses is refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, TypedDict

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlbroker import InvalidArgument, UnsupportedType, WorkerClient, WorkerCommunicator

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


class Rollout(TypedDict):
    obs: NDArray[np.float32]
    steps: int


def test_what_a_type_checker_accepts_works(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    model = torch.nn.Linear(2, 2)
    frozen: Mapping[str, torch.Tensor] = MappingProxyType(dict(model.named_parameters()))
    comm.send_model_weights(frozen)
    comm.send_model_weights({"deep": {"w": np.ones(3)}}, dtype=torch.bfloat16)
    comm.send_model_weights(model.state_dict())
    tensors: dict[str, torch.Tensor] = {}
    ordered: OrderedDict[str, torch.Tensor] = OrderedDict()
    anything: MutableMapping[str, Any] = {}
    for target in (model, torch.nn.Linear(2, 2), tensors, ordered, anything):
        assert client.load_weights(target) == 3
    client.poll(model)
    client.poll(None)
    rollout: Rollout = {"obs": np.ones((4, 2), np.float32), "steps": 8}
    assert client.send_experiences(rollout, rows=np.int64(8)).rows == 8
    assert client.send_experiences(MappingProxyType({"x": 1}), 5.0, rows=3).rows == 3
    for _, batch in comm.collect_experiences(timeout=5.0):
        assert client.send_experiences(batch).accepted


def test_what_a_type_checker_refuses_is_refused(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    for target in ([1], None, 3):
        with pytest.raises(UnsupportedType):
            client.load_weights(target)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedType):
        client.send_experiences([("x", 1)])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        client.send_experiences({"x": 1}, rows="3")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedType):
        comm.send_model_weights(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedType):
        comm.send_model_weights([torch.ones(1)])  # type: ignore[arg-type]
