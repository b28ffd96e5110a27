"""An exception of a signal handler at any point of a call leaves a client that works, and no command done twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import RealServer, wait_until
from interrupts import Alarm, Points, interrupt_at

from rlbroker import Command, WorkerClient, WorkerCommunicator

POINTS = pytest.mark.parametrize("points", ["function", "line"])
ERRORS = pytest.mark.parametrize("error", [KeyboardInterrupt, Alarm], ids=["ctrl-c", "alarm"])


@pytest.fixture
def comm(real_server: RealServer, run: str) -> Any:
    with WorkerCommunicator(1, redis_url=real_server.url, run=run) as comm:
        yield comm


@pytest.fixture
def client(comm: WorkerCommunicator, real_server: RealServer, run: str) -> Any:
    with WorkerClient(real_server.url, run, worker_id=0, host_cache=False) as client:
        wait_until("it knows the run", lambda: client._heartbeat.knows_run)
        yield client


def interrupt_everywhere(
    call: Callable[[], Any],
    check: Callable[[str], None],
    points: Points,
    error: type[BaseException],
    step: int = 1,
) -> None:
    """Interrupt a call at each of its points; `check` gets each place afterwards."""
    call()
    point = 1
    while True:
        with interrupt_at(point, points, error) as interrupt:
            call()
        check(interrupt.place)
        if not interrupt.place:
            break
        point += step
    assert point > 5


def step_of(points: Points, full: bool) -> int:
    """Return one in how many points is interrupted."""
    return 1 if full else {"function": 7, "line": 29}[points]


def poll_until_final(client: WorkerClient, commands: list[Command]) -> bool:
    client.poll()
    return not any(one.outcomes()[0].state == "waiting" for one in commands)


@POINTS
@ERRORS
@pytest.mark.parametrize("name", ["workers", "missed_updates", "get_queue_info"])
def test_after_an_interrupt_the_state_of_the_run_can_be_read(
    comm: WorkerCommunicator,
    client: WorkerClient,
    name: str,
    points: Points,
    error: type[BaseException],
    full: bool,
) -> None:
    for number in range(3):
        comm.send_model_weights({"x": number})
    client.load_weights({})
    wait_until("it is settled", lambda: comm.missed_updates()[0].total == 2)

    def check(place: str) -> None:
        assert [one.worker_id for one in comm.workers()] == [0], place
        assert comm.missed_updates()[0].total == 2, place
        assert comm.get_queue_info()["model_queue_sizes"] == [0], place

    interrupt_everywhere(getattr(comm, name), check, points, error, step_of(points, full))


@POINTS
@ERRORS
def test_after_an_interrupt_commands_are_sent_and_waited_for(
    comm: WorkerCommunicator, client: WorkerClient, points: Points, error: type[BaseException], full: bool
) -> None:
    done: list[Any] = []
    client.on_command("note", done.append)
    sent: list[Command] = []

    def check(place: str) -> None:
        last = comm.send_control_command("note", "last")
        wait_until("the last is done", lambda: [client.poll()] and done[-1:] == ["last"])
        assert last.wait(5.0)[0], place
        done.clear()

    def send_and_wait() -> None:
        sent.append(comm.send_control_command("note", "first"))
        sent.pop().wait(0.0)

    interrupt_everywhere(send_and_wait, check, points, error, step_of(points, full))
    assert comm.get_queue_info()["control_queue_sizes"] == [0]


@POINTS
@ERRORS
def test_an_interrupted_command_is_done_at_most_once_and_acknowledged_truly(
    comm: WorkerCommunicator, client: WorkerClient, points: Points, error: type[BaseException], full: bool
) -> None:
    begun: list[Any] = []
    client.on_command("note", begun.append)
    client.on_command("reset", begun.append)
    number = 0
    while True:
        number += 1 if full else 3 if points == "function" else 11
        commands = [comm.send_control_command(name, (number, name)) for name in ("note", "reset", "stranger")]
        wait_until("they have arrived", lambda: len(client._inbox._commands) == 3)
        with interrupt_at(number, points, error) as interrupt:
            client.poll()
        wait_until("all are acknowledged", lambda: poll_until_final(client, commands))  # noqa: B023
        outcomes = {one.name: one.outcomes()[0] for one in commands}
        assert outcomes["stranger"].state == "unknown", interrupt.place
        for name in ("note", "reset"):
            times = begun.count((number, name))
            if outcomes[name].state == "done":
                assert times == 1, interrupt.place
            else:
                assert outcomes[name].state == "failed", (interrupt.place, outcomes)
                assert any(word in str(outcomes[name]) for word in ("interrupted", error.__name__)), outcomes
                assert times <= 1, interrupt.place
        assert client.reset_requested() or outcomes["reset"].state == "failed", interrupt.place
        if not interrupt.place:
            break
    assert all(outcome for name, outcome in outcomes.items() if name != "stranger")
    assert number > 20


@ERRORS
def test_an_interrupt_inside_a_handler_makes_its_command_failed(
    comm: WorkerCommunicator, client: WorkerClient, error: type[BaseException]
) -> None:
    calls: list[Any] = []

    def handle(data: Any) -> None:
        calls.append(data)
        raise error

    client.on_command("note", handle)
    command = comm.send_control_command("note", 1)
    wait_until("it has arrived", lambda: client._inbox.waiting)
    try:
        client.poll()
    except error:
        assert error is KeyboardInterrupt
    client.close()
    assert str(command.wait(5.0)[0]) == f"failed: {error.__name__}"
    assert calls == [1]


@ERRORS
def test_an_interrupted_pause_is_left(
    comm: WorkerCommunicator, client: WorkerClient, error: type[BaseException]
) -> None:
    for point in range(1, 200, 7):
        command = comm.send_control_command("pause", {"duration": 0.1})
        wait_until("it has arrived", lambda: client._inbox.waiting)
        with interrupt_at(point, "line", error):
            client.poll()
        client.poll()
        assert not client.paused
        assert command.wait(5.0)[0].state == "done"
