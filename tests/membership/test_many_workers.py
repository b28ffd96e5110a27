"""Many workers must not send the same request at the same time, and few must not wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import wait_until

import rlbroker.learner.maintenance
from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.deadline import Deadline
from rlbroker.membership import lease
from rlbroker.membership.heartbeat import Heartbeat
from rlbroker.membership.run_size import RunSize
from rlbroker.membership.worker_ids import Registrar
from rlbroker.types import Registration

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


class _EndlessWait(RunSize):
    """A run so large that a download has to wait for an hour."""

    def wait_seconds(self, *facts: Any, **more: Any) -> float:
        return 3600.0


def test_workers_learn_how_many_workers_and_hosts_there_are(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rlbroker.learner.maintenance, "HOUSEKEEPING_SECONDS", 0.1)
    learner(lease_seconds=1.0)
    clients = [worker() for _ in range(3)]
    wait_until(
        "each worker knows of all three",
        lambda: {client._heartbeat.run_size for client in clients} == {RunSize(3, 1)},
    )
    clients[1]._heartbeat._host = "elsewhere"
    wait_until("they run on two hosts", lambda: clients[0]._heartbeat.run_size.hosts == 2)


def test_a_worker_that_had_to_wait_fetches_the_version_that_is_newest_by_then(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    client._subscriber._jitter._run_size = _EndlessWait
    comm.send_model_weights({"number": 1})
    wait_until("it waits for its turn", lambda: client._subscriber._not_before)
    comm.send_model_weights({"number": 2})
    model: dict[str, Any] = {}
    assert not client.poll(model)
    client._subscriber._not_before = Deadline(0)
    wait_until("it is its turn", lambda: client.poll(model))
    assert (client.version, model) == (2, {"number": 2})
    assert comm.missed_updates()[0].by_reason == {"superseded": 1}


def test_a_worker_that_waits_for_its_turn_sends_no_request_before(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand workers that read the manifest at once would be a load too."""
    comm, client = learner(), worker()
    comm.send_model_weights({"number": 1})
    wait_until("it runs the first version", lambda: client.poll({}))
    subscriber, manifests = client._subscriber, list[Any]()
    read = subscriber._read_manifest

    def count_and_read() -> Any:
        manifests.append(read())
        return manifests[-1]

    monkeypatch.setattr(subscriber, "_read_manifest", count_and_read)
    subscriber._jitter._run_size = _EndlessWait
    comm.send_model_weights({"number": 2})
    wait_until("it waits for its turn", lambda: subscriber._not_before)
    assert not manifests
    subscriber._not_before = Deadline(0)
    wait_until("it is its turn", lambda: client.poll({}))
    assert len(manifests) == 1


def test_a_worker_that_waits_for_its_turn_can_leave(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    client._subscriber._jitter._run_size = _EndlessWait
    comm.send_model_weights({"number": 1})
    wait_until("it waits for its turn", lambda: client._subscriber._not_before)
    client.close()
    assert not client._subscriber._thread._thread.is_alive()


def test_a_worker_without_an_id_does_not_try_ids_that_are_taken(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand workers that start together would need half a million requests."""
    learner()
    for _ in range(5):
        worker()
    tried: list[int] = []
    claim = Registrar._claim

    def note_and_claim(self: Registrar, worker_id: int, *, only_if_free: bool) -> Registration | None:
        tried.append(worker_id)
        return claim(self, worker_id, only_if_free=only_if_free)

    monkeypatch.setattr(Registrar, "_claim", note_and_claim)
    assert worker().worker_id == 5
    assert tried == [5]


def test_a_worker_polls_for_its_learner_more_often_than_it_sends_heartbeats(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand workers that start before their learner would keep the server busy with heartbeats."""
    monkeypatch.setattr(lease, "HEARTBEATS_PER_LEASE", 0.001)  # the next heartbeat is hours away
    done: list[str] = []

    def noted(name: str) -> Callable[[Heartbeat], Any]:
        step = getattr(Heartbeat, name)

        def note(self: Heartbeat) -> Any:
            done.append(name)
            return step(self)

        return note

    for name in ("_is_opened", "_beat"):
        monkeypatch.setattr(Heartbeat, name, noted(name))
    client = worker()
    wait_until("it has polled a few times", lambda: done.count("_is_opened") > 3)
    assert done.count("_beat") == 1  # when it registered
    learner()
    wait_until("it knows the run", lambda: client._heartbeat.knows_run)
