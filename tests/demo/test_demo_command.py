"""Tests of the commands `rlbroker demo`, `learner` and `worker`: processes, exit codes, files."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from unittest import mock

import pytest
from conftest import RealServer

from rlbroker import QueueFull, WorkerCommunicator
from rlbroker.demo.rollout_worker import WorkerSettings, work
from rlbroker.ops.cli.demo_commands import read_learner_state

MAIN = [sys.executable, "-c", "from rlbroker.ops.cli import main; main()"]


class Shell:
    """Runs commands, and finds all their processes by a mark in the environment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._mark = f"RLBROKER_TEST={uuid.uuid4().hex}"
        temporary = directory / "temporary"
        temporary.mkdir()
        name, _, value = self._mark.partition("=")
        hidden = ("RLBROKER_REDIS_URL", "REDIS_URL")
        self.environment = {key: text for key, text in os.environ.items() if key not in hidden}
        self.environment |= {name: value, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*MAIN, *arguments],
            cwd=self.directory,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # As in a terminal: Ctrl-C reaches the whole group.
            process_group=0,
        )

    def processes(self, containing: str = "") -> list[int]:
        """Return the pids of the commands and of their children, except the guards."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if self._mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    command_line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    # A zombie has no command line: it does not run any more.
                    if command_line and containing in command_line and "child_guard.py" not in command_line:
                        found.append(int(entry.name))
            except (OSError, ValueError):
                continue
        return found

    def files(self) -> list[str]:
        return sorted(
            str(path.relative_to(self.directory)) for path in self.directory.rglob("*") if not path.is_dir()
        )


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    remaining = shell.processes()
    for pid in remaining:
        os.kill(pid, signal.SIGKILL)
    assert not remaining, "processes were left behind"


def read_until(output: IO[str] | None, pattern: str) -> str:
    """Read lines until one matches; fail at the end of the output."""
    assert output is not None
    lines = []
    for line in output:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError(f"{pattern!r} was not found in:\n{''.join(lines)}")


def test_the_demo_solves_cartpole_although_a_worker_is_killed(shell: Shell) -> None:
    demo = shell.start("demo", "--seed", "1", "--output", "picture.png")
    output = read_until(demo.stdout, r"[1-9]\d* steps ")
    (worker,) = [pid for pid in shell.processes("--worker-id 1") if pid != demo.pid]
    os.kill(worker, signal.SIGKILL)
    output += demo.communicate(timeout=100)[0]
    assert demo.returncode == 0, output
    assert "Solved CartPole-v1" in output
    assert "worker-1 was restarted 1 time" in output
    found = re.search(r"([\d,]+) produced = ([\d,]+) delivered \+ (.*)", output)
    assert found is not None
    produced, delivered = (int(number.replace(",", "")) for number in found.groups()[:2])
    lost = sum(int(number.replace(",", "")) for number in re.findall(r"([\d,]+) \w", found[3]))
    assert produced == delivered + lost
    assert delivered > 50
    assert "did not leave" not in output
    assert shell.files() == ["picture.png"]


def test_a_learner_reports_that_it_did_not_solve_in_time(shell: Shell, real_server: RealServer) -> None:
    learner = shell.start("learner", "--minutes", "0.05", RLBROKER_REDIS_URL=real_server.url)
    output = learner.communicate(timeout=60)[0]
    assert learner.returncode == 1, output
    assert "CartPole-v1 is not solved after" in output


@pytest.mark.parametrize("when", [r"rlbroker worker", r"[1-9]\d* steps "], ids=["starting", "training"])
def test_ctrl_c_leaves_no_process_and_no_file(shell: Shell, when: str) -> None:
    demo = shell.start("demo", "--output", "picture.png")
    read_until(demo.stdout, when)
    started = time.monotonic()
    os.killpg(demo.pid, signal.SIGINT)
    output = demo.communicate(timeout=30)[0]
    assert time.monotonic() - started < 5.0
    assert demo.returncode == 130, output
    assert "Interrupted" in output
    assert shell.processes() == []
    assert shell.files() == []


def test_a_kept_server_can_be_inspected(shell: Shell) -> None:
    demo = shell.start("demo", "--env", "MountainCar-v0", "--minutes", "0.1", "--keep-server")
    output = read_until(demo.stdout, "The server keeps running")
    url = re.search(r"export RLBROKER_REDIS_URL='?(unix://rlbroker:[^*'\n]+)", output)
    assert url is not None
    run = re.search(r"rlbroker status --run (\S+)", output)
    assert run is not None
    status = shell.start("status", "--run", run[1], RLBROKER_REDIS_URL=url[1]).communicate(timeout=20)[0]
    assert run[1] in status
    os.killpg(demo.pid, signal.SIGINT)
    demo.communicate(timeout=10)
    assert demo.returncode == 1
    assert "demo.png" in shell.files()


def test_learner_and_worker_work_without_the_demo_command(shell: Shell, real_server: RealServer) -> None:
    server_url: dict[str, Any] = {"RLBROKER_REDIS_URL": real_server.url}
    learner = shell.start("learner", "--run", "hand", "--workers", "1", "--target", "25", **server_url)
    worker = shell.start("worker", "--run", "hand", "--envs", "2", **server_url)
    output = learner.communicate(timeout=60)[0]
    assert learner.returncode == 0, output
    assert "Solved CartPole-v1" in output
    assert "stopped by the learner" in worker.communicate(timeout=20)[0]
    assert worker.returncode == 0


def test_an_unknown_environment_is_reported_in_one_line(shell: Shell) -> None:
    demo = shell.start("demo", "--env", "NoSuchGame-v7")
    output = demo.communicate(timeout=60)[0]
    assert demo.returncode == 2
    assert "NoSuchGame-v7" in output.splitlines()[-1]
    assert "Traceback" not in output


def test_the_error_for_missing_packages_says_how_to_install_them(shell: Shell) -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "from rlbroker.ops.cli import main; sys.argv = ['rlbroker', 'worker']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=shell.environment)
    assert done.returncode == 2
    assert done.stderr == "rlbroker: the demo needs torch: run `pip install 'rlbroker[demo]'`\n"


def test_sigterm_drains_a_worker(shell: Shell, real_server: RealServer) -> None:
    worker = shell.start("worker", "--run", "term", RLBROKER_REDIS_URL=real_server.url)
    read_until(worker.stdout, "worker 0 of run term")
    assert real_server.client.exists("rlb:{term}:hb:0")
    worker.terminate()
    output = worker.communicate(timeout=10)[0]
    assert worker.returncode == 0
    assert output == "drained: sent its last batch and left the run after 0 batches\n"
    assert not real_server.client.exists("rlb:{term}:hb:0")


def test_a_worker_whose_last_batch_finds_no_room_reports_that_its_learner_is_away(
    real_server: RealServer,
) -> None:
    WorkerCommunicator(1, run="alone", redis_url=real_server.url).cleanup(stop_workers=False)
    real_server.client.hset("rlb:{alone}:meta", "learner_seen", "1.0")
    full = QueueFull("its queue is full")
    settings = WorkerSettings("alone", num_envs=1, url=real_server.url)
    with (
        mock.patch("rlbroker.demo.rollout_worker.run_worker", side_effect=full),
        pytest.raises(QueueFull, match=r"last batch is lost.*the learner of 'alone' is away"),
    ):
        work(settings, lambda: read_learner_state(real_server.url, "alone"))


def test_a_worker_that_joins_after_the_end_says_so_and_ends(
    real_server: RealServer, capsys: pytest.CaptureFixture[str]
) -> None:
    WorkerCommunicator(1, run="over", redis_url=real_server.url).cleanup()
    work(WorkerSettings("over", num_envs=1, url=real_server.url), lambda: "ended")
    assert "has ended; start its learner before its workers" in capsys.readouterr().out


def test_a_moved_learner_continues_after_its_restart_and_its_worker_waits(
    shell: Shell, real_server: RealServer
) -> None:
    server_url: dict[str, Any] = {"RLBROKER_REDIS_URL": real_server.url}
    command = ("learner", "--run", "moved", "--workers", "1", "--checkpoint", "state.pt", "--target", "25")
    worker = shell.start("worker", "--run", "moved", "--envs", "2", **server_url)
    first = shell.start(*command, "--target", "1000", **server_url)
    read_until(first.stdout, r"[1-9]\d* steps ")
    first.send_signal(signal.SIGUSR1)
    output = first.communicate(timeout=20)[0]
    assert first.returncode == 75, output
    assert "Asked to leave" in output
    assert "no --checkpoint" not in output
    assert shell.files() == ["state.pt"]
    assert real_server.client.hget("rlb:{moved}:meta", "ended") is None
    assert worker.poll() is None
    output = shell.start(*command, **server_url).communicate(timeout=60)[0]
    assert "the run 'moved' continues" in output
    assert "Solved CartPole-v1" in output
    assert "stopped by the learner" in worker.communicate(timeout=20)[0]
    assert worker.returncode == 0
