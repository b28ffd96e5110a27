"""The end of a run: every worker stops, also one that joins later; nothing else ends a run."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import Server, wait_until
from crashed import end_at_once

from rlbroker import (
    Closed,
    ConnectionFailed,
    Fenced,
    InvalidArgument,
    Outcome,
    RoundIncomplete,
    RunLost,
    UnsupportedType,
    WorkerClient,
    WorkerCommunicator,
)
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.local import RedisServer
from rlbroker.membership.joined_run import STOP_GRACE_SECONDS
from rlbroker.membership.roster import end_run
from rlbroker.ops.send_command import send_command

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]

ENDS: dict[str, Callable[[WorkerCommunicator], Any]] = {
    "cleanup": lambda comm: comm.cleanup(),
    "leaving the block": lambda comm: comm.__exit__(None, None, None),
    "stop_workers": lambda comm: comm.stop_workers(timeout=0.1),
    "stop": lambda comm: comm.send_control_command("stop"),
}


def is_ended(server: Server, keys: Keys) -> bool:
    ended, epoch = server.client.hmget(keys.meta, "ended", "epoch")
    return ended is not None and ended.split()[1] == epoch


@contextmanager
def connected(server: Server) -> Iterator[Connection]:
    settings = server.connection_settings()
    connection = Connection(
        settings.get("redis_url"), client=settings.get("redis_client"), timeout_seconds=5.0
    )
    yield connection
    connection.close()


def end_without_a_command(server: Server, comm: WorkerCommunicator, keys: Keys) -> None:
    """End the run as a learner whose command was lost."""
    with connected(server) as connection:
        end_run(connection, keys, comm.epoch, None)


def crash(comm: WorkerCommunicator) -> None:
    comm._thread.stop(5.0)
    end_at_once(comm)


def lose_connection(comm: WorkerCommunicator) -> None:
    """Let the background thread meet a new connection, as after a fault of the network."""
    restoration = comm._maintenance._restoration
    wait_until("it was connected", lambda: restoration._connected)
    restoration.mark_stale()


def obeys(client: WorkerClient) -> threading.Thread:
    """Start a thread that polls until the worker is stopped."""

    def loop() -> None:
        while client.running:
            client.poll()
            time.sleep(0.001)

    thread = threading.Thread(target=loop)
    thread.start()
    return thread


@pytest.mark.on_every_engine
@pytest.mark.parametrize("end", ENDS)
def test_a_worker_that_joins_after_the_end_stops_at_once(
    learner: Learner, worker: Worker, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    ENDS[end](learner())
    with caplog.at_level(logging.WARNING, "rlbroker"):
        late = worker()
    assert not late.running
    assert "has ended, so this worker stops at once; start a learner of the run before its" in caplog.text
    assert late.load_weights({}, timeout=5.0) == 0
    assert not late.poll({})


@pytest.mark.on_every_engine
@pytest.mark.parametrize("end", ENDS)
def test_a_worker_sees_the_end_without_polling(learner: Learner, worker: Worker, end: str) -> None:
    comm, client = learner(), worker()
    assert client.running
    ENDS[end](comm)
    wait_until("it stops", lambda: not client.running)


def test_a_worker_that_the_command_missed_sees_the_end_in_every_wait(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    """It loads weights, is paused, or waits for room in a full queue."""
    comm = learner(3, max_queue_size=1)
    loading, paused, sending = worker(), worker(), worker()
    sending.send_experiences({})
    comm.send_control_command("pause", None, [paused.worker_id])
    wait_until("the pause has arrived", lambda: paused._inbox.waiting)
    results: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {
        "load": lambda: loading.load_weights({}, timeout=60.0),
        "poll": lambda: paused.poll(),
        "send": lambda: bool(sending.send_experiences({}, timeout=60.0)),
    }
    threads = [
        threading.Thread(target=lambda name=name, call=call: results.update({name: call()}))
        for name, call in calls.items()
    ]
    for thread in threads:
        thread.start()
    end_without_a_command(server, comm, keys)
    for thread in threads:
        thread.join(20.0)
    assert results == {"load": 0, "poll": False, "send": False}
    assert not any(client.running for client in (loading, paused, sending))


def test_stop_workers_returns_the_answer_of_each_worker(learner: Learner, worker: Worker) -> None:
    comm = learner()
    threads = [obeys(worker()), obeys(worker())]
    assert comm.stop_workers(timeout=10.0) == {0: Outcome("done"), 1: Outcome("done")}
    for thread in threads:
        thread.join(10.0)
    assert comm.stop_workers() == {0: Outcome("done"), 1: Outcome("done")}
    assert comm.cleanup().stopped == {0: Outcome("done"), 1: Outcome("done")}


def test_stop_workers_of_no_workers_ends_the_run(learner: Learner, server: Server, keys: Keys) -> None:
    assert learner().stop_workers() == {}
    assert is_ended(server, keys)


def test_a_worker_that_is_away_is_named_and_not_waited_for(learner: Learner, worker: Worker) -> None:
    comm = learner(lease_seconds=0.5)
    crashed, client = worker(), worker()
    crashed._heartbeat.thread.stop(5.0)
    thread = obeys(client)
    outcomes = comm.stop_workers(timeout=60.0)
    thread.join(10.0)
    assert outcomes[client.worker_id].state == "done"
    assert str(outcomes[crashed.worker_id]) == "waiting: the worker is away; it stops if it returns"


def test_stop_workers_reads_what_waits_and_collect_returns_it(learner: Learner, worker: Worker) -> None:
    comm, client = learner(1, max_queue_size=2), worker()
    receipts = [client.send_experiences({"number": 0}), client.send_experiences({"number": 1})]
    assert len(comm.collect_experiences(timeout=5.0)) == 2
    receipts += [client.send_experiences({"number": 2}), client.send_experiences({"number": 3})]
    comm.stop_workers(timeout=0.2)
    counts = comm.get_queue_info()["counts"][0]
    assert (counts.waiting, counts.in_hand, counts.delivered) == (0, 4, 0), "it acknowledges nothing"
    assert client.send_experiences({"number": 4}), "the queue has room again"
    collected = comm.collect_experiences() + comm.collect_experiences()
    assert [batch["number"] for _, batch in collected] == [2, 3, 4]
    comm.collect_experiences()
    assert comm.get_queue_info()["counts"][0].delivered == 5


def test_a_full_queue_does_not_hold_up_the_stop(learner: Learner, worker: Worker) -> None:
    comm, client = learner(1, max_queue_size=1), worker()
    sent: list[int] = []

    def loop() -> None:
        while client.running:
            client.poll()
            sent.append(client.send_experiences({}, timeout=60.0).sequence)

    thread = threading.Thread(target=loop)
    thread.start()
    wait_until("the queue is full", lambda: client._sender.room_seconds)
    assert comm.stop_workers(timeout=10.0) == {0: Outcome("done")}
    thread.join(10.0)
    collected = comm.collect_experiences() + comm.collect_experiences()
    assert [batch.sequence for _, batch in collected] == [number for number in sent if number]


def test_handlers_are_called_in_order_even_if_the_end_comes_before_the_next_poll(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    calls: list[tuple[str, Any]] = []
    client.on_command("save", lambda data: calls.append(("save", data)))
    client.on_command("stop", lambda data: calls.append(("stop", data)))
    save, stop = comm.send_control_command("save", 1), comm.send_control_command("stop", 2)
    wait_until("it stops", lambda: not client.running)
    client.close()
    assert calls == [("save", 1), ("stop", 2)]
    assert save.wait(5.0) == stop.wait(5.0) == {0: Outcome("done")}


def test_another_learner_opens_the_run_again_but_not_for_stopped_workers(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    learner().cleanup()
    stopped = worker()
    learner(learner_name="collecting", publishes=False)
    assert is_ended(server, keys)
    comm = learner()
    assert not is_ended(server, keys)
    assert worker().running
    comm.send_model_weights({"w": 1})
    wait_until("the weights arrive", lambda: stopped._subscriber.ready)
    assert not stopped.running


def test_only_the_learner_that_leads_ends_the_run(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    replaced, collecting = learner(), learner(learner_name="second", publishes=False)
    other = learner(learner_name="third")
    leading = learner()
    with pytest.raises(InvalidArgument, match="publishes=False"):
        collecting.stop_workers()
    for one in (replaced, other):
        with pytest.raises(Fenced):
            one.stop_workers()
    for one in (replaced, collecting, other):
        assert one.cleanup().stopped == {}
    assert not is_ended(server, keys)
    assert worker().running
    leading.cleanup()
    assert is_ended(server, keys)


def test_a_learner_that_fails_or_restarts_ends_nothing(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    client = worker()
    with pytest.raises(ZeroDivisionError), learner():
        raise ZeroDivisionError
    learner().cleanup(stop_workers=False)
    crash(learner())
    assert not is_ended(server, keys)
    assert client.running


@pytest.mark.on_every_engine
def test_a_learner_says_that_a_command_of_another_process_has_ended_its_run(
    learner: Learner, worker: Worker, server: Server, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    comm = learner()
    comm.send_model_weights({"w": 1})
    wait_until("it has a heartbeat", lambda: server.client.hexists(keys.meta, "learner_seen"))
    with connected(server) as connection:
        send_command(connection, keys, "stop", None, None, expires_seconds=None)
    assert not worker().running
    wait_until("the learner has noticed", lambda: comm._roster.ended_by_command)
    assert caplog.text.count("was ended by a command, so its workers stop") == 1
    for workers in (None, [3]):
        with pytest.raises(RoundIncomplete, match=r"was ended by a command.*: start the learner again"):
            comm.collect_round(workers=workers, timeout=0.2)
    comm = learner()
    assert worker().running
    comm.stop_workers(timeout=0.1)
    comm._maintenance.send_heartbeat()
    assert not comm._roster.ended_by_command, "this learner has ended it"


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_learner_that_leaves_by_an_exception_says_that_its_run_goes_on(
    learner: Learner, run: str, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    with pytest.raises(error), learner():
        raise error
    assert f"the run {run!r} goes on after {error.__name__}: its workers wait" in caplog.text
    assert f"`rlbroker control send stop --run {run} --force`" in caplog.text


def test_a_learner_whose_run_does_not_go_on_does_not_say_so(
    learner: Learner, caplog: pytest.LogCaptureFixture
) -> None:
    def end_and_fail() -> None:
        with learner() as comm:
            comm.stop_workers(timeout=0.1)
            raise ZeroDivisionError

    def be_replaced() -> None:
        with learner() as comm:
            learner()
            comm.stop_workers()

    with learner():
        pass
    with pytest.raises(ZeroDivisionError):
        end_and_fail()
    with pytest.raises(Fenced):
        be_replaced()
    with pytest.raises(ZeroDivisionError), learner(learner_name="second", publishes=False):
        raise ZeroDivisionError
    assert "goes on" not in caplog.text


def test_a_stop_for_some_or_for_a_time_does_not_end_the_run(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm = learner()
    worker()
    comm.send_control_command("stop", worker_ids=[0])
    comm.send_control_command("stop", expires=600)
    with pytest.raises(UnsupportedType):
        comm.send_control_command("stop", object())
    assert not is_ended(server, keys)
    assert worker(worker_id=5).running


def test_a_worker_with_a_key_takes_only_a_signed_end(
    learner: Learner, worker: Worker, server: Server, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    comm, client = learner(signing_key="k" * 32), worker(signing_key="k" * 32)
    for forged in (f"1.0 {comm.epoch}", f"1.0 {comm.epoch} ", f"1.0 {comm.epoch} 01234567:{'0' * 64}"):
        server.client.hset(keys.meta, "ended", forged)
        with caplog.at_level(logging.WARNING, "rlbroker"):
            assert worker(1, signing_key="k" * 32).running
        assert "refuses the end of the run" in caplog.text
        caplog.clear()
    server.client.hdel(keys.meta, "ended")
    comm.stop_workers(timeout=0.1)
    assert not worker(1, signing_key="k" * 32).running
    wait_until("it stops", lambda: not client.running)


def test_the_end_survives_the_loss_of_the_servers_data(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(lease_seconds=1.0), worker()
    comm.stop_workers(timeout=0.1)
    server.client.flushall()
    late = worker(worker_id=1)
    wait_until("the end is restored", lambda: is_ended(server, keys))
    wait_until("both stop", lambda: not (client.running or late.running))


def test_the_end_outlives_a_learner_that_is_killed_while_it_waits(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker()
    thread = threading.Thread(target=comm.stop_workers, args=(1.0,))
    thread.start()
    wait_until("the run has ended", lambda: is_ended(server, keys))
    crash(comm)
    thread.join(20.0)
    assert not thread.is_alive()
    wait_until("the worker stops", lambda: not client.running)
    assert not worker().running


def test_a_learner_that_opens_while_the_last_one_cleans_up_keeps_its_run_open(
    learner: Learner, server: Server, keys: Keys
) -> None:
    comm = learner()
    for _ in range(5):
        ending = threading.Thread(target=comm.cleanup)
        ending.start()
        comm = learner()
        ending.join(10.0)
        assert not is_ended(server, keys)


def test_cleanup_ends_stop_workers_in_another_thread(learner: Learner, worker: Worker) -> None:
    comm = learner()
    worker()
    errors: list[type[BaseException]] = []

    def stop() -> None:
        try:
            comm.stop_workers(timeout=60.0)
        except Closed as error:
            errors.append(type(error))

    thread = threading.Thread(target=stop)
    thread.start()
    wait_until("it waits", lambda: comm._run_end.command)
    comm.cleanup()
    thread.join(10.0)
    assert errors == [Closed]


def test_cleanup_does_not_wait_long_for_workers_that_do_not_answer(learner: Learner, worker: Worker) -> None:
    comm, client = learner(timeout=8.0), worker()
    began = time.monotonic()
    report = comm.cleanup()
    assert time.monotonic() - began < 6.0
    assert report.complete
    assert report.stopped == {client.worker_id: Outcome("waiting")}
    assert report.commands == 0
    assert report, "a stop without an answer is not left behind"
    assert comm.cleanup() is report


def test_an_end_comes_back_with_older_data_and_stops_no_worker_of_the_next_learner(
    learner: Learner, worker: Worker, server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a backup, or a replica that lagged behind; the end of the present learner is restored."""
    learner().cleanup()
    old = server.client.dump(keys.meta)
    comm = learner(lease_seconds=0.5)
    client = worker()
    restoration, go_on = comm._maintenance._restoration, threading.Event()
    restore = comm._maintenance.restore
    monkeypatch.setattr(comm._maintenance, "restore", lambda: go_on.wait(20.0) and restore())
    server.client.restore(keys.meta, 0, old, replace=True)
    assert is_ended(server, keys)
    lose_connection(comm)
    time.sleep(STOP_GRACE_SECONDS + 0.5)  # some heartbeats bring the old end
    assert client.running
    go_on.set()
    wait_until("it is restored", lambda: not restoration.stale)
    assert not is_ended(server, keys)
    assert worker(worker_id=7).running
    comm.stop_workers(timeout=0.1)
    server.client.restore(keys.meta, 0, old, replace=True)
    lose_connection(comm)
    wait_until("its own end is restored", lambda: int(server.client.hget(keys.meta, "epoch")) == comm.epoch)
    wait_until("its own end is restored", lambda: is_ended(server, keys))
    wait_until("the worker stops", lambda: not client.running)


def test_a_run_that_was_pruned_in_part_is_open_for_a_learner_that_only_collects(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    server.client.hset(keys.meta, mapping={"ended": "0 0", "pruned": "1"})
    learner(publishes=False)
    assert worker().running


def test_a_learner_that_ended_its_run_and_was_replaced_goes_on_collecting_after_a_reconnect(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    """It leaves the end alone, and renews what it has in hand, so that no batch is given twice."""
    replaced = learner(learner_name="replaced", take_over_seconds=1.0)
    replaced.stop_workers(timeout=0.1)
    leading = learner(learner_name="leading", take_over_seconds=1.0)
    wait_until("it was replaced", lambda: not replaced._roster.leads)
    lose_connection(replaced)
    wait_until("it is restored", lambda: not replaced._maintenance._restoration.stale)
    client = worker()
    client.send_experiences({"number": 0})
    assert [batch["number"] for _, batch in replaced.collect_experiences(timeout=5.0)] == [0]
    assert leading.collect_experiences(timeout=3.0) == []
    assert client.running


def test_a_restoration_that_fails_for_good_is_repeated_with_pauses(
    learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, calls = learner(), list[float]()

    def fail(error: Exception) -> None:
        calls.append(time.monotonic())
        raise error

    for error in (Fenced("for good"), RunLost("for good")):
        calls.clear()
        monkeypatch.setattr(comm._roster, "restore", lambda error=error: fail(error))
        lose_connection(comm)
        wait_until("it was tried again", lambda: len(calls) >= 2)
        begun = len(calls)
        time.sleep(1.0)
        assert len(calls) - begun < 20


def test_a_repeated_stop_of_a_replaced_learner_is_fenced(learner: Learner, worker: Worker) -> None:
    comm = learner(learner_name="replaced")
    thread = obeys(worker())
    assert comm.stop_workers(timeout=10.0) == {0: Outcome("done")}
    thread.join(10.0)
    learner(learner_name="leading")
    with pytest.raises(Fenced):
        comm.stop_workers(timeout=1.0)


def test_stop_workers_outlasts_a_server_that_does_not_answer_for_a_while(
    keys: Keys,
) -> None:
    """Longer than any command waits; and it keeps to its own timeout."""
    with (
        RedisServer() as server,
        WorkerCommunicator(1, redis_url=server.url, run=keys.run, timeout=2.0) as comm,
        WorkerClient(server.url, keys.run) as client,
    ):
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(comm.stop_workers(timeout=60.0)))
        thread.start()
        wait_until("it waits", lambda: comm._run_end.command)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(ConnectionFailed):
                comm.stop_workers(timeout=0.5)
            assert time.monotonic() - began < 1.5
            thread.join(4.0)
            assert thread.is_alive()
        finally:
            os.kill(server.pid, signal.SIGCONT)
        while client.running:
            client.poll()
        thread.join(20.0)
        assert results == [{0: Outcome("done")}]


@pytest.mark.parametrize("workers", [None, [0]])
def test_a_handler_that_waits_for_weights_returns_when_a_stop_comes(
    learner: Learner, worker: Worker, workers: list[int] | None
) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"w": 1})
    results: list[Any] = []
    client.on_command("sync", lambda data: results.append(client.wait_for_weights({})))
    client.load_weights({})
    sync = comm.send_control_command("sync")
    wait_until("it has arrived", lambda: client._inbox.waiting)
    thread = threading.Thread(target=client.poll)
    thread.start()
    stop = comm.send_control_command("stop", worker_ids=workers)
    thread.join(10.0)
    waits = thread.is_alive()
    client.drain()
    thread.join(10.0)
    assert (waits, results) == (False, [False])
    client.close()
    assert sync.wait(5.0) == stop.wait(5.0) == {0: Outcome("done")}


def test_an_unsigned_end_does_not_keep_the_leader_from_signing_its_own(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm = learner(signing_key="k" * 32)
    end_without_a_command(server, comm, keys)
    assert worker(0, signing_key="k" * 32).running
    comm.stop_workers(timeout=0.1)
    end_without_a_command(server, comm, keys)
    assert not worker(1, signing_key="k" * 32).running
