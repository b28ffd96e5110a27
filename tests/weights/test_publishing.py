"""Publishing: each version is whole or not there, its number is used once, and only the newest learner publishes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Server, wait_until

from rlbroker import Fenced, WorkerClient, WorkerCommunicator
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.scripts import Script
from rlbroker.codec.image import ImagePlan
from rlbroker.errors import (
    Closed,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidArgument,
    ServerFault,
    ServerOutOfMemory,
    UnsupportedType,
)
from rlbroker.weights.commit import COMMIT
from rlbroker.weights.publisher import Publisher
from rlbroker.weights.subscriber import Subscriber
from rlbroker.weights.upload import Uploader

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def some_weights() -> dict[str, torch.Tensor]:
    """Return weights that are large enough to be sent as a delta."""
    return {"w": torch.randn(512, 64), "b": torch.randn(512)}


@pytest.mark.on_every_engine
def test_many_chunks_make_one_version(server: Server, keys: Keys, learner: Learner) -> None:
    """Small limits stand in for gigabytes: chunks, segments and their order."""
    epoch = learner().epoch
    connection = Connection(
        **{name.replace("redis_", ""): value for name, value in server.connection_settings().items()}
    )
    publisher = Publisher(connection, keys, epoch=epoch, segment_bytes=256, chunk_bytes=600)
    weights: dict[str, Any] = {
        "big": np.arange(5000.0),
        "small": [np.arange(3), np.ones((2, 2), np.float32)],
        "none": np.zeros(0),
    }

    receipt = publisher.publish(weights, compression=False)

    subscriber = Subscriber(connection, keys)
    subscriber.start()
    [update] = wait_until("the version is ready", lambda: subscriber.updates)
    subscriber.stop(5.0)
    publisher.close()
    connection.close()
    assert receipt.chunks > 50
    assert update.version == 1
    assert update.decoded is not None
    received = update.decoded.weights
    assert np.array_equal(received["big"], weights["big"])
    assert received["small"][0].tolist() == [0, 1, 2]


def test_small_changes_cost_few_bytes(learner: Learner, worker: Worker) -> None:
    comm, client, weights = learner(), worker(), some_weights()
    received: dict[str, torch.Tensor] = {}
    full = comm.send_model_weights(weights)
    client.load_weights(received)
    weights["w"][0] += 1
    delta = comm.send_model_weights(weights)
    assert (full.kind, delta.kind, delta.base) == ("full", "delta", 1)
    assert delta.stored_bytes < full.stored_bytes / 20
    wait_until("it runs", lambda: client.poll(received))
    assert all(torch.equal(received[name], value) for name, value in weights.items())
    raw = comm.send_model_weights(weights, compression_enabled=False)
    assert (raw.kind, raw.raw_bytes < raw.stored_bytes) == ("full", True)


@pytest.mark.parametrize("weights", [None, [np.zeros(3)], torch.zeros(3)])
def test_weights_that_are_not_a_dictionary_are_refused(learner: Learner, weights: Any) -> None:
    comm = learner()
    with pytest.raises(UnsupportedType, match="weights are a dictionary"):
        comm.send_model_weights(weights)
    assert comm.version == 0


def test_a_model_in_place_of_its_weights_is_refused(learner: Learner) -> None:
    with pytest.raises(UnsupportedType, match=r"model\.state_dict\(\)"):
        learner().send_model_weights(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_an_unknown_precision_is_refused(learner: Learner) -> None:
    comm = learner()
    for dtype in ("int8", "complex64", "float31", "qint8", ""):
        with pytest.raises(InvalidArgument, match="dtype"):
            comm.send_model_weights({"w": torch.ones(3)}, dtype=dtype)
    assert comm.version == 0


# Version numbers


def test_a_new_learner_continues_the_version_numbers(learner: Learner) -> None:
    first = learner()
    first.send_model_weights({})
    first.cleanup()
    assert learner().send_model_weights({}).version == 2


def test_a_learner_that_continues_a_run_warns_of_it(
    learner: Learner, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    learner()
    first, client = learner(), worker()
    first.send_model_weights({})
    client.send_experiences({"x": 1})
    learner(learner_name="other", publishes=False)
    assert "goes on" not in caplog.text  # the run was empty, or this learner does not publish
    learner()
    assert "continues: version 1, 1 batch waiting" in caplog.text


@pytest.mark.on_every_engine
def test_an_older_learner_cannot_publish(learner: Learner, worker: Worker) -> None:
    old = learner()
    old.send_model_weights({"from": "old"})
    new = learner()
    with pytest.raises(Fenced):
        old.send_model_weights({"from": "old again"})
    new.send_model_weights({"from": "new"})
    received: dict[str, str] = {}
    assert worker().load_weights(received) == 2
    assert received == {"from": "new"}


def test_publishing_waits_until_a_lost_run_is_restored(learner: Learner, server: Server, keys: Keys) -> None:
    comm = learner()
    server.client.delete(keys.meta)
    assert comm.send_model_weights({}).version == 1
    assert server.client.hget(keys.meta, "epoch") == str(comm.epoch).encode()


def test_a_number_is_not_used_again_after_the_server_lost_its_version(
    learner: Learner, server: Server, keys: Keys
) -> None:
    comm = learner()
    comm.send_model_weights({})
    server.client.delete(keys.weights)
    assert comm.send_model_weights({}).version == 2


@pytest.mark.parametrize("floor", ["1" + "0" * 18, "9" * 40, "1e3", "-1"])
def test_an_impossible_version_floor_is_an_error_and_no_endless_loop(
    learner: Learner, server: Server, keys: Keys, floor: str
) -> None:
    """Lua scripts cannot count on from there, and would refuse every number."""
    comm = learner()
    comm.send_model_weights({"number": 1})
    server.client.hset(keys.meta, "version_floor", floor)
    server.client.hset(keys.weights, "version", 2)  # the number is taken, so the learner looks for a free one
    with pytest.raises(ServerFault, match="version_floor"):
        comm.send_model_weights({"number": 2})
    server.client.hdel(keys.meta, "version_floor")
    assert comm.send_model_weights({"number": 2}).version == 3


@pytest.mark.parametrize("applied", [True, False])
def test_a_number_is_not_used_again_after_the_reply_to_its_commit_was_lost(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch, applied: bool
) -> None:
    comm, client = learner(), worker()
    run = comm._publisher._committer._channel.run

    def lose(script: Script, *arguments: Any, **options: Any) -> Any:
        if script is COMMIT:
            if applied:
                run(script, *arguments, **options)
            raise ConnectionFailed("the reply was lost until the deadline")
        return run(script, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(comm._publisher._committer._channel, "run", lose)
        patch.setattr(comm._connection, "timeout_seconds", 0.5)
        with pytest.raises(ConnectionFailed):
            comm.send_model_weights({"from": "first"})
    assert comm.send_model_weights({"from": "second"}).version == 2  # number 1 may have been used
    received: dict[str, str] = {}
    client.load_weights(received)
    assert received == {"from": "second"}


# What a failed publication leaves


def test_an_interrupted_upload_leaves_no_chunks(
    learner: Learner, server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = learner()

    def interrupted(*arguments: Any) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ImagePlan, "header", interrupted)  # the segments are being sent
        with pytest.raises(KeyboardInterrupt):
            comm.send_model_weights({"w": np.zeros(100)})
    assert list(server.client.scan_iter(keys.chunk("*", 1))) == []


@pytest.mark.parametrize("refusal", [ServerOutOfMemory, Fenced])
def test_a_refused_commit_leaves_no_chunks(
    learner: Learner,
    server: Server,
    keys: Keys,
    monkeypatch: pytest.MonkeyPatch,
    refusal: type[Exception],
) -> None:
    """A full server would stay full of them for an hour."""
    comm = learner()
    comm.send_model_weights({"number": 1})

    def refuse(*arguments: Any) -> None:
        raise refusal

    with monkeypatch.context() as patch:
        patch.setattr(comm._publisher._committer._channel, "run", refuse)
        with pytest.raises(refusal):
            comm.send_model_weights({"number": 2})
    assert [*server.client.scan_iter(keys.chunk("*", 0))] == [keys.chunk(f"1-{comm.epoch}-1", 0).encode()]


# Without waiting


def test_weights_that_are_sent_without_waiting_may_change_at_once(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, weights = learner(), some_weights()
    go_on = threading.Event()
    store = Uploader.store

    def store_later(self: Uploader, *arguments: Any, **settings: Any) -> Any:
        assert go_on.wait(10)
        return store(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Uploader, "store", store_later)
        before = weights["w"].clone()
        receipt = comm.send_model_weights(weights, wait=False)
        assert not receipt.done
        assert receipt
        weights["w"].zero_()
        with pytest.raises(DeadlineExceeded, match="not published after 0"):
            receipt.wait(0.01)
        go_on.set()
        assert receipt.wait(10).version == 1
    assert receipt.done
    received: dict[str, torch.Tensor] = {}
    worker().load_weights(received)
    assert torch.equal(received["w"], before)
    assert torch.equal(received["b"], weights["b"])


def test_cleanup_waits_for_the_last_publication(learner: Learner, worker: Worker) -> None:
    comm, weights = learner(), some_weights()
    receipts = [comm.send_model_weights(weights, wait=False) for _ in range(3)]
    comm.cleanup(stop_workers=False)
    assert [receipt.version for receipt in receipts] == [1, 2, 3]
    received: dict[str, torch.Tensor] = {}
    worker().load_weights(received)
    assert torch.equal(received["w"], weights["w"])


def test_a_receipt_reports_that_publishing_failed(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Uploader, *arguments: Any, **settings: Any) -> None:
        raise ConnectionFailed("the server is away")

    comm = learner()
    with monkeypatch.context() as patch:
        patch.setattr(Uploader, "store", fail)
        receipt = comm.send_model_weights(some_weights(), wait=False)
        with pytest.raises(ConnectionFailed, match="the server is away"):
            receipt.wait(10)
        with pytest.raises(ConnectionFailed, match="the server is away"):
            _ = receipt.version
    assert not receipt
    wait_until("it is in the log", lambda: "were not published: the server is away" in caplog.text)
    assert comm.send_model_weights(some_weights()).version == 1


def test_unsupported_weights_are_refused_at_once_also_without_waiting(learner: Learner) -> None:
    comm = learner()
    with pytest.raises(UnsupportedType, match="optimizer"):
        comm.send_model_weights({"optimizer": object()}, wait=False)
    assert comm.send_model_weights({"step": 1}).version == 1


def test_nothing_is_sent_without_waiting_after_cleanup(learner: Learner) -> None:
    comm = learner()
    comm.cleanup()
    with pytest.raises(Closed):
        comm.send_model_weights({"step": 1}, wait=False)
