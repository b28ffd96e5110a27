"""Tests of the scripts in deploy/slurm, with a fake Slurm that has only the commands that they use."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import RealServer, wait_until
from executable import RLBROKER, environment

FOLDER = Path(__file__).parents[2] / "deploy" / "slurm"
FAKE = Path(__file__).parents[1] / "support" / "fake_slurm.py"
SCRIPTS = ["learner.sbatch", "workers.sbatch"]
LEARNER, WORKERS = "4711", "4712"

#: The limit for what includes the start of processes: on a loaded machine each imports PyTorch for many seconds.
START_SECONDS = 180.0

pytestmark = pytest.mark.timeout(600)


class FakeSlurm:
    """Starts jobs as `sbatch` does, and finds all processes of a job by a mark in the environment."""

    def __init__(self, directory: Path, tasks: int) -> None:
        self.directory, self.home = directory, directory / "slurm"
        self.folder = directory / f"rlbroker-{LEARNER}"
        (self.home / "jobs").mkdir(parents=True)
        programs = directory / "programs"
        programs.mkdir()
        for name in ("srun", "squeue", "scontrol"):
            fake = programs / name
            fake.write_text(f"#!{sys.executable}\n{FAKE.read_text()}")
            fake.chmod(0o755)
        (programs / "rlbroker").symlink_to(RLBROKER)
        self._environment = environment(
            PATH=f"{programs}:{os.environ['PATH']}",
            FAKE_SLURM=str(self.home),
            SLURM_SUBMIT_DIR=str(directory),
            SLURM_NTASKS=str(tasks),
            SLURM_ARRAY_TASK_ID="0",
            TMPDIR=str(self.home),
            LOOK_SECONDS="0.2",
        )
        self._processes: list[subprocess.Popen[bytes]] = []

    def start_job(
        self, script: str, job: str, *arguments: str, node: str = "127.0.0.1", **variables: str
    ) -> subprocess.Popen[bytes]:
        (self.home / "jobs" / job).touch()
        with (self.directory / f"{job}.log").open("ab") as log:
            process = subprocess.Popen(
                ["bash", str(FOLDER / script), *arguments],
                cwd=self.directory,
                env={**self._environment, "SLURM_JOB_ID": job, "BIND": node, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)
        return process

    def start_learner(self, *arguments: str, node: str = "127.0.0.1") -> subprocess.Popen[bytes]:
        return self.start_job("learner.sbatch", LEARNER, "CartPole-v1", *arguments, node=node)

    def start_workers(self) -> subprocess.Popen[bytes]:
        return self.start_job("workers.sbatch", WORKERS, LEARNER, "CartPole-v1", "--envs", "2")

    def log_of(self, job: str) -> str:
        return (self.directory / f"{job}.log").read_text()

    def count_in_worker_logs(self, text: str) -> int:
        """Return how often the text is in the logs of the workers."""
        return sum(path.read_text().count(text) for path in self.folder.glob("worker-0-*.log"))

    def requeued(self) -> list[str]:
        path = self.home / "requeued"
        return path.read_text().split() if path.exists() else []

    def remaining_processes(self) -> list[int]:
        """Return the pids of the processes that a job started and that still run."""
        mark = f"FAKE_SLURM={self.home}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def kill_all(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for pid in self.remaining_processes():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def tasks(full: bool) -> int:
    """The number of workers of a job. Each takes seconds to import PyTorch."""
    return 3 if full else 2


@pytest.fixture
def slurm(tmp_path: Path, tasks: int) -> Iterator[FakeSlurm]:
    slurm = FakeSlurm(tmp_path, tasks)
    yield slurm
    slurm.kill_all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_are_valid(script: str) -> None:
    path = FOLDER / script
    subprocess.run(["bash", "-n", path], check=True)
    assert "set -euo pipefail" in path.read_text()
    options = set(re.findall(r"^#SBATCH (--[\w-]+)", path.read_text(), re.MULTILINE))
    assert {"--requeue", "--signal", "--open-mode", "--time", "--output"} <= options
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-S", "warning", "-s", "bash", path], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_without_arguments_prints_its_usage(slurm: FakeSlurm, script: str) -> None:
    assert slurm.start_job(script, LEARNER).wait(timeout=30) == 2
    assert "usage: sbatch" in slurm.log_of(LEARNER)


def test_a_learner_at_its_time_limit_is_requeued_and_finishes_the_run(slurm: FakeSlurm, tasks: int) -> None:
    """It continues from its checkpoint at a new address. Its workers wait for it, and no process is left at the end."""
    workers = slurm.start_workers()  # they start before the learner, and wait
    learner = slurm.start_learner("--target", "1000")
    wait_until(
        "the learner has an address", lambda: (slurm.folder / "url").exists(), timeout_seconds=START_SECONDS
    )
    first = (slurm.folder / "url").read_text()
    assert stat.S_IMODE((slurm.folder / "url").stat().st_mode) == 0o600
    assert stat.S_IMODE(slurm.folder.stat().st_mode) == 0o700
    assert re.fullmatch(r"redis://rlbroker:\S+@127\.0\.0\.1:2\d{4}/0\n", first)
    wait_until(
        "the learner trains",
        lambda: re.search(r"[1-9]\d* steps ", slurm.log_of(LEARNER)),
        timeout_seconds=START_SECONDS,
    )

    learner.send_signal(signal.SIGUSR1)
    assert learner.wait(timeout=60) == 75
    assert slurm.requeued() == [LEARNER]
    assert not (slurm.folder / "url").exists()
    assert (slurm.folder / "checkpoint.pt").exists()
    assert workers.poll() is None

    learner = slurm.start_learner("--target", "25", node="127.0.0.2")  # at another address than before
    wait_until("the learner is back", lambda: (slurm.folder / "url").exists(), timeout_seconds=START_SECONDS)
    assert (slurm.folder / "url").read_text() != first
    assert learner.wait(timeout=START_SECONDS) == 0
    assert "Solved CartPole-v1" in slurm.log_of(LEARNER)
    assert workers.wait(timeout=60) == 0
    assert slurm.count_in_worker_logs("stopped by the learner") == tasks
    assert slurm.remaining_processes() == []
    assert sorted(path.name for path in slurm.folder.iterdir()) == [
        "checkpoint.pt",
        "over",
        *(f"worker-0-{task}.log" for task in range(tasks)),
    ]


def test_workers_at_their_time_limit_drain_and_are_requeued(
    slurm: FakeSlurm, real_server: RealServer, tasks: int
) -> None:
    slurm.folder.mkdir()
    (slurm.folder / "url").write_text(real_server.url)  # as the learner's job writes it
    (slurm.home / "jobs" / LEARNER).touch()
    workers = slurm.start_workers()
    wait_until(
        "the workers have joined",
        lambda: slurm.count_in_worker_logs("of run slurm-4711") == tasks,
        timeout_seconds=START_SECONDS,
    )
    workers.send_signal(signal.SIGUSR1)
    assert workers.wait(timeout=60) == 0
    assert slurm.count_in_worker_logs("drained: sent its last batch") == tasks
    assert slurm.requeued() == [WORKERS]
    assert slurm.remaining_processes() == []


def test_learner_and_worker_can_be_other_programs(slurm: FakeSlurm, tasks: int) -> None:
    worker = slurm.directory / "play"
    worker.write_text('#!/bin/sh\necho "plays $RLBROKER_REDIS_URL" "$@"\n')
    learner = slurm.directory / "train"
    learner.write_text(
        '#!/bin/sh\necho "trains $RLBROKER_REDIS_URL" "$@"\nuntil [ -e go ]; do sleep 0.1; done\n'
    )
    for program in (worker, learner):
        program.chmod(0o755)
    job = slurm.start_job("learner.sbatch", LEARNER, "MyGame", "--more", LEARNER=f"{learner} --well")
    workers = slurm.start_job(
        "workers.sbatch", WORKERS, LEARNER, "MyGame", "--more", WORKER=f"{worker} --well"
    )
    wait_until(
        "the workers play",
        lambda: slurm.count_in_worker_logs("plays redis://") >= tasks,
        timeout_seconds=START_SECONDS,
    )
    assert slurm.count_in_worker_logs("--well --run slurm-4711 --env MyGame --timeout 600 --more") >= tasks
    (slurm.directory / "go").touch()
    assert job.wait(timeout=60) == 0
    options = rf"--well --run slurm-4711 --env MyGame --checkpoint {slurm.folder}/checkpoint.pt --minutes 100000 --more"
    assert re.search(f"trains redis://.* {options}", slurm.log_of(LEARNER))
    assert workers.wait(timeout=60) == 0
    assert (slurm.folder / "over").read_text() == "0\n"


def test_workers_end_without_a_learner_job(slurm: FakeSlurm) -> None:
    workers = slurm.start_workers()
    assert workers.wait(timeout=60) == 0
    assert slurm.requeued() == []


def test_a_cancelled_learner_is_not_requeued(slurm: FakeSlurm) -> None:
    learner = slurm.start_learner()
    wait_until(
        "the learner has an address", lambda: (slurm.folder / "url").exists(), timeout_seconds=START_SECONDS
    )
    learner.terminate()
    assert learner.wait(timeout=60) > 1
    assert slurm.requeued() == []
    assert list(slurm.folder.iterdir()) == []
    assert slurm.remaining_processes() == []
