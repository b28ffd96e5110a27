"""What keeps many workers from asking for the same at the same time, and few from waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import wait_until

import rlbroker.membership.heartbeat
import rlbroker.run.maintenance
from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.deadline import Deadline
from rlbroker.membership.heartbeat import Heartbeat
from rlbroker.membership.run_size import RunSize
from rlbroker.types import Registration

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


class _Late(RunSize):
    """A crowd in which it is always somebody else's turn."""

    def wait_seconds(self, *facts: Any, **more: Any) -> float:
        return 3600.0


def test_workers_are_told_how_many_they_are(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rlbroker.run.maintenance, "HOUSEKEEPING_SECONDS", 0.1)
    learner(lease_seconds=1.0)
    clients = [worker() for _ in range(3)]
    wait_until("each has heard of all", lambda: {one._heartbeat.crowd for one in clients} == {RunSize(3, 1)})
    clients[1]._heartbeat._host = "elsewhere"
    wait_until("they run on two hosts", lambda: clients[0]._heartbeat.crowd.hosts == 2)


def test_who_had_to_wait_fetches_what_is_the_newest_by_then(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    client._subscriber._crowd = _Late
    comm.send_model_weights({"number": 1})
    wait_until("it waits for its turn", lambda: client._subscriber._turn)
    comm.send_model_weights({"number": 2})
    model: dict[str, Any] = {}
    assert not client.poll(model)
    client._subscriber._turn = Deadline(0)
    wait_until("it is its turn", lambda: client.poll(model))
    assert (client.version, model) == (2, {"number": 2})
    assert comm.missed_updates()[0].by_reason == {"superseded": 1}


def test_who_waits_for_its_turn_asks_for_nothing_before(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand pointers that are read at once are a crowd too."""
    comm, client = learner(), worker()
    comm.send_model_weights({"number": 1})
    wait_until("it runs the first version", lambda: client.poll({}))
    subscriber, asked = client._subscriber, list[Any]()
    read = subscriber._read_pointer

    def noted() -> Any:
        asked.append(read())
        return asked[-1]

    monkeypatch.setattr(subscriber, "_read_pointer", noted)
    subscriber._crowd = _Late
    comm.send_model_weights({"number": 2})
    wait_until("it waits for its turn", lambda: subscriber._turn)
    assert not asked
    subscriber._turn = Deadline(0)
    wait_until("it is its turn", lambda: client.poll({}))
    assert len(asked) == 1


def test_who_waits_for_its_turn_leaves_without_it(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    client._subscriber._crowd = _Late
    comm.send_model_weights({"number": 1})
    wait_until("it waits for its turn", lambda: client._subscriber._turn)
    client.close()
    assert not client._subscriber._thread._thread.is_alive()


def test_who_wants_a_free_id_does_not_ask_for_each_that_is_taken(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand workers that start would ask half a million times."""
    learner()
    for _ in range(5):
        worker()
    asked: list[int] = []
    claim = Heartbeat._claim

    def noted(self: Heartbeat, worker_id: int, *, only_if_free: bool) -> Registration | None:
        asked.append(worker_id)
        return claim(self, worker_id, only_if_free=only_if_free)

    monkeypatch.setattr(Heartbeat, "_claim", noted)
    assert worker().worker_id == 5
    assert asked == [5]


def test_who_waits_for_a_learner_looks_for_it_more_often_than_it_beats(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand workers that are there first would keep the server busy with heartbeats."""
    monkeypatch.setattr(rlbroker.membership.heartbeat, "BEATS_PER_LEASE", 0.001)  # none for hours
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
    wait_until("it has looked a few times", lambda: done.count("_is_opened") > 3)
    assert done.count("_beat") == 1  # when it registered
    learner()
    wait_until("it knows the run", lambda: client._heartbeat.knows_run)
