"""`rlbroker prune`: what dead runs left goes, what lives stays, whoever comes in between."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import time
from collections.abc import Callable, Iterator
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
from rlbroker.ops import stale_runs
from rlbroker.ops.cli.app import app
from rlbroker.ops.prune import OPENED, PRUNE_QUEUE, PRUNE_RUN, Pruned, prune
from rlbroker.ops.stale_runs import BACK_SECONDS, StaleRun, find_stale_runs

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
HOUR = 3600.0


def plant(url: str, run: str) -> None:
    """Leave a run behind: its learner has ended, a batch of its worker waits, a version and a command are there."""
    with WorkerCommunicator(1, redis_url=url, run=run) as learner, WorkerClient(url, run) as worker:
        learner.send_model_weights({"w": np.zeros(10, np.float32)})
        worker.send_experiences({"x": np.zeros(3, np.float32)})
        learner.send_control_command("noop")


def age(client: Any, run: str, seconds: float, *, state: str = "ended") -> None:
    """Have a run be as silent as it would be after so long."""
    keys, then = Keys(run), time.time() - seconds
    client.hset(keys.meta, mapping={"learner_seen": f"{then:.3f}", "learner_state": state})
    client.hset(keys.life(0), mapping={"seen": int(then * 1000)})


def all_of(client: Any, run: str = "*") -> dict[bytes, Any]:
    found = client.keys(f"rlb:{{{run}}}:*" if run != "*" else "*")
    return {key: client.dump(key) for key in found}


@pytest.fixture(autouse=True)
def _long_started(real_server: RealServer) -> None:
    wait_until("the server runs for long enough", lambda: uptime(real_server) >= BACK_SECONDS, 15.0)


def uptime(server: RealServer) -> int:
    return int(server.client.info("server")["uptime_in_seconds"])


@pytest.fixture
def connection(real_server: RealServer) -> Iterator[Connection]:
    found = Connection(real_server.url)
    yield found
    found.close()


def leftover(connection: Connection, name: str, **options: Any) -> StaleRun:
    found = {one.run: one for one in find_stale_runs(connection, **{"older_than_seconds": HOUR, **options})}
    return found[name]


def prune_now(connection: Connection, run: str, **options: Any) -> Pruned:
    names = leftover(connection, run).names
    return prune(connection, run, names, **{"older_than_seconds": HOUR, "named": False, **options})


# The command


def test_dead_runs_are_shown_and_deleted_and_those_that_live_stay(real_server: RealServer) -> None:
    url, client = real_server.url, real_server.client
    for run in ("old", "lost", "recent", "live"):
        plant(url, run)
    age(client, "old", 2 * HOUR)
    age(client, "lost", 2 * HOUR, state="open")
    age(client, "recent", HOUR / 2)
    client.set("another", "program")
    with WorkerCommunicator(1, redis_url=url, run="live"):
        before = all_of(client)
        done = rlbroker("prune", "--dry-run", RLBROKER_REDIS_URL=url)
        assert done.returncode == 0, done.stderr
        assert re.search(r"old +its learner has ended +2 h +1 +\d+ +\S+ k?B", done.stdout)
        assert re.search(r"lost +its learner is away +2 h", done.stdout)
        assert "kept: live, as its learner lives\n" in done.stderr
        assert "kept: recent, as its learner has ended, but not for long enough (30 min)\n" in done.stderr
        assert all_of(client).keys() == before.keys()
        assert all_of(client, "old") == {key: one for key, one in before.items() if b"{old}" in key}

        asked = CliRunner().invoke(app, ["prune", "--url", url])  # without a terminal
        assert asked.exit_code == 2
        assert asked.output.splitlines()[-1].startswith(
            "rlbroker: nothing was deleted: confirm it with --yes"
        )
        assert all_of(client).keys() == before.keys()

        done = rlbroker("prune", "--yes", "--json", RLBROKER_REDIS_URL=url)
        assert (done.returncode, done.stderr) == (0, "")
        said = json.loads(done.stdout)
        deleted = {one["run"]: one["deleted_keys"] for one in said["runs"]}
        kept = {key for key in before if not re.match(rb"rlb:\{(old|lost)\}:", key)}
        assert all_of(client).keys() == kept
        assert deleted["old"] + deleted["lost"] == len(before) - len(kept)
        assert deleted["live"] == deleted["recent"] == 0
    section = PAGE.read_text().partition("## rlbroker prune")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`(?:runs\[\]\.)?(\w+)`", section.partition("JSON:")[2]))
    assert {*said, *said["runs"][0]} - {"runs"} <= documented


def test_a_run_that_is_named_goes_at_once_when_its_learner_has_ended(real_server: RealServer) -> None:
    url, client = real_server.url, real_server.client
    plant(url, "done")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [RLBROKER, "prune", "--run", "done"],
        env=environment(RLBROKER_REDIS_URL=url),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    os.write(ours, b"y\n")
    said = process.communicate(timeout=20)[0].decode()
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0, said
    assert "Delete the run done for good?" in said
    assert all_of(client) == {}


# Who is dead


def test_a_worker_that_lives_keeps_its_run(real_server: RealServer, connection: Connection) -> None:
    with WorkerClient(real_server.url, "waiting"):
        found = leftover(connection, "waiting", older_than_seconds=0.0)
        assert (found.dead, found.why) == (False, "a worker of it lives")
    with WorkerCommunicator(1, redis_url=real_server.url, run="short") as learner:
        worker = WorkerClient(real_server.url, "short")
        assert learner.workers()
    with worker:
        found = leftover(connection, "short", run="short", named=True, older_than_seconds=0.0)
        assert (found.dead, found.why) == (False, "a worker of it lives")


def test_a_learner_that_only_collects_keeps_its_run(real_server: RealServer, connection: Connection) -> None:
    url = real_server.url
    with WorkerCommunicator(1, redis_url=url, run="two") as learner:
        other = WorkerCommunicator(1, redis_url=url, run="two", learner_name="second", publishes=False)
        assert learner.workers() == []
    with other:
        found = leftover(connection, "two", run="two", named=True, older_than_seconds=0.0)
        assert (found.dead, found.why) == (False, "another learner of it lives, which collects")


def test_a_server_that_has_just_started_has_heard_of_nobody(
    real_server: RealServer, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(real_server.url, "down")
    age(real_server.client, "down", 2 * HOUR, state="open")
    assert leftover(connection, "down").dead
    monkeypatch.setattr(stale_runs, "BACK_SECONDS", uptime(real_server) + 100)
    assert "has just started" in leftover(connection, "down").why


def test_keys_that_only_look_like_ours_are_nobodys(real_server: RealServer, connection: Connection) -> None:
    for name in ("rlb:{tenant}:session", "rlb:{cfg}:settings", "rlb:{a}:{b}:meta", "rlb:{a}:x:y"):
        real_server.client.set(name, "precious")
    assert find_stale_runs(connection, older_than_seconds=0.0) == []


def unused(client: Any, run: str, seconds: float) -> None:
    """Have all keys of a run be as if nobody had used them for so long."""
    for key, dumped in all_of(client, run).items():
        client.restore(key, 0, dumped, replace=True, idletime=int(seconds))


def test_keys_without_a_run_go_once_nobody_used_them(real_server: RealServer, connection: Connection) -> None:
    client = real_server.client
    plant(real_server.url, "orphan")
    age(client, "orphan", HOUR)
    client.delete(Keys("orphan").meta, Keys("orphan").workers)
    found = leftover(connection, "orphan")
    assert (found.state, found.dead) == ("orphaned", False)
    assert prune_now(connection, "orphan").kept
    unused(client, "orphan", 2 * HOUR)
    assert leftover(connection, "orphan").dead
    assert prune_now(connection, "orphan").kept == ""  # looking had not counted as using
    assert all_of(client) == {}


def test_what_nobody_knows_the_age_of_is_kept(real_server: RealServer, connection: Connection) -> None:
    real_server.client.set(Keys("orphan").control, "x")
    real_server.client.config_set("maxmemory-policy", "volatile-lfu")  # such servers do not tell idle times
    try:
        found = leftover(connection, "orphan", older_than_seconds=0.0)
    finally:
        real_server.client.config_set("maxmemory-policy", "noeviction")
    assert (found.dead, found.silent_seconds) == (False, None)
    assert found.why.endswith("but nobody knows for how long")


def test_a_run_that_cannot_be_read_is_kept_while_its_keys_are_used(
    real_server: RealServer, connection: Connection
) -> None:
    plant(real_server.url, "odd")
    real_server.client.hset(Keys("odd").meta, "lease_seconds", "soon")
    assert leftover(connection, "odd").state == "unreadable"
    assert not leftover(connection, "odd").dead
    unused(real_server.client, "odd", 2 * HOUR)
    assert leftover(connection, "odd").dead
    assert prune_now(connection, "odd").kept == ""
    assert all_of(real_server.client) == {}


# Who comes in between


def meanwhile(monkeypatch: pytest.MonkeyPatch, before: Script, what: Callable[[], None]) -> None:
    """Have something happen right before a script runs."""
    run = Connection.run

    def watched(self: Connection, script: Script, *arguments: Any, **options: Any) -> Any:
        if script is before:
            monkeypatch.setattr(Connection, "run", run)
            what()
        return run(self, script, *arguments, **options)

    monkeypatch.setattr(Connection, "run", watched)


def test_a_learner_that_opens_the_run_just_before_keeps_it(
    real_server: RealServer, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(real_server.url, "back")
    age(real_server.client, "back", 2 * HOUR)
    before = all_of(real_server.client, "back").keys()
    opened: list[WorkerCommunicator] = []
    meanwhile(
        monkeypatch,
        PRUNE_RUN,
        lambda: opened.append(WorkerCommunicator(1, redis_url=real_server.url, run="back")),
    )
    try:
        assert prune_now(connection, "back") == Pruned("back", 0, OPENED)
        assert all_of(real_server.client, "back").keys() >= before
        assert [worker for worker, _ in opened[0].collect_experiences(timeout=5.0)] == [0]
    finally:
        opened[0].cleanup()


def test_a_worker_that_joins_just_before_keeps_the_run(
    real_server: RealServer, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(real_server.url, "back")
    age(real_server.client, "back", 2 * HOUR)
    before = all_of(real_server.client, "back").keys()
    joined: list[WorkerClient] = []
    meanwhile(monkeypatch, PRUNE_RUN, lambda: joined.append(WorkerClient(real_server.url, "back")))
    try:
        assert prune_now(connection, "back").kept == OPENED
        assert all_of(real_server.client, "back").keys() >= before
    finally:
        joined[0].close()


def test_a_run_that_begins_while_the_old_one_is_deleted_loses_nothing(
    real_server: RealServer, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(real_server.url, "anew")
    age(real_server.client, "anew", 2 * HOUR)
    opened: list[Any] = []

    def begin() -> None:
        opened.append(WorkerCommunicator(1, redis_url=real_server.url, run="anew"))
        opened.append(WorkerClient(real_server.url, "anew"))
        opened[0].send_model_weights({"w": np.ones(10, np.float32)})
        opened[1].send_experiences({"new": np.ones(3, np.float32)})

    meanwhile(monkeypatch, PRUNE_QUEUE, begin)
    found = prune_now(connection, "anew")
    try:
        assert found.kept == OPENED
        learner, worker = opened
        wait_until(
            "the new batch is there",
            lambda: any("new" in batch for _, batch in learner.collect_experiences(timeout=0.1)),
        )
        weights: dict[str, Any] = {}
        wait_until("the new version too", lambda: worker.poll(weights) or worker.version == 1)
        assert weights["w"].sum() == 10
    finally:
        opened[1].close()
        opened[0].cleanup()


def test_what_was_interrupted_is_finished_at_once(
    real_server: RealServer, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(real_server.url, "half")
    age(real_server.client, "half", 2 * HOUR)

    def interrupt() -> None:
        raise KeyboardInterrupt

    meanwhile(monkeypatch, PRUNE_QUEUE, interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune_now(connection, "half")
    assert all_of(real_server.client, "half")
    found = leftover(connection, "half")
    assert (found.state, found.dead, found.why) == ("pruned", True, "its deletion was interrupted")
    assert prune_now(connection, "half").kept == ""
    assert all_of(real_server.client) == {}
