"""Faults that only a Cluster knows: slots that move, a shard that fails over, is cut off, or is lost whole."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import pytest
from arena import Arena, recovery
from engines import Cluster, Node

#: Whose server is meant: a shard's, with streams and chunks; or the run's own, with pointer, control and ledger.
PARTS = ["shard", "own"]


@pytest.fixture
def engine() -> str:
    return "cluster"


@pytest.fixture
def cluster(arena: Arena) -> Cluster:
    assert isinstance(arena.server, Cluster)
    return arena.server


def _begin(arena: Arena, level: str) -> None:
    """Let batches flow from workers of every shard."""
    arena.start_learner(versions=0, version_seconds=0.3)
    for number in range(3):
        arena.start_worker(number, batches=None, pause=0.01, level=level)
    arena.wait("batches flow, of every worker", lambda: arena.inserted() > 100 and arena.all_send())
    with arena.server.client() as client:
        arena.keys.spread(client.hget(arena.keys.meta, "shards").decode())
    assert len(arena.keys.shards) == 3


def _flow(arena: Arena, batches: int = 100) -> None:
    """Wait for more batches."""
    enough = arena.inserted() + batches
    arena.wait("batches flow", lambda: arena.inserted() > enough)


def _slot(arena: Arena, cluster: Cluster, part: str) -> int:
    """Give the slot of a part of the run; of the shards, the one whose master is not the run's own."""
    own = cluster.slot_of(arena.keys.meta)
    if part == "own":
        return own
    slots = [cluster.slot_of(key) for key in arena.keys.one_of_each_shard]
    return next(slot for slot in slots if cluster.owner_of(slot) is not cluster.owner_of(own))


def _finish(arena: Arena, level: str, figures: dict[str, Any], **found: Any) -> list[tuple[int, int, int]]:
    """Apply the oracle, and give the batches that are counted as lost, which at level `learner` are none."""
    report = arena.finish(120.0)
    missing = arena.check(report, lost="nothing" if level == "learner" else "vanished")
    figures |= {"batches": arena.produced(), "vanished": len(missing), **found}
    return missing


@pytest.mark.parametrize("how", ["key by key", "at once"])
def test_12_slots_move_under_load(
    arena: Arena, cluster: Cluster, how: str, full: bool, figures: dict[str, Any]
) -> None:
    """Streams, chunks, and what is the run's own change their servers, and nothing is lost at any level."""
    if how == "at once" and not cluster.moves_at_once:
        pytest.skip("only Valkey 9 and later move slots as a whole")
    chance = random.Random(arena.seed)
    _begin(arena, "redis")
    moved = 0
    for _ in range(5 if full else 1):
        for key in (*arena.keys.one_of_each_shard, arena.keys.meta):
            slot = cluster.slot_of(key)
            to = chance.choice([node for node in cluster.masters() if node is not cluster.owner_of(slot)])
            if how == "at once":
                cluster.move_slot_at_once(slot, to)
            else:
                cluster.move_slot(slot, to, halfway=partial(time.sleep, chance.uniform(0.2, 1.0)))
            moved += 1
            recovery(arena, time.monotonic())
    cluster.wait_ok()
    assert not _finish(arena, "redis", figures, faults=moved)


def test_13_replicas_take_over_again_and_again(
    arena: Arena, cluster: Cluster, full: bool, figures: dict[str, Any]
) -> None:
    """Where masters hand over, as for maintenance, nothing is lost at any level."""
    _begin(arena, "redis")
    faults = 0
    for _ in range(5 if full else 1):
        for master in cluster.masters():
            cluster.fail_over(cluster.replica_of(master))
            recovery(arena, time.monotonic())
            faults += 1
    assert not _finish(arena, "redis", figures, faults=faults)


@pytest.mark.parametrize("level", ["learner", "redis"])
@pytest.mark.parametrize("part", PARTS)
def test_14_a_master_is_killed_and_its_replica_promoted(
    arena: Arena, cluster: Cluster, part: str, level: str, figures: dict[str, Any]
) -> None:
    """All go on by themselves; later the dead one is back, and takes over from the one that was promoted."""
    _begin(arena, level)
    master = cluster.owner_of(_slot(arena, cluster, part))
    replica = cluster.replica_of(master)
    took = []
    for dies, promoted in ((master, replica), (replica, master)):
        dies.kill()
        cluster.wait_promoted(promoted)
        took.append(recovery(arena, time.monotonic()))
        dies.empty()
        dies.start()
        cluster.wait_ok()
        _flow(arena)
    _finish(arena, level, figures, faults=2, recovery=took)


@pytest.mark.parametrize("level", ["learner", "redis"])
@pytest.mark.parametrize("part", PARTS)
def test_15_a_minority_takes_writes_for_a_while(
    arena: Arena, cluster: Cluster, part: str, level: str, figures: dict[str, Any]
) -> None:
    """What a master took while it was alone with its clients is gone: sent again, or known to be lost."""
    _begin(arena, level)
    master = cluster.owner_of(_slot(arena, cluster, part))
    before = _taken(master)
    with cluster.alone(master):
        time.sleep(1.5)  # less than it takes until it notices
        assert _taken(master) > before, "it took nothing"
    took = recovery(arena, time.monotonic())
    _flow(arena)
    _finish(arena, level, figures, faults=1, recovery=[took])


@pytest.mark.parametrize("level", ["learner", "redis"])
@pytest.mark.parametrize("part", PARTS)
def test_16_a_shard_is_lost_with_its_replica_and_comes_back_empty(
    arena: Arena, cluster: Cluster, part: str, level: str, figures: dict[str, Any]
) -> None:
    """One part of the run is gone and the others are not: at level `learner` nothing is lost."""
    _begin(arena, level)
    master = cluster.owner_of(_slot(arena, cluster, part))
    replica = cluster.replica_of(master)
    if level == "redis":  # something is to be lost
        arena.hold_back(60)
    for node in (replica, master):
        node.kill()
    time.sleep(0.5)
    for node in (master, replica):
        node.empty()
        node.start()
    cluster.wait_ok()
    arena.go_on()
    took = recovery(arena, time.monotonic())
    _flow(arena)
    lost = _finish(arena, level, figures, faults=1, recovery=[took])
    if part == "shard":
        assert bool(lost) == (level == "redis")


def _taken(node: Node) -> int:
    """Give how far its log of writes has got, as its replicas are told."""
    offset: int = node.ask("ROLE")[1]
    return offset
