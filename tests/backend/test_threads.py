"""Background threads: what they log, when they wake, and when they end."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import wait_until

from rlbroker.backend.threads import BackgroundThread
from rlbroker.errors import ConnectionFailed

pytestmark = pytest.mark.unit


def steps(*results: bool | Exception | None) -> tuple[Callable[[], bool | None], list[object]]:
    left: list[bool | Exception | None] = list(results)
    done: list[object] = []

    def step() -> bool | None:
        result = left.pop(0) if left else False
        done.append(result)
        if isinstance(result, Exception):
            raise result
        return result

    return step, done


@pytest.mark.parametrize(("last", "recovered"), [(False, False), (True, True), (None, True)])
def test_an_outage_ends_only_with_a_step_that_used_the_server(
    caplog: pytest.LogCaptureFixture, last: bool | None, recovered: bool
) -> None:
    caplog.set_level(logging.INFO, "rlbroker")
    step, done = steps(ConnectionFailed("away"), False, last)
    thread = BackgroundThread("test", step)
    thread.start()
    wait_until("the steps are done", lambda: len(done) > 3)
    assert thread.stop(5.0)
    assert caplog.text.count("trying again until it works") == 1
    assert ("it works again" in caplog.text) == recovered


@pytest.fixture
def waiting() -> Iterator[tuple[BackgroundThread, list[bool], socket.socket]]:
    """A thread that repeatedly waits an hour for a socket; the results of the waits; the socket's other end."""
    near, far = socket.socketpair()
    ends: list[bool] = []

    def step() -> None:
        ends.append(thread.wait_for(near, 3600.0))
        if ends[-1]:
            near.recv(1)

    thread = BackgroundThread("test", step)
    with near, far:
        thread.start()
        yield thread, ends, far
        assert thread.stop(5.0)


def test_a_wait_for_a_socket_ends_when_it_is_readable(waiting: Any) -> None:
    _, ends, far = waiting
    far.send(b"x")
    wait_until("the wait has ended", lambda: ends)
    assert ends == [True]


def test_a_wait_for_a_socket_ends_at_once_on_stop(waiting: Any) -> None:
    thread, ends, _ = waiting
    assert thread.stop(5.0)
    assert not any(ends)


def test_a_wait_for_a_socket_ends_on_wake(waiting: Any) -> None:
    thread, ends, _ = waiting
    thread.wake()
    wait_until("the wait has ended", lambda: ends)
    assert ends == [False]


def test_a_wake_before_the_wait_is_not_lost() -> None:
    near, far = socket.socketpair()
    done: list[bool] = []

    def step() -> None:
        thread.wake()
        done.append(thread.wait_for(near, 3600.0))

    thread = BackgroundThread("test", step)
    with near, far:
        thread.start()
        wait_until("the wait has ended", lambda: done[2:])
        assert thread.stop(5.0)
        thread.wake()  # has no effect after the end


def test_waking_often_does_not_block(waiting: Any) -> None:
    thread, _, _ = waiting
    for _ in range(10_000):
        thread.wake()
