"""`samples_per_insert`: collecting and training limit each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from rlbroker import InvalidArgument, QueueFull, SamplesPerInsert, WorkerClient, WorkerCommunicator

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


@pytest.mark.on_every_engine
def test_too_little_training_blocks_collecting_and_then_the_workers(learner: Learner, worker: Worker) -> None:
    comm = learner(max_queue_size=2, samples_per_insert=SamplesPerInsert(1.0, min_size=2, error_buffer=2.0))
    client = worker()
    collected = []
    for number in range(6):
        client.send_experiences({"number": number})
        collected += comm.collect_experiences()
    assert len(collected) == 4
    with pytest.raises(QueueFull):
        client.send_experiences({"number": 6}, timeout=0.2)
    assert comm.may_sample(2)
    assert len(comm.collect_experiences(timeout=5.0)) == 2
    client.send_experiences({"number": 6})


def test_too_much_training_is_refused_until_more_is_collected(learner: Learner, worker: Worker) -> None:
    comm = learner(samples_per_insert=SamplesPerInsert(2.0, min_size=1, error_buffer=2.0))
    client = worker()
    assert not comm.may_sample()
    client.send_experiences({"number": 0})
    comm.collect_experiences(timeout=5.0)
    assert [comm.may_sample() for _ in range(3)] == [True, True, False]
    client.send_experiences({"number": 1})
    comm.collect_experiences(timeout=5.0)
    assert [comm.may_sample() for _ in range(3)] == [True, True, False]


def test_a_waiting_collect_continues_when_another_thread_samples(learner: Learner, worker: Worker) -> None:
    comm = learner(samples_per_insert=SamplesPerInsert(1.0, min_size=1, error_buffer=1.0))
    client = worker()
    for number in range(3):
        client.send_experiences({"number": number})
    assert len(comm.collect_experiences(timeout=5.0)) == 2
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.extend(comm.collect_experiences(timeout=30.0)))
    waiting.start()
    waiting.join(timeout=0.3)  # until it waits
    assert comm.may_sample()
    waiting.join(timeout=10.0)
    assert len(found) == 1


def test_marks_contain_the_counts_of_inserts_and_samples(learner: Learner, worker: Worker) -> None:
    rule = SamplesPerInsert(1.0, min_size=1, error_buffer=1.0)
    comm, client = learner(samples_per_insert=rule), worker()
    client.send_experiences({"number": 0})
    comm.collect_experiences(timeout=5.0)
    assert comm.may_sample()
    marks = comm.marks()
    again = learner(samples_per_insert=rule)
    again.restore(marks)
    assert (again.marks()["inserts"], again.marks()["samples"]) == (1, 1)
    client.send_experiences({"number": 1})
    assert len(again.collect_experiences(timeout=5.0)) == 1
    assert [again.may_sample(), again.may_sample()] == [True, False]


@pytest.mark.parametrize("rule", [(1.0, 1, 1.0), 4, {"ratio": 1.0}])
def test_only_samples_per_insert_is_accepted(learner: Learner, rule: Any) -> None:
    with pytest.raises(InvalidArgument, match="SamplesPerInsert"):
        learner(samples_per_insert=rule)
