"""Lifetimes that a server forgets: a replica that is promoted may not have heard of the last ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Server, wait_until

from rlbroker import WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.weights import retention


@pytest.mark.on_every_engine
def test_superseded_chunks_do_not_stay_though_nobody_lets_them_expire(
    learner: Callable[..., WorkerCommunicator], server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_learner_that_was_replaced_deletes_nothing_that_the_newer_one_names(
    learner: Callable[..., WorkerCommunicator], server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows of a version that a failover lost; the version before is the latest again."""
    old = learner()
    old.send_model_weights({"number": 1})
    before = server.client.hgetall(keys.weights)
    old.send_model_weights({"number": 2})
    named_again = keys.chunk(f"1-{old.epoch}-1", 0)
    assert server.client.persist(named_again)
    server.client.hset(keys.weights, mapping=before)
    learner()
    monkeypatch.setattr(retention, "SUPERSEDED_SECONDS", 0)

    def forgotten() -> bool:
        old._publisher.enforce_retention()
        return not old._publisher._retention._superseded

    wait_until("it has looked at what should have expired", forgotten)
    assert server.client.exists(named_again)
