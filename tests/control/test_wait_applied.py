"""A receipt says at which workers its version is applied, and why it is not at the others."""

from __future__ import annotations

import gc
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Server, wait_until
from crashed import end_at_once

from rlbroker import (
    Closed,
    Fenced,
    InvalidArgument,
    Outcome,
    PublishReceipt,
    UnknownWorker,
    UnsupportedType,
    WeightsMismatch,
    WorkerClient,
    WorkerCommunicator,
)
from rlbroker.control import settlements, version_outcomes, version_waiter

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def states(receipt: PublishReceipt, **arguments: Any) -> dict[int, str]:
    return {worker: str(outcome) for worker, outcome in receipt.wait_applied(**arguments).items()}


@pytest.mark.on_every_engine
def test_a_receipt_waits_until_every_worker_has_applied_its_version(learner: Learner, worker: Worker) -> None:
    comm, clients = learner(), [worker(), worker()]
    receipt = comm.send_model_weights({"w": np.zeros(3)})
    clients[0].load_weights({})
    assert states(receipt, timeout=0.3) == {0: "applied", 1: "waiting"}
    late = threading.Timer(0.2, clients[1].load_weights, ({},))
    late.start()
    outcomes = receipt.wait_applied()
    late.join()
    assert outcomes == {0: Outcome("applied"), 1: Outcome("applied")}
    assert all(outcomes.values())


def test_an_answer_is_known_when_it_arrives(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither heartbeats, of 1 s, nor regular reads, which never come here, are waited for."""
    for module in (settlements, version_waiter):
        monkeypatch.setattr(module, "POLL_SECONDS", 3600.0)
    comm, client = learner(), worker()
    wait_until("the learner listens to the worker", lambda: 0 in comm._roster.everyone)
    seconds = []
    for number in range(5):
        receipt = comm.send_model_weights({"number": number})
        applied = threading.Timer(0.2, client.load_weights, ({},))
        applied.start()
        began = time.monotonic()
        assert receipt.wait_applied()[0]
        seconds.append(time.monotonic() - began)
        applied.join()
    assert sorted(seconds)[2] < 0.7


def test_a_version_that_was_jumped_over_is_missed(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    receipts = [comm.send_model_weights({"number": number}) for number in range(4)]
    client.load_weights({})
    assert [states(one) for one in receipts] == [{0: "missed: superseded"}] * 3 + [{0: "applied"}]
    assert not receipts[0].wait_applied()[0]


def test_a_version_that_did_not_fit_is_missed_with_the_reason(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    receipt = comm.send_model_weights({"w": np.zeros(3)})
    with pytest.raises(WeightsMismatch):
        client.load_weights({"b": np.zeros(3)})
    outcome = receipt.wait_applied()[0]
    assert outcome.state == "missed"
    assert outcome.detail.startswith(
        "failed: the received weights do not fit the model: not in the weights: b"
    )
    client.load_weights({})
    wait_until("it runs in another model", lambda: receipt.wait_applied(timeout=0)[0])


def test_a_version_that_does_not_fit_a_worker_that_joined_later_is_on_record(
    learner: Learner, worker: Worker
) -> None:
    comm = learner()
    receipt = comm.send_model_weights({"w": np.zeros(3)})
    client = worker()
    for _ in range(2):  # the second failure of the same version is not another one
        with pytest.raises(WeightsMismatch):
            client.load_weights({"b": np.zeros(3)})
    assert receipt.wait_applied()[0].detail.startswith("failed: the received weights do not fit the model")
    missed = wait_until("it is on record", lambda: (one := comm.missed_updates()[0]).total and one)
    assert [(one.first, one.last, one.why) for one in missed.records] == [(1, 1, "failed")]
    client.load_weights({})
    wait_until("it runs in another model", lambda: receipt.wait_applied(timeout=0)[0])
    assert comm.missed_updates()[0].by_reason == {"failed": 1}


def test_a_worker_that_joined_later_counts_too(learner: Learner, worker: Worker) -> None:
    comm = learner()
    first = comm.send_model_weights({"number": 1})
    client = worker()
    assert states(first, timeout=0) == {0: "waiting"}
    second = comm.send_model_weights({"number": 2})
    client.load_weights({})
    assert (states(first), states(second)) == ({0: "missed: superseded"}, {0: "applied"})


def test_a_worker_that_leaves_or_dies_meanwhile_has_a_final_outcome(learner: Learner, worker: Worker) -> None:
    comm = learner(lease_seconds=0.3, forget_seconds=0.6)
    leaves, dies = worker(), worker()
    receipt = comm.send_model_weights({"number": 1})
    joins_and_leaves = worker()

    def end_all() -> None:
        dies._heartbeat.thread.stop(5.0)  # the run cannot tell this from its death
        leaves.close()
        joins_and_leaves.close()

    end = threading.Timer(0.2, end_all)
    end.start()
    assert states(receipt, timeout=20.0) == {0: "missed: left", 1: "missed: away", 2: "missed: left"}
    end.join()
    assert states(receipt, timeout=0, worker_ids=[0, 1]) == {0: "missed: left", 1: "missed: away"}


def test_a_worker_that_starts_again_and_loads_the_version_has_applied_it(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker(0)
    receipt = comm.send_model_weights({"number": 1})
    end_at_once(client)
    again = worker(0)
    assert states(receipt) == {0: "missed: away"}
    again.load_weights({})
    wait_until("it is applied", lambda: receipt.wait_applied(timeout=0)[0])


def test_a_process_that_replaces_one_with_an_outcome_is_not_waited_for(
    learner: Learner, worker: Worker
) -> None:
    comm, client, leaves = learner(), worker(0), worker(1)
    receipt = comm.send_model_weights({"number": 1})
    client.load_weights({})
    leaves.close()
    before = {0: "applied", 1: "missed: left"}
    wait_until("both have an outcome", lambda: states(receipt, timeout=0) == before)
    again = [worker(0), worker(1)]
    assert [client.version for client in again] == [0, 0]
    assert states(receipt, timeout=20.0) == before
    again[1].load_weights({})
    wait_until("it is applied", lambda: all(receipt.wait_applied(timeout=0).values()))


def test_only_the_wanted_workers_are_waited_for(learner: Learner, worker: Worker) -> None:
    comm, clients = learner(), [worker() for _ in range(3)]
    receipt = comm.send_model_weights({"number": 1})
    clients[2].load_weights({})
    assert states(receipt, worker_ids=(np.int64(2), 9)) == {2: "applied", 9: "unknown: unknown worker"}
    with pytest.raises(
        UnknownWorker, match=r"worker 8, 9 are not members of the run .*; members are: 0, 1, 2"
    ):
        receipt.wait_applied(worker_ids=[8, 9])
    for wrong in (3, [-1], ["0"], [True]):
        with pytest.raises(InvalidArgument):
            receipt.wait_applied(worker_ids=wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        receipt.wait_applied(timeout=-1)
    assert states(receipt, worker_ids=[], timeout=0) == {}


def test_a_receipt_without_waiting_waits_for_its_version_first(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, client, may_publish = learner(), worker(), threading.Event()
    publish = comm._publisher._publish
    monkeypatch.setattr(
        comm._publisher, "_publish", lambda *given: (may_publish.wait(10.0), publish(*given))[1]
    )
    receipt = comm.send_model_weights({"number": 1}, wait=False)
    assert states(receipt, timeout=0.05, worker_ids=[0, 7]) == {0: "waiting", 7: "unknown: unknown worker"}
    may_publish.set()
    client.load_weights({})
    assert states(receipt) == {0: "applied"}


def test_a_version_that_was_not_published_raises_its_error(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = learner()
    worker()

    def fail(*_: Any) -> None:
        raise UnsupportedType("on purpose")

    monkeypatch.setattr(comm._publisher, "_publish", fail)
    with pytest.raises(UnsupportedType, match="on purpose"):
        comm.send_model_weights({"number": 1}, wait=False).wait_applied()


def test_receipts_tell_the_truth_after_a_loss(learner: Learner, worker: Worker, server: Server) -> None:
    """What was applied stays applied, and a version that the server lost is superseded by its republication."""
    comm, clients = learner(), [worker(), worker()]
    receipt = comm.send_model_weights({"number": 1})
    clients[0].load_weights({})
    assert states(receipt, worker_ids=[0]) == {0: "applied"}
    server.client.flushall()
    wait_until("the weights are published again", lambda: comm.version > receipt.version)
    assert clients[1].load_weights({}) == comm.version == 2
    assert states(receipt) == {0: "applied", 1: "missed: superseded"}


def test_a_closed_learner_and_a_replaced_one_say_so(learner: Learner, worker: Worker) -> None:
    old = learner(learner_name="a")
    worker()
    receipt = old.send_model_weights({"number": 1})
    new = learner(learner_name="b")
    with pytest.raises(Fenced, match="a newer learner"):
        receipt.wait_applied(timeout=10.0)
    receipt = new.send_model_weights({"number": 2})
    new.cleanup()
    with pytest.raises(Closed):
        receipt.wait_applied()
    copied = pickle.loads(pickle.dumps(receipt))
    assert copied.version == receipt.version == 2
    with pytest.raises(Closed, match="copy of a receipt"):
        copied.wait_applied()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_receipt_does_not_keep_its_learner(server: Server, run: str) -> None:
    comm = WorkerCommunicator(1, run=run, timeout=5.0, **server.connection_settings())
    receipt = comm.send_model_weights({"number": 1}, wait=False)
    receipt.wait_applied()
    found = weakref.ref(comm)
    gc.disable()
    try:
        del comm
        assert found() is None
    finally:
        gc.enable()
    with pytest.raises(Closed):
        receipt.wait_applied()


def test_only_so_many_outcomes_are_remembered(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions in a row that were all applied count as one. Of older ones nothing false is said."""
    monkeypatch.setattr(version_outcomes, "RANGES_KEPT", 4)
    comm, client = learner(), worker()
    receipts = []
    for number in range(12):
        receipts.append(comm.send_model_weights({"number": number}))
        if number % 2 or number < 6:
            client.load_weights({})
            assert receipts[-1].wait_applied()[0]
    assert [states(one)[0] for one in receipts[:8]] == ["unknown: too long ago"] * 8
    assert [states(one)[0] for one in receipts[8:]] == ["missed: superseded", "applied"] * 2
