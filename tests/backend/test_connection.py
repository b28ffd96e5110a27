"""Commands over a connection: retries under one deadline, and scripts that the server lacks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import fakeredis
import pytest
import redis
from conftest import RealServer

from rlbroker import errors
from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.scripts import Script

pytestmark = pytest.mark.unit

ECHO = Script("echo", "return ARGV[1]")


class FailingClient(fakeredis.FakeRedis):
    """A client whose connections fail some times before they answer."""

    failures = 0
    error: Exception = redis.ConnectionError("reset by peer")

    def __init__(self) -> None:
        client = self

        class FailingConnection(fakeredis.FakeRedisConnection):
            def send_packed_command(self, *arguments: Any, **options: Any) -> Any:
                if client.failures:
                    client.failures -= 1
                    raise client.error
                send: Callable[..., Any] = super().send_packed_command
                return send(*arguments, **options)

        super().__init__(connection_class=FailingConnection)


def test_a_broken_connection_is_retried_until_it_works() -> None:
    client = FailingClient()
    client.failures = 3
    assert Connection(client=client, timeout_seconds=5.0).execute("PING")


def test_the_error_is_raised_within_the_deadline_with_its_cause() -> None:
    client = FailingClient()
    client.failures = 10**9
    began = time.monotonic()
    with pytest.raises(errors.ConnectionFailed, match="reset by peer") as caught:
        Connection(client=client, timeout_seconds=5.0).execute("PING", deadline=Deadline(0.2))
    assert time.monotonic() - began < 2.0
    assert caught.value.__cause__ is client.error


def test_no_attempt_follows_that_would_hang_far_beyond_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts: list[float] = []
    now = 0.0

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    def hang() -> None:
        attempts.append(now)
        pass_time(2.4)
        raise errors.ConnectionFailed("silent")

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "sleep", pass_time)
    with pytest.raises(errors.ConnectionFailed):
        Connection(client=fakeredis.FakeRedis()).retry(hang, Deadline(5.0))
    assert len(attempts) == 2
    assert now <= 5.0


def test_an_error_that_a_retry_does_not_cure_is_raised_at_once() -> None:
    client = FailingClient()
    client.failures, client.error = 1, redis.AuthenticationError("WRONGPASS")
    with pytest.raises(errors.AccessDenied):
        Connection(client=client).execute("PING")


def test_scripts_are_loaded_again_if_the_server_lacks_them() -> None:
    connection = Connection(client=fakeredis.FakeRedis())
    for _ in range(2):
        assert connection.run(ECHO, (), (b"x",)) == b"x"
        assert connection.execute_all([ECHO.call((), (b"1",)), ECHO.call((), (b"2",))]) == [b"1", b"2"]
        connection.execute("SCRIPT FLUSH")


def test_scripts_that_are_flushed_again_and_again_are_loaded_until_they_run(real_server: RealServer) -> None:
    connection = Connection(real_server.url)
    ended = threading.Event()

    def flush() -> None:
        while not ended.is_set():
            real_server.client.script_flush()

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        for number in range(200):
            assert connection.run(ECHO, (), (str(number),)) == str(number).encode()
    finally:
        ended.set()
        thread.join()
        connection.close()
