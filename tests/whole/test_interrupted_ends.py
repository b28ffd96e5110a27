"""Constructors, `close`, `cleanup` and the calls that only read, interrupted at any point."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import RealServer, wait_until
from interrupts import Alarm, Points, interrupt_at

from rlbroker import Closed, WorkerClient, WorkerCommunicator

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]

#: Every point would take minutes: a test takes each of this many, and all of them with --full.
STRIDES = {"function": 13, "line": 61}

KINDS = [("function", KeyboardInterrupt), ("function", Alarm), ("line", KeyboardInterrupt), ("line", Alarm)]

#: Clients of the server besides those of the test's own learner, which opens some when it first needs them.
SPARE_CONNECTIONS = 4

pytestmark = [
    pytest.mark.parametrize(("points", "error"), KINDS, ids=[f"{one}-{two.__name__}" for one, two in KINDS]),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # Python swallows an interrupt while it closes a generator.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def every(points: Points, request: pytest.FixtureRequest) -> Iterator[int]:
    full = request.config.getoption("--full")
    return itertools.count(1, 1 if full else STRIDES[points])


def threads_of_clients() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name.startswith("rlbroker-")}


def test_an_interrupted_constructor_of_a_worker_leaves_nothing_behind(
    reachable: RealServer,
    learner: Learner,
    run: str,
    points: Points,
    error: type[BaseException],
    request: pytest.FixtureRequest,
) -> None:
    comm = learner()
    before, clients = threads_of_clients(), len(reachable.client.client_list())
    for point in every(points, request):
        client: WorkerClient | None = None
        with interrupt_at(point, points, error) as interrupt:
            client = WorkerClient(redis_url=reachable.url, run=run, timeout=5.0)
        if not interrupt.place:
            break
        client = None  # Python swallowed the interrupt, if there is one
        wait_until(f"threads end: {interrupt.place}", lambda: threads_of_clients() <= before)
        wait_until(f"it leaves: {interrupt.place}", lambda: not comm.workers())
    assert client is not None
    client.close()
    wait_until(
        "connections are closed", lambda: len(reachable.client.client_list()) <= clients + SPARE_CONNECTIONS
    )


def test_an_interrupted_constructor_of_a_learner_leaves_nothing_behind(
    reachable: RealServer,
    run: str,
    points: Points,
    error: type[BaseException],
    request: pytest.FixtureRequest,
) -> None:
    before, clients = threads_of_clients(), len(reachable.client.client_list())
    for point in every(points, request):
        comm: WorkerCommunicator | None = None
        with interrupt_at(point, points, error) as interrupt:
            comm = WorkerCommunicator(1, redis_url=reachable.url, run=run, timeout=5.0)
        if not interrupt.place:
            break
        comm = None  # Python swallowed the interrupt, if there is one
        wait_until(f"threads end: {interrupt.place}", lambda: threads_of_clients() <= before)
    assert comm is not None
    comm.cleanup()
    wait_until("connections are closed", lambda: len(reachable.client.client_list()) <= clients)


@pytest.mark.parametrize("again", [True, False], ids=["closed again", "dropped"])
def test_a_worker_leaves_after_an_interrupted_close(
    reachable: RealServer,
    learner: Learner,
    run: str,
    points: Points,
    error: type[BaseException],
    again: bool,
    request: pytest.FixtureRequest,
) -> None:
    comm = learner()
    before = threads_of_clients()
    previous = signal.getsignal(signal.SIGUSR2)
    for point in every(points, request):
        client = WorkerClient(redis_url=reachable.url, run=run, timeout=5.0)
        client.drain_on(signal.SIGUSR2)
        client.send_experiences({"point": point})
        with interrupt_at(point, points, error) as interrupt:
            client.close()
        if again:
            client.close()
            assert signal.getsignal(signal.SIGUSR2) is previous, interrupt.place
            wait_until(
                f"its threads have ended: {interrupt.place}", lambda: threads_of_clients() <= before, 5.0
            )
            with pytest.raises(Closed):
                client.poll()
        del client
        wait_until(f"threads end: {interrupt.place}", lambda: threads_of_clients() <= before)
        assert not comm.workers(), interrupt.place
        assert [batch["point"] for _, batch in comm.collect_experiences(timeout=5.0)] == [point]
        signal.signal(signal.SIGUSR2, previous)
        if not interrupt.place:
            break


@pytest.mark.timeout(900)  # nearly 500 lines, and a new learner for each
@pytest.mark.parametrize("again", [True, False], ids=["cleaned up again", "dropped"])
def test_a_learner_ends_after_an_interrupted_cleanup(
    reachable: RealServer,
    worker: Worker,
    run: str,
    points: Points,
    error: type[BaseException],
    again: bool,
    request: pytest.FixtureRequest,
) -> None:
    if points == "line" and not request.config.getoption("--full"):
        pytest.skip("takes long")
    client, before = worker(), threads_of_clients()
    for point in every(points, request):
        comm = WorkerCommunicator(1, redis_url=reachable.url, run=run, timeout=5.0)
        client.send_experiences({"point": point})
        got: list[int] = []
        while point not in got:
            got += [batch["point"] for _, batch in comm.collect_experiences(timeout=5.0)]
        with interrupt_at(point, points, error) as interrupt:
            comm.cleanup(stop_workers=False)
        if again:
            report = comm.cleanup(stop_workers=False)
            assert report.complete, interrupt.place
            assert not report.unacknowledged.get(client.worker_id), interrupt.place
            with pytest.raises(Closed):
                comm.collect_experiences()
        del comm
        wait_until(f"threads end: {interrupt.place}", lambda: threads_of_clients() - before == set())
        if not interrupt.place:
            break


def test_reading_calls_work_after_an_interrupt(
    learner: Learner,
    worker: Worker,
    reachable: RealServer,
    points: Points,
    error: type[BaseException],
    request: pytest.FixtureRequest,
) -> None:
    comm, client = learner(), worker()
    client.send_experiences({"x": 1})
    calls: list[Callable[[], Any]] = [
        lambda: [one.worker_id for one in comm.workers()],
        lambda: comm.get_queue_info()["experience_queue_sizes"],
        lambda: comm.missed_updates()[0].total,
        lambda: comm.may_sample(),
        client.flush,
        lambda: (client.worker_id, client.incarnation, client.running, client.paused, client.draining),
        lambda: (comm.epoch, comm.version, comm.run),
    ]
    for call in calls:
        expected = call()
        for point in every(points, request):
            with interrupt_at(point, points, error) as interrupt:
                call()
            assert call() == expected, interrupt.place
            if not interrupt.place:
                break
    comm.send_control_command("reset")
    wait_until("it has arrived", lambda: client._inbox.waiting)
    client.poll()
    for point in itertools.count(1):  # an interrupted call leaves the request for the next one
        with interrupt_at(point, points, error) as interrupt:
            assert client.reset_requested()
        if not interrupt.place:
            break
    assert not client.reset_requested()
