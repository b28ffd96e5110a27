"""Wrong use, missing rights and foreign data in keys end in one clear line, and never in a traceback."""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import redis
from conftest import wait_until
from executable import rlbroker, start
from processes import command_line, command_lines
from typer.testing import CliRunner

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.local.embedded_server import RedisServer
from rlbroker.ops.cli.app import app

RUN = "wrong-use"
KEYS = Keys(RUN)
PASSWORD = f"not-to-be-seen-{secrets.token_hex(8)}"

#: Commands that read one run, and all that read from the server.
ABOUT_A_RUN = [
    ("status",),
    ("workers",),
    ("missed",),
    ("check", "--max-missed", "5"),
    ("doctor",),
    ("weights", "list"),
    ("experiences", "peek"),
    ("control", "list"),
    ("dead", "list"),
    ("report", "--json"),
    ("top", "--interval", "0.1"),
]
ALL = [*ABOUT_A_RUN, ("runs",), ("prune", "--dry-run")]

#: Commands that read different keys.
READERS = [("status",), ("missed",), ("experiences", "peek"), ("control", "list"), ("report", "--json")]

#: Exit codes of commands that cannot read the run; it is 2 for the others.
UNREADABLE_CODES = {"check": 3, "doctor": 3}


def names(commands: list[tuple[str, ...]]) -> list[str]:
    return [" ".join(command) for command in commands]


@pytest.fixture(scope="module")
def admin(embedded: RedisServer) -> Iterator[Any]:
    """A server with a run of one worker that has ended."""
    client = redis.Redis.from_url(embedded.url, protocol=2)
    client.flushall()
    with (
        WorkerCommunicator(1, redis_url=embedded.url, run=RUN) as learner,
        WorkerClient(embedded.url, RUN) as worker,
    ):
        learner.send_model_weights({})
        learner.send_model_weights({})
        wait_until("the worker runs version 2", lambda: worker.poll({}) and worker.version == 2)
        wait_until("it is recorded", lambda: learner.missed_updates()[0].behind == 0)
        learner.send_control_command("noop")
    yield client
    client.flushall()
    client.close()


def observer(admin: Any, url: str, *rules: str, name: str = "observer") -> str:
    """Create a user with the rights to read, changed by these rules, and return its URL."""
    rights = ("%R~rlb:*", "+@read", "+@connection", "+info", "+time", "+scan", *rules)
    admin.execute_command("ACL", "SETUSER", name, "reset", "on", f">{PASSWORD}", *rights)
    return with_user(url, name, PASSWORD)


def with_user(url: str, name: str, password: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{name}:{quote(password)}@{parts.netloc.rpartition('@')[2]}").geturl()


def call(*arguments: str, url: str) -> tuple[int, str]:
    """Run a command in this process, and return its exit code and output."""
    found = CliRunner().invoke(app, [*arguments, "--url", url])
    assert found.exception is None or isinstance(found.exception, SystemExit)
    assert "Traceback" not in found.output
    return found.exit_code, found.output


def assert_refused(*arguments: str, url: str, message: str) -> None:
    code, output = call(*arguments, url=url)
    assert code == UNREADABLE_CODES.get(arguments[0], 2), output
    assert output.count("\n") == 1
    assert re.search(message, output), output


# Runs and servers


@pytest.mark.parametrize("command", ABOUT_A_RUN, ids=names(ABOUT_A_RUN))
def test_an_unknown_run_is_answered_with_those_that_exist(
    command: tuple[str, ...], admin: Any, embedded: RedisServer
) -> None:
    assert_refused(
        *command,
        "--run",
        "tetris",
        url=embedded.url,
        message=f"no run 'tetris' on .*; its runs are: {RUN};",
    )


@pytest.mark.parametrize("command", ABOUT_A_RUN, ids=names(ABOUT_A_RUN))
def test_a_run_of_another_wire_format_is_refused_with_advice(
    command: tuple[str, ...], admin: Any, embedded: RedisServer
) -> None:
    old = Keys("older").meta
    admin.hset(old, "wire_format", 0)
    try:
        assert_refused(
            *command, "--run", "older", url=embedded.url, message="wire format 0, this release reads 1; use"
        )
    finally:
        admin.delete(old)


@pytest.mark.parametrize("command", ALL, ids=names(ALL))
def test_an_unreachable_server_is_named(command: tuple[str, ...]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    url = f"redis://me:{PASSWORD}@127.0.0.1:{port}/0"
    assert_refused(*command, url=url, message=rf"cannot reach redis://127\.0\.0\.1:{port}/0: .*refused")
    assert PASSWORD not in call(*command, url=url)[1]


@pytest.mark.parametrize("command", ALL, ids=names(ALL))
def test_a_wrong_password_is_reported_as_such(
    command: tuple[str, ...], admin: Any, embedded: RedisServer
) -> None:
    url = with_user(embedded.url, "rlbroker", "wrong-one")
    assert_refused(*command, url=url, message="refused: .*; check user and password in the server's URL")
    assert "wrong-one" not in call(*command, url=url)[1]


# Rights


@pytest.mark.parametrize("command", ALL, ids=names(ALL))
def test_the_rights_to_read_are_enough(command: tuple[str, ...], admin: Any, embedded: RedisServer) -> None:
    url = observer(admin, embedded.url)
    denied = "acl_access_denied_cmd"
    before = int(admin.info("stats")[denied])
    code, output = call(*command, url=url)
    assert code in ((0, 1) if command[0] in UNREADABLE_CODES else (0,)), output
    assert command[0] == "doctor" or int(admin.info("stats")[denied]) == before


@pytest.mark.parametrize(
    ("command", "rule", "message"),
    [
        (("status",), "-hgetall", r"may not run HGETALL; .*redis-cli ACL SETUSER poor \+hgetall\n"),
        (("workers",), "-time", r"may not run TIME; .*redis-cli ACL SETUSER poor \+time\n"),
        (("missed",), "-xrevrange", r"may not run XREVRANGE; .*redis-cli ACL SETUSER poor \+xrevrange\n"),
        (("runs",), "-scan", r"may not run SCAN; .*redis-cli ACL SETUSER poor \+scan\n"),
        (("check",), "-ping", r"may not run PING; .*redis-cli ACL SETUSER poor \+ping\n"),
        (
            ("status", "--run", RUN),
            "resetkeys",
            rf"may not read the key {re.escape(KEYS.meta)} \(HGET\); .*SETUSER poor '%R~rlb:\*'",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_a_missing_right_is_named_with_the_rule_that_grants_it(
    command: tuple[str, ...], rule: str, message: str, admin: Any, embedded: RedisServer
) -> None:
    url = observer(admin, embedded.url, rule, name="poor")
    code, output = call(*command, url=url)
    assert code == UNREADABLE_CODES.get(command[0], 2)
    assert re.search(message, output), output
    assert output.count("\n") == 1
    assert "password" not in output
    typed = re.search(r"redis-cli ACL SETUSER poor (\S+?),? ?(?:before|$)", output.strip())
    assert typed
    admin.execute_command("ACL", "SETUSER", "poor", typed[1].strip("',"))
    assert call(*command, url=url)[0] in ((0, 1) if command[0] in UNREADABLE_CODES else (0,))


# Foreign data


def _write_string(client: Any, key: str) -> None:
    client.set(key, "\x1b[31mforeign")


def _write_field(name: str, value: str) -> Callable[[Any, str], None]:
    return lambda client, key: client.hset(key, name, value)


def _write_entry(client: Any, key: str) -> None:
    client.xadd(key, {"worker": "no worker"})


FOREIGN_DATA = {
    "meta-string": (KEYS.meta, _write_string),
    "meta-lease": (KEYS.meta, _write_field("lease_seconds", "soon")),
    "meta-lease-negative": (KEYS.meta, _write_field("lease_seconds", "-1")),
    "meta-seen": (KEYS.meta, _write_field("learner_seen", "yesterday")),
    "meta-workers": (KEYS.meta, _write_field("num_workers", "many")),
    "weights-string": (KEYS.weights, _write_string),
    "weights-version": (KEYS.weights, _write_field("version", "latest")),
    "workers-string": (KEYS.workers, _write_string),
    "life-string": (KEYS.life(0), _write_string),
    "pending": (KEYS.pending, _write_field("noop", "?")),
    "ledger-string": (KEYS.ledger(0), _write_string),
    "ledger-field": (KEYS.ledger(0), _write_field("settled", "all")),
    "missed": (KEYS.missed, _write_entry),
    "control-string": (KEYS.control, _write_string),
    "history-string": (KEYS.history(1), _write_string),
    "experiences": (KEYS.experiences(0), _write_string),
    "dead": (KEYS.dead(0), _write_string),
}


@pytest.fixture
def foreign(request: pytest.FixtureRequest, admin: Any) -> Iterator[str]:
    """A key that another program has written into, until the test ends."""
    key, write = FOREIGN_DATA[request.param]
    before = admin.dump(key)
    if write is _write_string:
        admin.delete(key)
    write(admin, key)
    yield key
    admin.delete(key)
    if before is not None:
        admin.restore(key, 0, before)


@pytest.mark.parametrize("foreign", FOREIGN_DATA, indirect=True)
def test_foreign_data_is_reported_as_such(
    foreign: str, embedded: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    noticed = False
    for command in READERS:
        code, output = call(*command, "--run", RUN, url=embedded.url)
        assert "unexpected" not in output, f"{command}: {output}"
        if code == UNREADABLE_CODES.get(command[0], 2):
            noticed = True
            assert output.count("\n") == 1, output
            assert foreign.rpartition(":")[0] in output or "manifest" in output, output
            assert "\x1b" not in output
        noticed |= (
            command == ("status",) and f"{foreign} of worker 0 is not what rlbroker writes there" in output
        )
    assert noticed or f"{foreign} has 1 entry that no learner wrote" in caplog.text


@pytest.mark.parametrize("foreign", ["meta-string", "meta-lease"], indirect=True)
def test_an_unreadable_run_does_not_hide_the_others(foreign: str, admin: Any, embedded: RedisServer) -> None:
    other = Keys("other").meta
    admin.hset(other, "wire_format", 1)
    admin.set("rlb:{not a run}:meta", "1")
    try:
        code, output = call("runs", url=embedded.url)
    finally:
        admin.delete(other, "rlb:{not a run}:meta")
    assert code == 0
    assert re.search(rf"{RUN} +unreadable", output)
    assert re.search(r"other +away", output)


# The executable


def test_the_executable_prints_one_line_and_a_traceback_only_with_vv(
    admin: Any, embedded: RedisServer
) -> None:
    done = rlbroker("status", "--run", "tetris", "--url", embedded.url)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "Traceback" not in done.stderr
    done = rlbroker("status", "-vv", "--url", with_user(embedded.url, "rlbroker", PASSWORD))
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "check user and password" in done.stderr.splitlines()[-1]
    assert PASSWORD not in done.stdout + done.stderr


def test_a_password_is_in_no_message_and_not_in_the_process_list() -> None:
    with closing(socket.create_server(("127.0.0.1", 0), backlog=8)) as silent:
        url = f"redis://me:{PASSWORD}@127.0.0.1:{silent.getsockname()[1]}/0"
        commands = [
            ("status", "--watch", "--timeout", "20", "--url", url),
            ("bench", f"--url={url}"),
            ("worker", "--timeout", "20", "--url", url),
            ("learner", "--url", url),
            ("demo", "--url", url),
        ]
        processes = [start(*command) for command in commands]
        try:
            for process, command in zip(processes, commands, strict=True):

                def hidden(pid: int = process.pid, name: str = command[0]) -> bool:
                    shown = command_line(pid)
                    return PASSWORD not in shown and f"rlbroker {name}" in shown

                wait_until(f"{command[0]} has hidden its password", hidden)
            silent.settimeout(20.0)
            with closing(silent.accept()[0]) as accepted:  # of the first command that connects
                assert PASSWORD.encode() in accepted.recv(4096)
                assert PASSWORD not in command_lines()
        finally:
            for process in processes:
                process.kill()
                output, problem = process.communicate(timeout=10)
                assert PASSWORD not in output + problem
