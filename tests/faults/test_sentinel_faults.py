"""Faults that only Sentinels know: a master that another one replaces, a minority, and Sentinels that are gone."""

from __future__ import annotations

import time
from typing import Any

import pytest
from arena import Arena, recovery
from engines import SentinelTrio


@pytest.fixture
def engine() -> str:
    return "sentinel"


@pytest.fixture
def trio(arena: Arena) -> SentinelTrio:
    assert isinstance(arena.server, SentinelTrio)
    return arena.server


def _begin(arena: Arena, level: str) -> None:
    arena.start_learner(versions=0, version_seconds=0.3)
    for number in range(3):
        arena.start_worker(number, batches=None, pause=0.01, level=level)
    arena.wait("batches flow, of every worker", lambda: arena.inserted() > 100 and arena.all_send())


def _finish(arena: Arena, level: str, figures: dict[str, Any], **found: Any) -> list[tuple[int, int, int]]:
    """Apply the oracle, and give the batches that are counted as lost, which at level `learner` are none."""
    report = arena.finish(120.0)
    missing = arena.check(report, lost="nothing" if level == "learner" else "vanished")
    figures |= {"batches": arena.produced(), "vanished": len(missing), **found}
    return missing


@pytest.mark.parametrize("level", ["learner", "replica", "redis"])
def test_17_the_master_is_killed_and_a_replica_promoted(
    arena: Arena, trio: SentinelTrio, level: str, full: bool, figures: dict[str, Any]
) -> None:
    """All go on by themselves; at level `replica` only what a worker knows to be unconfirmed can be lost."""
    _begin(arena, level)
    took = []
    for _ in range(3 if full else 2):
        old = trio.master()
        old.kill()
        trio.wait_promoted(old)
        took.append(recovery(arena, time.monotonic()))
        old.empty()
        old.start()  # a replica from now on
        trio.wait_ok()
    lost = _finish(arena, level, figures, faults=len(took), recovery=took)
    if level == "replica":
        unconfirmed = {
            (number, line["unconfirmed"])
            for number, worker in enumerate(arena.workers)
            for line in worker.lines("unconfirmed")
        }
        assert {(worker, sequence) for worker, _, sequence in lost} <= unconfirmed


def test_18_replicas_take_over_again_and_again(
    arena: Arena, trio: SentinelTrio, full: bool, figures: dict[str, Any]
) -> None:
    """A master that was demoted answers READONLY or not at all, and nobody stays with it."""
    _begin(arena, "learner")
    took = []
    for _ in range(6 if full else 2):
        trio.fail_over()
        took.append(recovery(arena, time.monotonic()))
        trio.wait_ok()
    _finish(arena, "learner", figures, faults=len(took), recovery=took)


@pytest.mark.parametrize("level", ["learner", "redis"])
def test_19_a_minority_takes_writes_for_a_while(
    arena: Arena, trio: SentinelTrio, level: str, figures: dict[str, Any]
) -> None:
    """What a master took while it was alone with its clients is gone: sent again, or known to be lost."""
    _begin(arena, level)
    with trio.alone():
        before = arena.inserted()
        arena.wait("the minority takes batches", lambda: arena.inserted() > before + 100)
        arena.hold_back(30)
    arena.go_on()
    took = recovery(arena, time.monotonic())
    lost = _finish(arena, level, figures, faults=1, recovery=[took])
    assert bool(lost) == (level == "redis")


def test_20_all_sentinels_are_gone_for_a_while(
    arena: Arena, trio: SentinelTrio, full: bool, figures: dict[str, Any]
) -> None:
    """Nobody misses them until the master dies; once they are back, another one takes its place."""
    _begin(arena, "learner")
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
    _finish(arena, "learner", figures, faults=2, recovery=took)
