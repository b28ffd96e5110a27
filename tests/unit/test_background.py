"""The background threads: what they log and when they end."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

import pytest
from conftest import wait_until

from rlbroker.background import Background
from rlbroker.errors import ConnectionFailed


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
    thread = Background("test", step)
    thread.start()
    wait_until("the steps are done", lambda: len(done) > 3)
    assert thread.stop(5.0)
    assert caplog.text.count("trying again until it works") == 1
    assert ("it works again" in caplog.text) == recovered


def _waiting(seconds: float = 3600.0, **more: Any) -> tuple[Background, list[bool], socket.socket]:
    """Give a thread that waits for a socket, what came of that, and the other end."""
    ours, theirs = socket.socketpair()
    ends: list[bool] = []

    def step() -> None:
        with ours:
            ends.append(thread.wait_for(ours, seconds, **more))
        thread.request_stop()

    thread = Background("test", step)
    thread.start()
    return thread, ends, theirs


def test_who_waits_for_a_socket_goes_on_when_there_is_something_to_read() -> None:
    thread, ends, theirs = _waiting()
    with theirs:
        theirs.send(b"x")
        wait_until("it has seen that", lambda: ends)
    assert ends == [True]
    assert thread.stop(5.0)


def test_who_waits_for_a_socket_sees_that_it_is_to_stop() -> None:
    thread, ends, theirs = _waiting()
    with theirs:
        assert thread.stop(5.0)
    assert ends == [False]


def test_who_waits_for_a_socket_sees_what_else_there_is_to_do() -> None:
    thread, ends, theirs = _waiting(unless=lambda: True)
    with theirs:
        wait_until("it goes on", lambda: ends)
    assert ends == [False]
    assert thread.stop(5.0)
