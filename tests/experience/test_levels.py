"""The levels: what a batch must have reached before its worker releases it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from conftest import ClusterServer, RealServer, Server, spread, wait_until
from nodes import Node

from rlbroker import (
    ConnectionFailed,
    Fenced,
    InvalidArgument,
    RunLost,
    ServerUnsuitable,
    Unconfirmed,
    WorkerClient,
    WorkerCommunicator,
)
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import entry_place

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def waiting(server: Server, keys: Keys, client: WorkerClient) -> list[int]:
    """Return the numbers of the batches in the queue, which must all be of this incarnation."""
    ids = [entry_place(entry_id) for entry_id, _ in server.client.xrange(keys.experiences(0))]
    assert {incarnation for incarnation, _ in ids} <= {client.incarnation}
    return [number for _, number in ids]


def break_channel(client: WorkerClient, *, after_sending: bool) -> threading.Event:
    """Break the sender's connection, before or after the server receives the commands, until the event is set."""
    mended = threading.Event()
    assert client._sender is not None
    channel: Any = client._sender.writer.channel
    execute_all = channel.execute_all

    def fail(commands: Any) -> Any:
        if mended.is_set():
            return execute_all(commands)
        if after_sending:
            execute_all(commands)
        channel.close()
        raise ConnectionFailed("broken on purpose")

    channel.execute_all = fail
    return mended


def test_at_level_learner_a_batch_is_kept_until_it_is_acknowledged(learner: Learner, worker: Worker) -> None:
    comm, client = learner(acknowledge="manual"), worker(level="learner")
    for number in range(3):
        client.send_experiences({"number": number})
    pairs = comm.collect_experiences(timeout=5.0)
    assert client.flush(timeout=0.1) == 3
    comm.acknowledge(pairs[:2])
    wait_until("two are safe", lambda: client.flush(timeout=0.01) == 1)
    comm.acknowledge(pairs)
    assert client.flush(timeout=5.0) == 0


def test_flush_reports_pending_batches_while_another_thread_sends(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_queue_size=1, acknowledge="manual"), worker(level="learner")
    client.send_experiences({})
    sending = threading.Thread(target=client.send_experiences, args=({},))
    sending.start()
    wait_until("it waits for room", lambda: client._sender.room_seconds > 0)
    assert client.flush(timeout=0.05) == 1
    comm.collect_experiences(timeout=5.0)
    sending.join()


def test_at_level_redis_no_batch_is_kept(learner: Learner, worker: Worker) -> None:
    learner()
    client = worker()
    client.send_experiences({})
    assert client.flush(timeout=0.1) == 0


def test_at_level_learner_lost_batches_are_sent_again_in_order(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    comm, client = learner(acknowledge="manual"), worker(level="learner")
    for number in range(5):
        client.send_experiences({"number": number})
    comm.acknowledge(comm.collect_experiences(timeout=5.0, max_batches=2))
    wait_until("two are safe", lambda: client.flush(timeout=0.01) == 3)
    comm.cleanup()
    server.client.flushall()
    wait_until("the rest is stored again", lambda: waiting(server, keys, client) == [3, 4, 5])


def test_lost_batches_are_sent_again_before_new_ones(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    comm, client = learner(), worker(level="learner")
    client.send_experiences({"number": 1})
    comm.cleanup()
    server.client.flushall()
    client.send_experiences({"number": 2})
    assert waiting(server, keys, client) == [1, 2]


@pytest.mark.parametrize(("batches", "words"), [(1, "1 is"), (2, "2 are")])
def test_batches_sent_again_are_logged(
    server: Server,
    learner: Learner,
    worker: Worker,
    caplog: pytest.LogCaptureFixture,
    batches: int,
    words: str,
) -> None:
    comm, client = learner(), worker(level="learner")
    for number in range(batches):
        client.send_experiences({"number": number})
    comm.cleanup()
    server.client.flushall()
    with suppress(RunLost):  # there is no learner to open the run
        client.flush(timeout=0.01)
    text = f"the server lost what worker 0 sent after batch 0; {words} sent again"
    wait_until("it is logged, perhaps by the heartbeat thread", lambda: text in caplog.text)


def test_a_worker_writes_again_how_many_batches_it_sent_after_a_loss(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    comm, client = learner(), worker()
    for number in range(4):
        client.send_experiences({"number": number})
    comm.cleanup()
    server.client.flushall()
    wait_until(
        "it wrote so", lambda: server.client.hget(keys.counts(0), f"sent:{client.incarnation}") == b"4"
    )
    assert waiting(server, keys, client) == []
    client.send_experiences({"number": 4})
    assert waiting(server, keys, client) == [5]


@pytest.mark.on_every_engine
def test_a_batch_whose_reply_was_lost_for_good_is_unconfirmed_and_stored_once(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    learner()
    client = worker()
    mended = break_channel(client, after_sending=True)
    with pytest.raises(Unconfirmed, match="do not send it again") as caught:
        client.send_experiences({"number": 1}, timeout=0.2)
    assert caught.value.receipt.sequence == 1
    mended.set()
    client.send_experiences({"number": 2})
    assert waiting(server, keys, client) == [1, 2]


def test_a_batch_that_went_out_with_a_reopened_queue_keeps_its_number(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    learner()
    client = worker()
    assert client._sender is not None
    channel: Any = client._sender.writer.channel
    execute_all = channel.execute_all

    lost: list[bool] = []

    def lose_reply(commands: Any) -> Any:
        if not lost:
            replies = execute_all(commands)
            if not any(command[0] == "XADD" for command in commands):
                return replies
            lost.append(True)
        channel.close()
        raise ConnectionFailed("broken on purpose")

    client._sender.mark_stale()
    channel.execute_all = lose_reply
    with pytest.raises(Unconfirmed):
        client.send_experiences({"number": 1}, timeout=0.2)
    channel.execute_all = execute_all
    assert client.send_experiences({"number": 2}).sequence == 2
    assert waiting(server, keys, client) == [1, 2]


def test_a_batch_collected_during_a_refresh_is_kept(learner: Learner, worker: Worker) -> None:
    comm, client = learner(acknowledge="manual"), worker(level="learner")
    client.send_experiences({"number": 1})
    assert client._sender is not None
    channel: Any = client._sender.writer.channel
    execute_all = channel.execute_all

    def slowly(commands: Any) -> list[Any]:
        replies = []
        for command in commands:
            replies += execute_all([command])
            comm.collect_experiences()
        return replies

    channel.execute_all = slowly
    assert client.flush(timeout=0.01) == 1


def test_an_unconfirmed_batch_is_sent_in_the_background(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    learner()
    client = worker()
    mended = break_channel(client, after_sending=False)
    with pytest.raises(Unconfirmed):
        client.send_experiences({"number": 1}, timeout=0.2)
    assert waiting(server, keys, client) == []
    mended.set()
    wait_until("it is stored", lambda: waiting(server, keys, client) == [1])
    assert client.flush(timeout=5.0) == 0


def test_a_batch_that_was_never_sent_stays_with_the_caller(
    server: Server, learner: Learner, worker: Worker, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner()
    client = worker()
    assert client._sender is not None
    channel = client._sender.writer.channel
    channel.close()

    def refuse() -> bool:
        raise ConnectionFailed("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(channel, "connect", refuse)
        with pytest.raises(ConnectionFailed, match="broken on purpose"):
            client.send_experiences({"number": 1}, timeout=0.2)
    assert client.send_experiences({"number": 2}).sequence == 1
    assert waiting(server, keys, client) == [1]


def test_a_fenced_worker_counts_its_undelivered_batches(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    learner()
    client = worker(0)
    client.send_experiences({"number": 1})
    mended = break_channel(client, after_sending=False)
    with pytest.raises(Unconfirmed):
        client.send_experiences({"number": 2}, timeout=0.2)
    worker(0)
    mended.set()
    with pytest.raises(Fenced):
        client._sender.send({"number": 3}, version=0, timeout_seconds=5.0)
    assert server.client.hget(keys.counts(0), f"fenced:{client.incarnation}") == b"2"
    assert server.client.hget(keys.counts(0), f"sent:{client.incarnation}") == b"1"


@pytest.mark.on_every_engine
def test_dropped_batches_are_not_sent_again(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    comm = learner(max_queue_size=2, when_full="drop_oldest")
    client = worker(level="learner")
    for number in range(5):
        client.send_experiences({"number": number})
    comm.cleanup()
    server.client.flushall()
    wait_until("the rest is stored", lambda: waiting(server, keys, client) == [4, 5])
    dropped = f"dropped_oldest:{client.incarnation}"
    wait_until("the dropped batches are counted", lambda: server.client.hget(keys.counts(0), dropped) == b"3")


def test_an_unknown_level_is_refused(worker: Worker) -> None:
    with pytest.raises(InvalidArgument, match="'redis', 'replica', 'fsync', 'learner'"):
        worker(level="disk")


@pytest.mark.on_every_engine
@pytest.mark.parametrize(
    "level", [pytest.param("replica", marks=pytest.mark.single_server("engines have replicas")), "fsync"]
)
def test_a_level_that_the_server_cannot_give_is_refused_at_once(
    server: Server, worker: Worker, place: str, level: str
) -> None:
    able = {"replica": "REPLICAOF", "fsync": "appendonly yes"}
    unable = {"replica": "Redis or Valkey; this is", "fsync": r"Redis 7\.2 or newer, or Valkey; this is"}
    known = unable if server.kind == "fake" or ":redis-" in place else able  # 7.0 has no WAITAOF
    with pytest.raises(ServerUnsuitable, match=f"{level}.*{known[level]}"):
        worker(level=level)


def test_at_level_fsync_a_batch_is_confirmed_by_the_disk(real_server: RealServer, run: str) -> None:
    with WorkerCommunicator(1, run=run, **real_server.connection_settings()) as comm:
        real_server.client.config_set("appendonly", "yes")
        try:
            with WorkerClient(run=run, level="fsync", **real_server.connection_settings()) as client:
                assert client.send_experiences({"number": 1})
                assert client.flush(timeout=1.0) == 0
        finally:
            real_server.client.config_set("appendonly", "no")
        assert [batch["number"] for _, batch in comm.collect_experiences()] == [1]


@contextmanager
def on_the_disk(server: RealServer) -> Iterator[None]:
    """Make the server keep an append-only file within this block."""
    server.client.config_set("appendonly", "yes")
    try:
        yield
    finally:
        server.client.config_set("appendonly", "no")


def test_a_level_that_the_server_loses_later_is_reported_and_waited_for(
    real_server: RealServer, run: str
) -> None:
    """Only a level that is impossible from the start is refused; later it is an outage."""
    with (
        WorkerCommunicator(1, run=run, lease_seconds=1.0, **real_server.connection_settings()) as comm,
        ExitStack() as stack,
    ):
        with on_the_disk(real_server):
            client = stack.enter_context(
                WorkerClient(run=run, level="fsync", timeout=1.0, **real_server.connection_settings())
            )
        with pytest.raises(
            Unconfirmed, match=r"batch 1 of worker 0.*append-only file for batch 1.* to continue"
        ):
            client.send_experiences({"number": 1})
        assert client._sender is not None
        client._sender.maintain()  # it must not make heartbeats fail
        real_server.client.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(ConnectionFailed, match="has no append-only file for batch 1; CONFIG SET"):
            client.send_experiences({"number": 2})
        why = wait_until("the learner knows why", lambda: comm.workers()[0].unconfirmed)
        assert "has no append-only file" in why
        with on_the_disk(real_server):
            client.send_experiences({"number": 2}, timeout=10.0)
            assert [batch["number"] for _, batch in comm.collect_experiences(timeout=5.0)] == [1, 2]
            wait_until("the worker reports no problem", lambda: not comm.workers()[0].unconfirmed)


@pytest.mark.parametrize("drains", [False, True])
def test_a_worker_with_an_unconfirmed_batch_leaves_in_time(
    real_server: RealServer, run: str, drains: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The server answers, so the worker can leave the run; it logs once why the batch is not safe."""
    caplog.set_level(logging.WARNING, "rlbroker")
    with WorkerCommunicator(1, run=run, **real_server.connection_settings()) as comm:
        with on_the_disk(real_server):
            client = WorkerClient(run=run, level="fsync", timeout=1.0, **real_server.connection_settings())
        with pytest.raises(Unconfirmed):
            client.send_experiences({"number": 1})
        if drains:
            client.drain()
        client.close()
        assert comm.workers() == []
        (message,) = caplog.messages
        assert message.startswith("worker 0 leaves with 1 batch that has not reached level 'fsync': ")
        assert "has no append-only file for batch 1" in message


@contextmanager
def without_replica(cluster: ClusterServer, key: str) -> Iterator[Node]:
    """Stop the replica of the master that has a key, within this block; yield that master."""
    master = cluster.engine.owner_of(cluster.engine.slot_of(key))
    replica = cluster.engine.replica_of(master)
    replica.kill()
    wait_until("the master has noticed", lambda: b"connected_slaves:0" in master.ask("INFO", "replication"))
    try:
        yield master
    finally:
        replica.start()
        cluster.engine.wait_until_stable()


def queue_on(master: Node, cluster: ClusterServer, keys: Keys) -> int:
    """Return the worker whose queue is on a master."""
    slots = [cluster.engine.slot_of(keys.experiences(number)) for number in range(3)]
    return next(number for number, slot in enumerate(slots) if cluster.engine.owner_of(slot) is master)


def test_level_replica_needs_a_replica_of_the_queues_own_master(
    cluster: ClusterServer, run: str, keys: Keys
) -> None:
    """Not one of the master that has the run's own keys; the error says how to add one to a Cluster."""
    with without_replica(cluster, keys.meta) as lonely, ExitStack() as stack:
        way: dict[str, Any] = {
            "run": run,
            "level": "replica",
            "timeout": 2.0,
            **cluster.connection_settings(),
        }
        early = [stack.enter_context(WorkerClient(worker_id=number, **way)) for number in range(3)]
        stack.enter_context(WorkerCommunicator(3, run=run, **cluster.connection_settings()))
        alone = queue_on(lonely, cluster, spread(keys, cluster))
        for number in {0, 1, 2} - {alone}:
            assert early[number].send_experiences({})
        stack.enter_context(WorkerClient(worker_id=(alone + 1) % 3, **way))
        named = f"127.0.0.1:{lonely.port}"
        with pytest.raises(
            ServerUnsuitable, match=f"{named} has none.*add-node HOST:PORT {named} --cluster-slave"
        ):
            WorkerClient(worker_id=alone, **way)


def test_a_replica_that_is_missing_when_the_run_opens_is_waited_for(
    cluster: ClusterServer, run: str, keys: Keys
) -> None:
    with ExitStack() as stack:
        way: dict[str, Any] = {"run": run, "timeout": 2.0, **cluster.connection_settings()}
        clients = [
            stack.enter_context(WorkerClient(worker_id=number, level="replica", **way)) for number in range(3)
        ]
        comm = stack.enter_context(WorkerCommunicator(3, **way))
        with without_replica(cluster, keys.meta) as lonely:
            number = queue_on(lonely, cluster, spread(keys, cluster))
            client, why = clients[number], f"no replica of 127.0.0.1:{lonely.port} has confirmed batch 1 yet"
            with pytest.raises(Unconfirmed, match=f"{why}; bring one back"):
                client.send_experiences({"number": 1})
            with pytest.raises(ConnectionFailed, match=why):
                client.send_experiences({"number": 2})
        client.send_experiences({"number": 2}, timeout=20.0)
        pairs = comm.collect_experiences(timeout=5.0)
        assert [(worker, batch["number"]) for worker, batch in pairs] == [(number, 1), (number, 2)]
