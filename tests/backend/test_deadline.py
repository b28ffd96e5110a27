"""Deadlines and exponential back-off."""

from __future__ import annotations

import itertools
import random

import pytest
from interrupts import Points, interrupt_at

from rlbroker.backend.deadline import Backoff, Deadline, try_seconds, within

pytestmark = pytest.mark.unit


def test_pauses_grow_and_end_at_the_deadline() -> None:
    backoff = Backoff(first=1.0, longest=4.0)
    random.seed(0)
    seeded = random.getstate()
    assert [round(backoff.next() / ceiling, 1) <= 1.0 for ceiling in (1, 2, 4, 4)] == [True] * 4
    assert backoff.next(Deadline(0.01)) <= 0.01
    backoff.reset()
    assert backoff.next() <= 1.0
    assert random.getstate() == seeded, "a program's own random numbers would depend on the network"


@pytest.mark.parametrize("points", ["function", "line"])
def test_an_interrupt_leaves_no_deadline_behind(points: Points) -> None:
    for point in itertools.count(1):
        with interrupt_at(point, points) as interrupt, within(Deadline(0.001)), within(Deadline(0.0001)):
            pass
        assert try_seconds(100.0) == 100.0, interrupt.place
        if not interrupt.place:
            break
