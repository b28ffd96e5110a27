"""rlbroker's errors for redis-py's: the right type, and what to do in the message."""

from __future__ import annotations

import pytest
import redis

from rlbroker import errors
from rlbroker.backend import error_mapping
from rlbroker.backend.error_mapping import ErrorTranslator, translate_error

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("found", "expected"),
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
def test_errors_of_redis_py_become_errors_of_rlbroker(
    found: redis.RedisError, expected: type[Exception]
) -> None:
    assert type(translate_error(found, "host:1")) is expected


def test_messages_of_the_server_end_without_a_full_stop() -> None:
    assert (
        str(translate_error(redis.ConnectionError("Error 1. Gone."), "host:1"))
        == "cannot reach host:1: Error 1. Gone"
    )
    full = translate_error(redis.ResponseError("OOM command not allowed."), "host:1")
    assert str(full).endswith("allowed; raise maxmemory, or lower max_queue_bytes or max_queue_size")


@pytest.mark.parametrize(
    ("text", "command", "rule", "message"),
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
def test_a_missing_right_is_named_with_the_command_that_grants_it(
    text: str, command: tuple[str, ...], rule: str, message: str
) -> None:
    error = translate_error(redis.exceptions.NoPermissionError(text), "host:1", command=command, user="me")
    assert isinstance(error, errors.AccessDenied)
    assert error.rule == rule
    assert message in str(error)
    assert "password" not in str(error)


@pytest.mark.parametrize(
    "text", ["WRONGPASS invalid username-password pair", "NOAUTH Authentication required"]
)
def test_a_wrong_password_is_named_as_the_cause(text: str) -> None:
    error = translate_error(redis.ResponseError(text), "host:1", command=("PING",), user="me")
    assert (
        "check user and password in the server's URL, or where it has none, in RLBROKER_REDIS_USERNAME"
        in str(error)
    )


def test_the_command_on_a_key_of_another_program_is_named() -> None:
    wrong_type = redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")
    assert "(HGETALL rlb:{a}:meta)" in str(
        translate_error(wrong_type, "host:1", command=("HGETALL", "rlb:{a}:meta"))
    )
    in_pipeline = redis.ResponseError(f"Command # 2 (HGETALL rlb:b) of pipeline caused error: {wrong_type}")
    assert "(HGETALL rlb:b)" in str(translate_error(in_pipeline, "host:1"))


def test_a_user_that_was_accepted_before_may_be_refused_for_some_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    translator = ErrorTranslator("host:1", "me", redis.ConnectionPool())
    refusal = redis.AuthenticationError("WRONGPASS")
    assert type(translator.translate(refusal)) is errors.AccessDenied
    translator.record_answer()
    found = translator.translate(refusal)
    assert type(found) is errors.ConnectionFailed
    assert "no longer accepts this user" in str(found)
    translator.record_answer()
    monkeypatch.setattr(error_mapping, "REFUSAL_GRACE_SECONDS", 0.0)
    assert type(translator.translate(refusal)) is errors.AccessDenied


def test_the_hint_is_given_only_while_the_server_has_never_answered() -> None:
    translator = ErrorTranslator("host:1", "me", redis.ConnectionPool(), hint="; is it running?")
    refused = redis.TimeoutError("no reply")
    assert str(translator.translate(refused)).endswith("; is it running?")
    translator.record_answer()
    assert not str(translator.translate(refused)).endswith("; is it running?")
    assert "b:2 of host:1" in str(translator.translate(refused, server_name="b:2"))
