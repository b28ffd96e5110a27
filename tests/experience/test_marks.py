"""Marks: batches that a checkpoint covers are never delivered again, and all others are."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Server, wait_until

from rlbroker import ConnectionFailed, InvalidArgument, WorkerClient, WorkerCommunicator
from rlbroker.experience import watched_streams

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


@pytest.fixture(autouse=True)
def _recheck_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_streams, "RECHECK_SECONDS", 0.1)


def send(client: WorkerClient, *numbers: int) -> None:
    for number in numbers:
        client.send_experiences({"number": number})


def collect(comm: WorkerCommunicator, count: int) -> list[int]:
    """Collect until this many batches were delivered, and a moment longer; return all of them."""
    found: list[int] = []

    def enough() -> bool:
        found.extend(batch["number"] for _, batch in comm.collect_experiences(timeout=0.2))
        return len(found) >= count

    wait_until(f"{count} batches were collected", enough)
    found.extend(batch["number"] for _, batch in comm.collect_experiences(timeout=0.3))
    return found


@pytest.mark.on_every_engine
def test_a_learner_continues_exactly_where_its_checkpoint_ends(learner: Learner, worker: Worker) -> None:
    comm, client = learner(acknowledge="manual"), worker()
    send(client, 1, 2, 3, 4)
    comm.collect_experiences(timeout=5.0, max_batches=2)
    marks = json.loads(json.dumps(comm.marks()))
    comm.collect_experiences(timeout=5.0)  # after the checkpoint, so they are lost with the learner
    again = learner(acknowledge="manual")
    again.restore(marks)
    send(client, 5)
    assert collect(again, 3) == [3, 4, 5]


def test_batches_covered_by_a_checkpoint_count_as_delivered(learner: Learner, worker: Worker) -> None:
    comm, client = learner(acknowledge="manual"), worker()
    send(client, 1, 2, 3)
    comm.collect_experiences(timeout=5.0)
    marks = comm.marks()
    again = learner(acknowledge="manual")
    again.restore(marks)
    assert again.collect_experiences(timeout=0.3) == []
    counts = again.get_queue_info()["counts"][0]
    assert (counts.produced, counts.delivered, counts.in_hand, counts.lost) == (3, 3, 0, {})


def test_without_marks_unacknowledged_batches_are_delivered_again(learner: Learner, worker: Worker) -> None:
    comm, client = learner(acknowledge="manual"), worker()
    send(client, 1, 2)
    comm.acknowledge(comm.collect_experiences(timeout=5.0, max_batches=1))
    comm.collect_experiences(timeout=5.0)
    assert collect(learner(), 1) == [2]


def test_acknowledging_marks_acknowledges_only_what_they_cover(learner: Learner, worker: Worker) -> None:
    comm, client = learner(acknowledge="manual"), worker(level="learner")
    send(client, 1, 2, 3)
    comm.collect_experiences(timeout=5.0, max_batches=2)
    marks = comm.marks()
    comm.collect_experiences(timeout=5.0)
    assert comm.acknowledge(marks) == 2
    assert comm.acknowledge(marks) == 0
    wait_until("the worker keeps the third only", lambda: client.flush(timeout=0.01) == 1)


def test_batches_that_were_read_and_not_returned_are_not_covered(learner: Learner, worker: Worker) -> None:
    comm, first, second = learner(acknowledge="manual"), worker(), worker()
    send(first, 1, 2, 3)
    send(second, 11, 12, 13)
    got = [batch["number"] for _, batch in comm.collect_experiences(timeout=5.0, max_batches=2)]
    marks = comm.marks()
    again = learner(acknowledge="manual")
    again.restore(marks)
    assert sorted(got + collect(again, 4)) == [1, 2, 3, 11, 12, 13]


def test_a_new_incarnation_of_a_worker_is_not_covered(learner: Learner, worker: Worker) -> None:
    comm, client = learner(acknowledge="manual"), worker(0)
    send(client, 1, 2, 3)
    comm.collect_experiences(timeout=5.0)
    marks = comm.marks()
    send(worker(0), 4)
    again = learner(acknowledge="manual")
    again.restore(marks)
    assert collect(again, 1) == [4]


def test_a_repeat_that_could_not_be_acknowledged_is_acknowledged_later(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, client = learner(acknowledge="manual"), worker(level="learner")
    send(client, 1, 2, 3)
    comm.collect_experiences(timeout=5.0)
    marks = comm.marks()
    again = learner(acknowledge="manual")
    again.restore(marks)

    def fail(*arguments: Any, **options: Any) -> None:
        raise ConnectionFailed("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(again._pending, "acknowledge", fail)
        with pytest.raises(ConnectionFailed):
            again.collect_experiences(timeout=5.0)
    assert again.collect_experiences() == []
    wait_until("the worker keeps nothing", lambda: client.flush(timeout=0.01) == 0)
    counts = again.get_queue_info()["counts"][0]
    assert (counts.in_hand, counts.delivered, counts.produced) == (0, 3, 3)


def test_a_retried_batch_covered_by_a_checkpoint_is_not_delivered_again(
    server: Server, learner: Learner, worker: Worker
) -> None:
    comm, client = learner(acknowledge="manual", max_deliveries=1), worker()
    send(client, 1)
    comm.collect_experiences(timeout=5.0)
    comm = learner(acknowledge="manual", max_deliveries=1)  # the learner before died over it
    wait_until("it is a dead letter", lambda: comm.collect_experiences() or comm.dead_letters())
    comm.retry_dead_letters(comm.dead_letters())
    assert collect(comm, 1) == [1]
    marks = comm.marks()
    again = learner(acknowledge="manual")
    again.restore(marks)
    send(client, 2)
    assert collect(again, 1) == [2]


def test_version_numbers_continue_on_a_new_server(server: Server, learner: Learner, run: str) -> None:
    comm = learner()
    for _ in range(3):
        comm.send_model_weights({"w": 1})
    marks = comm.marks()
    comm.cleanup()
    server.client.flushall()
    again = learner()
    again.restore(marks)
    assert again.send_model_weights({"w": 1}).version == 4


def test_marks_are_restored_before_the_first_collect(learner: Learner, worker: Worker) -> None:
    comm = learner()
    comm.collect_experiences()
    with pytest.raises(InvalidArgument, match="before the first"):
        comm.restore(comm.marks())


def test_marks_of_another_run_are_refused(learner: Learner) -> None:
    comm = learner()
    marks = comm.marks() | {"run": "other"}
    for use in (comm.restore, comm.acknowledge):
        with pytest.raises(InvalidArgument, match="'other'"):
            use(marks)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        {"batches": None},
        {"batches": {"x": {}}},
        {"batches": {"0": {"through": "1-1", "except": [], "taken_over": []}}},
        {"batches": {"0": {"through": "1-1", "except": [], "taken_over": [], "passed_over": ["1-1"]}}},
        {"batches": {"0": {"through": "1", "except": [], "taken_over": [], "passed_over": []}}},
        {"batches": {"0": {"through": "1-1", "except": ["*"], "taken_over": [], "passed_over": []}}},
        {"batches": {"-1": {"through": "1-1", "except": [], "taken_over": [], "passed_over": []}}},
        {"version": "new"},
        {"inserts": None},
    ],
    ids=str,
)
def test_invalid_marks_are_refused_and_change_nothing(learner: Learner, worker: Worker, wrong: Any) -> None:
    comm, client = learner(), worker()
    send(client, 1)
    damaged = comm.marks() | wrong if isinstance(wrong, dict) else wrong
    with pytest.raises(InvalidArgument):
        comm.restore(damaged)
    assert collect(comm, 1) == [1]
