"""Tests of the test servers: Cluster and Sentinel trio start, and faults have the effects that scenarios rely on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis
from redis_cluster import Cluster
from sentinel_trio import SentinelTrio

KEY = "rlb:{test}:"


@pytest.fixture
def cluster(new_cluster: Callable[..., Cluster]) -> Cluster:
    return new_cluster()


def test_a_moved_slot_keeps_its_keys(cluster: Cluster) -> None:
    slot = cluster.slot_of(KEY)
    old = cluster.owner_of(slot)
    new = next(node for node in cluster.masters() if node is not old)
    redirections = list[str]()

    def halfway() -> None:
        for number in range(10):
            try:
                old.ask("GET", f"{KEY}{number}")
            except redis.exceptions.AskError:
                redirections.append("ASK")
        with pytest.raises(redis.exceptions.TryAgainError):
            new.ask_importing("MGET", *(f"{KEY}{number}" for number in range(10)))

    with cluster.client() as client:
        for number in range(10):
            client.set(f"{KEY}{number}", number)
        cluster.move_slot(slot, new, halfway)
        assert redirections == ["ASK"] * 5
        cluster.wait_until_stable()
        assert cluster.owner_of(slot) is new
        assert [client.get(f"{KEY}{number}") for number in range(10)] == [b"%d" % n for n in range(10)]


def test_a_slot_moves_at_once(cluster: Cluster) -> None:
    slot = cluster.slot_of(KEY)
    old = cluster.owner_of(slot)
    new = next(node for node in cluster.masters() if node is not old)
    with cluster.client() as client:
        client.set(KEY, "there")
        if not cluster.can_move_slots_at_once:
            pytest.skip("only Valkey 9 and later move slots as a whole")
        cluster.move_slot_at_once(slot, new)
        cluster.wait_until_stable()
        assert cluster.owner_of(slot) is new
        assert client.get(KEY) == b"there"


def test_a_shard_survives_its_master_which_returns_as_a_replica(cluster: Cluster) -> None:
    slot = cluster.slot_of(KEY)
    master = cluster.owner_of(slot)
    replica = cluster.replica_of(master)
    with cluster.client() as client:
        client.set(KEY, "there")
        cluster.fail_over(replica)
        assert cluster.owner_of(slot) is replica
        replica.kill()
        cluster.wait_until_promoted(master)
        replica.start()
        cluster.wait_until_stable()
        assert replica.is_replica_of(master)
        assert client.get(KEY) == b"there"


def test_an_isolated_cluster_master_loses_its_writes(cluster: Cluster) -> None:
    slot = cluster.slot_of(KEY)
    master = cluster.owner_of(slot)
    master.ask("SET", KEY, "before")
    with cluster.isolated(master) as replica:
        master.ask("SET", KEY, "isolated")
    assert cluster.owner_of(slot) is replica
    assert replica.ask("GET", KEY) == b"before"
    assert master.is_replica_of(replica)


def test_an_emptied_cluster_restarts_without_data(cluster: Cluster) -> None:
    with cluster.client() as client:
        client.set(KEY, "before")
    cluster.kill()
    cluster.empty()
    cluster.start()
    with cluster.client() as client:
        assert client.get(KEY) is None


@pytest.fixture
def trio(new_trio: Callable[..., SentinelTrio]) -> SentinelTrio:
    return new_trio()


def test_sentinels_promote_a_replica_and_demote_the_old_master(trio: SentinelTrio) -> None:
    first = trio.master()
    first.ask("SET", KEY, "there")
    second = trio.fail_over()
    trio.wait_until_stable()
    second.kill()
    third = trio.wait_until_promoted(second)
    second.start()
    trio.wait_until_stable()
    assert second in trio.replicas()
    assert third.ask("GET", KEY) == b"there"


def test_restarted_sentinels_know_the_master(trio: SentinelTrio) -> None:
    second = trio.fail_over()
    trio.wait_until_stable()
    trio.stop_sentinels()
    assert trio.master() is second
    trio.start_sentinels()
    trio.wait_until_stable()
    assert trio.master() is second


def test_an_isolated_sentinel_master_loses_its_writes(trio: SentinelTrio) -> None:
    trio.master().ask("SET", KEY, "before")
    with trio.isolated() as old:
        old.ask("SET", KEY, "isolated")
    assert trio.master() is not old
    assert trio.master().ask("GET", KEY) == b"before"
    assert old in trio.replicas()


def test_an_emptied_trio_restarts_without_data(trio: SentinelTrio) -> None:
    trio.master().ask("SET", KEY, "before")
    trio.kill()
    trio.empty()
    trio.start()
    assert trio.master().ask("GET", KEY) is None
