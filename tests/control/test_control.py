"""Commands are durable, done once and in order, and each has one final outcome at each worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from conftest import Server, wait_until

from rlbroker import Command, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.control import commands
from rlbroker.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    InvalidArgument,
    PeerError,
    UnknownWorker,
    UnsupportedType,
)
from rlbroker.membership.incarnations import read_incarnations

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def states(command: Command) -> dict[int, str]:
    return {worker: str(outcome) for worker, outcome in command.outcomes().items()}


def poll_until_acknowledged(client: WorkerClient, command: Command) -> None:
    """Let a worker poll until it has acknowledged a command."""
    worker_id = client.worker_id
    wait_until("it is acknowledged", lambda: client.poll() or states(command)[worker_id] != "waiting")


@pytest.mark.on_every_engine
def test_commands_are_done_once_and_in_order(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    done: list[int] = []
    client.on_command("note", done.append)
    commands = [comm.send_control_command("note", number) for number in range(50)]
    poll_until_acknowledged(client, commands[-1])
    assert done == list(range(50))
    assert all(command.wait(5.0)[0] for command in commands)


def test_a_command_reaches_only_the_workers_that_it_was_sent_to(learner: Learner, worker: Worker) -> None:
    comm, clients = learner(num_workers=3), [worker() for _ in range(3)]
    command = comm.send_control_command("reset", worker_ids=[0, 2])
    for client in (clients[0], clients[2]):
        poll_until_acknowledged(client, command)
    clients[1].poll()
    assert [client.reset_requested() for client in clients] == [True, False, True]
    assert states(command) == {0: "done", 2: "done"}
    assert command.worker_ids == (0, 2)


def test_handlers_get_arrays_and_nested_data(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    got: list[dict[str, object]] = []
    client.on_command("goals", got.append)
    poll_until_acknowledged(client, comm.send_control_command("goals", {"xy": np.arange(3), "name": "left"}))
    assert got[0]["name"] == "left"
    assert np.array_equal(got[0]["xy"], np.arange(3))  # type: ignore[arg-type]


def test_an_unknown_command_is_acknowledged_as_unknown_and_recorded(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    command = comm.send_control_command("dance")
    poll_until_acknowledged(client, command)
    assert states(command) == {0: "unknown"}
    missed = comm.missed_updates()[0]
    assert (missed.commands, missed.records[-1].why) == (1, "unknown")
    assert missed.records[-1].command == f"{command.id} dance"


def test_a_failing_handler_is_reported_and_the_worker_continues(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    client.on_command("divide", lambda by: 1 / by)
    command = comm.send_control_command("divide", 0)
    poll_until_acknowledged(client, command)
    assert states(command) == {0: "failed: ZeroDivisionError: division by zero"}
    assert client.running


def test_an_expired_command_is_not_done(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    command = comm.send_control_command("reset", expires=0.05)
    time.sleep(0.1)  # expiry is measured in real time
    poll_until_acknowledged(client, command)
    assert states(command) == {0: "expired"}
    assert not client.reset_requested()


def test_pause_holds_the_worker_for_its_duration(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    command = comm.send_control_command("pause", {"duration": 0.3})
    wait_until("the command has arrived", lambda: client._inbox.waiting)
    began = time.monotonic()
    client.poll()
    assert time.monotonic() - began >= 0.3
    assert command.wait(5.0)[0]


def test_a_stop_ends_an_endless_pause(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    comm.send_control_command("pause")
    threading.Timer(0.3, comm.send_control_command, ("stop",)).start()
    while client.running:
        client.poll()
    assert not client.running


def test_a_resume_ends_a_pause(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    comm.send_control_command("pause")
    comm.send_control_command("resume")
    command = comm.send_control_command("reset")
    poll_until_acknowledged(client, command)
    assert not client.paused


def test_a_paused_worker_stays_alive(learner: Learner, worker: Worker) -> None:
    comm = learner(lease_seconds=0.5)
    client = worker()
    wait_until("it knows its lease", lambda: client._heartbeat.knows_run)
    comm.send_control_command("pause", {"duration": 1.2})
    wait_until("the command has arrived", lambda: client._inbox.waiting)
    pausing = threading.Thread(target=client.poll)
    pausing.start()
    pausing.join(1.0)
    assert [info.state for info in comm.workers()] == ["alive"]
    pausing.join()


@pytest.mark.parametrize("duration", [-1, "long", {"duration": "x"}])
def test_a_pause_with_an_invalid_duration_fails(learner: Learner, worker: Worker, duration: object) -> None:
    comm, client = learner(), worker()
    command = comm.send_control_command("pause", duration)
    poll_until_acknowledged(client, command)
    assert states(command)[0].startswith("failed: InvalidArgument: duration must be a number of seconds")


def test_wait_returns_waiting_for_workers_that_have_not_acknowledged(
    learner: Learner, worker: Worker
) -> None:
    comm, _, slow = learner(), worker(), worker()
    command = comm.send_control_command("reset")
    poll_until_acknowledged(slow, command)
    assert {one: outcome.state for one, outcome in command.wait(0.1).items()} == {0: "waiting", 1: "done"}
    assert comm.get_queue_info()["control_queue_sizes"] == [1, 0]


def test_a_worker_that_leaves_without_acknowledging_missed_the_command(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    command = comm.send_control_command("reset")
    client.close()
    assert {one: str(outcome) for one, outcome in command.wait(5.0).items()} == {0: "missed: left"}
    assert comm.get_queue_info()["control_queue_sizes"] == [0, 0]


def test_a_new_process_does_not_do_the_commands_of_its_predecessor(learner: Learner, worker: Worker) -> None:
    comm = learner()
    worker(worker_id=0)
    command = comm.send_control_command("stop", worker_ids=[0])
    successor = worker(worker_id=0)
    assert {one: str(outcome) for one, outcome in command.wait(5.0).items()} == {0: "missed: away"}
    successor.poll()
    assert successor.running


def test_a_command_to_no_worker_is_false(learner: Learner) -> None:
    command = learner().send_control_command("reset")
    assert not command
    assert command.wait(1.0) == {}


def test_a_command_to_an_unknown_worker_names_the_members(learner: Learner, worker: Worker) -> None:
    comm = learner()
    worker(worker_id=4)
    with pytest.raises(UnknownWorker, match=r"worker 7 is not a member .* members are: 4"):
        comm.send_control_command("reset", worker_ids=[7])
    assert comm.get_queue_info()["control_queue_sizes"][4] == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("",), InvalidArgument),
        ((3,), InvalidArgument),
        (("x" * 201,), InvalidArgument),
        (("reset", None, [-1]), InvalidArgument),
        (("reset", None, 0), InvalidArgument),
        (("reset", object()), UnsupportedType),
    ],
)
def test_invalid_commands_are_refused(
    learner: Learner, arguments: tuple[object, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        learner().send_control_command(*arguments)  # type: ignore[arg-type]


def test_a_handler_must_be_callable(worker: Worker) -> None:
    with pytest.raises(UnsupportedType, match="callable"):
        worker().on_command("x", 3)  # type: ignore[arg-type]


@pytest.mark.on_every_engine
def test_a_person_can_read_commands_and_their_outcomes(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker()
    command = comm.send_control_command("pause", {"duration": 0.01})
    poll_until_acknowledged(client, command)
    [(_, fields)] = server.client.xrange(keys.control)
    assert (fields[b"name"], fields[b"arguments"]) == (b"pause", b'{"duration": 0.01}')
    assert server.client.hgetall(keys.outcomes(command.id)) == {b"0": b"done"}


def test_a_command_survives_a_fault_before_it_is_done(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, client = learner(), worker()
    comm.send_control_command("stop", expires=600)
    wait_until("the command has arrived", lambda: client._inbox.waiting)

    def fail(*command: object, **options: object) -> None:
        raise ConnectionFailed("the server is away")

    with monkeypatch.context() as patch:
        patch.setattr(client._connection, "clock", fail)
        with pytest.raises(ConnectionFailed):
            client.poll()
    client.poll()
    assert not client.running


def test_an_interrupted_handler_is_acknowledged_as_failed(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()

    def interrupt(data: object) -> None:
        raise KeyboardInterrupt

    client.on_command("long", interrupt)
    command = comm.send_control_command("long")
    wait_until("the command has arrived", lambda: client._inbox.waiting)
    with pytest.raises(KeyboardInterrupt):
        client.poll()
    assert str(command.wait(5.0)[0]) == "failed: KeyboardInterrupt"


def test_a_pause_does_not_extend_the_wait_for_weights(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    comm.send_control_command("pause")
    wait_until("the command has arrived", lambda: client._inbox.waiting)
    with pytest.raises(DeadlineExceeded):
        client.load_weights({}, timeout=0.5)


def test_threads_that_poll_at_the_same_time_keep_the_order(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    done: list[int] = []

    def note_slowly(number: int) -> None:
        time.sleep(0.01 if number % 2 else 0)
        done.append(number)

    client.on_command("note", note_slowly)
    commands = [comm.send_control_command("note", number) for number in range(40)]

    def poll() -> None:
        while states(commands[-1])[0] == "waiting":
            client.poll()

    pollers = [threading.Thread(target=poll) for _ in range(3)]
    for poller in pollers:
        poller.start()
    for poller in pollers:
        poller.join()
    assert done == list(range(40))


def test_commands_arrive_from_a_new_server_whose_clock_is_behind(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker()
    ahead = int(server.client.time()[0] + 3600) * 1000
    server.client.xadd(keys.control, {"event": "from the future"}, id=f"{ahead}-0")
    wait_until("the entry was read", lambda: client._inbox._reader.position == f"{ahead}-0")
    server.client.flushall()
    wait_until("the worker is back", lambda: comm.workers())
    comm.send_control_command("stop")
    wait_until("it stops", lambda: client.poll() or not client.running)


def test_a_worker_that_rereads_the_control_stream_does_each_of_its_commands_once(
    learner: Learner, worker: Worker
) -> None:
    comm, first = learner(), worker(0)
    comm.send_control_command("note", 1)
    first.close()
    second = worker(0)
    done: list[int] = []
    second.on_command("note", done.append)
    command = comm.send_control_command("note", 2)
    poll_until_acknowledged(second, command)
    second._inbox._reader.restart()
    poll_until_acknowledged(second, comm.send_control_command("note", 3))
    assert done == [2, 3]


def test_a_command_is_settled_although_the_list_of_pending_commands_is_lost(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker()
    command = comm.send_control_command("reset")
    server.client.delete(keys.pending)
    poll_until_acknowledged(client, command)
    assert states(command) == {0: "done"}


def test_an_acknowledgement_after_a_day_leaves_no_key_without_a_lifetime(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker()
    command = comm.send_control_command("reset")
    server.client.delete(keys.outcomes(command.id))  # as if it had expired
    wait_until("the command has arrived", lambda: client._inbox.waiting)
    client.poll()
    wait_until("it is settled", lambda: comm.get_queue_info()["control_queue_sizes"][0] == 0)
    assert server.client.ttl(keys.outcomes(command.id)) > 0


def test_acknowledgements_are_kept_while_the_learner_is_away(learner: Learner, worker: Worker) -> None:
    """They stay in Redis until a learner settles them, so a restarted learner misses none."""
    first, client = learner(), worker()
    command = first.send_control_command("reset")
    first._thread.stop(5.0)
    wait_until("the command has arrived", lambda: client._inbox.waiting)
    client.poll()
    assert states(command) == {0: "waiting"}
    learner()
    wait_until("the new learner settled it", lambda: states(command) == {0: "done"})


def test_a_worker_that_rejoins_while_a_command_to_all_is_sent_gets_it(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, _ = learner(), worker()
    worker(1).close()
    read, rejoined = read_incarnations, list[WorkerClient]()

    def read_and_rejoin(*arguments: Any) -> Any:
        incarnations = read(*arguments)
        if not rejoined:
            rejoined.append(worker(1))
        return incarnations

    monkeypatch.setattr(commands, "read_incarnations", read_and_rejoin)
    command = comm.send_control_command("reset")
    assert command.worker_ids == (0, 1)
    poll_until_acknowledged(rejoined[0], command)


def test_an_expiry_is_a_positive_finite_number(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    command = comm.send_control_command("reset", expires=np.float64(60))
    poll_until_acknowledged(client, command)
    assert states(command) == {0: "done"}
    for wrong in (True, np.True_, 0, -1.0, float("nan"), "5"):
        with pytest.raises(InvalidArgument, match="expires"):
            comm.send_control_command("reset", expires=wrong)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("meta", "lease_seconds"),
        ("meta", "epoch"),
        ("meta", "wire_format"),
        ("ledger", "event"),
        ("pending", "x"),
    ],
)
def test_a_field_that_another_program_spoiled_stops_commands_only_while_it_is_there(
    learner: Learner, worker: Worker, server: Server, keys: Keys, key: str, field: str
) -> None:
    comm, client = learner(), worker()
    poll_until_acknowledged(client, comm.send_control_command("reset"))
    name = keys.ledger(0) if key == "ledger" else getattr(keys, key)
    before = server.client.hget(name, field)
    server.client.hset(name, field, "nonsense")
    for step in (
        client._heartbeat._beat,
        client._inbox.acknowledgements._drop_settled,
        lambda: comm._maintenance.send_heartbeat(),
    ):
        with suppress(PeerError):
            step()
    if before is None:
        server.client.hdel(name, field)
    else:
        server.client.hset(name, field, before)
    poll_until_acknowledged(
        client, wait_until("commands are sent again", lambda: comm.send_control_command("reset"))
    )


def test_a_command_that_could_not_be_sent_is_not_sent_later(
    learner: Learner, worker: Worker, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, client = learner(), worker()
    done: list[object] = []
    client.on_command("note", done.append)

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionFailed("the server is away")

    with monkeypatch.context() as patch:
        patch.setattr(comm._connection, "run", fail)
        with pytest.raises(ConnectionFailed):
            comm.send_control_command("note")
    comm._commands.restore()
    poll_until_acknowledged(client, comm.send_control_command("reset"))
    assert done == []


def _nested(levels: int, inner: object = 1) -> object:
    for _ in range(levels):
        inner = [inner]
    return inner


def _containing_itself() -> object:
    data: list[object] = []
    data.append({"again": data})
    return data


@pytest.mark.parametrize("data", [_nested(5000), _containing_itself()], ids=["deep", "itself"])
def test_command_data_without_end_is_refused(learner: Learner, data: object) -> None:
    comm = learner()
    with pytest.raises(UnsupportedType, match=r"nested deeper than 64 levels, or one contains itself"):
        comm.send_control_command("reset", data)
    assert set(comm.get_queue_info()["control_queue_sizes"]) == {0}


def test_command_data_may_be_what_a_batch_may_be(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    received: list[Any] = []
    client.on_command("take", received.append)
    data = MappingProxyType({"x": np.ones(1000), "deep": _nested(60), "text": "é"})
    poll_until_acknowledged(client, comm.send_control_command("take", data))
    assert received[0]["x"].tolist() == [1] * 1000
    assert (received[0]["deep"], received[0]["text"]) == (_nested(60), "é")
