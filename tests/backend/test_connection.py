"""The boundary to Redis: retries under one deadline, and our errors for redis-py's."""

from __future__ import annotations

import random
import time
from typing import Any

import fakeredis
import pytest
import redis

from rlbroker import errors
from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Backoff, Deadline
from rlbroker.backend.error_mapping import translate_error
from rlbroker.backend.replies import pending_count, stream_entries, text_fields
from rlbroker.backend.scripts import Script

pytestmark = pytest.mark.unit

GIVE = Script("give", "return ARGV[1]")


class Failing(fakeredis.FakeRedis):
    """Fails some times before it answers."""

    failures = 0
    error: Exception = redis.ConnectionError("reset by peer")

    def execute_command(self, *arguments: Any, **options: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise self.error
        return super().execute_command(*arguments, **options)  # type: ignore[no-untyped-call]


def test_a_broken_connection_is_tried_again_until_it_works() -> None:
    client = Failing()
    client.failures = 3
    assert Connection(client=client, timeout_seconds=5.0).execute("PING")


def test_the_error_comes_within_the_deadline_with_its_cause() -> None:
    client = Failing()
    client.failures = 10**9
    began = time.monotonic()
    with pytest.raises(errors.ConnectionFailed, match="reset by peer") as caught:
        Connection(client=client, timeout_seconds=5.0).execute("PING", deadline=Deadline(0.2))
    assert time.monotonic() - began < 2.0
    assert caught.value.__cause__ is client.error


def test_after_a_try_that_hung_none_follows_that_would_hang_far_beyond_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[float] = []
    now = 0.0

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    def hang() -> None:
        tries.append(now)
        pass_time(2.4)
        raise errors.ConnectionFailed("silent")

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "sleep", pass_time)
    with pytest.raises(errors.ConnectionFailed):
        Connection(client=fakeredis.FakeRedis()).retry(hang, Deadline(5.0))
    assert len(tries) == 2
    assert now <= 5.0


def test_what_trying_again_cannot_mend_is_raised_at_once() -> None:
    client = Failing()
    client.failures, client.error = 1, redis.AuthenticationError("WRONGPASS")
    with pytest.raises(errors.AccessDenied):
        Connection(client=client).execute("PING")


def test_scripts_are_loaded_where_the_server_forgot_them() -> None:
    connection = Connection(client=fakeredis.FakeRedis())
    for _ in range(2):
        assert connection.run(GIVE, (), (b"x",)) == b"x"
        assert connection.run_all([(GIVE, (), (b"1",)), (GIVE, (), (b"2",))]) == [b"1", b"2"]
        connection.execute("SCRIPT FLUSH")


@pytest.mark.parametrize(
    ("found", "ours"),
    [
        (redis.ConnectionError("refused"), errors.ConnectionFailed),
        (redis.TimeoutError("slow"), errors.ConnectionFailed),
        (redis.exceptions.BusyLoadingError("loading"), errors.ConnectionFailed),
        (redis.ResponseError("BUSY Redis is busy running a script"), errors.ConnectionFailed),
        (redis.ResponseError("BUSYGROUP name exists"), errors.ServerFault),
        (redis.AuthenticationError("invalid"), errors.AccessDenied),
        (redis.exceptions.NoPermissionError("no"), errors.AccessDenied),
        (redis.ResponseError("NOAUTH Authentication required"), errors.AccessDenied),
        (redis.exceptions.OutOfMemoryError("command not allowed"), errors.ServerOutOfMemory),
        (redis.ResponseError("OOM command not allowed"), errors.ServerOutOfMemory),
        (
            redis.ResponseError(
                "Error running script (call to f_2e): @user_script:21: @user_script: 21: -OOM command not allowed"
            ),
            errors.ServerOutOfMemory,
        ),
        (redis.ResponseError("FENCED a newer learner"), errors.Fenced),
        (redis.ResponseError("WRONGTYPE"), errors.WrongKeyType),
    ],
    ids=str,
)
def test_errors_of_the_client_library_become_ours(found: redis.RedisError, ours: type[Exception]) -> None:
    assert type(translate_error(found, "host:1")) is ours


def test_messages_of_the_server_end_without_a_full_stop() -> None:
    assert (
        str(translate_error(redis.ConnectionError("Error 1. Gone."), "host:1"))
        == "cannot reach host:1: Error 1. Gone"
    )
    full = translate_error(redis.ResponseError("OOM command not allowed."), "host:1")
    assert str(full).endswith("allowed; raise maxmemory, or lower max_queue_bytes or max_queue_size")


def test_pauses_grow_and_never_pass_the_deadline() -> None:
    backoff = Backoff(first=1.0, longest=4.0)
    random.seed(0)
    seeded = random.getstate()
    assert [round(backoff.next() / ceiling, 1) <= 1.0 for ceiling in (1, 2, 4, 4)] == [True] * 4
    assert backoff.next(Deadline(0.01)) <= 0.01
    backoff.reset()
    assert backoff.next() <= 1.0
    assert random.getstate() == seeded, (
        "what a program drew from its own generator would depend on the network"
    )


def test_replies_have_one_shape_whatever_the_protocol() -> None:
    entries = [(b"1-1", {b"a": b"b"}), (b"1-2", {})]
    expected = [("s", [("1-1", {b"a": b"b"}), ("1-2", None)])]
    assert stream_entries([[b"s", entries]]) == expected
    assert stream_entries({b"s": [entries]}) == stream_entries({b"s": entries}) == expected
    as_sent = [[b"1-1", [b"a", b"b"]], [b"1-2", None]]
    assert stream_entries([[b"s", as_sent]]) == stream_entries({b"s": as_sent}) == expected
    assert stream_entries({b"s": [[]]}) == stream_entries([[b"s", []]]) == [("s", [])]
    assert stream_entries(None) == stream_entries({}) == []
    assert text_fields([b"a", b"1"]) == text_fields({b"a": b"1"}) == {"a": "1"}
    assert pending_count([3, None, None, None]) == pending_count({"pending": 3}) == 3


@pytest.mark.parametrize(
    ("said", "sent", "rule", "words"),
    [
        (
            "User poor has no permissions to run the 'xinfo|stream' command",
            ("XINFO", "STREAM", "rlb:{a}:x:0"),
            "+xinfo|stream",
            "the user 'poor' may not run XINFO STREAM; an administrator of the server can allow it: "
            "redis-cli ACL SETUSER poor '+xinfo|stream'",
        ),
        (
            "this user has no permissions to run the 'hgetall' command or its subcommand",
            ("HGETALL", "rlb:{a}:meta"),
            "+hgetall",
            "the user 'me' may not run HGETALL; an administrator of the server can allow it: "
            "redis-cli ACL SETUSER me +hgetall",
        ),
        (
            "this user has no permissions to run the 'config' command or its subcommand",
            ("CONFIG", "GET", "save"),
            "+config|get",
            "the user 'me' may not run CONFIG GET; an administrator of the server can allow it: "
            "redis-cli ACL SETUSER me '+config|get'",
        ),
        (
            "No permissions to access a key",
            ("HGETALL", "rlb:{a}:meta"),
            "%R~rlb:*",
            "the user 'me' may not read the key rlb:{a}:meta (HGETALL); an administrator of the server can allow it: "
            "redis-cli ACL SETUSER me '%R~rlb:*', before Redis 7 '~rlb:*'",
        ),
        (
            "Command # 2 (HSET rlb:{a}:meta a 1) of pipeline caused error: this user has no permissions to access "
            "one of the keys used as arguments",
            (),
            "~rlb:*",
            "may not use the key rlb:{a}:meta (HSET); an administrator",
        ),
        (
            "User poor has no permissions to access the 'rlb:{a}:x:1' key",
            ("XLEN", "rlb:{a}:x:1"),
            "%R~rlb:*",
            "the user 'poor' may not read the key rlb:{a}:x:1 (XLEN)",
        ),
        (
            "No permissions to access a key",
            ("EXISTS", "rlb:a", "rlb:b", "rlb:c", "rlb:d"),
            "%R~rlb:*",
            "one of the keys rlb:a, rlb:b, rlb:c, … (EXISTS)",
        ),
        (
            "User poor has no permissions to access the 'rlb:{a}:notify' channel",
            ("SUBSCRIBE", "rlb:{a}:notify"),
            "&rlb:*",
            "may not use the channel rlb:{a}:notify",
        ),
    ],
)
def test_a_missing_right_is_named_with_what_gives_it(
    said: str, sent: tuple[str, ...], rule: str, words: str
) -> None:
    error = translate_error(redis.exceptions.NoPermissionError(said), "host:1", command=sent, user="me")
    assert isinstance(error, errors.AccessDenied)
    assert error.rule == rule
    assert words in str(error)
    assert "password" not in str(error)


@pytest.mark.parametrize(
    "said", ["WRONGPASS invalid username-password pair", "NOAUTH Authentication required"]
)
def test_a_wrong_password_is_called_that(said: str) -> None:
    error = translate_error(redis.ResponseError(said), "host:1", command=("PING",), user="me")
    assert (
        "check user and password in the server's URL, or where it has none, in RLBROKER_REDIS_USERNAME"
        in str(error)
    )


def test_a_key_of_another_program_is_named() -> None:
    said = redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")
    assert "(HGETALL rlb:{a}:meta)" in str(
        translate_error(said, "host:1", command=("HGETALL", "rlb:{a}:meta"))
    )
    said = redis.ResponseError(f"Command # 2 (HGETALL rlb:b) of pipeline caused error: {said}")
    assert "(HGETALL rlb:b)" in str(translate_error(said, "host:1"))
