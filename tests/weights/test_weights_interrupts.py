"""An interrupt in the middle of `poll`, `load_weights` or `send_model_weights`: the next call works, nothing is torn.

Here at every point of `rlbroker.weights`, with a look at models, versions and other threads; `tests/whole` interrupts
every call at every point of the package.
"""

from __future__ import annotations

import itertools
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import interrupts
import numpy as np
import pytest
import torch
from conftest import Server, wait_until
from interrupts import Alarm, Points, interrupt_at

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.weights.host_cache import _File

#: An interrupted attempt to connect drops its socket.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]

every_interrupt = pytest.mark.parametrize(
    ("points", "error"), [("function", Alarm), ("line", KeyboardInterrupt)]
)


def weights(number: float, size: int = 30_000) -> dict[str, Any]:
    """Return weights that are large enough for the host cache and for deltas."""
    return {"w": torch.full((size,), number), "b": np.full(3, number), "number": number}


def content(model: dict[str, Any]) -> set[float]:
    """Return the different numbers in weights: one, if they are of one version."""
    return {float(model["w"].min()), float(model["w"].max()), *model["b"].tolist(), model["number"]}


def in_another_thread(place: str, call: Callable[[], Any]) -> Any:
    """Return the result of a call in another thread, which must not find a lock that this one left."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(10.0)
    if not results:
        frame = sys._current_frames().get(thread.ident or 0)
        pytest.fail(f"after {place} another thread hangs:\n{''.join(traceback.format_stack(frame))}")
    return results[0]


@pytest.fixture(autouse=True)
def in_this_room(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    if server.kind == "fake":
        pytest.skip("the points of this room are the same on a real server")
    monkeypatch.setattr(interrupts, "PACKAGE", f"{interrupts.PACKAGE}weights/")


@pytest.mark.timeout(300)
@every_interrupt
def test_poll(learner: Learner, worker: Worker, points: Points, error: type[BaseException]) -> None:
    comm, client = learner(), worker()
    model = weights(0)
    applied = 0
    for point in itertools.count(1):
        number = comm.send_model_weights(weights(point)).version
        wait_until("the version is ready", lambda: client._subscriber.newest == number)  # noqa: B023
        before = content(model)
        with interrupt_at(point, points, error) as interrupt:
            client.poll(model)
        assert content(model) == ({float(point)} if client.version == number else before), interrupt.place
        assert client.version in (applied, number), interrupt.place
        loaded, again = client.version == number, client.poll(model)
        assert loaded or again, interrupt.place
        assert (client.version, content(model)) == (number, {float(point)}), interrupt.place
        assert not in_another_thread(interrupt.place, lambda: client.poll(model)), interrupt.place
        applied = number
        if not interrupt.place:
            break
    missed = comm.missed_updates()[0]
    assert (missed.total, missed.behind) == (0, 0)


@pytest.mark.timeout(300)
@every_interrupt
def test_load_weights(learner: Learner, worker: Worker, points: Points, error: type[BaseException]) -> None:
    comm, client = learner(), worker()
    for point in itertools.count(1):
        number = comm.send_model_weights(weights(point)).version
        if point % 2:  # otherwise the call waits for the version
            wait_until("the version is ready", lambda: client._subscriber.newest == number)  # noqa: B023
        first, second = weights(0), weights(0)
        with interrupt_at(point, points, error) as interrupt:
            client.load_weights(first, timeout=10.0)
        assert content(first) in ({0.0}, {float(point)}), interrupt.place
        assert content(first) == {float(point)} or client.version < number, interrupt.place
        # Another model, of another thread.
        assert in_another_thread(interrupt.place, lambda: client.load_weights(second, timeout=10.0)) == number  # noqa: B023
        assert content(second) == {float(point)}, interrupt.place
        assert client.load_weights(first, timeout=10.0) == number, interrupt.place
        assert content(first) == {float(point)}, interrupt.place
        if not interrupt.place:
            break
    missed = comm.missed_updates()[0]
    assert (missed.total, missed.behind) == (0, 0)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("wait", [True, False])
@every_interrupt
def test_send_model_weights(
    learner: Learner, worker: Worker, wait: bool, points: Points, error: type[BaseException]
) -> None:
    comm, client = learner(), worker()
    held = len(_File.existing)
    numbers: dict[int, float] = {}
    for point in itertools.count(1):
        with interrupt_at(point, points, error) as interrupt:
            comm.send_model_weights(weights(point), wait=wait)
        # In another thread: a lock that was left would block it.
        receipt = in_another_thread(
            interrupt.place,
            lambda: comm.send_model_weights(weights(-point), wait=wait),  # noqa: B023
        )
        assert receipt.version > max(numbers, default=0), interrupt.place
        assert receipt.version == comm.version or not wait
        model: dict[str, Any] = {}
        assert client.load_weights(model, timeout=10.0) >= receipt.version, interrupt.place
        assert content(model) == {float(-point)}, interrupt.place
        numbers[receipt.version] = -point
        assert len(_File.existing) < held + 12, interrupt.place
        if not interrupt.place:
            break
