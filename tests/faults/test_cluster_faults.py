"""Scenarios 12 to 16, faults of a Cluster: slots that move, shards that fail over, are isolated, or are lost."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import pytest
from arena import Arena, measure_recovery
from redis_cluster import Cluster

#: The server of a shard, with streams and chunks, or the run's own server, with manifest, control and ledger.
PARTS = ["shard", "own"]


@pytest.fixture
def engine() -> str:
    return "cluster"


@pytest.fixture
def cluster(arena: Arena) -> Cluster:
    assert isinstance(arena.server, Cluster)
    return arena.server


@pytest.mark.parametrize("how", ["key by key", "at once"])
def test_12_slots_move_under_load(
    arena: Arena, cluster: Cluster, how: str, full: bool, measurements: dict[str, Any]
) -> None:
    """Streams, chunks and the run's own keys move to other servers, and nothing is lost at any level."""
    if how == "at once" and not cluster.can_move_slots_at_once:
        pytest.skip("only Valkey 9 and later move slots as a whole")
    chance = random.Random(arena.seed)
    arena.start_all("redis")
    moved = [*_shards(arena), cluster.slot_of(arena.keys.meta)] * (5 if full else 1)
    for slot in moved:
        to = chance.choice([node for node in cluster.masters() if node is not cluster.owner_of(slot)])
        if how == "at once":
            cluster.move_slot_at_once(slot, to)
        else:
            cluster.move_slot(slot, to, halfway=partial(time.sleep, chance.uniform(0.2, 1.0)))
        measure_recovery(arena, time.monotonic())
    cluster.wait_until_stable()
    assert not arena.finish_and_check("redis")
    measurements |= {"faults": len(moved), "batches": arena.count_produced()}


def test_13_masters_fail_over_as_planned(
    arena: Arena, cluster: Cluster, full: bool, measurements: dict[str, Any]
) -> None:
    """Masters fail over one after another, as for maintenance: nothing is lost at any level."""
    arena.start_all("redis")
    took = []
    for _ in range(5 if full else 1):
        for master in cluster.masters():
            cluster.fail_over(cluster.replica_of(master))
            took.append(measure_recovery(arena, time.monotonic()))
    assert not arena.finish_and_check("redis")
    measurements |= {"faults": len(took), "batches": arena.count_produced(), "recovery": took}


@pytest.mark.parametrize("how", ["killed", "frozen"])
@pytest.mark.parametrize("part", PARTS)
def test_14_a_master_fails_and_its_replica_is_promoted(
    arena: Arena, cluster: Cluster, part: str, how: str, measurements: dict[str, Any]
) -> None:
    """All clients recover; later the first master returns, empty, and is promoted when the second one dies."""
    arena.start_all("learner")
    first = cluster.owner_of(_slot(arena, cluster, part))
    second = cluster.replica_of(first)
    if how == "killed":
        first.kill()
    else:
        first.freeze()
    cluster.wait_until_promoted(second)
    took = [measure_recovery(arena, time.monotonic())]
    first.kill()
    first.empty()
    first.start()
    cluster.wait_until_stable()
    second.kill()
    cluster.wait_until_promoted(first)
    took.append(measure_recovery(arena, time.monotonic()))
    arena.finish_and_check("learner")
    measurements |= {"faults": 2, "batches": arena.count_produced(), "recovery": took}


@pytest.mark.parametrize("level", ["learner", "redis"])
@pytest.mark.parametrize("part", PARTS)
def test_15_a_minority_accepts_writes_for_a_while(
    arena: Arena, cluster: Cluster, part: str, level: str, measurements: dict[str, Any]
) -> None:
    """Writes that an isolated master accepted are lost: the batches are sent again or counted as lost."""
    arena.start_all(level)
    master = cluster.owner_of(_slot(arena, cluster, part))
    arena.pause()
    with cluster.isolated(master):
        time.sleep(1.5)  # shorter than the time until the master detects it
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


@pytest.mark.parametrize("level", ["learner", "redis"])
@pytest.mark.parametrize("part", PARTS)
def test_16_a_master_is_lost_with_its_replica_and_comes_back_empty(
    arena: Arena, cluster: Cluster, part: str, level: str, measurements: dict[str, Any]
) -> None:
    """One part of the run is lost and the others remain: at level `learner` no batch is lost."""
    arena.start_all(level)
    master = cluster.owner_of(_slot(arena, cluster, part))
    replica = cluster.replica_of(master)
    arena.pause()
    expected = {worker: len(worker.lines("produced")) + 10 for worker in arena.workers}
    arena.wait("batches wait", lambda: all(len(one.lines("produced")) > n for one, n in expected.items()))
    for node in (replica, master):
        node.kill()
        node.empty()
    for node in (master, replica):
        node.start()
    cluster.wait_until_stable()
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


def _shards(arena: Arena) -> list[int]:
    """Return the slots of the run's shards."""
    assert isinstance(arena.server, Cluster)
    with arena.server.client() as client:
        arena.keys.use_shards(client.hget(arena.keys.meta, "shards").decode())
    assert len(arena.keys.shards) == 3
    return [arena.server.slot_of(key) for key in arena.keys.one_of_each_shard]


def _slot(arena: Arena, cluster: Cluster, part: str) -> int:
    """Return the slot of a part of the run; for a shard, one on another master than the run's own keys."""
    own = cluster.slot_of(arena.keys.meta)
    elsewhere = (slot for slot in _shards(arena) if cluster.owner_of(slot) is not cluster.owner_of(own))
    return own if part == "own" else next(elsewhere)
