"""Lifetimes of chunks: the latest version stays, superseded ones expire, whatever fails in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from conftest import RealServer, Server, wait_until

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.errors import ConnectionFailed
from rlbroker.weights import retention
from rlbroker.weights.retention import SUPERSEDED_SECONDS

Learner = Callable[..., WorkerCommunicator]


@pytest.mark.on_every_engine
def test_superseded_chunks_expire_and_the_latest_stay(learner: Learner, server: Server, keys: Keys) -> None:
    comm = learner()
    for _ in range(2):
        comm.send_model_weights({"w": np.zeros(10)})
    lifetimes = {
        name.decode().rsplit(":", 2)[1]: server.client.ttl(name)
        for name in server.client.scan_iter(keys.chunk("*", 1))
    }
    assert lifetimes.pop(f"2-{comm.epoch}-2") == -1
    [lifetime] = lifetimes.values()
    assert 0 < lifetime <= SUPERSEDED_SECONDS


def test_frequent_versions_do_not_fill_the_server(real_server: RealServer, run: str) -> None:
    """Superseded weights are kept for slow workers, but not at the expense of the newest."""
    with WorkerCommunicator(1, redis_url=real_server.url, run=run, timeout=5.0) as comm:
        limit = int(real_server.client.info("memory")["used_memory"]) + 12_000_000
        real_server.client.config_set("maxmemory", limit)
        try:
            for number in range(20):
                noise = np.random.default_rng(number).bytes(2_000_000)
                assert (
                    comm.send_model_weights({"noise": noise}, compression_enabled=False).version == number + 1
                )
        finally:
            real_server.client.config_set("maxmemory", 0)
        received: dict[str, Any] = {}
        with WorkerClient(real_server.url, run=run) as client:
            assert client.load_weights(received) == 20
        assert received["noise"] == noise


def cut_off_after_commit(comm: WorkerCommunicator, patch: pytest.MonkeyPatch) -> None:
    """Let the commands that set lifetimes fail."""
    execute_all = comm._connection.execute_all

    def fail(commands: Sequence[Sequence[Any]], **options: Any) -> list[Any]:
        # Before the commit, the nodes of a Cluster are asked for the chunks.
        if not commands or commands[0][0] == "EXISTS":
            return execute_all(commands, **options)
        raise ConnectionFailed("the server is away")

    patch.setattr(comm._connection, "execute_all", fail)


def test_the_next_learner_sets_the_lifetimes_that_a_fault_left_unset(
    learner: Learner, server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Superseded chunks expire even if the learner was cut off, or died, right after its commit."""
    comm = learner()
    comm.send_model_weights({"number": 1})
    with monkeypatch.context() as patch:
        cut_off_after_commit(comm, patch)
        assert comm.send_model_weights({"number": 2}).version == 2
    assert server.client.ttl(keys.chunk(f"1-{comm.epoch}-1", 0)) == -1
    learner()
    assert 0 < server.client.ttl(keys.chunk(f"1-{comm.epoch}-1", 0)) <= SUPERSEDED_SECONDS
    assert server.client.ttl(keys.chunk(f"2-{comm.epoch}-2", 0)) == -1


@pytest.mark.on_every_engine
def test_a_fault_leaves_no_chunk_of_a_delta_chain_to_expire(
    learner: Learner, server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version after a fault may be a delta to the version whose lifetimes were not set."""
    comm = learner(host_cache=False)
    weights = np.zeros(1 << 16, np.float32)
    with monkeypatch.context() as patch:
        cut_off_after_commit(comm, patch)
        comm.send_model_weights({"w": weights})
    weights[0] = 1
    assert comm.send_model_weights({"w": weights}).kind == "delta"
    chunks = [*server.client.scan_iter(keys.chunk("*", 0)), *server.client.scan_iter(keys.chunk("*", 1))]
    assert {name: server.client.ttl(name) for name in chunks} == dict.fromkeys(chunks, -1)
    assert len(chunks) == 4


def test_lifetimes_that_are_set_late_keep_nothing_that_was_superseded_meanwhile(
    learner: Learner, server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learner that was replaced after its commit does not persist chunks for ever."""
    old = learner()
    with monkeypatch.context() as patch:
        cut_off_after_commit(old, patch)
        old.send_model_weights({"number": 1})
    learner().send_model_weights({"number": 2})
    old._publisher.enforce_retention()
    assert 0 < server.client.ttl(keys.chunk(f"1-{old.epoch}-1", 0)) <= SUPERSEDED_SECONDS


@pytest.mark.on_every_engine
def test_superseded_chunks_whose_expiry_was_lost_are_deleted(
    learner: Learner, server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that is promoted may not have received the last EXPIRE."""
    comm = learner()
    for number in range(2):
        comm.send_model_weights({"number": number})
    superseded = keys.chunk(f"1-{comm.epoch}-1", 0)
    assert server.client.persist(superseded)
    monkeypatch.setattr(retention, "SUPERSEDED_SECONDS", 0)

    def gone() -> bool:
        comm._publisher.enforce_retention()
        return not server.client.exists(superseded)

    wait_until("it is deleted", gone)
    assert server.client.ttl(keys.chunk(f"2-{comm.epoch}-2", 0)) == -1


def test_a_replaced_learner_deletes_nothing_that_the_newer_one_names(
    learner: Learner, server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows a version that a failover lost; the version before is the latest again."""
    old = learner()
    old.send_model_weights({"number": 1})
    before = server.client.hgetall(keys.weights)
    old.send_model_weights({"number": 2})
    named_again = keys.chunk(f"1-{old.epoch}-1", 0)
    assert server.client.persist(named_again)
    server.client.hset(keys.weights, mapping=before)
    learner()
    monkeypatch.setattr(retention, "SUPERSEDED_SECONDS", 0)

    def checked() -> bool:
        old._publisher.enforce_retention()
        return not old._publisher._retention._superseded

    wait_until("it has checked what should have expired", checked)
    assert server.client.exists(named_again)
