"""A server loses its data: learner and workers restore the run by themselves, and report what was lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Reachable, Server, wait_until

from rlbroker import ConnectionFailed, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.control.commands import SEND
from rlbroker.control.ledger import SETTLE
from rlbroker.experience import watched_streams

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


@pytest.mark.on_every_engine
def test_the_learner_publishes_its_latest_weights_again_under_a_new_version(
    server: Server, learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    weights = np.arange(5.0)
    comm.send_model_weights({"w": weights})
    comm.send_model_weights({"w": weights})
    weights[:] = -1.0  # training continues; what was published must not change
    model: dict[str, np.ndarray] = {}
    wait_until("version 2 is applied", lambda: client.poll(model) and client.version == 2)
    server.client.flushall()
    wait_until("version 3 is applied", lambda: client.poll(model) and client.version == 3)
    wait_until("the learner has it too", lambda: comm.version == 3)
    assert model["w"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert comm.send_model_weights({"w": weights}).version == 4


def test_a_worker_rejoins_with_the_same_incarnation(server: Server, learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker(3)
    server.client.flushall()
    (info,) = wait_until("the worker is back", lambda: comm.workers())
    assert (info.worker_id, info.incarnation) == (3, client.incarnation)
    assert worker().worker_id == 0
    assert worker(3).incarnation > client.incarnation


@pytest.mark.parametrize("first", ["learner", "worker"])
def test_new_processes_on_a_server_that_lost_everything_are_not_taken_for_old_ones(
    server: Server, learner: Learner, worker: Worker, first: str
) -> None:
    comm, client = learner(acknowledge="manual"), worker(0)
    for number in range(5):
        client.send_experiences({"number": number})
    comm.collect_experiences(timeout=5.0)
    marks = comm.marks()
    client.close()
    comm.cleanup()
    server.client.flushall()
    early = [worker(0)] if first == "worker" else []
    comm = learner(acknowledge="manual")
    comm.restore(marks)
    client = early[0] if early else worker(0)
    for number in range(5, 8):
        client.send_experiences({"number": number})
    assert [batch["number"] for _, batch in comm.collect_experiences(timeout=5.0)] == [5, 6, 7]


@pytest.mark.parametrize("versions", [1, 2])
def test_a_new_learner_does_not_reuse_a_version_that_workers_have_seen(
    server: Server, learner: Learner, worker: Worker, keys: Keys, versions: int
) -> None:
    comm, client, model = learner(), worker(), dict[str, int]()
    for number in range(versions):
        comm.send_model_weights({"number": number})
    wait_until("the versions are applied", lambda: client.poll(model) and client.version == versions)
    comm.cleanup(stop_workers=False)
    client._heartbeat._thread.stop(5.0)  # so it does not notice the loss before the new learner publishes
    server.client.flushall()
    comm = learner()
    for number in range(versions):
        assert comm.send_model_weights({"number": 100 + number}).version == number + 1
    client._heartbeat._beat()
    wait_until("the new weights are applied", lambda: client.poll(model) and client.version > versions)
    assert model == {"number": 100 + versions - 1}


def test_a_worker_that_has_seen_newer_weights_than_the_run_reports_it(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    comm, client, model = learner(), worker(), dict[str, int]()
    for number in range(3):
        comm.send_model_weights({"number": number})
    wait_until("the versions are applied", lambda: client.poll(model) and client.version == 3)
    comm._thread.stop(5.0)
    server.client.hset(keys.weights, "version", 2)
    wait_until(
        "the worker reports it",
        lambda: "latest version is 2, but this worker has seen 3" in client._subscriber.problem,
    )


@pytest.mark.on_every_engine
def test_at_level_learner_no_batch_is_lost_or_delivered_twice(
    server: Server, learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker(level="learner")
    for number in range(10):
        client.send_experiences({"number": number})
    got = [batch["number"] for _, batch in comm.collect_experiences(timeout=5.0, max_batches=4)]
    server.client.flushall()
    client.send_experiences({"number": 10})

    def collected() -> bool:
        got.extend(batch["number"] for _, batch in comm.collect_experiences(timeout=0.5))
        return len(got) >= 11

    wait_until("all batches are collected", collected)
    assert got == list(range(11))
    wait_until(
        "all batches are safe", lambda: not comm.collect_experiences() and client.flush(timeout=0.1) == 0
    )
    counts = wait_until("the counts add up", lambda: _final_counts(comm))
    assert (counts.produced, counts.delivered, counts.lost) == (11, 11, {})


@pytest.mark.on_every_engine
def test_at_level_redis_the_exact_number_of_lost_batches_is_reported(
    server: Server, learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    for number in range(10):
        client.send_experiences({"number": number})
    got = [batch["number"] for _, batch in comm.collect_experiences(timeout=5.0, max_batches=4)]
    held = comm.collect_experiences(timeout=0.0, max_batches=1)
    server.client.flushall()
    wait_until("the worker is back", lambda: comm.workers())
    client.send_experiences({"number": 10})

    def collected() -> bool:
        got.extend(batch["number"] for _, batch in comm.collect_experiences(timeout=0.5))
        return bool(got[-1] == 10)

    wait_until("the last batch is collected", collected)
    comm.collect_experiences()
    counts = wait_until("the counts add up", lambda: _final_counts(comm))
    assert len(held) == 1
    delivered = len(got) + len(held)
    assert (counts.produced, counts.delivered, counts.lost) == (11, delivered, {"vanished": 11 - delivered})


@pytest.mark.on_every_engine
def test_a_pending_command_is_still_acknowledged(server: Server, learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    done: list[int] = []
    client.on_command("note", done.append)
    first = comm.send_control_command("note", 1)
    wait_until("the command has arrived", lambda: client._inbox.waiting)
    wait_until("the learner has seen the worker", lambda: comm._roster._incarnations.members)
    server.client.flushall()
    second = comm.send_control_command("note", 2)

    def acknowledged() -> bool:
        client.poll()
        return all(first.outcomes().values()) and all(second.outcomes().values())

    wait_until("both are acknowledged", acknowledged)
    assert done == [1, 2]


def test_a_command_acknowledged_before_its_sender_got_the_reply_stays_acknowledged(
    server: Server, learner: Learner, worker: Worker, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, client = learner(), worker()
    done: list[int] = []
    client.on_command("note", done.append)
    attempt = comm._connection._attempt

    def acknowledged(outcomes: str) -> bool:
        client.poll()
        return bool(server.client.hget(outcomes, "0") == b"done")

    def lose(commands: Any, strict: bool) -> Any:
        replies = attempt(commands, strict)
        if commands[0][:2] == ("EVALSHA", SEND.sha) and not done:
            wait_until("it is acknowledged", lambda: acknowledged(commands[0][7]))
            raise ConnectionFailed("the reply was lost")
        return replies

    with monkeypatch.context() as patch:
        patch.setattr(comm._connection, "_attempt", lose)
        command = comm.send_control_command("note", 1)
    server.client.flushall()
    wait_until("the worker is back", lambda: comm.workers())
    wait_until(
        "the outcome is recorded", lambda: server.client.hget(keys.outcomes(command.id), "0") == b"done"
    )
    assert (done, comm.get_queue_info()["control_queue_sizes"]) == ([1], [0, 0])


@pytest.mark.parametrize("closes", [False, True])
def test_an_acknowledgement_that_was_lost_unnoticed_is_sent_again(
    server: Server, learner: Learner, worker: Worker, closes: bool
) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"number": 1})
    wait_until("version 1 is ready", lambda: client._subscriber.ready)
    wait_until("the learner has seen the worker", lambda: comm._roster._incarnations.members)
    comm._thread.stop(5.0)
    if closes:
        client._heartbeat._thread.stop(5.0)
    client.poll({})
    server.client.flushall()
    comm._maintenance.restore()  # before the worker's next heartbeat
    if closes:
        client.close()
    wait_until("it is settled", lambda: comm.missed_updates() and comm._ledger.read_outcomes([0])[0].settled)
    assert comm._ledger.read_outcomes([0])[0].applied_total == 1


@pytest.mark.parametrize("lost", ["workers", "life", "heartbeat"])
def test_a_worker_recovers_from_the_loss_of_one_of_its_keys(
    server: Server, learner: Learner, worker: Worker, keys: Keys, lost: str
) -> None:
    comm, client = learner(lease_seconds=0.5), worker()
    wait_until("it knows its lease", lambda: client._heartbeat.knows_run)
    server.client.delete(
        {"workers": keys.workers, "life": keys.life(0), "heartbeat": keys.heartbeat(0)}[lost]
    )
    wait_until("its token is back", lambda: server.client.hget(keys.heartbeat(0), "token"))
    wait_until("it is a member", lambda: [one.incarnation for one in comm.workers()] == [client.incarnation])
    client.poll()


def test_outcomes_settled_without_a_reply_survive_a_loss(
    server: Server, learner: Learner, worker: Worker, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, client = learner(), worker()
    for number in range(1, 4):
        comm.send_model_weights({"number": number})
    model: dict[str, int] = {}
    wait_until("the newest is ready", lambda: client._subscriber.newest == 3)
    command = comm.send_control_command("reset")
    wait_until("the command has arrived", lambda: client._inbox.waiting)
    execute_all, lost = comm._connection.execute_all, threading.Event()

    def lose(calls: Any, **options: Any) -> Any:
        replies = execute_all(calls, **options)
        if calls and calls[0][:2] == ("EVALSHA", SETTLE.sha):
            lost.set()
            raise ConnectionFailed("the reply was lost until the deadline")
        return replies

    with monkeypatch.context() as patch:
        patch.setattr(comm._connection, "execute_all", lose)
        client.poll(model)
        wait_until(
            "all is settled", lambda: lost.is_set() and comm._ledger.read_outcomes([0])[0].commands_done
        )
        wait_until("the worker forgot its answers", lambda: not client._inbox.acknowledgements.unsettled)
        wait_until("the ledger looked again", lambda: not comm._ledger._unconfirmed)
    server.client.flushall()
    wait_until("version 4 is applied", lambda: client.poll(model) and client.version == 4)
    wait_until("the worker is back", lambda: comm.workers())
    wait_until("it is settled", lambda: comm.missed_updates()[0].behind == 0)
    missed = comm.missed_updates()[0]
    assert (missed.by_reason, len(missed.records)) == ({"superseded": 2}, 1)
    assert command.wait(0.0)[0]


def test_a_command_whose_acknowledgement_was_forgotten_is_acknowledged_again_and_done_once(
    server: Server, learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    done: list[int] = []
    client.on_command("note", done.append)
    command = comm.send_control_command("note", 1)
    wait_until("it is done", lambda: client.poll() or command.outcomes()[0])
    wait_until("the worker forgot its answer", lambda: not client._inbox.acknowledgements.unsettled)
    comm._commands._sent[command.id].outcomes.clear()  # as if the learner had not heard of it
    server.client.flushall()
    wait_until("the command is restored", lambda: client.poll() or command.outcomes()[0].state == "waiting")
    wait_until("it is acknowledged again", lambda: client.poll() or command.outcomes()[0])
    assert done == [1]


def test_missed_updates_recorded_before_a_loss_stay_recorded(
    server: Server, learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    for number in range(1, 6):
        comm.send_model_weights({"number": number})
    model: dict[str, int] = {}
    wait_until("the newest is applied", lambda: client.poll(model) and client.version == 5)
    wait_until("it is settled", lambda: comm.missed_updates()[0].behind == 0)
    before = comm.missed_updates()[0]
    server.client.flushall()
    wait_until("version 6 is applied", lambda: client.poll(model) and client.version == 6)
    wait_until("the worker is a member again", lambda: comm.missed_updates())
    wait_until("it is settled", lambda: comm.missed_updates()[0].behind == 0)
    after = comm.missed_updates()[0]
    assert (after.total, after.by_reason, after.commands) == (before.total, before.by_reason, 0)
    assert after.records == before.records


def test_restoring_a_server_that_lost_nothing_changes_nothing(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    comm, client = learner(), worker()
    for number in range(1, 6):
        comm.send_model_weights({"number": number})
    model: dict[str, int] = {}
    wait_until("the newest is applied", lambda: client.poll(model) and client.version == 5)
    wait_until("it is settled", lambda: comm.missed_updates()[0].behind == 0)
    client.send_experiences({"number": 1})
    comm.collect_experiences(timeout=5.0)
    comm.collect_experiences()

    def read_all() -> tuple[Any, ...]:
        return comm.missed_updates(), comm.get_queue_info(), comm.version

    before = read_all()
    assert before[0][0].records
    server.client.hdel(keys.meta, "learner_seen")
    comm._maintenance.close()
    wait_until("the learner has restored the run", lambda: server.client.hexists(keys.meta, "learner_seen"))
    assert read_all() == before


@pytest.mark.on_every_engine
@pytest.mark.parametrize("kept", ["nothing", "older"])
def test_counts_are_right_at_once_after_the_loss_of_one_workers_keys_and_of_all_connections(
    reachable: Reachable,
    learner: Learner,
    worker: Worker,
    keys: Keys,
    kept: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watched_streams, "RECHECK_SECONDS", 3600.0)
    comm, client = learner(acknowledge="manual"), worker()
    for number in range(5):
        client.send_experiences({"number": number})
    for _ in range(5):
        comm.acknowledge(comm.collect_experiences(timeout=5.0, max_batches=1))
    if kept == "nothing":
        reachable.client.delete(keys.counts(0), keys.epochs(0))
    else:
        reachable.client.hset(keys.counts(0), "delivered", 2)
    every = {"target_nodes": "primaries"} if reachable.kind == "cluster" else {}
    reachable.client.client_kill_filter(_type="normal", skipme=True, **every)
    client.send_experiences({"number": 5})

    def delivered() -> int:
        comm.acknowledge(comm.collect_experiences(timeout=0.1))
        count: int = comm.get_queue_info()["counts"][0].delivered
        return count

    wait_until("the last batch is delivered", lambda: delivered() in (1, 3, 6))
    counts = comm.get_queue_info()["counts"][0]
    assert (counts.delivered, counts.lost) == (6, {})


def test_counts_written_while_counts_are_restored_are_kept(
    server: Server, learner: Learner, worker: Worker, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, client = learner(acknowledge="manual"), worker()
    for number in range(2):
        client.send_experiences({"number": number})
    first = comm.collect_experiences(timeout=5.0, max_batches=1)
    comm.acknowledge(first)
    second = comm.collect_experiences(timeout=5.0)
    server.client.hset(keys.counts(0), "delivered", 0)  # it came back with older data
    restoring = threading.Thread(target=comm._pending.restore)
    execute_all = comm._connection.execute_all

    def interrupted(*arguments: Any, **options: Any) -> Any:
        replies = execute_all(*arguments, **options)
        if threading.current_thread() is threading.main_thread() and not restoring.is_alive():
            restoring.start()
            restoring.join(0.2)
        return replies

    monkeypatch.setattr(comm._connection, "execute_all", interrupted)
    comm.acknowledge(second)
    restoring.join()
    assert server.client.hget(keys.counts(0), "delivered") == b"2"


def test_a_call_that_needs_the_run_does_not_delay_its_restoration(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    comm, client = learner(timeout=3.0), worker()
    comm.send_control_command("stop")
    server.client.delete(keys.meta)  # from now on no acknowledgement can be settled
    wait_until("an acknowledgement is to be settled", lambda: client.poll() or not client.running)
    assert comm.get_queue_info()["control_queue_sizes"] == [0, 0]


def _final_counts(comm: WorkerCommunicator):  # type: ignore[no-untyped-def]
    counts = comm.get_queue_info()["counts"].get(0)
    return counts if counts and counts.waiting == counts.in_hand == 0 and counts.produced == 11 else None
