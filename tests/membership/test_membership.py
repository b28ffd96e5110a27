"""Membership: leases by the server's clock, forgetting, and one process for each worker id."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable

import pytest
import redis
from conftest import Server, wait_until

from rlbroker import Fenced, WorkerClient, WorkerCommunicator
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.local import RedisServer
from rlbroker.membership import lease
from rlbroker.membership.heartbeat import BEAT
from rlbroker.membership.joined_run import META_FIELDS

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def silence(client: WorkerClient) -> None:
    """Stop a worker's heartbeats, as if its host had lost the network."""
    client._heartbeat._thread.stop(5.0)


def test_a_silent_worker_is_away_after_its_lease(learner: Learner, worker: Worker) -> None:
    comm, client = learner(lease_seconds=0.5), worker()
    assert [info.state for info in comm.workers()] == ["alive"]
    silence(client)
    wait_until("it is away", lambda: [info.state for info in comm.workers()] == ["away"])


@pytest.mark.on_every_engine
def test_the_id_of_a_silent_worker_becomes_free(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm = learner(lease_seconds=0.5)
    first, second = worker(), worker()
    silence(first)
    expires = int(server.client.hget(keys.life(0), "seen")) / 1000 + 0.5
    wait_until("it is away", lambda: comm.workers()[0].state == "away")
    wait_until(
        "its learner was alive after that",
        lambda: float(server.client.hget(keys.meta, "learner_seen")) > expires,
    )
    assert (second.worker_id, worker().worker_id) == (1, 0)


def test_the_id_of_a_silent_worker_stays_taken_while_its_learner_is_cut_off_too(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(lease_seconds=0.5), worker()
    comm._thread.stop(5.0)  # as if neither could reach the server
    silence(client)
    wait_until("its lease is over", lambda: comm.workers()[0].state == "away")
    assert worker().worker_id == 1
    comm._maintenance.restore()
    comm._maintenance.send_heartbeat()
    assert worker().worker_id == 2
    client._heartbeat._beat()


def test_time_without_a_learner_does_not_count_as_silence(learner: Learner, worker: Worker) -> None:
    comm, client = learner(lease_seconds=0.3, forget_seconds=0.6), worker()
    comm._thread.stop(5.0)
    silence(client)
    wait_until("it was silent for too long", lambda: comm.workers()[0].last_seen_seconds > 0.7)
    comm._maintenance.restore()
    assert comm._roster.forget_silent() == []
    client._heartbeat._beat()
    wait_until("it is forgotten after all", lambda: comm._roster.forget_silent() == [0])


def test_a_worker_that_left_just_before_a_loss_is_soon_forgotten(
    learner: Learner, worker: Worker, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RETURN_SECONDS", 1.0)
    comm = learner(lease_seconds=0.5)
    leaving, staying = worker(), worker()
    wait_until("the learner has seen both", lambda: comm._roster.alive == {0, 1})
    wait_until("they know their lease", lambda: staying._heartbeat.knows_run)
    comm._thread.stop(5.0)
    leaving.close()
    server.client.flushall()
    comm._maintenance.restore()
    assert len(comm.workers()) == 2
    wait_until("one is forgotten", lambda: comm._roster.forget_silent() == [0])
    assert [info.worker_id for info in comm.workers()] == [1]
    staying.poll()


def test_a_worker_that_stays_silent_is_forgotten(learner: Learner, worker: Worker) -> None:
    comm = learner(lease_seconds=0.3, forget_seconds=0.6)
    client = worker()
    comm.send_model_weights({})
    silence(client)
    wait_until("it is forgotten", lambda: comm.workers() == [])
    wait_until("its open version is settled", lambda: comm.missed_updates()[0].by_reason == {"away": 1})
    with pytest.raises(Fenced):
        client._inbox.acknowledge_version(0, 1, "applied")


def test_a_worker_reports_the_version_that_it_runs(learner: Learner, worker: Worker) -> None:
    comm, client = learner(lease_seconds=0.5), worker()
    comm.send_model_weights({})
    client.load_weights({})
    client.send_experiences({"x": 1})
    comm.send_model_weights({})
    info = wait_until(
        "a heartbeat has reported it",
        lambda: next((one for one in comm.workers() if one.version == 1 and one.sent == 1), None),
    )
    assert (info.staleness, info.incarnation, info.worker_id) == (1, client.incarnation, 0)
    assert info.pid > 0
    assert info.host


def test_every_heartbeat_of_a_replaced_process_is_refused(learner: Learner, worker: Worker) -> None:
    learner(lease_seconds=0.5)
    old = worker(worker_id=0)
    wait_until("it knows its lease", lambda: old._heartbeat.knows_run)
    worker(worker_id=0)

    def fenced() -> bool:
        try:
            old.poll()
        except Fenced as error:
            return "worker 0 was replaced" in str(error)
        return False

    wait_until("the old process is fenced", fenced)


def test_batches_of_a_replaced_process_are_counted_as_fenced(learner: Learner, worker: Worker) -> None:
    comm = learner()
    old = worker(worker_id=0)
    old.send_experiences({"x": 1})
    worker(worker_id=0).send_experiences({"x": 2})
    with pytest.raises(Fenced):
        old.send_experiences({"x": 3})
    assert len(comm.collect_experiences()) == 2
    comm.collect_experiences()
    counts = comm.get_queue_info()["counts"][0]
    assert (counts.produced, counts.delivered, counts.lost) == (3, 2, {"fenced": 1})


@pytest.mark.on_every_engine
def test_a_replaced_process_is_refused_before_its_successor_has_sent_anything(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    learner()
    old = worker(worker_id=0)
    worker(worker_id=0)
    with pytest.raises(Fenced):
        old.send_experiences({"x": 1})
    assert server.client.xlen(keys.experiences(0)) == 0


def test_a_replaced_process_that_leaves_does_not_end_its_successors_membership(
    learner: Learner, worker: Worker
) -> None:
    comm = learner()
    old = worker(worker_id=0)
    new = worker(worker_id=0)
    old.close()
    assert [info.incarnation for info in comm.workers()] == [new.incarnation]


def test_a_heartbeat_after_leaving_is_refused(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    client._heartbeat.leave(5.0)
    with pytest.raises(Fenced):
        client._heartbeat._beat()
    assert comm.workers() == []


def test_workers_join_late_and_leave_early(learner: Learner, worker: Worker) -> None:
    comm = learner(num_workers=1)
    comm.send_model_weights({})
    incarnations = []
    for _ in range(3):
        with worker() as client:
            assert client.load_weights({}) == 1
            client.send_experiences({"x": 1})
            incarnations.append(client.incarnation)
    assert incarnations == sorted(set(incarnations))
    assert comm.workers() == []
    assert len(comm.collect_experiences()) == 3
    wait_until("nothing is missed", lambda: comm.missed_updates()[0].total == 0)


def test_the_settings_of_the_learner_reach_the_workers(learner: Learner, worker: Worker) -> None:
    client = worker()
    learner(max_queue_size=5, lease_seconds=2.0)
    settings = client._heartbeat.settings(Deadline(10.0))
    assert (settings.max_queue_size, settings.lease_seconds) == (5, 2.0)


def test_a_heartbeat_returns_the_fields_that_a_worker_needs() -> None:
    """The script names the fields, and the worker parses its reply by the same names in the same order."""
    *_, returned = BEAT.text.partition("return redis.call('HMGET', KEYS[4],")
    assert re.findall(r"'(\w+)'", returned) == list(META_FIELDS)


def test_silence_does_not_count_while_the_server_is_frozen(run: str) -> None:
    """No connection breaks, and the learner's heartbeat may be answered before those of the workers."""
    with (
        RedisServer() as server,
        WorkerCommunicator(1, redis_url=server.url, run=run, lease_seconds=3.0) as comm,
        WorkerClient(server.url, run) as client,
        redis.Redis.from_url(server.url) as redis_client,
    ):
        wait_until("its heartbeat is there", lambda: comm.workers()[0].state == "alive")
        silence(client)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            time.sleep(3.5)  # longer than the lease, and than the learner's own heartbeats are apart
        finally:
            os.kill(server.pid, signal.SIGCONT)
        thawed = float(redis_client.time()[0])
        seen = Keys(run).meta, "learner_seen"
        wait_until("the learner is back", lambda: float(redis_client.hget(*seen)) >= thawed)
        assert comm.workers()[0].state == "alive"
        wait_until("its lease is over", lambda: comm.workers()[0].state == "away")
