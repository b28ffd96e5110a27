"""Wrong use, missing rights, and keys that others have written into: one clear line, and never a traceback."""

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

#: Commands that look at one run, and at all.
OF_A_RUN = [
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
ALL = [*OF_A_RUN, ("runs",), ("prune", "--dry-run")]

#: Those that read different keys.
READERS = [("status",), ("missed",), ("experiences", "peek"), ("control", "list"), ("report", "--json")]

#: What commands end with that could not look: `check` and `doctor` as monitoring plugins do.
FAILED = {"check": 3, "doctor": 3}


def names(commands: list[tuple[str, ...]]) -> list[str]:
    return [" ".join(command) for command in commands]


@pytest.fixture(scope="module")
def admin(embedded: RedisServer) -> Iterator[Any]:
    """A server with one run that ended, of one worker."""
    client = redis.Redis.from_url(embedded.url, protocol=2)
    client.flushall()
    with (
        WorkerCommunicator(1, redis_url=embedded.url, run=RUN) as learner,
        WorkerClient(embedded.url, RUN) as worker,
    ):
        learner.send_model_weights({})
        learner.send_model_weights({})
        wait_until("the worker runs version 2", lambda: worker.poll({}) and worker.version == 2)
        wait_until("it is on record", lambda: learner.missed_updates()[0].behind == 0)
        learner.send_control_command("noop")
    yield client
    client.flushall()
    client.close()


def observer(admin: Any, url: str, *rules: str, name: str = "observer") -> str:
    """Make a user with the rights to look, changed by these rules; give its URL."""
    rights = ("%R~rlb:*", "+@read", "+@connection", "+info", "+time", "+scan", *rules)
    admin.execute_command("ACL", "SETUSER", name, "reset", "on", f">{PASSWORD}", *rights)
    return with_user(url, name, PASSWORD)


def with_user(url: str, name: str, password: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{name}:{quote(password)}@{parts.netloc.rpartition('@')[2]}").geturl()


def call(*arguments: str, url: str) -> tuple[int, str]:
    """Run a command in this process; give its exit code and what it said."""
    found = CliRunner().invoke(app, [*arguments, "--url", url])
    assert found.exception is None or isinstance(found.exception, SystemExit)
    assert "Traceback" not in found.output
    return found.exit_code, found.output


def refuses(*arguments: str, url: str, says: str) -> None:
    code, said = call(*arguments, url=url)
    assert code == FAILED.get(arguments[0], 2), said
    assert said.count("\n") == 1
    assert re.search(says, said), said


# Runs and servers


@pytest.mark.parametrize("command", OF_A_RUN, ids=names(OF_A_RUN))
def test_an_unknown_run_is_answered_with_those_that_exist(
    command: tuple[str, ...], admin: Any, embedded: RedisServer
) -> None:
    refuses(
        *command, "--run", "tetris", url=embedded.url, says=f"no run 'tetris' on .*; runs there are: {RUN};"
    )


@pytest.mark.parametrize("command", OF_A_RUN, ids=names(OF_A_RUN))
def test_a_run_of_another_wire_format_is_refused_with_what_reads_it(
    command: tuple[str, ...], admin: Any, embedded: RedisServer
) -> None:
    old = Keys("older").meta
    admin.hset(old, "wire_format", 0)
    try:
        refuses(*command, "--run", "older", url=embedded.url, says="wire format 0, this release reads 1; use")
    finally:
        admin.delete(old)


@pytest.mark.parametrize("command", ALL, ids=names(ALL))
def test_a_server_that_is_not_there_is_named(command: tuple[str, ...]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    url = f"redis://me:{PASSWORD}@127.0.0.1:{port}/0"
    refuses(*command, url=url, says=rf"cannot reach redis://127\.0\.0\.1:{port}/0: .*refused")
    assert PASSWORD not in call(*command, url=url)[1]


@pytest.mark.parametrize("command", ALL, ids=names(ALL))
def test_a_wrong_password_is_called_that(command: tuple[str, ...], admin: Any, embedded: RedisServer) -> None:
    url = with_user(embedded.url, "rlbroker", "wrong-one")
    refuses(*command, url=url, says="refused: .*; check user and password in the server's URL")
    assert "wrong-one" not in call(*command, url=url)[1]


# Rights


@pytest.mark.parametrize("command", ALL, ids=names(ALL))
def test_an_observer_needs_no_more_than_the_rights_to_read(
    command: tuple[str, ...], admin: Any, embedded: RedisServer
) -> None:
    url = observer(admin, embedded.url)
    denied = "acl_access_denied_cmd"
    before = int(admin.info("stats")[denied])
    code, said = call(*command, url=url)
    assert code in ((0, 1) if command[0] in FAILED else (0,)), said
    assert command[0] == "doctor" or int(admin.info("stats")[denied]) == before


@pytest.mark.parametrize(
    ("command", "rule", "says"),
    [
        (("status",), "-hgetall", r"may not run HGETALL; .*redis-cli ACL SETUSER poor \+hgetall\n"),
        (("workers",), "-time", r"may not run TIME; .*redis-cli ACL SETUSER poor \+time\n"),
        (("missed",), "-xrange", r"may not run XRANGE; .*redis-cli ACL SETUSER poor \+xrange\n"),
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
def test_the_rule_that_is_missing_is_named_and_mends_it(
    command: tuple[str, ...], rule: str, says: str, admin: Any, embedded: RedisServer
) -> None:
    url = observer(admin, embedded.url, rule, name="poor")
    code, said = call(*command, url=url)
    assert code == FAILED.get(command[0], 2)
    assert re.search(says, said), said
    assert said.count("\n") == 1
    assert "password" not in said
    typed = re.search(r"redis-cli ACL SETUSER poor (\S+?),? ?(?:before|$)", said.strip())
    assert typed
    admin.execute_command("ACL", "SETUSER", "poor", typed[1].strip("',"))
    assert call(*command, url=url)[0] in ((0, 1) if command[0] in FAILED else (0,))


# What other programs wrote


def _string(client: Any, key: str) -> None:
    client.set(key, "\x1b[31mnot yours")


def _field(name: str, value: str) -> Callable[[Any, str], None]:
    return lambda client, key: client.hset(key, name, value)


def _entry(client: Any, key: str) -> None:
    client.xadd(key, {"worker": "nobody"})


GARBLED = {
    "meta-string": (KEYS.meta, _string),
    "meta-lease": (KEYS.meta, _field("lease_seconds", "soon")),
    "meta-lease-negative": (KEYS.meta, _field("lease_seconds", "-1")),
    "meta-seen": (KEYS.meta, _field("learner_seen", "yesterday")),
    "meta-workers": (KEYS.meta, _field("num_workers", "many")),
    "weights-string": (KEYS.weights, _string),
    "weights-version": (KEYS.weights, _field("version", "latest")),
    "workers-string": (KEYS.workers, _string),
    "life-string": (KEYS.life(0), _string),
    "pending": (KEYS.pending, _field("noop", "?")),
    "ledger-string": (KEYS.ledger(0), _string),
    "ledger-field": (KEYS.ledger(0), _field("settled", "all")),
    "missed": (KEYS.missed, _entry),
    "control-string": (KEYS.control, _string),
    "history-string": (KEYS.history(1), _string),
    "experiences": (KEYS.experiences(0), _string),
    "dead": (KEYS.dead(0), _string),
}


@pytest.fixture
def garbled(request: pytest.FixtureRequest, admin: Any) -> Iterator[str]:
    """A key that another program has written into, as long as the test goes on."""
    key, spoil = GARBLED[request.param]
    before = admin.dump(key)
    if spoil is _string:
        admin.delete(key)
    spoil(admin, key)
    yield key
    admin.delete(key)
    if before is not None:
        admin.restore(key, 0, before)


@pytest.mark.parametrize("garbled", GARBLED, indirect=True)
def test_what_another_program_wrote_is_said_to_be_that(garbled: str, embedded: RedisServer) -> None:
    noticed = False
    for command in READERS:
        code, said = call(*command, "--run", RUN, url=embedded.url)
        assert "unexpected" not in said, f"{command}: {said}"
        if code == FAILED.get(command[0], 2):
            noticed = True
            assert said.count("\n") == 1, said
            assert garbled.rpartition(":")[0] in said or "manifest" in said, said
            assert "\x1b" not in said
        noticed |= (
            command == ("status",) and f"{garbled} of worker 0 is not what rlbroker writes there" in said
        )
    assert noticed


@pytest.mark.parametrize("garbled", ["meta-string", "meta-lease"], indirect=True)
def test_a_run_that_cannot_be_read_does_not_hide_the_others(
    garbled: str, admin: Any, embedded: RedisServer
) -> None:
    other = Keys("other").meta
    admin.hset(other, "wire_format", 1)
    admin.set("rlb:{not a run}:meta", "1")
    try:
        code, said = call("runs", url=embedded.url)
    finally:
        admin.delete(other, "rlb:{not a run}:meta")
    assert code == 0
    assert re.search(rf"{RUN} +unreadable", said)
    assert re.search(r"other +away", said)


# As a person sees it


def test_the_executable_says_one_line_and_shows_where_from_only_with_vv(
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


def test_a_password_is_in_no_message_and_not_in_the_list_of_processes() -> None:
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
            with closing(silent.accept()[0]) as accepted:  # the first of them that came
                assert PASSWORD.encode() in accepted.recv(4096)
                assert PASSWORD not in command_lines()
        finally:
            for process in processes:
                process.kill()
                said, problem = process.communicate(timeout=10)
                assert PASSWORD not in said + problem
