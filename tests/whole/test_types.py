"""The types of the public calls tell the truth: what a type checker accepts works, and what it refuses is refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, TypedDict, assert_type

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlbroker import (
    InvalidArgument,
    Outcome,
    QueueCounts,
    QueueInfo,
    UnsupportedType,
    WorkerClient,
    WorkerCommunicator,
)

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


def test_what_is_returned_has_the_type_that_it_claims(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker(worker_id=np.int64(0))
    receipt = comm.send_model_weights({"w": torch.ones(3)})
    taken = assert_type(client.take_weights(timeout=5.0), tuple[int, dict[str, Any]] | None)
    assert taken is not None
    version, tree = taken
    assert type(assert_type(version, int)) is int
    assert type(assert_type(tree, dict[str, Any])) is dict
    for target in (torch.nn.ParameterDict({"w": torch.zeros(3)}), dict[str, torch.Tensor]()):
        assert assert_type(client.wait_for_weights(target, newer_than=np.int64(0)), bool) is True
    for ids in ([0], (np.int64(0),), {0}, range(1), None):
        outcomes = assert_type(receipt.wait_applied(5.0, worker_ids=ids), dict[int, Outcome])
        assert outcomes == {0: Outcome("applied")}
        assert comm.send_control_command("reset", worker_ids=ids).worker_ids == (0,)
    client.on_command("count", lambda data: len(data))
    info = assert_type(comm.get_queue_info(), QueueInfo)
    assert info.keys() == QueueInfo.__annotations__.keys()
    assert assert_type(info["experience_queue_sizes"], list[int]) == [0, 0]
    assert assert_type(info["counts"], dict[int, QueueCounts])[0].produced == 0


def test_what_a_type_checker_refuses_is_refused(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    for target in ([1], None, 3):
        with pytest.raises(UnsupportedType):
            client.load_weights(target)  # type: ignore[arg-type]
        with pytest.raises(UnsupportedType):
            client.wait_for_weights(target)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        client.wait_for_weights({}, newer_than=1.0)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        client.take_weights(None)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        comm.send_model_weights({}).wait_applied(worker_ids=0)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        comm.send_model_weights({}).wait_applied(worker_ids=["0"])  # type: ignore[list-item]
    with pytest.raises(KeyError):
        comm.get_queue_info()["queue_sizes"]  # type: ignore[typeddict-item]
    with pytest.raises(UnsupportedType):
        client.send_experiences([("x", 1)])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        client.send_experiences({"x": 1}, rows="3")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedType):
        comm.send_model_weights(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedType):
        comm.send_model_weights([torch.ones(1)])  # type: ignore[arg-type]
