"""`rlbroker doctor` on a server and a run with planted faults, and the commands that it prints repair them."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from conftest import wait_until
from executable import rlbroker
from typer.testing import CliRunner

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.local.embedded_server import RedisServer
from rlbroker.ops.cli.app import app
from rlbroker.ops.doctor import run_checks
from rlbroker.ops.doctor.checks import Check
from rlbroker.ops.doctor.diagnosis import Diagnosis, diagnose
from rlbroker.ops.doctor.server_info import measure_latency

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
RUN = "pong"

#: Faulty settings by name: the value, and the check that reports it.
FAULTS = {
    "maxmemory-policy": ("allkeys-lru", "eviction"),
    "proto-max-bulk-len": ("2097152", "bulk"),
    "client-output-buffer-limit": ("normal 1048576 0 0", "buffers"),
    "timeout": ("30", "idle"),
    "tcp-keepalive": ("0", "keepalive"),
    "maxmemory": ("100000000", "room"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server for these tests alone, because they change its settings."""
    with RedisServer(directory=tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def admin(server: RedisServer) -> Iterator[Any]:
    """A client with all rights, while a healthy run is on the server."""
    client = redis.Redis.from_url(server.url, protocol=2)
    with (
        WorkerCommunicator(1, redis_url=server.url, run=RUN) as learner,
        WorkerClient(server.url, RUN) as worker,
    ):
        learner.send_model_weights({"w": np.zeros(10, np.float32)})
        wait_until("the worker runs version 1", lambda: worker.poll({}) and worker.version == 1)
        worker.send_experiences({"x": np.zeros(3, np.float32)})
        wait_until(
            "that is reported", lambda: learner.workers()[0].version == 1 and learner.workers()[0].sent == 1
        )
        yield client
    client.close()


@pytest.fixture
def connection(server: RedisServer, admin: Any) -> Iterator[Connection]:
    connection = Connection(server.url)
    yield connection
    connection.close()


def faults_of(diagnosis: Diagnosis) -> dict[str, Check]:
    return {check.code: check for check in diagnosis.checks if check.state in ("warning", "critical")}


def run_hint(client: Any, hint: str) -> None:
    """Run the command of a redis-cli hint."""
    program, *command = shlex.split(hint)
    assert program == "redis-cli"
    assert client.execute_command(*command) is not None


def test_a_healthy_server_and_run_have_no_faults(server: RedisServer, connection: Connection) -> None:
    diagnosis = diagnose(connection, RUN)
    assert faults_of(diagnosis).keys() <= {"latency"}  # this machine may be slow
    assert {"queues", "room", "run", "host_cache"} <= {check.code for check in diagnosis.checks}
    done = rlbroker("doctor", RLBROKER_REDIS_URL=server.url)
    assert done.returncode in (0, 1)
    assert done.stderr == ""
    assert re.search(r"^✓ persistence +append-only file", done.stdout, re.MULTILINE)
    assert re.search(r"^✓ run +nothing is wrong", done.stdout, re.MULTILINE)
    assert re.search(r"^\d+ ok, \d warnings?, 0 critical, 0 unknown$", done.stdout, re.MULTILINE)


def test_a_temporary_server_keeps_nothing_whatever_its_settings() -> None:
    with RedisServer() as server:
        with redis.Redis.from_url(server.url, protocol=2) as client:
            client.config_set("appendonly", "yes")
        done = rlbroker("doctor", RLBROKER_REDIS_URL=server.url)
    assert re.search(r"^! persistence +an embedded server without --directory: ", done.stdout, re.MULTILINE)
    assert re.search(r"^ +rlbroker server --directory DIR$", done.stdout, re.MULTILINE)
    assert "CONFIG SET appendonly" not in done.stdout


def test_planted_faults_are_reported_and_the_printed_commands_repair_them(
    server: RedisServer, admin: Any, connection: Connection
) -> None:
    before = {name: admin.config_get(name)[name] for name in FAULTS}
    key = Keys(RUN).experiences(0)
    try:
        for name, (value, _) in FAULTS.items():
            admin.config_set(name, value)
        # Only until the learner reads: it makes its group again.
        admin.xgroup_destroy(key, GROUP)
        done = rlbroker("doctor", "--json", RLBROKER_REDIS_URL=server.url)
        output = json.loads(done.stdout)
        assert (done.returncode, done.stderr, output["state"]) == (2, "", "critical")
        reported = {one["code"]: one for one in output["points"] if one["state"] in ("warning", "critical")}
        expected = {code for _, code in FAULTS.values()} | {"group_missing", "batch_bytes"}
        assert expected <= reported.keys()
        assert reported.keys() <= expected | {"latency"}
        for check in reported.values():
            if check["code"] != "latency":
                run_hint(admin, check["hint"])
        assert not faults_of(diagnose(connection, RUN)).keys() & expected
    finally:
        for name, value in before.items():
            admin.config_set(name, value)
    section = PAGE.read_text().partition("## rlbroker doctor")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`(?:points\[\]\.)?(\w+)`", section.partition("JSON:")[2]))
    assert {*output, *output["points"][0]} - {"points"} <= documented


def test_missing_rights_are_reported_together_and_the_hint_grants_them(
    server: RedisServer, admin: Any
) -> None:
    rules = ("%R~rlb:*", "+@connection", "+get", "+hget", "+exists", "+scan")
    admin.execute_command("ACL", "SETUSER", "poor", "reset", "on", ">pw", *rules)
    path = server.url.partition("@")[2]
    poor = Connection(f"unix://poor:pw@{path}")
    try:
        diagnosis = diagnose(poor, RUN)
        assert diagnosis.state == "warning"
        rights = faults_of(diagnosis)["rights"]
        assert rights.what.startswith("the user 'poor' lacks rights for reading a run: +time +info")
        assert next(check.state for check in diagnosis.checks if check.code == "run") == "unknown"
        run_hint(admin, rights.hint)
        diagnosis = diagnose(poor, RUN)
        states = {check.code: check.state for check in diagnosis.checks}
        assert (states["rights"], states["run"]) == ("ok", "ok")
        assert states["idle"] == "unknown"
        assert "latency" in faults_of(diagnosis) or diagnosis.state == "ok"
    finally:
        poor.close()


def test_an_idle_learner_with_pending_batches_is_reported(
    admin: Any, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Keys(RUN).experiences(0)
    admin.xgroup_create(key, GROUP, "0") if not admin.xinfo_groups(key) else None
    admin.xadd(key, {"data": b""})
    admin.xreadgroup(GROUP, "sleeper", {key: ">"})
    monkeypatch.setattr(run_checks, "IDLE_SECONDS", -1.0)
    check = faults_of(diagnose(connection, RUN))["holder_idle"]
    assert re.match(r"\d+ batch(es)? of worker 0 (is|are) pending at the learner 'sleeper'", check.what)
    admin.xgroup_delconsumer(key, GROUP, "sleeper")


def test_with_several_runs_and_none_named_only_the_server_is_checked(server: RedisServer, admin: Any) -> None:
    other = Keys("other").meta
    admin.hset(other, "wire_format", 1)
    try:
        done = CliRunner().invoke(app, ["doctor", "--url", server.url])
    finally:
        admin.delete(other)
    assert done.stderr == f"no run was examined: there are 2 runs: other, {RUN}; choose one with --run\n"
    assert done.exit_code in (0, 1)
    assert " persistence " in done.stdout
    assert " queues " not in done.stdout


def test_the_clock_difference_is_measured(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 7.0)
    assert measure_latency(connection).ahead_seconds == pytest.approx(7.0, abs=1.0)
