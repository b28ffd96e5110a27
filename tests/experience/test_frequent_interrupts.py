"""A learner goes on collecting though a signal interrupts nearly each of its calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from interrupts import Alarm, interrupt_at

from rlbroker import WorkerClient, WorkerCommunicator

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]

BATCHES = 200

#: An interrupt comes after so many functions: one call cannot collect all batches, but it can find some.
FUNCTIONS = 3000


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_learner_that_is_always_interrupted_collects_everything(learner: Learner, worker: Worker) -> None:
    """What an interrupted call has found is returned by the next one, before that looks for more."""
    comm, client = learner(), worker()
    for number in range(BATCHES):
        client.send_experiences({"number": number})
    got: list[int] = []
    interrupted = 0
    for _ in range(BATCHES):
        with interrupt_at(FUNCTIONS, "function", Alarm) as interrupt:
            got += [batch["number"] for _, batch in comm.collect_experiences(timeout=5.0)]
        interrupted += bool(interrupt.place)
        if len(got) == BATCHES:
            break
    assert got == list(range(BATCHES))
    assert interrupted
    comm.collect_experiences()
    counts = comm.get_queue_info()["counts"][client.worker_id]
    assert (counts.delivered, counts.in_hand, counts.waiting) == (BATCHES, 0, 0)
