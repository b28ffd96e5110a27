"""Weights: whole and bit-exact or not at all, on fakeredis and on a real server."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RealServer, Server, wait_until

import rlbroker.run.maintenance
from rlbroker import Fenced, MissedUpdates, WeightsMismatch, WorkerClient, WorkerCommunicator
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.scripts import Script
from rlbroker.codec.image import ImagePlan
from rlbroker.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    ServerFault,
    ServerOutOfMemory,
    UnsupportedType,
)
from rlbroker.weights.publisher import COMMIT, Publisher
from rlbroker.weights.retention import SUPERSEDED_SECONDS
from rlbroker.weights.subscriber import Subscriber

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def network() -> torch.nn.Sequential:
    """Parameters and buffers of several sizes and dtypes."""
    return torch.nn.Sequential(
        torch.nn.Linear(4, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 300), torch.nn.Linear(300, 300)
    )


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("compression", [True, False])
def test_a_module_gets_the_same_bits(learner: Learner, worker: Worker, compression: bool) -> None:
    trained, acting = network(), network()
    receipt = learner().send_model_weights(trained.state_dict(), compression)
    worker().load_weights(acting, timeout=5.0)
    assert same(trained, acting)
    assert receipt
    assert receipt.ratio == receipt.raw_bytes / receipt.stored_bytes


def test_tied_weights_are_stored_once_and_tied_again(learner: Learner, worker: Worker) -> None:
    shared = torch.randn(1000)
    receipt = learner().send_model_weights({"encoder": shared, "decoder": shared})
    received: dict[str, torch.Tensor] = {}
    worker().load_weights(received)
    assert receipt.raw_bytes == 4000
    assert received["encoder"] is received["decoder"]


def test_a_full_dictionary_is_overwritten_in_place(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"net": {"w": np.arange(4.0), "b": torch.ones(2)}, "step": 7})
    mine: dict[str, Any] = {"net": {"w": np.zeros(4), "b": torch.zeros(2)}, "step": 0}
    w, b = mine["net"]["w"], mine["net"]["b"]
    client.load_weights(mine)
    assert mine["net"]["w"] is w
    assert mine["net"]["b"] is b
    assert (w.tolist(), b.tolist(), mine["step"]) == ([0, 1, 2, 3], [1, 1], 7)


def test_weights_that_do_not_fit_name_keys_and_shapes(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights(OrderedDict(w=torch.zeros(2, 3), extra=torch.zeros(1)))
    model = {"w": torch.zeros(3, 2), "b": torch.zeros(1)}
    with pytest.raises(
        WeightsMismatch, match=r"not in the weights: b; not in the model: extra; w is \(2, 3\)"
    ):
        client.load_weights(model)
    assert client.version == 0
    assert model["w"].shape == (3, 2)
    missed = wait_until("the failure is on record", lambda: _missed(comm))
    assert [(one.first, one.why) for one in missed.records] == [(1, "failed")]


def test_weights_that_did_not_fit_one_model_can_be_loaded_into_another(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"w": np.arange(3)})
    with pytest.raises(WeightsMismatch):
        client.load_weights({"b": np.zeros(1)})
    wait_until("the roster names the problem", lambda: "not in the weights: b" in comm.workers()[0].problem)
    model = {"w": np.zeros(3)}
    assert client.load_weights(model, timeout=5.0) == 1
    assert model["w"].tolist() == [0, 1, 2]
    assert not client.poll(model)


def test_a_model_in_place_of_its_weights_is_refused(learner: Learner) -> None:
    with pytest.raises(UnsupportedType, match=r"model\.state_dict\(\)"):
        learner().send_model_weights(network())


def test_frequent_versions_do_not_fill_the_server(real_server: RealServer, run: str) -> None:
    """Superseded weights are kept for slow readers, but not at the price of the newest."""
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


def test_a_learner_that_goes_on_with_a_run_says_so(
    learner: Learner, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    learner()
    first, client = learner(), worker()
    first.send_model_weights({})
    client.send_experiences({"x": 1})
    learner(learner_name="other", publishes=False)
    assert "goes on" not in caplog.text  # there was nothing, or nothing for this one to say
    learner()
    assert "continues: version 1, 1 batch of earlier workers waiting" in caplog.text


def test_weights_are_not_loaded_into_anything_else(learner: Learner, worker: Worker) -> None:
    learner().send_model_weights({"w": np.zeros(1)})
    with pytest.raises(UnsupportedType, match="not a list"):
        worker().load_weights([])


def test_waiting_for_weights_ends_at_the_deadline(learner: Learner, worker: Worker, run: str) -> None:
    learner()
    with pytest.raises(DeadlineExceeded, match=f"no weights came in the run '{run}'"):
        worker().load_weights({}, timeout=0.3)


def test_weights_can_be_loaded_into_a_second_model(learner: Learner, worker: Worker) -> None:
    learner().send_model_weights({"w": np.arange(3)})
    client = worker()
    for _ in range(2):
        model: dict[str, Any] = {}
        assert client.load_weights(model, timeout=5.0) == 1
        assert model["w"].tolist() == [0, 1, 2]


@pytest.mark.on_every_engine
def test_many_chunks_make_one_version(server: Server, keys: Keys, run: str, learner: Learner) -> None:
    """Small limits stand in for gigabytes: chunks, segments and their order."""
    epoch = learner().epoch
    connection = Connection(**_way(server))
    publisher = Publisher(connection, keys, epoch=epoch, segment_bytes=256, chunk_bytes=600)
    weights: dict[str, Any] = {
        "big": np.arange(5000.0),
        "small": [np.arange(3), np.ones((2, 2), np.float32)],
        "none": np.zeros(0),
    }

    receipt = publisher.publish(weights, compression=False)

    subscriber = Subscriber(connection, keys)
    subscriber.start()
    [update] = subscriber.take(5.0)
    subscriber.stop(5.0)
    publisher.close()
    connection.close()
    assert receipt.chunks > 50
    assert update.version == 1
    assert update.decoded is not None
    received = update.decoded.weights
    assert np.array_equal(received["big"], weights["big"])
    assert received["small"][0].tolist() == [0, 1, 2]


def test_a_damaged_version_is_recorded_and_the_next_one_applied(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm = learner()
    comm.send_model_weights({"w": np.arange(1000)})
    [key] = server.client.scan_iter(keys.chunk("1-*", 1))
    server.client.set(key, b"x" + server.client.get(key)[1:])
    client = worker()
    model: dict[str, Any] = {}
    comm.collect_experiences()
    wait_until("the worker gave up on version 1", lambda: client.poll(model) or client._inbox._answer_number)
    assert (client.version, model) == (0, {})

    comm.send_model_weights({"w": np.arange(5)})

    wait_until("the worker runs version 2", lambda: client.poll(model))
    assert model["w"].tolist() == [0, 1, 2, 3, 4]


def test_a_version_without_room_in_memory_does_not_end_the_following(
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


def test_a_version_whose_chunk_is_gone_is_never_half_applied(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker()
    model = {"w": np.zeros(3)}
    comm.send_model_weights({"w": np.ones(3)})
    client.load_weights(model)
    # Version 2 loses its chunk before the worker can read it: the pointer is there, the bytes are not.
    connection = Connection(**_way(server))
    pointer = server.client.hgetall(keys.weights)
    server.client.hset(keys.weights, mapping={**pointer, b"version": 2, b"upload": b"2-9-9"})
    wait_until("it is reported", lambda: comm.workers()[0].problem.startswith("version 2: chunk 0"))
    wait_until("the worker gave up", lambda: client.poll(model) or _missed(comm))
    connection.close()
    assert model["w"].tolist() == [1, 1, 1]
    assert client.version == 1


@pytest.mark.on_every_engine
@pytest.mark.parametrize("lost", ["chunk", "header", "pointer", "bits"])
def test_weights_of_which_a_part_is_lost_are_published_again(
    learner: Learner, worker: Worker, server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.setattr(rlbroker.run.maintenance, "HOUSEKEEPING_SECONDS", 0.2)
    comm = learner()
    comm.send_model_weights({"w": np.arange(1000)}, compression_enabled=False)
    [key] = server.client.scan_iter(keys.chunk("1-*", 0 if lost == "header" else 1))
    if lost == "bits":
        server.client.setrange(key, 100, b"x")
    else:
        server.client.delete(keys.weights if lost == "pointer" else key)
    model: dict[str, Any] = {}
    client = worker()
    wait_until("the worker runs them", lambda: client.poll(model))
    wait_until("the learner knows too that they are there", lambda: comm.version == 2)
    assert (client.version, model["w"][-1]) == (2, 999)
    comm._thread.stop(5.0)
    comm._maintenance.housekeep()
    comm._maintenance.run_once()
    assert comm.version == 2  # and not once more


def test_workers_that_run_a_newer_version_than_a_new_learner_get_its_weights(
    learner: Learner, worker: Worker, server: Server
) -> None:
    old, client = learner(), worker()
    for _ in range(3):
        old.send_model_weights({"from": "old"})
    model: dict[str, str] = {}
    wait_until("the worker runs version 3", lambda: client.poll(model) and client.version == 3)
    old.cleanup()
    client._heartbeat._thread.stop(5.0)  # it comes back later than the new learner
    server.client.flushall()
    new = learner()
    assert new.send_model_weights({"from": "new"}).version == 1
    client._heartbeat._beat()
    wait_until("the worker runs the new ones", lambda: client.poll(model) and model["from"] == "new")
    assert client.version == 4
    wait_until("the learner knows the number", lambda: new.version == 4)


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


def test_a_lost_hint_delays_an_update_and_loses_nothing(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    """The pointer is the truth: here it changes without a notice and without a message."""
    comm, client = learner(), worker()
    comm.send_model_weights({"w": np.zeros(1)})
    client.load_weights({})
    server.client.hset(keys.weights, "version", 2)
    wait_until("the worker runs version 2", lambda: client.poll({}))


def test_versions_go_on_where_the_last_learner_stopped(learner: Learner) -> None:
    first = learner()
    first.send_model_weights({})
    first.cleanup()
    assert learner().send_model_weights({}).version == 2


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


def test_a_version_is_not_used_again_after_the_server_lost_it(
    learner: Learner, server: Server, keys: Keys
) -> None:
    comm = learner()
    comm.send_model_weights({})
    server.client.delete(keys.weights)
    assert comm.send_model_weights({}).version == 2


@pytest.mark.parametrize("floor", ["1" + "0" * 18, "9" * 40, "1e3", "-1"])
def test_a_number_that_no_worker_saw_does_not_keep_the_learner_busy(
    learner: Learner, server: Server, keys: Keys, floor: str
) -> None:
    """Scripts could not count on from there, and would refuse every number."""
    comm = learner()
    comm.send_model_weights({"number": 1})
    server.client.hset(keys.meta, "version_floor", floor)
    server.client.hset(keys.weights, "version", 2)  # the number is taken, so the learner looks for a free one
    with pytest.raises(ServerFault, match="version_floor"):
        comm.send_model_weights({"number": 2})
    server.client.hdel(keys.meta, "version_floor")
    assert comm.send_model_weights({"number": 2}).version == 3


def test_publishing_that_could_not_begin_leaves_nothing_locked(learner: Learner) -> None:
    comm = learner()
    comm._publisher._background.shutdown()  # as at the exit of the interpreter
    with pytest.raises(RuntimeError, match="cannot schedule"):
        comm.send_model_weights({"number": 1}, wait=False)
    assert comm.send_model_weights({"number": 1}).version == 1


@pytest.mark.parametrize("came_through", [True, False])
def test_a_version_is_not_used_again_after_a_commit_of_unknown_fate(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch, came_through: bool
) -> None:
    comm, client = learner(), worker()
    run = comm._publisher._channel.run

    def lose(script: Script, *arguments: Any, **options: Any) -> Any:
        if script is COMMIT:
            if came_through:
                run(script, *arguments, **options)
            raise ConnectionFailed("the reply was lost until the deadline")
        return run(script, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(comm._publisher._channel, "run", lose)
        patch.setattr(comm._connection, "timeout_seconds", 0.5)
        with pytest.raises(ConnectionFailed):
            comm.send_model_weights({"from": "first"})
    assert comm.send_model_weights({"from": "second"}).version == 2  # what became of 1, nobody can say
    received: dict[str, str] = {}
    client.load_weights(received)
    assert received == {"from": "second"}


def publish_unheard(comm: WorkerCommunicator, weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish weights, and let nobody hear that it was done."""
    run = comm._publisher._channel.run

    def lose(script: Script, *arguments: Any, **options: Any) -> Any:
        run(script, *arguments, **options)
        raise ConnectionFailed("the reply was lost until the deadline")

    with monkeypatch.context() as patch:
        patch.setattr(comm._publisher._channel, "run", lose)
        patch.setattr(comm._connection, "timeout_seconds", 0.5)
        with pytest.raises(ConnectionFailed):
            comm.send_model_weights(weights)


def test_a_version_of_unknown_fate_is_not_used_again_after_a_loss(
    learner: Learner, worker: Worker, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"from": "first"})
    publish_unheard(comm, {"from": "second"}, monkeypatch)
    received: dict[str, str] = {}
    wait_until("the worker runs version 2", lambda: client.poll(received) and client.version == 2)
    server.client.flushall()
    assert comm.send_model_weights({"from": "third"}).version > 2
    wait_until("it runs the third", lambda: client.poll(received) or received["from"] == "third")


def test_weights_of_unknown_fate_that_came_through_outlast_a_loss(
    learner: Learner, worker: Worker, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = learner()
    publish_unheard(comm, {"from": "first"}, monkeypatch)
    comm._publisher.restore()
    server.client.flushall()
    wait_until("it is published again", lambda: comm.version == 2)
    received: dict[str, str] = {}
    assert worker().load_weights(received) == 2
    assert received == {"from": "first"}


def cut_off_after_commit(comm: WorkerCommunicator, patch: pytest.MonkeyPatch) -> None:
    """Let nothing come through by which chunks of what was published are taken care of."""
    execute_all = comm._publisher._connection.execute_all

    def fail(commands: Sequence[Sequence[Any]], **options: Any) -> list[Any]:
        if commands[0][0] == "EXISTS":  # before the commit, a Cluster is asked for its chunks
            return execute_all(commands, **options)
        raise ConnectionFailed("the server is away")

    patch.setattr(comm._publisher._connection, "execute_all", fail)


def test_what_a_fault_left_undone_is_done_later(
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
def test_a_fault_leaves_no_chunk_of_the_chain_to_expire(
    learner: Learner, server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version after a fault may be a difference to the one whose chunks were not taken care of."""
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


def test_care_that_comes_late_keeps_nothing_that_was_superseded_meanwhile(
    learner: Learner, server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither that of a learner that was replaced after its commit, nor that of one that only collects."""
    old = learner()
    with monkeypatch.context() as patch:
        cut_off_after_commit(old, patch)
        old.send_model_weights({"number": 1})
    learner().send_model_weights({"number": 2})
    old._publisher.tidy()
    assert 0 < server.client.ttl(keys.chunk(f"1-{old.epoch}-1", 0)) <= SUPERSEDED_SECONDS


def test_half_a_version_does_not_stay(
    learner: Learner, server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = learner()

    def interrupted(*arguments: Any) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ImagePlan, "header", interrupted)  # the segments are under way
        with pytest.raises(KeyboardInterrupt):
            comm.send_model_weights({"w": np.zeros(100)})
    assert list(server.client.scan_iter(keys.chunk("*", 1))) == []


@pytest.mark.parametrize("refusal", [ServerOutOfMemory, Fenced])
def test_what_was_stored_of_a_refused_version_does_not_stay(
    learner: Learner,
    server: Server,
    keys: Keys,
    monkeypatch: pytest.MonkeyPatch,
    refusal: type[Exception],
) -> None:
    """A full server would stay full of it for an hour."""
    comm = learner()
    comm.send_model_weights({"number": 1})

    def refuse(*arguments: Any) -> None:
        raise refusal

    with monkeypatch.context() as patch:
        patch.setattr(comm._publisher._channel, "run", refuse)
        with pytest.raises(refusal):
            comm.send_model_weights({"number": 2})
    assert [*server.client.scan_iter(keys.chunk("*", 0))] == [keys.chunk(f"1-{comm.epoch}-1", 0).encode()]


def test_two_pollers_never_go_back_a_version(learner: Learner, worker: Worker) -> None:
    class Slow(dict[str, Any]):
        def update(self, *arguments: Any, **fields: Any) -> None:
            begun.set()
            time.sleep(0.3)
            super().update(*arguments, **fields)

    comm, client, begun = learner(), worker(), threading.Event()
    slow = Slow()
    comm.send_model_weights({"number": 1})
    wait_until("version 1 is ready", lambda: client._subscriber.ready)
    first = threading.Thread(target=client.poll, args=(slow,))
    first.start()
    begun.wait(5.0)
    comm.send_model_weights({"number": 2})
    wait_until("version 2 is ready", lambda: client._subscriber.ready)
    received: dict[str, Any] = {}
    assert client.poll(received)
    first.join()
    assert (client.version, slow["number"], received["number"]) == (2, 1, 2)


def test_loading_waits_for_the_version_that_is_the_latest_now(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    for number in range(1, 20):
        comm.send_model_weights({"number": number})
        received: dict[str, int] = {}
        assert client.load_weights(received) == received["number"] == number


def test_publishing_waits_until_a_lost_run_is_restored(learner: Learner, server: Server, keys: Keys) -> None:
    comm = learner()
    server.client.delete(keys.meta)
    assert comm.send_model_weights({}).version == 1
    assert server.client.hget(keys.meta, "epoch") == str(comm.epoch).encode()


def test_a_worker_that_slept_through_thirty_versions_runs_the_newest(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    model = {"w": np.zeros(1)}
    comm.send_model_weights({"w": np.zeros(1)})
    client.load_weights(model)
    # The background would fetch some of them meanwhile; it is the caller that sleeps, and does not poll.
    for number in range(30):
        comm.send_model_weights({"w": np.full(1, float(number))})
    wait_until("the newest is ready", lambda: client._subscriber._handled == 31)

    client.poll(model)

    assert (client.version, model["w"][0]) == (31, 29.0)
    missed = wait_until("the rest is on record", lambda: _missed(comm))
    assert [(one.first, one.last, one.why) for one in missed.records] == [(2, 30, "superseded")]
    assert (missed.total, missed.behind, missed.skips_in_a_row) == (29, 0, 1)


def test_who_is_behind_is_reported_while_it_is(learner: Learner, worker: Worker) -> None:
    comm = learner()
    worker()
    for _ in range(3):
        comm.send_model_weights({})
    wait_until("the ledger knows the worker", lambda: comm.missed_updates()[0].behind == 3)
    assert comm.missed_updates()[0].behind_since is not None
    assert comm.get_queue_info()["model_queue_sizes"] == [3, 0]


def _missed(comm: WorkerCommunicator) -> MissedUpdates | None:
    missed = comm.missed_updates().get(0)
    return missed if missed and missed.total else None


def _way(server: Server) -> dict[str, Any]:
    return {name.replace("redis_", ""): value for name, value in server.way().items()}


def test_loading_skips_what_was_read_of_an_older_architecture(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"w": np.zeros(3)})
    wait_until("version 1 is ready", lambda: client._subscriber.ready)
    client._subscriber._thread.request_stop()  # version 2 is not read before the load begins
    wait_until("it stopped", lambda: not client._subscriber._thread._thread.is_alive())
    comm.send_model_weights({"w": np.ones(5)})

    def read_late() -> None:
        time.sleep(0.3)
        client._subscriber._thread._stopping.clear()
        client._subscriber._look()

    late = threading.Thread(target=read_late)
    late.start()
    received: dict[str, Any] = {}
    assert client.load_weights(received, timeout=10.0) == 2
    late.join()
    assert received["w"].tolist() == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("weights", [None, [np.zeros(3)], torch.zeros(3)])
def test_weights_are_a_dictionary(learner: Learner, weights: Any) -> None:
    comm = learner()
    with pytest.raises(UnsupportedType, match="weights are a dictionary"):
        comm.send_model_weights(weights)
    assert comm.version == 0
