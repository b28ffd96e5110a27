"""Scenarios 3 and 6: learners that die at every phase, and workers that come back from the dead."""

from __future__ import annotations

import random
import signal
from functools import partial
from typing import Any

import pytest
from arena import Arena, LoggedProcess


def _ended(actor: LoggedProcess) -> bool:
    return actor.process.poll() is not None


@pytest.mark.on_every_engine
@pytest.mark.parametrize("phase", ["read", "insert", "checkpoint", "acknowledge"])
def test_3_the_learner_is_killed(
    arena: Arena, seed: int, phase: str, full: bool, measurements: dict[str, Any]
) -> None:
    """Killed again and again at one phase, it goes on from its checkpoint: nothing twice in it, nothing lost."""
    chance = random.Random(seed)
    learner = arena.start_learner(die=[phase, chance.randint(1, 6)], max_batches=4)
    for worker in range(3):
        arena.start_worker(worker, batches=150 if full else 80, pause=0.02, level="learner")
    lives = 5 if full else 3
    for life in range(lives):
        arena.wait("the learner died", partial(_ended, learner))
        last = life == lives - 1
        learner = arena.learner = learner.restart(die=None if last else [phase, chance.randint(2, 9)])
    arena.check(arena.finish())
    measurements |= {"faults": lives, "batches": arena.count_produced()}


@pytest.mark.on_every_engine
def test_6_a_worker_sleeps_is_replaced_and_wakes(
    arena: Arena, full: bool, measurements: dict[str, Any]
) -> None:
    """Nothing of the first process is accepted once the second is there, and what was refused is counted."""
    arena.start_learner()
    first = arena.start_worker(0, batches=10_000, pause=0.002)
    other = arena.start_worker(1, batches=100, pause=0.01)
    arena.wait("the first has sent some", lambda: len(first.lines("produced")) > 20)
    first.signal(signal.SIGSTOP)
    second = arena.start_worker(0, name="-second", batches=100, pause=0.01)
    arena.wait("the second has sent some", lambda: len(second.lines("produced")) > 20)
    first.signal(signal.SIGCONT)
    arena.wait("the first is fenced", lambda: first.lines("fenced"))
    first.process.wait()
    report = arena.finish()
    first.interrupted = True
    arena.check(report)
    assert other.lines("finished")
    measurements |= {
        "faults": 1,
        "batches": arena.count_produced(),
        "fenced": report["counts"]["0"]["lost"].get("fenced", 0),
    }
