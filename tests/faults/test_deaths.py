"""Scenarios 3 and 6: learners that are killed at every phase, and suspended workers that continue."""

from __future__ import annotations

import random
import signal
from functools import partial
from typing import Any

import pytest
from arena import Arena, LoggedProcess


def _has_ended(process: LoggedProcess) -> bool:
    return process.process.poll() is not None


@pytest.mark.on_every_engine
@pytest.mark.parametrize("phase", ["read", "insert", "checkpoint", "acknowledge"])
def test_3_the_learner_is_killed(
    arena: Arena, seed: int, phase: str, full: bool, measurements: dict[str, Any]
) -> None:
    """Killed repeatedly at one phase, the learner resumes from its checkpoint: no batch is lost or inserted twice."""
    chance = random.Random(seed)
    learner = arena.start_learner(die=[phase, chance.randint(1, 6)], max_batches=4)
    for worker in range(3):
        arena.start_worker(worker, batches=150 if full else 80, pause=0.02, level="learner")
    kills = 5 if full else 3
    for kill in range(kills):
        arena.wait("the learner died", partial(_has_ended, learner))
        last = kill == kills - 1
        learner = arena.learner = learner.restart(die=None if last else [phase, chance.randint(2, 9)])
    arena.check(arena.finish())
    measurements |= {"faults": kills, "batches": arena.count_produced()}


@pytest.mark.on_every_engine
def test_6_a_suspended_worker_is_replaced_and_resumes(
    arena: Arena, full: bool, measurements: dict[str, Any]
) -> None:
    """Once the second process has joined, batches of the first are refused and counted."""
    arena.start_learner()
    first = arena.start_worker(0, batches=10_000, pause=0.002)
    other = arena.start_worker(1, batches=100, pause=0.01)
    arena.wait("the first worker has sent batches", lambda: len(first.lines("produced")) > 20)
    first.signal(signal.SIGSTOP)
    second = arena.start_worker(0, name="-second", batches=100, pause=0.01)
    arena.wait("the second worker has sent batches", lambda: len(second.lines("produced")) > 20)
    first.signal(signal.SIGCONT)
    arena.wait("the first worker is fenced", lambda: first.lines("fenced"))
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
