"""`rlbroker doctor` on a server and a run with planted trouble; and what it says to type mends it."""

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

#: Settings that doctor is to find fault with, and the points that do.
TROUBLE = {
    "maxmemory-policy": ("allkeys-lru", "eviction"),
    "proto-max-bulk-len": ("2097152", "bulk"),
    "client-output-buffer-limit": ("normal 1048576 0 0", "buffers"),
    "timeout": ("30", "idle"),
    "tcp-keepalive": ("0", "keepalive"),
    "maxmemory": ("100000000", "room"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server of its own, as its settings are changed, with a run that is well but for what a test does to it."""
    with RedisServer(persistence=True, directory=tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture(scope="module")
def admin(server: RedisServer) -> Iterator[Any]:
    client = redis.Redis.from_url(server.url, protocol=2)
    with (
        WorkerCommunicator(1, redis_url=server.url, run=RUN) as learner,
        WorkerClient(server.url, RUN) as worker,
    ):
        learner.send_model_weights({"w": np.zeros(10, np.float32)})
        wait_until("the worker runs version 1", lambda: worker.poll({}) and worker.version == 1)
        worker.send_experiences({"x": np.zeros(3, np.float32)})
        wait_until(
            "that is said", lambda: learner.workers()[0].version == 1 and learner.workers()[0].sent == 1
        )
        yield client
    client.close()


@pytest.fixture
def connection(server: RedisServer, admin: Any) -> Iterator[Connection]:
    found = Connection(server.url)
    yield found
    found.close()


def failed(found: Diagnosis) -> dict[str, Check]:
    return {one.code: one for one in found.points if one.state in ("warning", "critical")}


def type_in(client: Any, hint: str) -> None:
    """Do what a hint says, as redis-cli would."""
    words = shlex.split(hint)
    assert words[0] == "redis-cli"
    assert client.execute_command(*words[1:]) is not None


def test_a_server_and_a_run_that_are_well_have_nothing_but_marks(
    server: RedisServer, connection: Connection
) -> None:
    found = diagnose(connection, RUN)
    slow = {"latency"}  # which this machine may be
    assert failed(found).keys() <= slow
    assert {"queues", "room", "run", "host_cache"} <= {one.code for one in found.points}
    done = rlbroker("doctor", RLBROKER_REDIS_URL=server.url)
    assert done.returncode in (0, 1)
    assert done.stderr == ""
    assert re.search(r"^✓ persistence +append-only file", done.stdout, re.MULTILINE)
    assert re.search(r"^✓ run +nothing is wrong", done.stdout, re.MULTILINE)
    assert re.search(r"^\d+ ok, \d warnings?, 0 critical, 0 unknown$", done.stdout, re.MULTILINE)


def test_planted_trouble_is_named_and_what_is_printed_mends_it(
    server: RedisServer, admin: Any, connection: Connection
) -> None:
    before = {name: admin.config_get(name)[name] for name in TROUBLE}
    key = Keys(RUN).experiences(0)
    try:
        for name, (value, _) in TROUBLE.items():
            admin.config_set(name, value)
        # A learner that reads makes its group again.
        admin.xgroup_destroy(key, GROUP)
        done = rlbroker("doctor", "--json", RLBROKER_REDIS_URL=server.url)
        said = json.loads(done.stdout)
        assert (done.returncode, done.stderr, said["state"]) == (2, "", "critical")
        found = {one["code"]: one for one in said["points"] if one["state"] in ("warning", "critical")}
        wanted = {code for _, code in TROUBLE.values()} | {"group_missing", "batch_bytes"}
        assert wanted <= found.keys()
        assert found.keys() <= wanted | {"latency"}
        for one in found.values():
            if one["code"] != "latency":
                type_in(admin, one["hint"])
        assert not failed(diagnose(connection, RUN)).keys() & wanted
    finally:
        for name, value in before.items():
            admin.config_set(name, value)
    section = PAGE.read_text().partition("## rlbroker doctor")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`(?:points\[\]\.)?(\w+)`", section.partition("JSON:")[2]))
    assert {*said, *said["points"][0]} - {"points"} <= documented


def test_missing_rights_are_named_all_at_once_and_the_hint_gives_them(
    server: RedisServer, admin: Any
) -> None:
    rules = ("%R~rlb:*", "+@connection", "+get", "+hget", "+exists", "+scan")
    admin.execute_command("ACL", "SETUSER", "poor", "reset", "on", ">pw", *rules)
    path = server.url.partition("@")[2]
    poor = Connection(f"unix://poor:pw@{path}")
    try:
        found = diagnose(poor, RUN)
        assert found.state == "warning"
        rights = failed(found)["rights"]
        assert rights.what.startswith("the user 'poor' lacks rights that looking needs: +time +info")
        run = next(one for one in found.points if one.code == "run")
        assert run.state == "unknown"
        type_in(admin, rights.hint)
        found = diagnose(poor, RUN)
        states = {one.code: one.state for one in found.points}
        assert (states["rights"], states["run"]) == ("ok", "ok")
        assert states["idle"] == "unknown"
        assert "latency" in failed(found) or found.state == "ok"
    finally:
        poor.close()


def test_a_learner_that_sleeps_over_batches_is_named(
    admin: Any, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Keys(RUN).experiences(0)
    admin.xgroup_create(key, GROUP, "0") if not admin.xinfo_groups(key) else None
    admin.xadd(key, {"data": b""})
    admin.xreadgroup(GROUP, "sleeper", {key: ">"})
    monkeypatch.setattr(run_checks, "IDLE_SECONDS", -1.0)
    found = failed(diagnose(connection, RUN))["holder_idle"]
    assert re.match(r"\d+ batch(es)? of worker 0 (is|are) in the hands of the learner 'sleeper'", found.what)
    admin.xgroup_delconsumer(key, GROUP, "sleeper")


def test_without_a_single_run_the_server_alone_is_examined(server: RedisServer, admin: Any) -> None:
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


def test_the_clocks_of_both_machines_are_compared(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 7.0)
    assert measure_latency(connection).ahead_seconds == pytest.approx(7.0, abs=1.0)
