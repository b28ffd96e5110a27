"""The demo's child processes, with real processes and real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from conftest import wait_until
from processes import is_alive, parent_of

from rlbroker.demo import processes
from rlbroker.demo.processes import DemoProcess, wait_for

SLEEP = "exec sleep 60"


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "RESTART_SECONDS", 0.01)


class Shell(DemoProcess):
    """A shell script, with the lines of its output so far."""

    def __init__(self, script: str, max_restarts: int = 0) -> None:
        super().__init__("a", ["/bin/sh", "-c", script], "redis://host", max_restarts=max_restarts)
        self.lines: list[str] = []

    def poll(self) -> list[str]:
        found = super().poll()
        self.lines += found
        return found

    def running_pid(self) -> int:
        """Return the pid, once the script runs and has written a line."""
        wait_until("the script has begun", lambda: bool((self.poll() or self.lines) and self.pid))
        assert self.pid is not None
        return self.pid


@pytest.fixture
def started() -> Iterator[list[Shell]]:
    """Processes to be stopped at the end of the test."""
    found: list[Shell] = []
    yield found
    for process in found:
        process.kill()
    assert wait_for(found, 15.0)


def test_a_process_that_succeeds_is_not_restarted() -> None:
    process = Shell("echo $RLBROKER_REDIS_URL; printf end", max_restarts=5)
    assert wait_for([process], 15.0)
    assert (process.lines, process.restarts, process.pid) == (["redis://host", "end"], 0, None)


def test_a_failed_process_is_restarted_until_its_restarts_are_used_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    process, other = Shell("echo run; exit 3", max_restarts=2), Shell("exit 3")
    assert wait_for([process, other], 15.0)
    assert (process.lines, process.restarts, other.restarts) == (["run"] * 3, 2, 0)
    assert "a ended with exit code 3 and is restarted" in caplog.text


@pytest.mark.parametrize("who", ["process", "guard"])
def test_a_process_that_is_killed_is_restarted(started: list[Shell], who: str) -> None:
    if who == "guard" and sys.platform != "linux":
        pytest.skip("only Linux can tie a process to its parent")
    started.append(process := Shell(f"echo $$; {SLEEP}", max_restarts=1))
    first = process.running_pid()
    os.kill(first if who == "process" else parent_of(first), signal.SIGKILL)
    wait_until("it runs again", lambda: bool(process.poll() or len(process.lines) > 1) and bool(process.pid))
    assert process.pid != first
    assert process.restarts == 1
    wait_until("the first one has ended", lambda: not is_alive(first))


def test_no_output_is_lost() -> None:
    process = Shell("seq 100000; printf '\\377'; exit 1")
    assert wait_for([process], 30.0)
    assert process.lines == [*map(str, range(1, 100_001)), "\ufffd"]


def test_a_command_that_cannot_run_says_why() -> None:
    process = DemoProcess("a", ["/no/such/program"], "")
    lines: list[str] = []

    def has_ended() -> bool:
        lines.extend(process.poll())
        return process.ended

    wait_until("it has ended", has_ended)
    assert lines == ["cannot run /no/such/program: No such file or directory"]


STUBBORN = "trap '' INT TERM; echo ready; while :; do sleep 0.05; done"
OBEDIENT = "trap 'echo interrupted; exit 1' INT; echo ready; while :; do sleep 0.05; done"
DEAF = "trap '' INT; trap 'echo terminated; exit 5' TERM; echo ready; while :; do sleep 0.05; done"


def test_a_stop_interrupts_then_terminates_then_kills_and_restarts_nothing(started: list[Shell]) -> None:
    started += [Shell(script, max_restarts=5) for script in (OBEDIENT, DEAF, STUBBORN)]
    pids = [process.running_pid() for process in started]
    began = time.monotonic()
    for process in started:
        process.request_stop()
    assert wait_for(started, 15.0)
    assert time.monotonic() - began < 4.0
    assert not any(map(is_alive, pids))
    obedient, deaf, stubborn = (process.lines for process in started)
    assert "interrupted" in obedient
    assert "terminated" in deaf
    assert stubborn == ["ready"]
    assert [process.restarts for process in started] == [0, 0, 0]


def test_a_stop_cancels_a_planned_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "RESTART_SECONDS", 60.0)
    process = Shell("exit 1", max_restarts=1)
    wait_until("it waits for its restart", lambda: process.poll() == [] and process.restarts == 1)
    assert not process.ended
    process.request_stop()
    assert process.ended


def test_the_children_of_a_process_end_with_it() -> None:
    process = Shell("sleep 60 & echo $!; exit 0")
    assert wait_for([process], 15.0)
    wait_until("the grandchild ends", lambda: not is_alive(int(process.lines[0])))


OWNER = """
import os, sys, time
from rlbroker.demo.processes import DemoProcess
command = ["/bin/sh", "-c", "trap 'sleep 0.3; exit' INT; sleep 60 & echo $!; wait"]
process, lines = DemoProcess("a", command, ""), []
while not (lines and process.pid):
    lines += process.poll()
if {forks} and not os.fork(): time.sleep(60)
print(lines[0], process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("forks", [False, True])
def test_no_process_remains_however_its_owner_ends(number: signal.Signals, forks: bool) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.replace("{forks}", str(forks))],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert owner.stdout is not None
    try:
        with owner.stdout:
            pids = [
                int(word) for word in owner.stdout.readline().split()
            ]  # the child of the process, and itself
        pids += [parent_of(pid) for pid in pids]
        assert all(map(is_alive, pids))
        owner.send_signal(number)
        owner.wait(15.0)
        wait_until("all have ended", lambda: not any(map(is_alive, pids)))
    finally:
        os.killpg(owner.pid, signal.SIGKILL) if forks else owner.kill()
