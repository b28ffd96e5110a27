"""Damaged, missing and lost weights: a worker never loads half a version, and the learner publishes lost ones again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from conftest import RealServer, Server, wait_until

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.backend.scripts import Script
from rlbroker.errors import ConnectionFailed, RunLost
from rlbroker.learner import maintenance

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def test_a_damaged_version_is_recorded_and_the_next_one_is_applied(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm = learner()
    comm.send_model_weights({"w": np.arange(1000)})
    [key] = server.client.scan_iter(keys.chunk("1-*", 1))
    server.client.set(key, b"x" + server.client.get(key)[1:])
    client = worker()
    model: dict[str, Any] = {}
    comm.collect_experiences()
    wait_until(
        "the worker gave up on version 1", lambda: client.poll(model) or client._inbox.acknowledgements.count
    )
    assert (client.version, model) == (0, {})

    comm.send_model_weights({"w": np.arange(5)})

    wait_until("the worker runs version 2", lambda: client.poll(model))
    assert model["w"].tolist() == [0, 1, 2, 3, 4]


def test_a_version_whose_chunk_is_missing_is_never_half_applied(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker()
    model = {"w": np.zeros(3)}
    comm.send_model_weights({"w": np.ones(3)})
    client.load_weights(model)
    # Version 2 has a manifest and no chunks.
    manifest = server.client.hgetall(keys.weights)
    server.client.hset(keys.weights, mapping={**manifest, b"version": 2, b"upload": b"2-9-9"})
    wait_until("it is reported", lambda: comm.workers()[0].problem.startswith("version 2: chunk 0"))

    def gave_up() -> bool:
        return client.poll(model) or any(one.total for one in comm.missed_updates().values())

    wait_until("the worker gave up", gave_up)
    assert model["w"].tolist() == [1, 1, 1]
    assert client.version == 1


def test_a_version_that_does_not_fit_into_memory_is_given_up_and_the_next_one_loaded(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, client = learner(), worker()
    asked: list[int] = []

    def refuse(image_bytes: int, raw_bytes: int) -> None:
        asked.append(image_bytes)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(client._subscriber._images, "reserve", refuse)
        comm.send_model_weights({"number": 1})
        wait_until("the worker has asked for memory", lambda: asked)
        wait_until("it gives up this version", lambda: client._subscriber.newest == 1)
    comm.send_model_weights({"number": 2})
    model: dict[str, Any] = {}
    wait_until("it runs the next version", lambda: client.poll(model))
    assert model == {"number": 2}


def test_a_lost_announcement_delays_an_update_and_loses_nothing(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    """The manifest is the truth: here it changes without a notice and without a message."""
    comm, client = learner(), worker()
    comm.send_model_weights({"w": np.zeros(1)})
    client.load_weights({})
    server.client.hset(keys.weights, "version", 2)
    wait_until("the worker runs version 2", lambda: client.poll({}))


@pytest.mark.on_every_engine
@pytest.mark.parametrize("lost", ["chunk", "header", "manifest", "bits"])
def test_weights_that_were_lost_in_part_are_published_again(
    learner: Learner, worker: Worker, server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.setattr(maintenance, "HOUSEKEEPING_SECONDS", 0.2)
    comm = learner()
    comm.send_model_weights({"w": np.arange(1000)}, compression_enabled=False)
    [key] = server.client.scan_iter(keys.chunk("1-*", 0 if lost == "header" else 1))
    if lost == "bits":
        server.client.setrange(key, 100, b"x")
    else:
        server.client.delete(keys.weights if lost == "manifest" else key)
    model: dict[str, Any] = {}
    client = worker()
    wait_until("the worker runs them", lambda: client.poll(model))
    wait_until("the learner knows too that they are there", lambda: comm.version == 2)
    assert (client.version, model["w"][-1]) == (2, 999)
    comm._thread.stop(5.0)
    comm._maintenance.housekeep()
    comm._maintenance.run_once()
    assert comm.version == 2  # they are not published once more


def test_workers_that_run_a_newer_version_than_a_new_learner_get_its_weights(
    learner: Learner, worker: Worker, server: Server
) -> None:
    old, client = learner(), worker()
    for _ in range(3):
        old.send_model_weights({"from": "old"})
    model: dict[str, str] = {}
    wait_until("the worker runs version 3", lambda: client.poll(model) and client.version == 3)
    old.cleanup(stop_workers=False)
    client._heartbeat._thread.stop(5.0)  # it comes back later than the new learner
    server.client.flushall()
    new = learner()
    assert new.send_model_weights({"from": "new"}).version == 1
    client._heartbeat._beat()
    wait_until("the worker runs the new ones", lambda: client.poll(model) and model["from"] == "new")
    assert client.version == 4
    wait_until("the learner knows the number", lambda: new.version == 4)


def publish_and_lose_the_reply(
    comm: WorkerCommunicator, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publish weights; the commit is applied, and its reply never arrives."""
    run = comm._publisher._committer._channel.run

    def lose(script: Script, *arguments: Any, **options: Any) -> Any:
        run(script, *arguments, **options)
        raise ConnectionFailed("the reply was lost until the deadline")

    with monkeypatch.context() as patch:
        patch.setattr(comm._publisher._committer._channel, "run", lose)
        patch.setattr(comm._connection, "timeout_seconds", 0.5)
        with pytest.raises(ConnectionFailed):
            comm.send_model_weights(weights)


def test_an_unconfirmed_number_is_not_used_again_after_the_server_lost_its_data(
    learner: Learner, worker: Worker, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"from": "first"})
    publish_and_lose_the_reply(comm, {"from": "second"}, monkeypatch)
    received: dict[str, str] = {}
    wait_until("the worker runs version 2", lambda: client.poll(received) and client.version == 2)
    server.client.flushall()
    assert comm.send_model_weights({"from": "third"}).version > 2
    wait_until("it runs the third", lambda: client.poll(received) or received["from"] == "third")


def test_an_unconfirmed_version_that_was_applied_is_published_again_after_a_loss(
    learner: Learner, worker: Worker, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = learner()
    publish_and_lose_the_reply(comm, {"from": "first"}, monkeypatch)
    comm._publisher.restore()
    server.client.flushall()
    wait_until("it is published again", lambda: comm.version == 2)
    received: dict[str, str] = {}
    assert worker().load_weights(received) == 2
    assert received == {"from": "first"}


def test_a_server_that_is_flushed_again_and_again_is_an_outage_for_a_learner(
    real_server: RealServer, learner: Learner
) -> None:
    comm = learner(timeout=1.0)
    ended = threading.Event()

    def flush() -> None:
        while not ended.wait(0.01):
            real_server.client.flushall()

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        for _ in range(5):
            with suppress(ConnectionFailed, RunLost):
                comm.send_model_weights({"w": np.zeros(1000)})
    finally:
        ended.set()
        thread.join()

    def published() -> bool:
        with suppress(ConnectionFailed, RunLost):
            return comm.send_model_weights({"w": np.ones(3)}).version == comm.version
        return False

    wait_until("it publishes again", published)
