"""deploy/slurm on this machine: the scripts as Slurm runs them, with a Slurm that only knows what they need of it."""

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


class Slurm:
    """Starts jobs as `sbatch` does; everything that a job started can be found again."""

    def __init__(self, directory: Path, tasks: int) -> None:
        self.directory, self.home = directory, directory / "slurm"
        self.folder = directory / f"rlbroker-{LEARNER}"
        (self.home / "jobs").mkdir(parents=True)
        programs = directory / "programs"
        programs.mkdir()
        for name in ("srun", "squeue", "scontrol"):
            fake = programs / name
            fake.write_text(
                f"#!{sys.executable}\n"
                + (Path(__file__).parents[1] / "support" / "fake_slurm.py").read_text()
            )
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

    def begin(
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

    def learner(self, *arguments: str, node: str = "127.0.0.1") -> subprocess.Popen[bytes]:
        return self.begin("learner.sbatch", LEARNER, "CartPole-v1", *arguments, node=node)

    def workers(self) -> subprocess.Popen[bytes]:
        return self.begin("workers.sbatch", WORKERS, LEARNER, "CartPole-v1", "--envs", "2")

    def said(self, job: str) -> str:
        return (self.directory / f"{job}.log").read_text()

    def workers_said(self, what: str) -> int:
        """Give how many workers have said this; of those that did it several times, each time counts."""
        return sum(path.read_text().count(what) for path in self.folder.glob("worker-0-*.log"))

    def requeued(self) -> list[str]:
        path = self.home / "requeued"
        return path.read_text().split() if path.exists() else []

    def left(self) -> list[int]:
        """Give the processes that were started by a job and run still."""
        mark = f"FAKE_SLURM={self.home}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def tasks(full: bool) -> int:
    """How many workers a job has; each of them takes seconds to import PyTorch."""
    return 3 if full else 2


@pytest.fixture
def slurm(tmp_path: Path, tasks: int) -> Iterator[Slurm]:
    slurm = Slurm(tmp_path, tasks)
    yield slurm
    slurm.end()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_are_sound(script: str) -> None:
    path = FOLDER / script
    subprocess.run(["bash", "-n", path], check=True)
    assert "set -euo pipefail" in path.read_text()
    asked = set(re.findall(r"^#SBATCH (--[\w-]+)", path.read_text(), re.MULTILINE))
    assert {"--requeue", "--signal", "--open-mode", "--time", "--output"} <= asked
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-S", "warning", "-s", "bash", path], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_without_arguments_says_what_it_needs(slurm: Slurm, script: str) -> None:
    assert slurm.begin(script, LEARNER).wait(timeout=30) == 2
    assert "usage: sbatch" in slurm.said(LEARNER)


def test_a_learner_whose_time_is_up_comes_back_and_nothing_is_left_at_the_end(
    slurm: Slurm, tasks: int
) -> None:
    """Its workers wait for it, go to its new address, and it goes on from its checkpoint until it has solved it."""
    workers = slurm.workers()  # the first to come, and they wait
    learner = slurm.learner("--target", "1000")
    wait_until("there is an address", lambda: (slurm.folder / "url").exists(), timeout_seconds=START_SECONDS)
    first = (slurm.folder / "url").read_text()
    assert stat.S_IMODE((slurm.folder / "url").stat().st_mode) == 0o600
    assert stat.S_IMODE(slurm.folder.stat().st_mode) == 0o700
    assert re.fullmatch(r"redis://rlbroker:\S+@127\.0\.0\.1:2\d{4}/0\n", first)
    wait_until(
        "it trains", lambda: re.search(r"[1-9]\d* steps ", slurm.said(LEARNER)), timeout_seconds=START_SECONDS
    )

    learner.send_signal(signal.SIGUSR1)
    assert learner.wait(timeout=60) == 75
    assert slurm.requeued() == [LEARNER]
    assert not (slurm.folder / "url").exists()
    assert (slurm.folder / "checkpoint.pt").exists()
    assert workers.poll() is None

    learner = slurm.learner("--target", "25", node="127.0.0.2")  # at an address that is not the old one
    wait_until("it is back", lambda: (slurm.folder / "url").exists(), timeout_seconds=START_SECONDS)
    assert (slurm.folder / "url").read_text() != first
    assert learner.wait(timeout=START_SECONDS) == 0
    assert "Solved CartPole-v1" in slurm.said(LEARNER)
    assert workers.wait(timeout=60) == 0
    assert slurm.workers_said("stopped by the learner") == tasks
    assert slurm.left() == []
    assert sorted(path.name for path in slurm.folder.iterdir()) == [
        "checkpoint.pt",
        "over",
        *(f"worker-0-{task}.log" for task in range(tasks)),
    ]


def test_workers_whose_time_is_up_drain_and_are_queued_again(
    slurm: Slurm, real_server: RealServer, tasks: int
) -> None:
    slurm.folder.mkdir()
    (slurm.folder / "url").write_text(real_server.url)  # as the learner's job does
    (slurm.home / "jobs" / LEARNER).touch()
    workers = slurm.workers()
    wait_until(
        "they have joined",
        lambda: slurm.workers_said("of run slurm-4711") == tasks,
        timeout_seconds=START_SECONDS,
    )
    workers.send_signal(signal.SIGUSR1)
    assert workers.wait(timeout=60) == 0
    assert slurm.workers_said("told to go: sent what it had begun") == tasks
    assert slurm.requeued() == [WORKERS]
    assert slurm.left() == []


def test_other_programs_take_the_place_of_learner_and_worker(slurm: Slurm, tasks: int) -> None:
    worker = slurm.directory / "play"
    worker.write_text('#!/bin/sh\necho "plays $RLBROKER_REDIS_URL" "$@"\n')
    learner = slurm.directory / "train"
    learner.write_text(
        '#!/bin/sh\necho "trains $RLBROKER_REDIS_URL" "$@"\nuntil [ -e go ]; do sleep 0.1; done\n'
    )
    for program in (worker, learner):
        program.chmod(0o755)
    job = slurm.begin("learner.sbatch", LEARNER, "MyGame", "--more", LEARNER=f"{learner} --well")
    workers = slurm.begin("workers.sbatch", WORKERS, LEARNER, "MyGame", "--more", WORKER=f"{worker} --well")
    wait_until(
        "they play", lambda: slurm.workers_said("plays redis://") >= tasks, timeout_seconds=START_SECONDS
    )
    assert slurm.workers_said("--well --run slurm-4711 --env MyGame --timeout 600 --more") >= tasks
    (slurm.directory / "go").touch()
    assert job.wait(timeout=60) == 0
    said = rf"--well --run slurm-4711 --env MyGame --checkpoint {slurm.folder}/checkpoint.pt --minutes 100000 --more"
    assert re.search(f"trains redis://.* {said}", slurm.said(LEARNER))
    assert workers.wait(timeout=60) == 0
    assert (slurm.folder / "over").read_text() == "0\n"


def test_workers_end_when_there_is_no_learner_to_wait_for(slurm: Slurm) -> None:
    workers = slurm.workers()
    assert workers.wait(timeout=30) == 0
    assert slurm.requeued() == []


def test_a_learner_that_is_cancelled_is_not_queued_again(slurm: Slurm) -> None:
    learner = slurm.learner()
    wait_until("there is an address", lambda: (slurm.folder / "url").exists(), timeout_seconds=START_SECONDS)
    learner.terminate()
    assert learner.wait(timeout=60) > 1
    assert slurm.requeued() == []
    assert list(slurm.folder.iterdir()) == []
    assert slurm.left() == []
