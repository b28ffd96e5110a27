"""Scenarios 17 to 20, faults with Sentinels: failover, an isolated master, and missing Sentinels."""

from __future__ import annotations

import time
from typing import Any

import pytest
from arena import Arena, measure_recovery
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
    arena: Arena, trio: SentinelTrio, level: str, full: bool, measurements: dict[str, Any]
) -> None:
    """All clients recover; at level `replica` only batches that raised `Unconfirmed` can be lost."""
    arena.start_all(level)
    took = []
    for _ in range(3 if full else 2):
        old = trio.master()
        old.kill()
        trio.wait_until_promoted(old)
        took.append(measure_recovery(arena, time.monotonic()))
        old.empty()
        old.start()  # it becomes a replica
        trio.wait_until_stable()
    lost = arena.finish_and_check(level)
    if level == "replica":
        unconfirmed = {
            (number, line["unconfirmed"])
            for number, worker in enumerate(arena.workers)
            for line in worker.lines("unconfirmed")
        }
        assert {(worker, sequence) for worker, _, sequence in lost} <= unconfirmed
    measurements |= {
        "faults": len(took),
        "batches": arena.count_produced(),
        "vanished": len(lost),
        "recovery": took,
    }


def test_18_masters_are_demoted_or_hang(
    arena: Arena, trio: SentinelTrio, full: bool, measurements: dict[str, Any]
) -> None:
    """A demoted master answers READONLY and a hanging one does not answer: clients leave both."""
    arena.start_all("learner")
    took = []
    for _ in range(3 if full else 1):
        trio.fail_over()
        took.append(measure_recovery(arena, time.monotonic()))
        trio.wait_until_stable()
        old = trio.master()
        old.freeze()
        trio.wait_until_promoted(old)
        took.append(measure_recovery(arena, time.monotonic(), 20.0))
        old.thaw()
        trio.wait_until_stable()
    arena.finish_and_check("learner")
    measurements |= {"faults": len(took), "batches": arena.count_produced(), "recovery": took}


@pytest.mark.parametrize("level", ["learner", "redis"])
def test_19_a_minority_accepts_writes_for_a_while(
    arena: Arena, trio: SentinelTrio, level: str, measurements: dict[str, Any]
) -> None:
    """Writes that an isolated master accepted are lost: the batches are sent again or counted as lost."""
    arena.start_all(level)
    with trio.isolated():
        before = arena.count_inserted()
        arena.wait("batches arrive through the minority", lambda: arena.count_inserted() > before + 100)
        arena.pause()
        before = arena.count_produced()
        arena.wait("more batches wait", lambda: arena.count_produced() > before + 30)
    arena.resume()
    took = measure_recovery(arena, time.monotonic())
    lost = arena.finish_and_check(level)
    assert bool(lost) == (level == "redis")
    measurements |= {
        "faults": 1,
        "batches": arena.count_produced(),
        "vanished": len(lost),
        "recovery": [took],
    }


def test_20_all_sentinels_are_down_for_a_while(
    arena: Arena, trio: SentinelTrio, full: bool, measurements: dict[str, Any]
) -> None:
    """Clients continue until the master dies; once the Sentinels are back, a replica is promoted."""
    arena.start_all("learner")
    trio.stop_sentinels()
    took = [measure_recovery(arena, time.monotonic())]
    time.sleep(60.0 if full else 4.0)
    took.append(measure_recovery(arena, time.monotonic()))
    old = trio.master()
    old.kill()
    time.sleep(2.0)
    trio.start_sentinels()
    trio.wait_until_promoted(old)
    took.append(measure_recovery(arena, time.monotonic()))
    arena.finish_and_check("learner")
    measurements |= {"faults": 2, "batches": arena.count_produced(), "recovery": took}
