"""Tests of the supervisor, with real processes and real signals."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from conftest import wait_until
from interrupts import interrupt_at
from processes import is_alive, parent_of

from rlbroker.errors import Closed
from rlbroker.local import restarts
from rlbroker.local import supervisor as supervisor_module
from rlbroker.local.supervisor import LONGEST_LINE_BYTES, Supervisor


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def pid_of(supervisor: Supervisor, name: str) -> int:
    pid = supervisor.status()[name].pid
    assert pid is not None
    return pid


class CollectedOutput:
    """An output handler that collects the lines of each process."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, name: str, line: str) -> None:
        self.lines.append((name, line))

    def lines_of(self, name: str) -> list[str]:
        return [line for other, line in list(self.lines) if other == name]


SLEEP = shell("exec sleep 60")


def test_a_process_with_exit_code_0_is_finished_and_not_restarted() -> None:
    with Supervisor({"a": shell("exit 0")}) as supervisor:
        assert supervisor.wait(15.0)
        status = supervisor.status()["a"]
    assert (status.state, status.exit_code, status.restarts, status.pid) == ("finished", 0, 0, None)


def test_a_failed_process_is_restarted_until_it_succeeds(tmp_path: Path) -> None:
    script = f"echo run >> {tmp_path}/runs; test $(wc -l < {tmp_path}/runs) -ge 3 || exit 4"
    with Supervisor({"a": shell(script)}, first_backoff_seconds=0.01) as supervisor:
        assert supervisor.wait(15.0)
        status = supervisor.status()["a"]
    assert (status.state, status.restarts) == ("finished", 2)
    assert (tmp_path / "runs").read_text() == "run\n" * 3


def test_a_process_killed_by_a_signal_is_restarted() -> None:
    with Supervisor({"a": SLEEP}, first_backoff_seconds=0.01) as supervisor:
        first = pid_of(supervisor, "a")
        os.kill(first, signal.SIGKILL)
        wait_until("it runs again", lambda: supervisor.status()["a"].pid not in (None, first))
        status = supervisor.status()["a"]
        assert (status.state, status.restarts, status.exit_code) == ("running", 1, -9)


def test_after_max_restarts_a_process_stays_down_and_the_others_keep_running(
    caplog: pytest.LogCaptureFixture,
) -> None:
    commands = {"bad": shell("exit 3"), "good": SLEEP}
    with Supervisor(commands, first_backoff_seconds=0.01, max_restarts=2) as supervisor:
        wait_until("the supervisor gives up", lambda: supervisor.status()["bad"].state == "failed")
        status = supervisor.status()["bad"]
        assert (status.restarts, status.exit_code) == (2, 3)
        assert supervisor.status()["good"].state == "running"
        assert not supervisor.wait(0.0)
    assert "bad ended with exit code 3; giving up after 2 restarts" in caplog.text


def test_restarts_outside_the_window_do_not_count() -> None:
    with Supervisor(
        {"a": shell("exit 3")}, first_backoff_seconds=0.1, max_restarts=1, restart_window_seconds=0.05
    ) as supervisor:
        wait_until("it was restarted more often", lambda: supervisor.status()["a"].restarts >= 3)


def test_a_healthy_run_resets_the_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []

    def record(failures: int, **settings: float) -> float:
        recorded.append(failures)
        return 0.001

    monkeypatch.setattr(restarts, "backoff_seconds", record)
    with Supervisor({"a": shell("exit 1")}, max_restarts=3) as supervisor:
        assert supervisor.wait(15.0)
    assert recorded == [1, 2, 3]
    recorded.clear()
    with Supervisor({"a": shell("exit 1")}, max_restarts=3, healthy_seconds=0.0) as supervisor:
        assert supervisor.wait(15.0)
    assert recorded == [1, 1, 1]


def test_the_status_says_why_a_command_cannot_run() -> None:
    with Supervisor({"a": ["/no/such/program"]}, max_restarts=0) as supervisor:
        assert supervisor.wait(15.0)
        status = supervisor.status()["a"]
    assert (status.state, status.exit_code) == ("failed", 127)
    assert status.error == "cannot run /no/such/program: No such file or directory"


def test_a_process_that_cannot_be_created_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    popen = subprocess.Popen
    failures = iter([OSError("no more processes")])

    def fail_once(*arguments: object, **settings: object) -> object:
        for failure in failures:
            raise failure
        return popen(*arguments, **settings)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", fail_once)
    with Supervisor({"a": shell("exit 0")}, first_backoff_seconds=0.01) as supervisor:
        assert supervisor.wait(15.0)
        status = supervisor.status()["a"]
    assert (status.state, status.restarts) == ("finished", 1)


def test_no_output_of_a_process_is_lost() -> None:
    output = CollectedOutput()
    script = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; echo oops >&2; printf 'no end'"
    with Supervisor({"a": shell(script), "b": shell("echo b")}, on_output=output) as supervisor:
        assert supervisor.wait(15.0)
    assert output.lines_of("a") == [*(f"line {i}" for i in range(3000)), "oops", "no end"]
    assert output.lines_of("b") == ["b"]


def test_an_endless_line_is_split_and_invalid_bytes_are_replaced() -> None:
    output = CollectedOutput()
    script = f"head -c {3 * LONGEST_LINE_BYTES} /dev/zero | tr '\\0' x; echo; printf '\\377\\n'"
    with Supervisor({"a": shell(script)}, on_output=output) as supervisor:
        assert supervisor.wait(15.0)
    *pieces, last = output.lines_of("a")
    assert "".join(pieces) == "x" * (3 * LONGEST_LINE_BYTES)
    assert max(map(len, pieces)) <= 2 * LONGEST_LINE_BYTES
    assert last == "�"


def test_an_exception_of_the_output_handler_is_logged_and_the_process_continues(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(name: str, line: str) -> None:
        raise RuntimeError("raised by the handler")

    with Supervisor({"a": shell("echo x")}, on_output=fail) as supervisor:
        assert supervisor.wait(15.0)
        assert supervisor.status()["a"].state == "finished"
    assert "the output handler failed on a line of a" in caplog.text


def test_the_output_of_every_restart_is_appended_to_the_log_file(tmp_path: Path) -> None:
    with Supervisor(
        {"a": shell("echo out; echo err >&2; exit 1")},
        log_directory=tmp_path / "logs",
        max_restarts=1,
        first_backoff_seconds=0.01,
    ) as supervisor:
        assert supervisor.wait(15.0)
    assert (tmp_path / "logs" / "a.log").read_text() == "out\nerr\n" * 2


def test_by_default_output_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with Supervisor({"a": shell("echo hello")}) as supervisor:
        assert supervisor.wait(15.0)
    assert capfd.readouterr().err == "hello\n"


def test_the_environment_is_added_to_the_inherited_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLT_OWN", "own")
    output = CollectedOutput()
    with Supervisor(
        {"a": shell('echo "$RLT_OWN $RLT_ADDED"')}, environment={"RLT_ADDED": "added"}, on_output=output
    ) as supervisor:
        assert supervisor.wait(15.0)
    assert output.lines_of("a") == ["own added"]


STUBBORN = shell("trap '' INT TERM; echo ready; while :; do sleep 0.05; done")
OBEDIENT_SCRIPT = "import time\ntry: print('ready', flush=True); time.sleep(60)\nfinally: print('bye')"
OBEDIENT = [sys.executable, "-ISc", OBEDIENT_SCRIPT]


def test_stop_interrupts_then_kills_and_returns_the_killed_names() -> None:
    output = CollectedOutput()
    supervisor = Supervisor({"obedient": OBEDIENT, "stubborn": STUBBORN}, on_output=output).start()
    pids = [pid_of(supervisor, name) for name in ("obedient", "stubborn")]
    wait_until("both are ready", lambda: len(output.lines) == 2)
    started = time.monotonic()
    assert supervisor.stop(0.5) == ["stubborn"]
    assert time.monotonic() - started < 4.0
    assert not [pid for pid in pids if is_alive(pid)]
    assert "bye" in output.lines_of("obedient")  # SIGINT let it finish
    assert {status.state for status in supervisor.status().values()} == {"stopped"}
    assert supervisor.status()["stubborn"].exit_code == -9
    assert supervisor.stop() == ["stubborn"]


def test_a_process_that_ignores_sigint_gets_sigterm_before_sigkill() -> None:
    output = CollectedOutput()
    script = "trap '' INT; trap 'echo terminated; exit 5' TERM; echo ready; while :; do sleep 0.05; done"
    supervisor = Supervisor({"a": shell(script)}, on_output=output).start()
    wait_until("it is ready", lambda: bool(output.lines))
    assert supervisor.stop(1.0) == []
    assert "terminated" in output.lines_of("a")
    assert supervisor.status()["a"].exit_code == 5


def test_stop_cancels_a_planned_restart() -> None:
    with Supervisor({"a": shell("exit 1")}, first_backoff_seconds=30.0) as supervisor:
        wait_until("it waits for its restart", lambda: supervisor.status()["a"].state == "backing off")
        started = time.monotonic()
        assert supervisor.stop() == []
        assert time.monotonic() - started < 5.0
        assert supervisor.status()["a"].state == "stopped"
        assert supervisor.wait(0.0)


def test_stop_returns_in_time_even_if_the_output_handler_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "GUARD_MARGIN_SECONDS", 0.0)
    threads = threading.active_count()
    hanging, release = threading.Event(), threading.Event()

    def hang(name: str, line: str) -> None:
        hanging.set()
        release.wait(15.0)

    supervisor = Supervisor({"a": shell("echo x; exec sleep 60")}, on_output=hang).start()
    pid = pid_of(supervisor, "a")
    assert hanging.wait(15.0)
    assert supervisor.stop(0.1) == ["a"]
    wait_until("the process is killed", lambda: not is_alive(pid))
    release.set()
    wait_until("the thread ends", lambda: threading.active_count() == threads)


def test_the_output_handler_can_stop_the_supervisor(caplog: pytest.LogCaptureFixture) -> None:
    def stop(name: str, line: str) -> None:
        supervisor.stop()

    supervisor = Supervisor({"a": shell("echo stop; exec sleep 60")}, on_output=stop)
    with supervisor:
        wait_until("it is stopped", lambda: supervisor.status()["a"].state == "stopped")
    assert caplog.text == ""


def test_the_children_of_a_process_end_with_it() -> None:
    output = CollectedOutput()
    with Supervisor({"a": shell("sleep 60 & echo $!; exit 0")}, on_output=output) as supervisor:
        assert supervisor.wait(15.0)
        grandchild = int(output.lines_of("a")[0])
        wait_until("the grandchild ends", lambda: not is_alive(grandchild))


def test_a_supervisor_can_be_started_only_once() -> None:
    with Supervisor({}) as supervisor, pytest.raises(Closed):
        supervisor.start()


OWNER = """
import os, queue, signal, sys, time
from rlbroker.local.supervisor import Supervisor
command = ["/bin/sh", "-c", "trap 'sleep 0.3; exit' INT; sleep 60 & echo $!; wait"]
lines = queue.Queue()
supervisor = Supervisor({"a": command}, on_output=lambda name, line: lines.put(line))
supervisor.start()
if {forks} and not os.fork(): time.sleep(60)
print(lines.get(), supervisor.status()["a"].pid, flush=True)
__THEN__
"""


@pytest.mark.parametrize(
    ("name", "then", "number"),
    [
        ("it returns", "", None),
        ("it raises", "raise RuntimeError", None),
        ("SIGTERM", "time.sleep(60)", signal.SIGTERM),
        ("SIGKILL", "time.sleep(60)", signal.SIGKILL),
        ("Ctrl-C to its group", "time.sleep(60)", signal.SIGINT),
        ("SIGKILL, with a forked child that keeps running", "time.sleep(60)", signal.SIGKILL),
    ],
)
def test_no_process_remains_however_the_owner_ends(
    name: str, then: str, number: signal.Signals | None
) -> None:
    forks = "forked" in name
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.replace("__THEN__", then).replace("{forks}", str(forks))],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert owner.stdout is not None
    with owner.stdout:
        pids = [int(word) for word in owner.stdout.readline().split()]  # the process and its child
    guards = [parent_of(pid) for pid in pids] if number is not None else []
    try:
        if number is not None:
            assert all(map(is_alive, pids))
            if forks:
                owner.send_signal(number)
            else:
                os.killpg(owner.pid, number)
        owner.wait(15.0)
        if number in (None, signal.SIGINT):  # the exit handlers of Python could clean up
            assert not any(map(is_alive, pids + guards))
        wait_until(f"all end after {name}", lambda: not any(map(is_alive, pids + guards)))
    finally:
        if forks:
            os.killpg(owner.pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tie a process to its parent")
def test_a_process_whose_guard_is_killed_ends_and_is_restarted() -> None:
    with Supervisor({"a": SLEEP}, first_backoff_seconds=0.01) as supervisor:
        first = pid_of(supervisor, "a")
        os.kill(parent_of(first), signal.SIGKILL)
        wait_until("it runs again", lambda: supervisor.status()["a"].pid not in (None, first))
        assert not is_alive(first)


@pytest.mark.parametrize(("name", "arguments"), [("stop", ()), ("status", ()), ("wait", (0.05,))])
def test_an_interrupted_call_can_be_repeated(name: str, arguments: tuple[float, ...]) -> None:
    """It leaves no lock behind: neither the same thread nor another one hangs, and the process ends."""
    for point in itertools.count(1):
        supervisor = Supervisor({"a": SLEEP}, stop_timeout_seconds=5.0).start()
        pid = pid_of(supervisor, "a")
        call = partial(getattr(supervisor, name), *arguments)
        with interrupt_at(point, "line") as interrupt:
            call()
        with ThreadPoolExecutor(1) as threads:
            threads.submit(call).result(10.0)
        began = time.monotonic()
        supervisor.stop()
        assert time.monotonic() - began < 5.0, f"its thread hangs after {interrupt.place}"
        assert not is_alive(pid), interrupt.place
        if not interrupt.place:
            break
