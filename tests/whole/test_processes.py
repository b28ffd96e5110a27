"""Real processes on a real server: nothing is lost or delivered twice, and every outcome is recorded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import RealServer, wait_until

from rlbroker import WorkerCommunicator

WORKER = Path(__file__).parents[1] / "support" / "process_worker.py"
LEARNER = Path(__file__).parents[1] / "support" / "process_learner.py"


class Process:
    """A child that logs JSON lines to a file."""

    def __init__(self, script: Path, log: Path, server: RealServer, run: str, *arguments: object) -> None:
        self.log = log
        environment = {**os.environ, "RLBROKER_REDIS_URL": server.url}
        command = [sys.executable, str(script), run, str(log), *map(str, arguments)]
        self.popen = subprocess.Popen(command, env=environment)

    def lines(self) -> list[dict[str, int]]:
        text = self.log.read_text() if self.log.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()


@pytest.fixture
def children() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(children: ExitStack, script: Path, log: Path, *arguments: object) -> Process:
    process = Process(script, log, *arguments)  # type: ignore[arg-type]
    children.callback(process.kill)
    return process


@pytest.mark.timeout(300)
def test_500_versions_and_20_000_batches_reach_everybody_once_and_in_order(
    real_server: RealServer, run: str, tmp_path: Path, children: ExitStack
) -> None:
    """Each batch is delivered once and in order. Each version has one outcome at each worker. The sums add up."""
    versions, batches, ids = 500, 5_000, range(4)
    workers = [
        start(children, WORKER, tmp_path / f"{one}.log", real_server, run, one, batches, "stays")
        for one in ids
    ]
    got: dict[int, list[tuple[int, int]]] = {one: [] for one in ids}
    with WorkerCommunicator(4, max_queue_size=200, redis_url=real_server.url, run=run) as comm:
        wait_until("all workers have joined", lambda: len(comm.workers()) == 4, timeout_seconds=60)
        weights = {"w": np.random.default_rng(1).random(1000, np.float32)}
        while comm.version < versions or sum(map(len, got.values())) < batches * 4:
            if comm.version < versions:
                comm.send_model_weights(weights)
            for worker_id, batch in comm.collect_experiences(timeout=0.01):
                assert batch["number"] == batch.sequence
                got[worker_id].append((batch["number"], batch.version))
        comm.send_control_command("stop")
        for worker in workers:
            assert worker.popen.wait(60) == 0
        wait_until(
            "every version is settled",
            lambda: all(account.settled >= versions for account in comm._ledger.read_outcomes(ids).values()),
        )
        missed = comm.missed_updates()
        comm.collect_experiences()
        counts = comm.get_queue_info()["counts"]

    for one in ids:
        assert [number for number, _ in got[one]] == list(range(1, batches + 1))
        tags = [version for _, version in got[one]]
        assert tags == sorted(tags)
        assert counts[one].produced == counts[one].delivered == batches
        applied = [line["applied"] for line in workers[one].lines() if "applied" in line]
        passed = [v for record in missed[one].records for v in range(record.first, record.last + 1)]
        assert sorted(applied + passed) == list(range(1, versions + 1))


def test_killed_learners_lose_and_repeat_no_batch(
    real_server: RealServer, run: str, tmp_path: Path, children: ExitStack
) -> None:
    """A learner inserts batches, then acknowledges them. It is killed in between, three times."""
    worker = start(children, WORKER, tmp_path / "worker.log", real_server, run, 0, 300)
    inserted: list[int] = []
    for attempt in range(4):
        learner = start(children, LEARNER, tmp_path / f"learner{attempt}.log", real_server, run, attempt == 3)
        if attempt < 3:
            wait_until("the learner has read batches", partial(_has_read, learner), timeout_seconds=30)
            learner.kill()
        else:
            assert worker.popen.wait(60) == 0
            assert learner.popen.wait(60) == 0
        inserted += [line["inserted"] for line in learner.lines() if "inserted" in line]
    assert inserted == list(range(1, 301))


def test_the_successor_of_a_killed_worker_continues_under_a_new_incarnation(
    real_server: RealServer, run: str, tmp_path: Path, children: ExitStack
) -> None:
    got: list[tuple[int, int]] = []
    with WorkerCommunicator(1, redis_url=real_server.url, run=run) as comm:
        comm.send_model_weights({})
        first = start(children, WORKER, tmp_path / "first.log", real_server, run, 0, 1_000_000)
        wait_until("the worker sends", lambda: _collect(comm, got), timeout_seconds=30)
        first.kill()
        second = start(children, WORKER, tmp_path / "second.log", real_server, run, 0, 50)
        wait_until(
            "its successor has sent all batches",
            lambda: _collect(comm, got)[-1][1] == 50 and len(_incarnations(got)) == 2,
            timeout_seconds=30,
        )
        comm.send_control_command("stop")
        assert second.popen.wait(30) == 0
    incarnations = [incarnation for incarnation, _ in got]
    assert incarnations == sorted(incarnations)
    for one in set(incarnations):
        numbers = [sequence for incarnation, sequence in got if incarnation == one]
        assert numbers == list(range(1, len(numbers) + 1))
    sent = [line["sent"] for line in first.lines() if "sent" in line]
    # Every batch that the killed process knew to be stored was delivered. It may not have known that of its last one.
    assert 0 <= incarnations.count(incarnations[0]) - len(sent) <= 1


def test_a_suspended_worker_is_fenced_when_it_resumes(
    real_server: RealServer, run: str, tmp_path: Path, children: ExitStack
) -> None:
    got: list[tuple[int, int]] = []
    with WorkerCommunicator(1, redis_url=real_server.url, run=run) as comm:
        comm.send_model_weights({})
        old = start(children, WORKER, tmp_path / "old.log", real_server, run, 0, 1_000_000)
        wait_until("the worker sends", lambda: _collect(comm, got), timeout_seconds=30)
        old.popen.send_signal(signal.SIGSTOP)
        new = start(children, WORKER, tmp_path / "new.log", real_server, run, 0, 1_000_000)
        wait_until(
            "its successor sends", lambda: len(_incarnations(_collect(comm, got))) == 2, timeout_seconds=30
        )
        old.popen.send_signal(signal.SIGCONT)
        assert old.popen.wait(30) != 0
        assert any("fenced" in line for line in old.lines())
        comm.send_control_command("stop")
        assert new.popen.wait(30) == 0
        while comm.collect_experiences(timeout=0.2):
            pass
        assert [info.incarnation for info in comm.workers()] == []
    incarnations = [incarnation for incarnation, _ in got]
    assert incarnations == sorted(incarnations)


def _has_read(learner: Process) -> bool:
    return any("pending" in line for line in learner.lines())


def _incarnations(got: list[tuple[int, int]]) -> set[int]:
    return {incarnation for incarnation, _ in got}


def _collect(comm: WorkerCommunicator, got: list[tuple[int, int]]) -> list[tuple[int, int]]:
    got += [(batch.incarnation, batch.sequence) for _, batch in comm.collect_experiences(timeout=0.2)]
    return got
