"""`rlbroker check --self`: whether the learner or a worker on this host is alive, for health checks of containers."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from conftest import RealServer, wait_until
from executable import environment
from typer.testing import CliRunner

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.ops.cli.app import app

#: After this silence a worker is away.
LEASE_SECONDS = 0.5

OnHost = Callable[[str], None]


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> OnHost:
    """Return a function that sets the host name of this process."""
    return lambda name: monkeypatch.setattr(socket, "gethostname", lambda: name)


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def url(real_server: RealServer, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("RLBROKER_RUN", "RLBROKER_REDIS_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    return str(real_server.url)


@pytest.fixture
def learner(url: str, run: str, on_host: OnHost, opened: ExitStack) -> WorkerCommunicator:
    on_host("learner-0")
    return opened.enter_context(WorkerCommunicator(2, redis_url=url, run=run, lease_seconds=LEASE_SECONDS))


@pytest.fixture
def worker(
    url: str, run: str, learner: WorkerCommunicator, on_host: OnHost, opened: ExitStack
) -> WorkerClient:
    on_host("box-7")
    worker = opened.enter_context(WorkerClient(url, run))
    wait_until(
        "its heartbeat has the host name", lambda: [info.host for info in learner.workers()] == ["box-7"]
    )
    return worker


def check(*arguments: str, **variables: str | None) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["check", "--self", *arguments], env=variables)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done.exit_code, done.output


def test_a_learner_or_worker_on_this_host_is_ok(
    url: str, run: str, learner: WorkerCommunicator, worker: WorkerClient, on_host: OnHost
) -> None:
    seen = r"\(last seen \d\.\d s ago\)\n"
    for host, name in (("box-7", "worker 0"), ("learner-0", "learner")):
        on_host(host)
        code, output = check("--url", url, "--run", run)
        assert code == 0, output
        assert re.fullmatch(f"OK: {run} on {host}: {name} alive {seen}", output)


def test_a_host_without_a_process_of_the_run_is_critical(
    url: str, run: str, worker: WorkerClient, on_host: OnHost
) -> None:
    on_host("elsewhere")
    assert check("--url", url, "--run", run) == (
        2,
        f"CRITICAL: {run} on elsewhere: no learner or worker runs here\n",
    )
    assert check("--url", url, "--run", "tetris")[0] == 2


def test_a_silent_worker_is_critical_until_another_one_on_its_host_is_alive(
    url: str, run: str, learner: WorkerCommunicator, on_host: OnHost, opened: ExitStack
) -> None:
    program = (
        "import socket, time; socket.gethostname = lambda: 'box-8'\n"
        f"from rlbroker import WorkerClient; worker = WorkerClient({url!r}, {run!r}, worker_id=5)\n"
        "time.sleep(60)"
    )
    on_host("box-8")
    killed = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_until("it is alive", lambda: check("--url", url, "--run", run)[0] == 0)
    finally:
        killed.kill()
        killed.wait()
    code, output = wait_until(
        "it is away", lambda: found if (found := check("--url", url, "--run", run))[0] else None
    )
    assert code == 2
    assert re.fullmatch(rf"CRITICAL: {run} on box-8: worker 5 away \(last seen \d\.\d s ago\)\n", output)

    opened.enter_context(WorkerClient(url, run))  # as after a restart of the container

    def both() -> Any:
        code, output = check("--url", url, "--run", run, "--json")
        found = json.loads(output)
        return (code, found) if len(found["here"]) == 2 else None

    code, found = wait_until("both heartbeats are known", both)
    assert (code, found["state"], found["run"], found["host"]) == (0, "ok", run, "box-8")
    assert [(one["worker_id"], one["state"]) for one in found["here"]] == [(0, "alive"), (5, "away")]


def test_a_learner_that_has_ended_is_ok_as_it_may_still_save_its_checkpoint(
    url: str, run: str, learner: WorkerCommunicator
) -> None:
    learner.cleanup()
    code, output = check("--url", url, "--run", run)
    assert code == 0
    assert output.startswith(f"OK: {run} on learner-0: learner ended ")


def test_an_unreachable_server_is_unknown_and_restarts_no_container(run: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    where = ("--url", f"redis://127.0.0.1:{port}/0", "--run", run)
    code, output = check(*where)
    assert (code, output.count("\n")) == (0, 1)
    assert output.startswith(f"UNKNOWN: cannot reach redis://127.0.0.1:{port}/0: ")
    assert check(*where, "--strict") == (3, output)
    assert json.loads(check(*where, "--json")[1])["state"] == "unknown"


def test_the_run_must_be_named_even_if_there_is_only_one(url: str, run: str, worker: WorkerClient) -> None:
    code, output = check("--url", url)
    assert (code, output) == (
        2,
        "rlbroker: --self needs the name of the run: set RLBROKER_RUN, or use --run\n",
    )


def test_invalid_settings_are_refused_and_named(url: str) -> None:
    assert check("--url", "http://host", "--run", "pong")[0] == 2
    code, output = check("--url", url, RLBROKER_RUN="not a name")
    assert code == 2
    assert output.startswith("rlbroker: RLBROKER_RUN must be 1 to 100 letters")
    assert CliRunner().invoke(app, ["check", "--strict", "--url", url]).output == (
        "rlbroker: --strict needs --self\n"
    )


def test_commands_use_the_run_of_the_environment_unless_one_is_named(
    url: str, run: str, worker: WorkerClient, real_server: RealServer
) -> None:
    with WorkerCommunicator(1, redis_url=url, run="another"):
        variables = {"RLBROKER_RUN": run, "RLBROKER_REDIS_URL": url}
        for command in ("status", "doctor"):
            done = CliRunner().invoke(app, [command, "--json"], env=variables)
            assert json.loads(done.stdout)["run"] == run, done.output
        done = CliRunner().invoke(app, ["status", "--json", "--run", "another"], env=variables)
        assert json.loads(done.stdout)["run"] == "another"


def test_prune_ignores_the_run_of_the_environment(
    url: str, run: str, real_server: RealServer, worker: WorkerClient
) -> None:
    with WorkerCommunicator(1, redis_url=url, run="another"):
        variables = {"RLBROKER_RUN": run, "RLBROKER_REDIS_URL": url}
        done = CliRunner().invoke(app, ["prune", "--dry-run", "--json"], env=variables)
        assert {one["run"] for one in json.loads(done.stdout)["runs"]} == {run, "another"}, done.output


def test_a_health_check_imports_nothing_heavy_and_needs_few_rights(
    url: str, run: str, real_server: RealServer, worker: WorkerClient
) -> None:
    rights = (
        f"%R~{Keys(run).prefix}:*",
        "+ping",
        "+time",
        "+hgetall",
        "+smembers",
        "+hmget",
        "+hget",
        "+client|setinfo",
    )
    real_server.client.execute_command("ACL", "SETUSER", "prober", "on", ">word", "resetkeys", *rights)
    program = (
        "import socket, sys; socket.gethostname = lambda: 'box-7'\n"
        "from rlbroker.ops.cli import main; sys.argv = ['rlbroker', 'check', '--self']\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'numpy', 'blosc2'} & set(sys.modules)))"
    )
    path = real_server.embedded.socket_path
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment(RLBROKER_REDIS_URL=f"unix://prober:word@{path}", RLBROKER_RUN=run),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    finally:
        real_server.client.execute_command("ACL", "DELUSER", "prober")
    assert done.returncode == 0, done.stderr
    first, loaded = done.stdout.splitlines()
    assert first.startswith(f"OK: {run} on box-7: worker 0 alive"), done.stdout
    assert loaded == "[]"
