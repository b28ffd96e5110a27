"""A call with a timeout of its own ends in time, though the server is away and the client's timeout is longer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.errors import PeerError
from rlbroker.local.embedded_server import RedisServer

#: The client's timeout, and the most seconds that a call may take: its own timeout, and one try of a socket.
CLIENT_SECONDS, LONGEST_SECONDS = 30.0, 5.0

TIMEOUT = 0.3


@pytest.fixture(params=["frozen", "dead"])
def outage(request: pytest.FixtureRequest) -> Iterator[tuple[WorkerCommunicator, WorkerClient, Any]]:
    """A learner, a worker, and a function that takes their server away until the test ends."""
    with RedisServer() as server:
        pid = server.pid
        settings: dict[str, Any] = {"redis_url": server.url, "timeout": CLIENT_SECONDS}
        assert pid is not None
        comm = WorkerCommunicator(1, **settings)
        worker = WorkerClient(**settings)
        comm.send_model_weights({"x": np.zeros(3)})
        worker.load_weights({})
        for _ in range(3):
            worker.send_experiences({"x": np.zeros(3)})
        assert comm.collect_experiences(timeout=5.0, max_batches=1)
        begin = signal.SIGSTOP if request.param == "frozen" else signal.SIGKILL
        try:
            yield comm, worker, lambda: os.kill(pid, begin)
        finally:
            if begin == signal.SIGSTOP:
                os.kill(pid, signal.SIGCONT)
            for client in (worker, comm):
                client._connection.timeout_seconds = 0.1
            worker.close()
            comm.cleanup()


CALLS: dict[str, Callable[[WorkerCommunicator, WorkerClient], Any]] = {
    "collect_experiences": lambda comm, _: comm.collect_experiences(timeout=TIMEOUT),
    "load_weights": lambda _, worker: worker.load_weights({}, timeout=TIMEOUT),
    "send_experiences": lambda _, worker: worker.send_experiences({"x": np.zeros(3)}, timeout=TIMEOUT),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_ends_within_its_own_timeout_in_an_outage(
    outage: tuple[WorkerCommunicator, WorkerClient, Callable[[], None]], name: str
) -> None:
    comm, worker, begin = outage
    begin()
    for _ in range(2):  # the second call begins without a connection
        began = time.monotonic()
        with pytest.raises(PeerError):
            CALLS[name](comm, worker)
        took = time.monotonic() - began
        assert took < LONGEST_SECONDS, f"{name}(timeout={TIMEOUT}) took {took:.1f} s"


def test_waiting_for_a_command_ends_within_its_own_timeout_in_an_outage(
    outage: tuple[WorkerCommunicator, WorkerClient, Callable[[], None]],
) -> None:
    comm, _, begin = outage
    command = comm.send_control_command("reset")
    begin()
    began = time.monotonic()
    with pytest.raises(PeerError):
        command.wait(timeout=TIMEOUT)
    assert time.monotonic() - began < LONGEST_SECONDS


def test_flushing_ends_within_its_own_timeout_in_an_outage(
    outage: tuple[WorkerCommunicator, WorkerClient, Callable[[], None]],
) -> None:
    """There is something to flush after a batch that was not confirmed in time."""
    _, worker, begin = outage
    begin()
    with pytest.raises(PeerError):
        worker.send_experiences({"x": np.zeros(3)}, timeout=TIMEOUT)
    for _ in range(2):
        began = time.monotonic()
        with suppress(PeerError):
            worker.flush(TIMEOUT)
        assert time.monotonic() - began < LONGEST_SECONDS
