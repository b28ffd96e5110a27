"""rlbroker's errors for redis-py's: the right type, and what to do in the message."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from redis._parsers.base import BaseParser

from rlbroker import errors
from rlbroker.backend import error_mapping
from rlbroker.backend.error_mapping import ANSWERS, ErrorTranslator, Reaction, translate_error

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


DOCS = Path(__file__).parents[2] / "docs" / "errors.md"


def test_the_docs_show_the_table_of_answers() -> None:
    lines = DOCS.read_text().splitlines()
    begin = lines.index("| answer | reaction | error | why |") + 2
    shown = [
        tuple(cell.strip() for cell in line.split("|")[1:-1])
        for line in itertools.takewhile(lambda line: line.startswith("|"), lines[begin:])
    ]
    expected = [
        (
            f"`{one.name}`" if one.name.isupper() else one.name,
            str(one.reaction),
            f"`{public_name(one.error)}`",
            one.meaning,
        )
        for one in ANSWERS
    ]
    assert shown == expected


def public_name(kind: type[Exception]) -> str:
    """Return the name of an error, or of the public one that it is a kind of."""
    return next(str(one.__name__) for one in kind.__mro__ if vars(errors).get(one.__name__) is one)


#: Answers as Redis 6.2 to 8 and Valkey 9 give them, in the table's names.
TEXTS = {
    "NOPERM": [
        "NOPERM this user has no permissions to run the 'hset' command",
        "NOPERM User worker has no permissions to run the 'evalsha' command",
        "NOPERM No permissions to access a key",
        "ERR ACL failure in script: User w has no permissions to run the 'hset' command script: " + "a" * 40,
        "The user executing the script can't run this command or subcommand script: " + "a" * 40,
    ],
    "WRONGPASS": ["WRONGPASS invalid username-password pair or user is disabled."],
    "NOAUTH": [
        "NOAUTH Authentication required.",
        "NOAUTH HELLO must be called with the client already authenticated",
    ],
    "DENIED": ["DENIED Redis is running in protected mode because protected mode is enabled"],
    "MOVED": ["MOVED 3999 127.0.0.1:6381"],
    "ASK": ["ASK 3999 127.0.0.1:6381"],
    "TRYAGAIN": ["TRYAGAIN Multiple keys request during rehashing of slot"],
    "OOM": [
        "OOM command not allowed when used memory > 'maxmemory'.",
        "OOM command not allowed when used memory > 'maxmemory'. script: "
        + "b" * 40
        + ", on @user_script:12.",
        "ERR Error running script (call to f_2e): @user_script:21: @user_script: 21: -OOM command not allowed",
    ],
    "LOADING": [
        "LOADING Redis is loading the dataset in memory",
        "LOADING Valkey is loading the dataset in memory",
    ],
    "BUSY": ["BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE."],
    "UNKILLABLE": ["UNKILLABLE Sorry the script already executed write commands against the dataset."],
    "MASTERDOWN": ["MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'."],
    "READONLY": [
        "READONLY You can't write against a read only replica.",
        "READONLY You can't write against a read only replica. script: " + "c" * 40 + ", on @user_script:3.",
    ],
    "CLUSTERDOWN": ["CLUSTERDOWN The cluster is down", "CLUSTERDOWN Hash slot not served"],
    "NOREPLICAS": [
        "NOREPLICAS Not enough good replicas to write.",
        "Command # 1 (XADD rlb:{a}:x:0 NOMKSTREAM 1-1) of pipeline caused error: NOREPLICAS Not enough good replicas.",
        "ERR Error running script (call to f_2e): @user_script:21: @user_script: 21: -NOREPLICAS Not enough good",
    ],
    "MISCONF": [
        "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
        "MISCONF Valkey is configured to save RDB snapshots, but it's currently unable to persist to disk.",
        "MISCONF Errors writing to the AOF file: No space left on device",
        "Command # 2 (HSET rlb:{a}:meta a 1) of pipeline caused error: MISCONF Errors writing to the AOF file",
        "ERR Error running script (call to f_2e): @user_script:1: @user_script: 1: -MISCONF Errors writing to the AOF",
    ],
    "max number of clients reached": [
        "ERR max number of clients reached",
        "ERR max number of clients + cluster connections reached",
    ],
    "invalid bulk length": ["ERR Protocol error: invalid bulk length"],
    "FENCED": ["FENCED worker 3 was replaced by a newer process"],
    "LOST": ["LOST the server has lost the run"],
    "NOSCRIPT": ["NOSCRIPT No matching script. Please use EVAL.", "NOSCRIPT No matching script."],
    "NOGROUP": [
        "NOGROUP No such key 'rlb:{a}:x:0' or consumer group 'learner' in XREADGROUP with GROUP option"
    ],
    "UNBLOCKED": ["UNBLOCKED the stream key no longer exists"],
    "WRONGTYPE": [
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "Command # 2 (HGETALL rlb:{a}:hb:1) of pipeline caused error: WRONGTYPE Operation against a key holding",
    ],
    "unknown command": [
        "ERR unknown command 'XADD', with args beginning with: 'rlb:{a}:x:0'",
        "ERR unknown command `EVALSHA`, with args beginning with: `00`",
    ],
    "DB index is out of range": ["ERR DB index is out of range"],
    "anything else": [
        "EXECABORT Transaction discarded because of previous errors.",
        "CROSSSLOT Keys in request don't hash to the same slot",
        "ERR syntax error",
        "BUSYGROUP Consumer Group name already exists",
        "ERR The ID specified in XADD is equal or smaller than the target stream top item",
        "ERR Protocol error: too big mbulk count string",
        # Names in a command or a key must not be taken for the answer.
        "Command # 2 (HGETALL rlb:{FENCED}:meta) of pipeline caused error: ERR syntax error",
        "Command # 2 (HGETALL rlb:{NOPERM LOST OOM}:meta) of pipeline caused error: ERR syntax error",
    ],
}


def parsed(text: str) -> redis.RedisError:
    """Return the error that redis-py makes of an answer; in a pipeline, it puts the command before the text."""
    prefix, caused, answer = text.rpartition(" of pipeline caused error: ")
    parse: Callable[[str], Any] = BaseParser.parse_error
    error = parse(answer)
    assert isinstance(error, redis.RedisError)
    if caused:
        error.args = (f"{prefix}{caused}{error}", *error.args[1:])
    return error


def test_there_are_texts_of_every_answer() -> None:
    assert {*TEXTS, "TLS refused", "no answer"} == {one.name for one in ANSWERS}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in TEXTS.items() for text in texts])
def test_the_table_knows_the_answers_of_every_server(name: str, text: str) -> None:
    (answer,) = [one for one in ANSWERS if one.name == name]
    for error in (parsed(text), redis.ResponseError(text.removeprefix("ERR "))):
        found = translate_error(error, "host:1", command=("EVALSHA", "00", 1, "rlb:{a}:meta"), user="me")
        if name == "MOVED" and type(error) is redis.ResponseError:
            continue  # the redirection is in redis-py's class only
        assert type(found) is answer.error, (found, error)
    if answer.reaction is Reaction.WAITED_OUT:
        assert isinstance(found, errors.ConnectionFailed | errors.RunLost)


def test_a_right_that_is_missing_is_an_outage_for_a_while_if_the_client_had_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("rlbroker.backend.deadline.time.monotonic", lambda: now)
    translator = ErrorTranslator("host:1", "me", redis.ConnectionPool())
    translator.record_answer()

    def refused(name: str) -> errors.PeerError:
        text = f"User me has no permissions to run the '{name}' command"
        found = translator.translate(redis.exceptions.NoPermissionError(text))
        assert f"may not run {name.upper()}" in str(found)
        translator.record_answer()  # of another command
        return found

    assert type(refused("info")) is errors.AccessDenied
    translator.joined = True
    assert type(refused("info")) is errors.AccessDenied  # the client does without this right
    for _ in range(4):
        assert type(refused("hset")) is errors.ConnectionFailed
        now += 3.0
    now = 1011.0
    assert type(refused("hset")) is errors.AccessDenied
    assert type(refused("xread")) is errors.ConnectionFailed
    now = 1020.0  # it was granted in between
    assert type(refused("hset")) is errors.ConnectionFailed
