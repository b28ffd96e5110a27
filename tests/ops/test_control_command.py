"""`rlbroker control`: commands from the command line, and the answers of live workers."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import wait_until
from executable import RunShell, environment

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.local.embedded_server import RedisServer

RUN = "control-command"


def fail(data: Any) -> None:
    raise ValueError(f"no such level: {data['level']}")


class ActiveRun:
    """A run whose workers 0 and 1 poll all the time, and whose worker 2 never polls."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        self.received: list[Any] = []
        self.learner = stack.enter_context(WorkerCommunicator(3, redis_url=url, run=RUN))
        self.workers = [
            stack.enter_context(WorkerClient(redis_url=url, run=RUN, worker_id=number)) for number in range(3)
        ]
        for worker in self.workers:
            worker.on_command("level", self.received.append)
            worker.on_command("fail", fail)
        self._stopped = threading.Event()
        stack.callback(self._end)
        self._threads = [threading.Thread(target=self._work, args=(one,)) for one in self.workers[:2]]
        for thread in self._threads:
            thread.start()

    def _work(self, worker: WorkerClient) -> None:
        while not self._stopped.wait(0.01):
            worker.poll({})

    def _end(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture(scope="module")
def active_run(embedded: RedisServer) -> Iterator[ActiveRun]:
    with ExitStack() as stack:
        yield ActiveRun(embedded.url, stack)
    with redis.Redis.from_url(embedded.url, protocol=2) as client:
        client.flushall()


@pytest.fixture
def shell(embedded: RedisServer, active_run: ActiveRun) -> RunShell:
    return RunShell(embedded.url, RUN)


def test_a_command_is_sent_and_its_answers_are_printed(shell: RunShell, active_run: ActiveRun) -> None:
    done = shell(
        "control", "send", "level", "--data", '{"level": 7}', "--worker", "0", "--worker", "1", "--json"
    )
    assert (done.returncode, done.stderr) == (0, "sent level to 2 workers\n")
    data = json.loads(done.stdout)
    answered = {"state": "done", "detail": ""}
    expected = {"run": RUN, "name": "level", "workers": [0, 1], "outcomes": {"0": answered, "1": answered}}
    assert data == expected | {"id": data["id"], "done": True}
    assert active_run.received == [{"level": 7}, {"level": 7}]


def test_a_terminal_shows_a_progress_bar(shell: RunShell) -> None:
    code, output = shell.on_terminal("control", "send", "reset", "--worker", "1")
    assert code == 0
    assert "0/1" in output or "1/1" in output
    assert output.split()[-2:] == ["1", "done"]


def test_workers_that_fail_or_do_not_answer_are_named(shell: RunShell) -> None:
    done = shell("control", "send", "fail", "--data", '{"level": 9}', "--worker", "0", "--worker", "1")
    assert (done.returncode, done.stderr) == (1, "sent fail to 2 workers\n")
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines()[3:] if line.strip()]
    assert [row[:2] for row in rows] == [["0", "failed"], ["1", "failed"]]
    assert all("no such level: 9" in row[2] for row in rows)
    done = shell("control", "send", "level", "--worker", "2", "--wait", "0.2s")
    assert done.returncode == 1
    assert done.stdout.split()[-2:] == ["2", "waiting"]
    assert "the command stays sent" in done.stderr
    first, second = shell.json("control", "list", "--count", "2")["commands"]
    assert list(first) == ["id", "name", "arguments", "sent", "age_seconds", "states", "outcomes"]
    assert (first["name"], first["arguments"], first["states"]) == ("fail", '{"level": 9}', {"failed": 2})
    assert "no such level: 9" in first["outcomes"]["1"]["detail"]
    assert 0 <= second["age_seconds"] <= first["age_seconds"] < 60
    assert (second["states"], second["outcomes"]) == (
        {"waiting": 1},
        {"2": {"state": "waiting", "detail": ""}},
    )


def test_no_wait_only_sends_the_command(shell: RunShell, active_run: ActiveRun) -> None:
    before = len(active_run.received)
    done = shell("control", "send", "level", "--no-wait", "--expires", "1h")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("to workers 0, 1, 2\n")
    wait_until("workers 0 and 1 obey", lambda: active_run.received[before:] == [None, None])
    wait_until(
        "and acknowledge it", lambda: active_run.learner.get_queue_info()["control_queue_sizes"][:2] == [0, 0]
    )
    table = shell("control", "list").stdout
    last = table.rstrip().splitlines()[-1].split()
    assert last[-9:] == ["null", "2", "done,", "1", "waiting", "no", "answer", "from", "2"]


def test_ctrl_c_ends_the_wait_and_not_the_command(shell: RunShell, active_run: ActiveRun) -> None:
    process = subprocess.Popen(
        shell.command("control", "send", "resume", "--worker", "2"),
        env=environment(RLBROKER_REDIS_URL=shell.url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "sent resume to 1 worker\n"
    process.send_signal(signal.SIGINT)
    output, more = process.communicate(timeout=10)
    assert (process.returncode, output) == (130, "")
    assert "the command stays sent; to see the answers: rlbroker control list" in more
    assert active_run.learner.get_queue_info()["control_queue_sizes"][2] >= 1


def test_an_unknown_worker_is_answered_with_the_members(shell: RunShell) -> None:
    done = shell("control", "send", "level", "--worker", "9")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "rlbroker: worker 9 is not a member of the run 'control-command'; members are: 0, 1, 2\n"
    )


def test_a_stop_without_the_key_of_a_signed_run_is_refused(embedded: RedisServer, tmp_path: Path) -> None:
    run, file = "control-signed", tmp_path / "key"
    file.write_text("k" * 32)
    shell = RunShell(embedded.url, run)
    with (
        WorkerCommunicator(1, redis_url=embedded.url, run=run, signing_key=file),
        WorkerClient(embedded.url, run, signing_key=file) as worker,
    ):
        refused = shell("control", "send", "stop", "--no-wait")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "is signed, so only a stop with its key (id " in refused.stderr
        assert "RLBROKER_SIGNING_KEY_FILE" in refused.stderr
        signed = shell("control", "send", "stop", "--no-wait", RLBROKER_SIGNING_KEY_FILE=str(file))
        assert "the run has ended" in signed.stderr
        wait_until("the worker stops", lambda: not worker.running)


def test_without_a_learner_force_is_needed_and_live_workers_apply_the_command(embedded: RedisServer) -> None:
    run = "control-alone"
    shell = RunShell(embedded.url, run)
    with (
        redis.Redis.from_url(embedded.url, protocol=2) as client,
        WorkerCommunicator(1, redis_url=embedded.url, run=run) as comm,
        WorkerClient(embedded.url, run) as worker,
    ):
        client.hset(Keys(run).meta, "ended", f"1.000 {comm.epoch}")
        refused = shell("control", "send", "stop")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "has ended, so no process records the workers' answers; --force" in refused.stderr
        shell("control", "send", "stop", "--force", "--no-wait")
        wait_until("the worker obeys", lambda: worker.poll({}) or not worker.running)
