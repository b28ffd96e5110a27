"""Weights in a worker: loaded whole and bit-exact into modules and dictionaries, or not at all."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import wait_until

from rlbroker import MissedUpdates, WeightsMismatch, WorkerClient, WorkerCommunicator
from rlbroker.errors import DeadlineExceeded, UnsupportedType

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def network() -> torch.nn.Sequential:
    """Return parameters and buffers of several sizes and dtypes."""
    return torch.nn.Sequential(
        torch.nn.Linear(4, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 300), torch.nn.Linear(300, 300)
    )


def equal(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def missed_updates(comm: WorkerCommunicator) -> MissedUpdates | None:
    missed = comm.missed_updates().get(0)
    return missed if missed and missed.total else None


@pytest.mark.parametrize("compression", [True, False])
def test_a_module_gets_the_same_bits(learner: Learner, worker: Worker, compression: bool) -> None:
    trained, acting = network(), network()
    receipt = learner().send_model_weights(trained.state_dict(), compression)
    worker().load_weights(acting, timeout=5.0)
    assert equal(trained, acting)
    assert receipt
    assert receipt.ratio == receipt.raw_bytes / receipt.stored_bytes


class Migrating(torch.nn.Linear):
    """Version 2 stores twice the weight of version 1."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *others: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] *= 2
        super()._load_from_state_dict(state, prefix, metadata, *others)


@pytest.mark.parametrize("wait", [True, False])
def test_the_versions_of_modules_travel(learner: Learner, worker: Worker, wait: bool) -> None:
    comm, client = learner(), worker()
    trained, acting = (torch.nn.Sequential(Migrating(100, 200)) for _ in range(2))
    comm.send_model_weights(trained.state_dict(), wait=wait)
    client.load_weights(acting)
    assert equal(trained, acting)
    old = trained.state_dict()
    old._metadata["0"]["version"] = 1  # type: ignore[attr-defined]
    comm.send_model_weights(old, wait=wait)
    wait_until("version 2 is loaded", lambda: client.poll(acting))
    assert torch.equal(acting[0].weight, trained[0].weight * 2)  # type: ignore[operator,arg-type]


def test_metadata_that_cannot_travel_is_named(learner: Learner) -> None:
    state = torch.nn.Linear(2, 2).state_dict()
    state._metadata[""]["scale"] = torch.ones(1)  # type: ignore[attr-defined]
    with pytest.raises(
        UnsupportedType, match=r"\['_metadata'\]\[''\]\['scale'\]: a torch.Tensor in the metadata"
    ):
        learner().send_model_weights(state)


def test_tied_weights_are_stored_once_and_tied_again(learner: Learner, worker: Worker) -> None:
    shared = torch.randn(1000)
    receipt = learner().send_model_weights({"encoder": shared, "decoder": shared})
    received: dict[str, torch.Tensor] = {}
    worker().load_weights(received)
    assert receipt.raw_bytes == 4000
    assert received["encoder"] is received["decoder"]


def test_a_filled_dictionary_is_overwritten_in_place(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"net": {"w": np.arange(4.0), "b": torch.ones(2)}, "step": 7})
    target: dict[str, Any] = {"net": {"w": np.zeros(4), "b": torch.zeros(2)}, "step": 0}
    w, b = target["net"]["w"], target["net"]["b"]
    client.load_weights(target)
    assert target["net"]["w"] is w
    assert target["net"]["b"] is b
    assert (w.tolist(), b.tolist(), target["step"]) == ([0, 1, 2, 3], [1, 1], 7)


def test_what_fills_an_empty_dictionary_belongs_to_the_caller(learner: Learner, worker: Worker) -> None:
    comm, client, weights = learner(), worker(), {"w": torch.randn(200, 300)}
    comm.send_model_weights(weights)
    first: dict[str, torch.Tensor] = {}
    client.load_weights(first)
    first["w"].zero_()
    comm.send_model_weights(weights)
    second: dict[str, torch.Tensor] = {}
    wait_until("version 2 is loaded", lambda: client.poll(second))
    assert torch.equal(second["w"], weights["w"])
    assert not first["w"].any()


def test_weights_that_do_not_fit_are_refused_with_keys_and_shapes(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights(OrderedDict(w=torch.zeros(2, 3), extra=torch.zeros(1)))
    model = {"w": torch.zeros(3, 2), "b": torch.zeros(1)}
    with pytest.raises(
        WeightsMismatch, match=r"not in the weights: b; not in the model: extra; w is \(2, 3\)"
    ):
        client.load_weights(model)
    assert client.version == 0
    assert model["w"].shape == (3, 2)
    missed = wait_until("the failure is on record", lambda: missed_updates(comm))
    assert [(one.first, one.why) for one in missed.records] == [(1, "failed")]


def test_weights_that_did_not_fit_one_model_can_be_loaded_into_another(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"w": np.arange(3)})
    with pytest.raises(WeightsMismatch):
        client.load_weights({"b": np.zeros(1)})
    wait_until("the roster names the problem", lambda: "not in the weights: b" in comm.workers()[0].problem)
    model = {"w": np.zeros(3)}
    assert client.load_weights(model, timeout=5.0) == 1
    assert model["w"].tolist() == [0, 1, 2]
    assert not client.poll(model)


def test_weights_can_be_loaded_into_a_second_model(learner: Learner, worker: Worker) -> None:
    learner().send_model_weights({"w": np.arange(3)})
    client = worker()
    for _ in range(2):
        model: dict[str, Any] = {}
        assert client.load_weights(model, timeout=5.0) == 1
        assert model["w"].tolist() == [0, 1, 2]


def test_only_modules_and_dictionaries_can_be_loaded_into(learner: Learner, worker: Worker) -> None:
    learner().send_model_weights({"w": np.zeros(1)})
    with pytest.raises(UnsupportedType, match="not a list"):
        worker().load_weights([])  # type: ignore[arg-type]


def test_waiting_for_the_first_version_ends_at_the_deadline(
    learner: Learner, worker: Worker, run: str
) -> None:
    learner()
    with pytest.raises(DeadlineExceeded, match=f"no weights in the run '{run}' on .* came within 0.3 s"):
        worker().load_weights({}, timeout=0.3)


def test_loading_waits_for_the_version_that_is_the_latest_at_the_call(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    for number in range(1, 20):
        comm.send_model_weights({"number": number})
        received: dict[str, int] = {}
        assert client.load_weights(received) == received["number"] == number


def test_loading_skips_a_decoded_version_of_an_older_architecture(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"w": np.zeros(3)})
    wait_until("version 1 is ready", lambda: client._subscriber.ready)
    client._subscriber._thread.request_stop()  # version 2 is not read before the load begins
    wait_until("it stopped", lambda: not client._subscriber.thread.running)
    comm.send_model_weights({"w": np.ones(5)})

    def read_late() -> None:
        time.sleep(0.3)
        client._subscriber._thread.stopping = False
        client._subscriber._poll()

    late = threading.Thread(target=read_late)
    late.start()
    received: dict[str, Any] = {}
    assert client.load_weights(received, timeout=10.0) == 2
    late.join()
    assert received["w"].tolist() == [1, 1, 1, 1, 1]


def test_two_threads_that_poll_never_go_back_a_version(learner: Learner, worker: Worker) -> None:
    class Slow(dict[str, Any]):
        def update(self, *arguments: Any, **fields: Any) -> None:
            begun.set()
            time.sleep(0.3)
            super().update(*arguments, **fields)

    comm, client, begun = learner(), worker(), threading.Event()
    slow = Slow()
    comm.send_model_weights({"number": 1})
    wait_until("version 1 is ready", lambda: client._subscriber.ready)
    first = threading.Thread(target=client.poll, args=(slow,))
    first.start()
    begun.wait(5.0)
    comm.send_model_weights({"number": 2})
    wait_until("version 2 is ready", lambda: client._subscriber.ready)
    received: dict[str, Any] = {}
    assert client.poll(received)
    first.join()
    assert (client.version, slow["number"], received["number"]) == (2, 1, 2)


def test_a_worker_that_missed_thirty_versions_runs_the_newest(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    model = {"w": np.zeros(1)}
    comm.send_model_weights({"w": np.zeros(1)})
    client.load_weights(model)
    # The background thread may decode some of them meanwhile; it is the caller that does not poll.
    for number in range(30):
        comm.send_model_weights({"w": np.full(1, float(number))})
    wait_until("the newest is ready", lambda: client._subscriber.newest == 31)

    client.poll(model)

    assert (client.version, model["w"][0]) == (31, 29.0)
    missed = wait_until("the rest is on record", lambda: missed_updates(comm))
    assert [(one.first, one.last, one.why) for one in missed.records] == [(2, 30, "superseded")]
    assert (missed.total, missed.behind, missed.skips_in_a_row) == (29, 0, 1)


def test_a_worker_that_is_behind_is_reported(learner: Learner, worker: Worker) -> None:
    comm = learner()
    worker()
    for _ in range(3):
        comm.send_model_weights({})
    wait_until("the ledger knows the worker", lambda: comm.missed_updates()[0].behind == 3)
    assert comm.missed_updates()[0].behind_since is not None
    assert comm.get_queue_info()["model_queue_sizes"] == [3, 0]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_lower_precision_is_cast_back_unless_the_worker_keeps_it(
    learner: Learner, worker: Worker, dtype: Any
) -> None:
    comm, trained, acting = learner(), network(), network()
    array = np.linspace(0, 1, 7, dtype=np.float32)
    receipt = comm.send_model_weights({**trained.state_dict(), "array": array}, dtype=dtype)
    assert receipt.raw_bytes < sum(value.nbytes for value in trained.state_dict().values()) * 0.51
    rounded = {
        name: value.bfloat16().float() if value.is_floating_point() else value
        for name, value in trained.state_dict().items()
    }
    received: dict[str, Any] = {}
    client = worker()
    client.load_weights(received)
    assert np.array_equal(received.pop("array"), torch.from_numpy(array).bfloat16().float().numpy())
    for name, value in rounded.items():
        assert received[name].dtype == value.dtype
        assert torch.equal(received[name], value)
    low: dict[str, Any] = {}
    worker(keep_dtype=True).load_weights(low)
    assert low["0.weight"].dtype == torch.bfloat16
    comm.send_model_weights(trained.state_dict(), dtype=dtype)
    wait_until("it runs in the model", lambda: client.poll(acting))
    weight = acting.state_dict()["0.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, rounded["0.weight"])
