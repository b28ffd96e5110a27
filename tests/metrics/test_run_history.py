"""The history of a run as its learner writes it and any client reads it, and the times that workers report for it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Server, wait_until

from rlbroker import Fenced, QueueFull, WorkerClient, WorkerCommunicator
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import server_seconds
from rlbroker.metrics.history import TIERS, Sample, intervals, read_history

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def stop_background(comm: WorkerCommunicator) -> WorkerCommunicator:
    """Stop a learner's background thread, so that the test decides when a sample is taken."""
    assert comm._thread.stop(5.0)
    return comm


def record(comm: WorkerCommunicator, *, last: bool = False) -> Sample:
    """Take a sample, as the background thread does once a second, and return it as it was stored."""
    comm._maintenance.send_heartbeat()
    comm._maintenance.record(last=last)
    return history(comm)[-1]


def history(comm: WorkerCommunicator, **selection: Any) -> list[Sample]:
    return read_history(comm._connection, comm._keys, **selection)


def stop_heartbeats(client: WorkerClient) -> None:
    assert client._heartbeat._thread.stop(5.0)


def test_a_sample_counts_versions_batches_bytes_and_seconds(
    learner: Learner, worker: Worker, monkeypatch: Any
) -> None:
    monkeypatch.setattr("rlbroker.learner.maintenance.HEARTBEAT_SECONDS", 0.05)
    comm = learner(max_staleness=2)
    client = worker(3)
    # The background thread takes the second sample.
    wait_until("a sample has been taken", lambda: any(one.alive for one in history(comm)))
    stop_background(comm)
    before = history(comm)[-1]
    comm.send_model_weights({"weights": np.zeros(1000, np.float32)})
    client.load_weights({})
    for _ in range(3):
        client.send_experiences({"steps": np.zeros(10)})
    comm.send_model_weights({"weights": np.ones(1000, np.float32)})
    comm.collect_experiences(timeout=5.0, max_batches=2)
    meanwhile = record(comm)
    assert (meanwhile.in_hand, meanwhile.waiting, meanwhile.queued) == (2, 1, {3: 1})
    assert len(comm.collect_experiences(timeout=0.05, max_batches=1)) == 1
    assert comm.collect_experiences(timeout=0.2) == []
    client._heartbeat._beat()
    client.send_experiences({"steps": np.zeros(10)})
    after = record(comm)
    assert (after.version, after.alive, after.away) == (2, 1, 0)
    assert (after.waiting, after.in_hand, after.queued, after.running) == (1, 0, {3: 1}, {3: 1})
    assert (after.published, after.published_raw_bytes) == (2, 8000)
    assert (after.collected, after.rows, after.collected_raw_bytes, after.delivered) == (3, 30, 240, 3)
    assert after.staleness == {1: 3}
    (interval,) = intervals([before, after])
    for name in ("encode_seconds", "send_seconds", "publish_seconds", "decode_seconds"):
        assert 0 < interval.growth(name) <= interval.seconds
    assert 0.1 <= interval.growth("wait_seconds") <= interval.seconds  # it also looked for new streams
    assert after.published_stored_bytes > 0
    assert after.collected_stored_bytes > 0


def test_a_sample_counts_lost_batches_and_missed_versions(learner: Learner, worker: Worker) -> None:
    comm = stop_background(learner(max_staleness=1, max_queue_size=1, when_full="drop_newest"))
    client = worker(0)
    client.send_experiences({"steps": np.zeros(1)})
    assert not client.send_experiences({"steps": np.zeros(1)})
    for _ in range(3):
        comm.send_model_weights({"weights": np.zeros(10)})
    client.load_weights({})
    assert comm.collect_experiences(timeout=0.0) == []
    wait_until("what was missed is settled", lambda: comm.missed_updates()[0].by_reason)
    found = record(comm)
    assert (found.lost, found.missed, found.collected) == (2, 2, 0)


def test_a_new_learner_continues_the_history_with_sums_of_its_own(learner: Learner) -> None:
    first = learner()
    first.send_model_weights({"weights": np.zeros(10)})
    first.cleanup()
    second = learner()
    wait_until("it has written a sample", lambda: history(second)[-1].epoch == second.epoch)
    found = history(second)
    assert [one.published for one in found if one.epoch == first.epoch][-1] == 1  # its last sample
    assert (found[-1].published, found[-1].version) == (0, 1)
    assert all(one.before.epoch == one.after.epoch for one in intervals(found))


def test_the_streams_of_the_history_are_capped(
    learner: Learner, server: Server, keys: Keys, monkeypatch: Any
) -> None:
    comm = stop_background(learner())
    monkeypatch.setitem(TIERS, 1, 20)
    for _ in range(80):
        comm._maintenance.record()
    # Whole nodes of the stream are cut off, so a few more may stay.
    assert 20 <= server.client.xlen(keys.history(1)) < 60
    assert server.client.xlen(keys.history(600)) == 1  # not due again


def test_coarser_samples_fill_in_for_finer_ones_that_were_trimmed(
    learner: Learner, server: Server, keys: Keys
) -> None:
    comm = stop_background(learner())
    for _ in range(4):
        comm.send_model_weights({"w": np.zeros(1)})
        record(comm, last=True)
        wait_until("the server's clock has advanced", lambda: _age(comm, server) > 0.005)
    whole = history(comm)
    assert len(whole) >= 4
    server.client.xtrim(keys.history(1), maxlen=2, approximate=False)
    server.client.xtrim(keys.history(30), maxlen=3, approximate=False)
    server.client.xadd(keys.history(30), {"junk": "x"})
    again = history(comm)
    # A sample gets a slightly different time in each stream.
    assert [one.version for one in again] == [one.version for one in whole]
    assert [one.at for one in again] == sorted(one.at for one in again)
    assert history(comm, count=1) == whole[-1:]
    assert history(comm, since=whole[-1].at) == [one for one in whole if one.at >= whole[-1].at]


def _age(comm: WorkerCommunicator, server: Server) -> float:
    return server_seconds(server.client.time()) - history(comm)[-1].at


def test_a_fault_in_the_history_does_not_affect_the_learner(
    learner: Learner, server: Server, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    comm = stop_background(learner())
    server.client.delete(keys.history(1))
    server.client.set(keys.history(1), "not mine")
    server.client.set(keys.experiences(0), "not mine either", ex=60)
    server.client.hset(keys.life(0), "incarnation", "1")
    server.client.sadd(keys.workers, 0)
    comm._maintenance.send_heartbeat()
    comm._maintenance.record()
    server.client.delete(keys.history(1))
    assert record(comm).waiting == 0
    assert server.client.xlen(keys.history(1)) == 1  # the next sample is written
    assert "history" not in caplog.text
    comm._recorder._read_state = lambda: 1 / 0  # type: ignore[assignment, return-value]
    for _ in range(2):
        comm._maintenance.record()
    assert caplog.text.count("the history of the run") == 1
    assert comm.send_model_weights({"weights": np.zeros(1)})
    assert comm._thread.error is None


# What workers report


@pytest.mark.parametrize("call", ["heartbeat", "send", "close"])
def test_a_fenced_twin_is_reported(
    call: str, learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm = learner()
    first = worker(0)
    stop_heartbeats(first)
    second = worker(0)
    assert comm.workers()[0].fenced_process == ""
    assert comm.workers()[0].fenced_seconds is None
    if call == "heartbeat":
        with pytest.raises(Fenced):
            first._heartbeat._beat()
    elif call == "send":
        with pytest.raises(Fenced):
            first.send_experiences({"steps": np.zeros(1)})
    if call != "heartbeat":
        first.close()
    second._heartbeat._beat()
    (found,) = comm.workers()
    assert found.incarnation == second.incarnation
    assert found.fenced_process == f"{socket.gethostname()}:{os.getpid()}"
    assert found.fenced_seconds is not None
    assert 0 <= found.fenced_seconds < 60
    assert server.client.pttl(keys.heartbeat(0)) > 0


def test_a_worker_that_left_or_was_forgotten_is_not_reported_as_a_twin(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm = stop_background(learner(forget_seconds=0.2, lease_seconds=0.2))
    gone = worker(0)
    stop_heartbeats(gone)
    wait_until("it is forgotten", comm._roster.forget_silent)
    with pytest.raises(Fenced):
        gone._heartbeat._beat()
    gone.close()
    assert not server.client.hexists(keys.heartbeat(0), "fenced_process")
    left = worker(1)
    left.close()
    left._heartbeat.leave(1.0)
    assert not server.client.exists(keys.heartbeat(1))
    back = worker(1)
    assert (back.worker_id, comm.workers()[0].fenced_process) == (1, "")


def test_time_spent_waiting_for_room_is_reported_once(learner: Learner, worker: Worker) -> None:
    comm = stop_background(learner(max_queue_size=1))
    assert record(comm).room_seconds == 0
    client = worker(0)
    client.send_experiences({"steps": np.zeros(1)})
    client._heartbeat._beat()
    assert comm.workers()[0].room_seconds == 0
    blocked = threading.Thread(target=_fail_to_send, args=(client,))
    blocked.start()
    wait_until("it waits", lambda: client._sender.room_seconds > 0.05)
    client._heartbeat._beat()
    assert comm.workers()[0].room_seconds >= 0.05  # while it still waits
    blocked.join()
    client._heartbeat._beat()
    waited = comm.workers()[0].room_seconds
    assert 0.1 <= waited < 5
    assert record(comm).room_seconds == pytest.approx(waited, abs=0.002)
    assert record(comm).room_seconds == pytest.approx(waited, abs=0.002)  # counted once


def _fail_to_send(client: WorkerClient) -> None:
    with pytest.raises(QueueFull):
        client.send_experiences({"steps": np.zeros(1)}, timeout=0.15)


def test_a_worker_that_does_not_poll_is_reported(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker(0)
    wait_until("a heartbeat reports it", lambda: comm.workers()[0].unpolled_seconds > 0)
    inside: list[Any] = []
    client.on_command("note", lambda _: inside.append(client._parts._describe()["unpolled_seconds"]))
    comm.send_control_command("note")
    wait_until("it obeys", lambda: client.poll() or inside)
    assert inside == ["0.000"]


def test_times_that_a_worker_reports_are_checked(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = stop_background(learner()), worker(0)
    stop_heartbeats(client)
    record(comm)
    reported = {
        "room_seconds": "1e300",
        "unpolled_seconds": "nan",
        "fenced_at": "-5",
        "fenced_process": "x" * 999,
    }
    server.client.hset(keys.heartbeat(0), mapping=reported)
    (found,) = comm.workers()
    assert (found.room_seconds, found.unpolled_seconds, found.fenced_seconds) == (0.0, 0.0, None)
    assert len(found.fenced_process) < 999
    server.client.hset(keys.heartbeat(0), "room_seconds", "999999")
    assert record(comm).room_seconds < 60  # no more than the time that has passed
    server.client.hdel(keys.heartbeat(0), *reported)  # an older release does not report them
    assert comm.workers()[0].room_seconds == 0.0


def test_any_client_reads_the_history(learner: Learner, server: Server, keys: Keys) -> None:
    comm = learner()
    wait_until("it has written a sample", lambda: history(comm))
    comm.cleanup()
    connection = Connection(
        server.connection_settings().get("redis_url"), client=server.connection_settings().get("redis_client")
    )
    assert read_history(connection, keys)[-1].epoch == comm.epoch
    connection.close()
