"""`rlbroker prune`: deletes dead runs and keeps live ones, also if a process joins a run meanwhile."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RealServer, wait_until
from executable import RLBROKER, environment, rlbroker
from typer.testing import CliRunner

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.scripts import Script
from rlbroker.ops import prune as prune_module
from rlbroker.ops.cli.app import app
from rlbroker.ops.prune import (
    BACK_SECONDS,
    OPENED,
    PRUNE,
    PruneResult,
    RunVerdict,
    judge_runs,
    prune,
)

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
HOUR = 3600.0


def plant(url: str, run: str) -> None:
    """Leave a run whose learner has ended, with a waiting batch, a version and a command."""
    with WorkerCommunicator(1, redis_url=url, run=run) as learner, WorkerClient(url, run) as worker:
        learner.send_model_weights({"w": np.zeros(10, np.float32)})
        worker.send_experiences({"x": np.zeros(3, np.float32)})
        learner.send_control_command("noop")


def backdate(client: Any, run: str, seconds: float, *, state: str = "ended") -> None:
    """Change the heartbeats of a run: the last ones were sent this long ago."""
    keys, then = Keys(run), time.time() - seconds
    client.hset(keys.meta, "learner_seen", f"{then:.3f}")
    if state != "ended":
        client.hdel(keys.meta, "ended")
    client.hset(keys.life(0), mapping={"seen": int(then * 1000)})


def read_keys(client: Any, run: str = "*") -> dict[bytes, Any]:
    found = client.keys(f"rlb:{{{run}}}:*" if run != "*" else "*")
    return {key: client.dump(key) for key in found}


@pytest.fixture(autouse=True)
def _long_started(real_server: RealServer) -> None:
    wait_until("the server has run long enough", lambda: uptime(real_server) >= BACK_SECONDS, 15.0)


def uptime(server: RealServer) -> int:
    return int(server.client.info("server")["uptime_in_seconds"])


@pytest.fixture
def connection(real_server: RealServer) -> Iterator[Connection]:
    found = Connection(real_server.url)
    yield found
    found.close()


def find_run(connection: Connection, name: str, **options: Any) -> RunVerdict:
    found = {one.run: one for one in judge_runs(connection, **{"older_than_seconds": HOUR, **options})}
    return found[name]


def prune_now(connection: Connection, run: str, **options: Any) -> PruneResult:
    names = find_run(connection, run).names
    return prune(connection, run, names, **{"older_than_seconds": HOUR, "named": False, **options})


# The command


def test_dead_runs_are_listed_and_deleted_and_live_ones_are_kept(real_server: RealServer) -> None:
    url, client = real_server.url, real_server.client
    for run in ("old", "lost", "recent", "live"):
        plant(url, run)
    backdate(client, "old", 2 * HOUR)
    backdate(client, "lost", 2 * HOUR, state="open")
    backdate(client, "recent", HOUR / 2)
    client.set("another", "program")
    with WorkerCommunicator(1, redis_url=url, run="live"):
        before = read_keys(client)
        done = rlbroker("prune", "--dry-run", RLBROKER_REDIS_URL=url)
        assert done.returncode == 0, done.stderr
        assert re.search(r"old +its learner has ended +2 h +1 +\d+ +\S+ k?B", done.stdout)
        assert re.search(r"lost +its learner is away +2 h", done.stdout)
        assert "kept: live, as its learner is alive\n" in done.stderr
        assert (
            "kept: recent, as its learner has ended, but for less than 60 min (30 min); to delete it now: "
            "rlbroker prune --run recent --older-than 0s\n"
        ) in done.stderr
        assert read_keys(client).keys() == before.keys()
        assert read_keys(client, "old") == {key: one for key, one in before.items() if b"{old}" in key}

        asked = CliRunner().invoke(app, ["prune", "--url", url])  # without a terminal
        assert asked.exit_code == 2
        assert asked.output.splitlines()[-1].startswith(
            "rlbroker: nothing was deleted: confirm it with --yes"
        )
        assert read_keys(client).keys() == before.keys()

        done = rlbroker("prune", "--yes", "--json", RLBROKER_REDIS_URL=url)
        assert (done.returncode, done.stderr) == (0, "")
        data = json.loads(done.stdout)
        deleted = {one["run"]: one["deleted_keys"] for one in data["runs"]}
        kept = {key for key in before if not re.match(rb"rlb:\{(old|lost)\}:", key)}
        assert read_keys(client).keys() == kept
        assert deleted["old"] + deleted["lost"] == len(before) - len(kept)
        assert deleted["live"] == deleted["recent"] == 0
    section = PAGE.read_text().partition("## rlbroker prune")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`(?:runs\[\]\.)?(\w+)`", section.partition("JSON:")[2]))
    assert {*data, *data["runs"][0]} - {"runs"} <= documented


def test_a_named_run_is_deleted_at_once_if_its_learner_has_ended(real_server: RealServer) -> None:
    url, client = real_server.url, real_server.client
    plant(url, "done")
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [RLBROKER, "prune", "--run", "done"],
        env=environment(RLBROKER_REDIS_URL=url),
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    os.write(controller, b"y\n")
    output = process.communicate(timeout=20)[0].decode()
    os.close(controller)
    os.close(terminal)
    assert process.returncode == 0, output
    assert "Delete the run done for good?" in output
    assert read_keys(client) == {}


def test_a_run_that_is_kept_for_a_while_comes_with_the_command_that_deletes_it(
    real_server: RealServer,
) -> None:
    with WorkerClient(real_server.url, "mistyped"):
        pass
    kept = rlbroker("prune", "--run", "mistyped", RLBROKER_REDIS_URL=real_server.url)
    assert kept.returncode == 1
    found = re.search(
        r"as no learner ever opened it, but for less than 60 min .*; to delete it now: rlbroker (.*)$",
        kept.stderr,
        re.MULTILINE,
    )
    assert found, kept.stderr
    deleted = rlbroker(*found[1].split(), "--yes", RLBROKER_REDIS_URL=real_server.url)
    assert (deleted.returncode, read_keys(real_server.client)) == (0, {}), deleted.stderr


# Which runs are dead


def test_an_alive_worker_keeps_its_run(real_server: RealServer, connection: Connection) -> None:
    with WorkerClient(real_server.url, "waiting"):
        found = find_run(connection, "waiting", older_than_seconds=0.0)
        assert (found.dead, found.why) == (False, "a worker is alive")
    with WorkerCommunicator(1, redis_url=real_server.url, run="short") as learner:
        worker = WorkerClient(real_server.url, "short")
        assert learner.workers()
    with worker:
        found = find_run(connection, "short", run="short", named=True, older_than_seconds=0.0)
        assert (found.dead, found.why) == (False, "a worker is alive")


def test_a_learner_that_only_collects_keeps_its_run(real_server: RealServer, connection: Connection) -> None:
    url = real_server.url
    with WorkerCommunicator(1, redis_url=url, run="two") as learner:
        other = WorkerCommunicator(1, redis_url=url, run="two", learner_name="second", publishes=False)
        assert learner.workers() == []
    with other:
        found = find_run(connection, "two", run="two", named=True, older_than_seconds=0.0)
        assert (found.dead, found.why) == (False, "another learner is alive, which collects")


def test_nothing_is_dead_on_a_server_that_has_just_started(
    real_server: RealServer, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(real_server.url, "down")
    backdate(real_server.client, "down", 2 * HOUR, state="open")
    assert find_run(connection, "down").dead
    monkeypatch.setattr(prune_module, "BACK_SECONDS", uptime(real_server) + 100)
    assert "has just started" in find_run(connection, "down").why


def test_keys_with_names_like_those_of_a_run_are_ignored(
    real_server: RealServer, connection: Connection
) -> None:
    for name in ("rlb:{tenant}:session", "rlb:{cfg}:settings", "rlb:{a}:{b}:meta", "rlb:{a}:x:y"):
        real_server.client.set(name, "precious")
    assert judge_runs(connection, older_than_seconds=0.0) == []


def set_idle(client: Any, run: str, seconds: float) -> None:
    """Set the idle time of all keys of a run."""
    for key, dumped in read_keys(client, run).items():
        client.restore(key, 0, dumped, replace=True, idletime=int(seconds))


def test_orphaned_keys_are_deleted_once_they_are_idle(
    real_server: RealServer, connection: Connection
) -> None:
    client = real_server.client
    plant(real_server.url, "orphan")
    backdate(client, "orphan", HOUR)
    client.delete(Keys("orphan").meta, Keys("orphan").workers)
    found = find_run(connection, "orphan")
    assert (found.state, found.dead) == ("orphaned", False)
    assert prune_now(connection, "orphan").kept
    set_idle(client, "orphan", 2 * HOUR)
    assert find_run(connection, "orphan").dead
    assert prune_now(connection, "orphan").kept == ""  # reading the keys did not count as use
    assert read_keys(client) == {}


def test_keys_of_unknown_age_are_kept(real_server: RealServer, connection: Connection) -> None:
    real_server.client.set(Keys("orphan").control, "x")
    real_server.client.config_set(
        "maxmemory-policy", "volatile-lfu"
    )  # with this policy the server has no idle times
    try:
        found = find_run(connection, "orphan", older_than_seconds=0.0)
    finally:
        real_server.client.config_set("maxmemory-policy", "noeviction")
    assert (found.dead, found.silent_seconds) == (False, None)
    assert found.why.endswith("but for how long is unknown")


def test_an_unreadable_run_is_kept_while_its_keys_are_used(
    real_server: RealServer, connection: Connection
) -> None:
    plant(real_server.url, "odd")
    real_server.client.hset(Keys("odd").meta, "lease_seconds", "soon")
    assert find_run(connection, "odd").state == "unreadable"
    assert not find_run(connection, "odd").dead
    set_idle(real_server.client, "odd", 2 * HOUR)
    assert find_run(connection, "odd").dead
    assert prune_now(connection, "odd").kept == ""
    assert read_keys(real_server.client) == {}


# Processes that join meanwhile


def call_before(monkeypatch: pytest.MonkeyPatch, key: str, action: Callable[[], None]) -> None:
    """Call a function right before the script deletes this key, with others of the run or of the queue."""
    run = Connection.run

    def watched(self: Connection, called: Script, keys: Sequence[str], *arguments: Any) -> Any:
        if called is PRUNE and key in keys:
            monkeypatch.setattr(Connection, "run", run)
            action()
        return run(self, called, keys, *arguments)

    monkeypatch.setattr(Connection, "run", watched)


def test_a_learner_that_opens_the_run_just_before_keeps_it(
    real_server: RealServer, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(real_server.url, "back")
    backdate(real_server.client, "back", 2 * HOUR)
    before = read_keys(real_server.client, "back").keys()
    opened: list[WorkerCommunicator] = []
    call_before(
        monkeypatch,
        Keys("back").meta,
        lambda: opened.append(WorkerCommunicator(1, redis_url=real_server.url, run="back")),
    )
    try:
        assert prune_now(connection, "back") == PruneResult("back", 0, OPENED)
        assert read_keys(real_server.client, "back").keys() >= before
        assert [worker for worker, _ in opened[0].collect_experiences(timeout=5.0)] == [0]
    finally:
        opened[0].cleanup()


def test_a_worker_that_joins_just_before_keeps_the_run(
    real_server: RealServer, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(real_server.url, "back")
    backdate(real_server.client, "back", 2 * HOUR)
    before = read_keys(real_server.client, "back").keys()
    joined: list[WorkerClient] = []
    call_before(monkeypatch, Keys("back").meta, lambda: joined.append(WorkerClient(real_server.url, "back")))
    try:
        assert prune_now(connection, "back").kept == OPENED
        assert read_keys(real_server.client, "back").keys() >= before
    finally:
        joined[0].close()


def test_a_run_that_begins_while_the_old_one_is_deleted_loses_nothing(
    real_server: RealServer, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(real_server.url, "anew")
    backdate(real_server.client, "anew", 2 * HOUR)
    opened: list[Any] = []

    def begin() -> None:
        opened.append(WorkerCommunicator(1, redis_url=real_server.url, run="anew"))
        opened.append(WorkerClient(real_server.url, "anew"))
        opened[0].send_model_weights({"w": np.ones(10, np.float32)})
        opened[1].send_experiences({"new": np.ones(3, np.float32)})

    call_before(monkeypatch, Keys("anew").experiences(0), begin)
    found = prune_now(connection, "anew")
    try:
        assert found.kept == OPENED
        learner, worker = opened
        wait_until(
            "the new batch arrives",
            lambda: any("new" in batch for _, batch in learner.collect_experiences(timeout=0.1)),
        )
        weights: dict[str, Any] = {}
        wait_until("the new version arrives", lambda: worker.poll(weights) or worker.version == 1)
        assert weights["w"].sum() == 10
    finally:
        opened[1].close()
        opened[0].cleanup()


def test_an_interrupted_deletion_is_completed_by_the_next_one(
    real_server: RealServer, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(real_server.url, "half")
    backdate(real_server.client, "half", 2 * HOUR)

    def interrupt() -> None:
        raise KeyboardInterrupt

    call_before(monkeypatch, Keys("half").experiences(0), interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune_now(connection, "half")
    assert read_keys(real_server.client, "half")
    found = find_run(connection, "half")
    assert (found.state, found.dead, found.why) == ("pruned", True, "its deletion was interrupted")
    assert prune_now(connection, "half").kept == ""
    assert read_keys(real_server.client) == {}
