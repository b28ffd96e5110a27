"""Names of keys, with shards and without."""

from __future__ import annotations

from collections import Counter

import fakeredis
import pytest

from rlbroker.backend.cluster import slot_of
from rlbroker.backend.keys import Keys, run_of, shard_of

pytestmark = pytest.mark.unit


def keys(*shards: str) -> Keys:
    return Keys("pong", shards=shards)


def test_on_a_single_server_all_keys_have_the_same_prefix() -> None:
    alone = keys()
    names = [alone.meta, alone.chunk("1-1-1", 7), *alone.queue(3), alone.heartbeat(3)]
    assert {shard_of(name) for name in names} == {"rlb:{pong}"}
    assert alone.one_of_each_shard == []


def test_a_worker_has_one_shard_and_chunks_are_spread_over_all() -> None:
    spread = keys("0", "4", "7")
    assert {shard_of(name) for name in spread.queue(4)} == {"rlb:{pong/s4}"}
    chunks = [shard_of(name) for name in spread.upload("1-1-1", 8)]
    assert Counter(chunks) == {"rlb:{pong/s0}": 3, "rlb:{pong/s4}": 3, "rlb:{pong/s7}": 3}
    assert {shard_of(one) for one in spread.one_of_each_shard} == set(chunks)


def test_the_runs_own_keys_have_one_slot_with_any_shards() -> None:
    spread = keys("0", "4")
    own = [spread.meta, spread.weights, spread.control, spread.missed, spread.pending, spread.workers]
    own += [spread.life(3), spread.heartbeat(3), spread.acknowledgements(3), spread.ledger(3)]
    assert {slot_of(name) for name in own} == {slot_of(keys().meta)}


@pytest.mark.parametrize(("count", "servers", "share"), [(3, 3, 1), (6, 3, 2), (1, 3, 1), (4, 3, 2)])
def test_shards_are_spread_evenly_over_the_servers(count: int, servers: int, share: int) -> None:
    def server_of(key: str) -> int:
        return slot_of(key) * servers // 16384

    found = keys().choose_shards(count, servers, server_of)
    spread = Keys("pong")
    spread.use_shards(found)
    assert len(spread.shards) == count
    assert max(Counter(map(server_of, spread.one_of_each_shard)).values()) == share


def test_shards_are_read_from_the_text_in_meta() -> None:
    spread = keys()
    spread.use_shards("0 4 7")
    assert spread == keys("0", "4", "7")


def test_the_run_of_a_key_is_found_in_every_shard() -> None:
    for name in (keys("4").experiences(3), keys().meta, keys("4").chunk("1-1-1", 0)):
        assert run_of(name) == "pong"
    for name in ("rlb:{pong/t4}:x:3", "rlb:{pong/s}:x:3", "rlb:{pong/s4}:x:a", "rlb:{a/b/s4}:x:3", "pong"):
        assert run_of(name) == ""


def test_a_queue_is_found_in_its_shard_by_any_of_its_keys() -> None:
    for spread in (keys(), keys("4")):
        for name in spread.queue(3):
            assert (keys().queue_of(name), keys().queue_beside(name)) == (3, spread.queue(3))
    assert keys().queue_beside(keys().meta) == []


def test_the_pattern_of_a_run_matches_all_its_keys_and_no_others() -> None:
    client = fakeredis.FakeRedis()
    own = [keys().meta, *keys("4").queue(3), keys("0").chunk("1-1-1", 0)]
    for name in (*own, Keys("pong2").meta, Keys("pon").meta, "rlb:other"):
        client.set(name, "")
    assert sorted(client.scan_iter(keys().everything)) == sorted(name.encode() for name in own)
