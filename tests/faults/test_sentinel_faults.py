"""Faults that only Sentinels know: a master that another one replaces, a minority, and Sentinels that are gone."""

from __future__ import annotations

import time
from typing import Any

import pytest
from arena import Arena, recovery
from sentinel_trio import SentinelTrio


@pytest.fixture
def engine() -> str:
    return "sentinel"


@pytest.fixture
def trio(arena: Arena) -> SentinelTrio:
    assert isinstance(arena.server, SentinelTrio)
    return arena.server


@pytest.mark.parametrize("level", ["learner", "replica", "redis"])
def test_17_the_master_is_killed_and_a_replica_promoted(
    arena: Arena, trio: SentinelTrio, level: str, full: bool, figures: dict[str, Any]
) -> None:
    """All go on by themselves; at level `replica` only what a worker knows to be unconfirmed can be lost."""
    arena.begin(level)
    took = []
    for _ in range(3 if full else 2):
        old = trio.master()
        old.kill()
        trio.wait_promoted(old)
        took.append(recovery(arena, time.monotonic()))
        old.empty()
        old.start()  # it becomes a replica
        trio.wait_ok()
    lost = arena.settle(level)
    if level == "replica":
        unconfirmed = {
            (number, line["unconfirmed"])
            for number, worker in enumerate(arena.workers)
            for line in worker.lines("unconfirmed")
        }
        assert {(worker, sequence) for worker, _, sequence in lost} <= unconfirmed
    figures |= {
        "faults": len(took),
        "batches": arena.produced(),
        "vanished": len(lost),
        "recovery": took,
    }


def test_18_masters_hand_over_and_hang(
    arena: Arena, trio: SentinelTrio, full: bool, figures: dict[str, Any]
) -> None:
    """One that was demoted answers READONLY, one that hangs doesn't answer: nobody stays with either."""
    arena.begin("learner")
    took = []
    for _ in range(3 if full else 1):
        trio.fail_over()
        took.append(recovery(arena, time.monotonic()))
        trio.wait_ok()
        old = trio.master()
        old.freeze()
        trio.wait_promoted(old)
        took.append(recovery(arena, time.monotonic(), 20.0))
        old.thaw()
        trio.wait_ok()
    arena.settle("learner")
    figures |= {"faults": len(took), "batches": arena.produced(), "recovery": took}


@pytest.mark.parametrize("level", ["learner", "redis"])
def test_19_a_minority_takes_writes_for_a_while(
    arena: Arena, trio: SentinelTrio, level: str, figures: dict[str, Any]
) -> None:
    """What a master took while it was alone with its clients is gone: sent again, or known to be lost."""
    arena.begin(level)
    with trio.alone():
        before = arena.inserted()
        arena.wait("the minority's batches come", lambda: arena.inserted() > before + 100)
        arena.pause()
        before = arena.produced()
        arena.wait("others wait", lambda: arena.produced() > before + 30)
    arena.go_on()
    took = recovery(arena, time.monotonic())
    lost = arena.settle(level)
    assert bool(lost) == (level == "redis")
    figures |= {"faults": 1, "batches": arena.produced(), "vanished": len(lost), "recovery": [took]}


def test_20_all_sentinels_are_gone_for_a_while(
    arena: Arena, trio: SentinelTrio, full: bool, figures: dict[str, Any]
) -> None:
    """Nobody misses them until the master dies; once they are back, another one takes its place."""
    arena.begin("learner")
    trio.stop_sentinels()
    took = [recovery(arena, time.monotonic())]
    time.sleep(60.0 if full else 4.0)
    took.append(recovery(arena, time.monotonic()))
    old = trio.master()
    old.kill()
    time.sleep(2.0)
    trio.start_sentinels()
    trio.wait_promoted(old)
    took.append(recovery(arena, time.monotonic()))
    arena.settle("learner")
    figures |= {"faults": 2, "batches": arena.produced(), "recovery": took}
