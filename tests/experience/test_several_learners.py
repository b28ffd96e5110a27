"""Several learners of one run: each batch is delivered to one of them, and only one of them publishes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Server, wait_until

from rlbroker import Fenced, InvalidArgument, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.experience import watched_streams

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


@pytest.fixture(autouse=True)
def _recheck_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_streams, "RECHECK_SECONDS", 0.1)


def send(client: WorkerClient, *numbers: int) -> None:
    for number in numbers:
        client.send_experiences({"number": number})


def numbers(pairs: Any) -> list[int]:
    return [batch["number"] for _, batch in pairs]


def test_each_batch_is_delivered_to_one_learner(learner: Learner, worker: Worker) -> None:
    first, second = learner(learner_name="a"), learner(learner_name="b", publishes=False)
    client = worker()
    found: list[list[int]] = [[], []]
    for number in range(20):
        send(client, number)
        share = number % 2
        found[share] += numbers((first, second)[share].collect_experiences(timeout=5.0))
    assert sorted(found[0] + found[1]) == list(range(20))
    assert all(found)
    first.collect_experiences()
    second.collect_experiences()
    counts = first.get_queue_info()["counts"][0]
    assert (counts.produced, counts.delivered, counts.duplicates) == (20, 20, 0)


@pytest.mark.on_every_engine
def test_pending_batches_of_a_dead_learner_go_to_another(learner: Learner, worker: Worker) -> None:
    dead, client = learner(learner_name="dead", publishes=False), worker()
    send(client, 1, 2, 3)
    dead.collect_experiences(timeout=5.0, max_batches=2)
    dead._thread.stop(5.0)  # from now on it renews nothing
    living = learner(take_over_seconds=0.5)
    found: list[int] = []

    def all_collected() -> bool:
        found.extend(numbers(living.collect_experiences(timeout=0.1)))
        return len(found) >= 3

    wait_until("all were collected", all_collected)
    living.collect_experiences()
    assert sorted(found) == [1, 2, 3]
    assert living.get_queue_info()["counts"][0].delivered == 3


@pytest.mark.parametrize("take_over_seconds", [0.75, 1.5])
def test_pending_batches_of_a_slow_live_learner_stay_with_it(
    learner: Learner, worker: Worker, take_over_seconds: float
) -> None:
    busy = learner(
        learner_name="busy", publishes=False, acknowledge="manual", take_over_seconds=take_over_seconds
    )
    other, client = learner(take_over_seconds=take_over_seconds), worker()
    send(client, 1, 2)
    pairs = busy.collect_experiences(timeout=5.0)
    end = time.monotonic() + 2 * take_over_seconds
    while time.monotonic() < end:
        assert other.collect_experiences(timeout=0.2) == []
    assert busy.acknowledge(pairs) == 2


def test_a_learner_that_was_frozen_is_warned_when_it_acknowledges(
    learner: Learner, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    frozen, client = learner(learner_name="frozen", publishes=False, acknowledge="manual"), worker()
    send(client, 1)
    held = frozen.collect_experiences(timeout=5.0)
    frozen._thread.stop(5.0)
    living = learner(take_over_seconds=0.5)
    found = wait_until("it was collected", lambda: living.collect_experiences(timeout=0.1))
    with caplog.at_level(logging.WARNING, "rlbroker"):
        assert frozen.acknowledge(held) == 0
    assert "another learner took over" in caplog.text
    assert numbers(found) == [1]
    living.collect_experiences()
    counts = living.get_queue_info()["counts"][0]
    assert (counts.produced, counts.delivered, counts.lost) == (1, 1, {})


def test_a_learner_frozen_during_a_collect_takes_nothing_back(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, client = learner(learner_name="a", publishes=False), worker()
    send(client, 1)
    dead.collect_experiences(timeout=5.0)
    dead._thread.stop(5.0)
    frozen = learner(learner_name="a", publishes=False, acknowledge="manual")
    other = learner(learner_name="b", take_over_seconds=0.5, acknowledge="manual")
    frozen._thread.stop(5.0)
    count_delivery = frozen._maintenance._takeover.count_delivery

    def freeze(*arguments: Any) -> bool:
        wait_until("the other learner has it", lambda: other.collect_experiences(timeout=0.1))
        return count_delivery(*arguments)

    monkeypatch.setattr(frozen._maintenance._takeover, "count_delivery", freeze)
    assert frozen.collect_experiences() == []
    assert other.acknowledge(other.marks()) == 1


def test_a_learner_that_is_superseded_continues_to_collect(learner: Learner, worker: Worker) -> None:
    older = learner(learner_name="older")
    newer = learner(learner_name="newer")
    wait_until("the older learner knows", lambda: not older._roster.leads)
    newer._thread.stop(5.0)  # so that the older one collects what is sent now
    older._roster.leads = True
    send(worker(), 1)
    wait_until("it knows again", lambda: not older._roster.leads)
    assert numbers(older.collect_experiences(timeout=5.0)) == [1]


def test_only_the_newest_learner_publishes(learner: Learner, worker: Worker) -> None:
    older = learner(learner_name="older")
    assert older.send_model_weights({"w": 1}).version == 1
    newer = learner(learner_name="newer")
    for forbidden in (lambda: older.send_model_weights({"w": 2}), lambda: older.send_control_command("stop")):
        with pytest.raises(Fenced):
            forbidden()
    assert newer.send_model_weights({"w": 2}).version == 2
    send(worker(), 1)
    assert numbers(older.collect_experiences(timeout=5.0)) == [1]


def test_a_superseded_learner_never_leads_again(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    older, newer = learner(learner_name="older"), learner(learner_name="newer")
    newer.send_model_weights({"w": 1})
    wait_until("the older learner knows", lambda: not older._roster.leads)
    newer._thread.stop(5.0)  # it is frozen
    server.client.flushall()
    wait_until(
        "the older learner has registered again", lambda: server.client.hexists(keys.meta, "learner:older")
    )
    for forbidden in (lambda: older.send_model_weights({"w": 2}), lambda: older.send_control_command("stop")):
        with pytest.raises(Fenced):
            forbidden()
    newer._maintenance.restore()
    assert newer.send_model_weights({"w": 3}).version == 2
    send(worker(), 1)
    assert numbers(newer.collect_experiences(timeout=5.0)) == [1]


def test_a_learner_with_publishes_false_does_not_supersede_the_leader(
    learner: Learner, worker: Worker
) -> None:
    leading = learner(learner_name="leading")
    collecting = learner(learner_name="collecting", publishes=False, max_queue_size=1)
    for wrong in (
        lambda: collecting.send_model_weights({"w": 1}),
        lambda: collecting.send_control_command("stop"),
    ):
        with pytest.raises(InvalidArgument, match="publishes=False"):
            wrong()
    assert leading.send_model_weights({"w": 1}).version == 1
    client = worker()
    send(client, 1, 2)  # the bounds are those of the leading learner
    command = leading.send_control_command("stop")
    wait_until("it stops", lambda: client.poll() or not client.running)
    assert command.wait(5.0)[0]


def test_a_second_learner_of_the_same_name_replaces_the_first(learner: Learner, worker: Worker) -> None:
    leading = learner()
    first = learner(learner_name="b", publishes=False, acknowledge="manual")
    client = worker()
    send(client, 1)
    held = first.collect_experiences(timeout=5.0)
    second = learner(learner_name="b", publishes=False)
    with pytest.raises(Fenced):
        first.acknowledge(held)
    assert numbers(second.collect_experiences(timeout=5.0)) == [1]
    assert leading.send_model_weights({"w": 1}).version == 1


def test_marks_do_not_cover_what_another_learner_read(learner: Learner, worker: Worker) -> None:
    first = learner(learner_name="a", acknowledge="manual")
    second = learner(learner_name="b", publishes=False, acknowledge="manual")
    client = worker()
    send(client, 1)
    assert numbers(first.collect_experiences(timeout=5.0)) == [1]
    send(client, 2)
    assert numbers(second.collect_experiences(timeout=5.0)) == [2]
    send(client, 3)
    assert numbers(first.collect_experiences(timeout=5.0)) == [3]
    assert first.acknowledge(first.marks()) == 2
    assert second.acknowledge(second.marks()) == 1


def test_marks_do_not_cover_what_was_taken_over_and_not_collected(learner: Learner, worker: Worker) -> None:
    dead, client = learner(learner_name="dead", publishes=False), worker()
    send(client, 1, 2)
    dead.collect_experiences(timeout=5.0)
    comm = learner(acknowledge="manual", take_over_seconds=0.5)
    send(client, 3)
    assert numbers(comm.collect_experiences(timeout=5.0)) == [3]
    dead._thread.stop(5.0)
    assert numbers(wait_until("one was collected", lambda: comm.collect_experiences(0.1, max_batches=1))) == [
        1
    ]
    marks = comm.marks()
    for _ in range(2):  # also if the second learner only restored the marks of the first
        comm = learner(acknowledge="manual", take_over_seconds=0.5)
        comm.restore(marks)
        marks = comm.marks()
    assert numbers(wait_until("the other was collected", lambda: comm.collect_experiences(timeout=0.1))) == [
        2
    ]
    assert comm.collect_experiences(timeout=0.3) == []


def test_marks_do_not_cover_what_was_taken_over_later(learner: Learner, worker: Worker) -> None:
    dead, client = learner(learner_name="dead", publishes=False), worker()
    send(client, 1, 2)
    dead.collect_experiences(timeout=5.0)
    comm = learner(acknowledge="manual", take_over_seconds=0.5)
    send(client, 3)
    assert numbers(comm.collect_experiences(timeout=5.0)) == [3]
    before = comm.marks()
    dead._thread.stop(5.0)
    assert numbers(wait_until("one was collected", lambda: comm.collect_experiences(0.1, max_batches=1))) == [
        1
    ]
    after = comm.marks()

    def found_with(marks: Any) -> list[int]:
        comm = learner(acknowledge="manual", take_over_seconds=0.5)
        comm.restore(marks)
        found: list[int] = []
        while pairs := comm.collect_experiences(timeout=1.0):
            found += numbers(pairs)
        return found

    assert found_with(before) == [1, 2]
    assert found_with(after) == [2]


def collects(comm: WorkerCommunicator, got: list[int]) -> int:
    """Collect once; return how many batches were collected so far."""
    got += numbers(comm.collect_experiences(timeout=0.1))
    return len(got)


def test_batches_that_only_a_dead_learner_had_read_are_delivered_after_a_loss(
    server: Server, learner: Learner, worker: Worker
) -> None:
    first = learner(learner_name="a", acknowledge="manual")
    dead = learner(learner_name="b", publishes=False, acknowledge="manual")
    client = worker(level="learner")
    got: list[int] = []
    for number in range(1, 7):
        send(client, number)
        collecting = dead if number % 2 else first
        found = numbers(collecting.collect_experiences(timeout=5.0))
        got += found if collecting is first else []
    assert got == [2, 4, 6]
    marks = first.marks()
    dead._thread.stop(5.0)
    dead._connection.close()
    server.client.flushall()
    wait_until("the rest was collected", lambda: collects(first, got) == 6)
    assert sorted(got) == [1, 2, 3, 4, 5, 6]
    assert first.acknowledge(marks) == 3  # without those collected after that checkpoint
    again = learner(learner_name="a", acknowledge="manual")
    again.restore(marks)
    found = []
    wait_until("they were collected", lambda: collects(again, found) == 3)
    assert found == [1, 3, 5]


@pytest.mark.on_every_engine
def test_each_learner_restores_its_counts_on_a_server_that_lost_everything(
    server: Server, learner: Learner, worker: Worker
) -> None:
    leading, other = learner(), learner(learner_name="other", publishes=False)
    client = worker()
    leading.send_model_weights({"w": 1})
    for number in range(6):
        send(client, number)
        (leading, other)[number % 2].collect_experiences(timeout=5.0)
    leading.collect_experiences()
    other.collect_experiences()
    wait_until(
        "each learner knows all counts",
        lambda: _delivered_as_remembered(leading) == _delivered_as_remembered(other) == 6,
    )
    server.client.flushall()
    wait_until("the weights are published again", lambda: leading.version == 2)
    assert leading.epoch < other.epoch
    wait_until("the counts are restored", lambda: _delivered(leading) == 6)
    send(client, 6)
    assert numbers(other.collect_experiences(timeout=5.0)) == [6]


def _delivered_as_remembered(comm: WorkerCommunicator) -> int:
    comm.collect_experiences()
    return comm._pending.totals()[0]


def _delivered(comm: WorkerCommunicator) -> int:
    counts = comm.get_queue_info()["counts"]
    return counts[0].delivered if counts else 0
