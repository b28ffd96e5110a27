"""The background threads: what they log and when they end."""

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
def test_only_a_step_that_asked_the_server_shows_that_it_works_again(
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
    """Give a thread that waits for a socket for hours, again and again, what came of that, and the other end."""
    ours, theirs = socket.socketpair()
    ends: list[bool] = []

    def step() -> None:
        ends.append(thread.wait_for(ours, 3600.0))
        if ends[-1]:
            ours.recv(1)

    thread = BackgroundThread("test", step)
    with ours, theirs:
        thread.start()
        yield thread, ends, theirs
        assert thread.stop(5.0)


def test_who_waits_for_a_socket_goes_on_when_there_is_something_to_read(waiting: Any) -> None:
    _, ends, theirs = waiting
    theirs.send(b"x")
    wait_until("it has seen that", lambda: ends)
    assert ends == [True]


def test_who_waits_for_a_socket_ends_at_once_when_it_is_to_stop(waiting: Any) -> None:
    thread, ends, _ = waiting
    assert thread.stop(5.0)
    assert not any(ends)


def test_who_waits_for_a_socket_can_be_woken_for_something_else(waiting: Any) -> None:
    thread, ends, _ = waiting
    thread.wake()
    wait_until("it goes on", lambda: ends)
    assert ends == [False]


def test_who_is_woken_before_it_waits_does_not_wait() -> None:
    """What there is to do may come just before the wait."""
    ours, theirs = socket.socketpair()
    done: list[bool] = []

    def step() -> None:
        thread.wake()
        done.append(thread.wait_for(ours, 3600.0))

    thread = BackgroundThread("test", step)
    with ours, theirs:
        thread.start()
        wait_until("it goes on", lambda: done[2:])
        assert thread.stop(5.0)
        thread.wake()  # which is nothing now


def test_who_is_woken_very_often_is_not_held_up(waiting: Any) -> None:
    thread, _, _ = waiting
    for _ in range(10_000):
        thread.wake()
