"""The supervisor's promises, kept with real processes and real signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import wait_until
from processes import is_alive, parent_of

from rlbroker.errors import Closed
from rlbroker.local import supervisor as module
from rlbroker.local.supervisor import LONGEST_LINE_BYTES, Supervisor


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def pid_of(supervisor: Supervisor, name: str) -> int:
    pid = supervisor.status()[name].pid
    assert pid is not None
    return pid


class Output:
    """Collects what processes print."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, name: str, line: str) -> None:
        self.lines.append((name, line))

    def of(self, name: str) -> list[str]:
        return [line for other, line in list(self.lines) if other == name]


SLEEP = shell("exec sleep 60")


def test_a_process_that_ends_well_is_finished_and_not_started_again() -> None:
    with Supervisor({"a": shell("exit 0")}) as supervisor:
        assert supervisor.wait(15.0)
        status = supervisor.status()["a"]
    assert (status.state, status.exit_code, status.restarts, status.pid) == ("finished", 0, 0, None)


def test_a_process_that_fails_is_started_again_until_it_ends_well(tmp_path: Path) -> None:
    script = f"echo run >> {tmp_path}/runs; test $(wc -l < {tmp_path}/runs) -ge 3 || exit 4"
    with Supervisor({"a": shell(script)}, first_backoff_seconds=0.01) as supervisor:
        assert supervisor.wait(15.0)
        status = supervisor.status()["a"]
    assert (status.state, status.restarts) == ("finished", 2)
    assert (tmp_path / "runs").read_text() == "run\n" * 3


def test_a_process_killed_by_a_signal_is_started_again() -> None:
    with Supervisor({"a": SLEEP}, first_backoff_seconds=0.01) as supervisor:
        first = pid_of(supervisor, "a")
        os.kill(first, signal.SIGKILL)
        wait_until("it runs again", lambda: supervisor.status()["a"].pid not in (None, first))
        status = supervisor.status()["a"]
        assert (status.state, status.restarts, status.exit_code) == ("running", 1, -9)


def test_a_process_that_keeps_failing_is_given_up_and_the_others_run_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    commands = {"bad": shell("exit 3"), "good": SLEEP}
    with Supervisor(commands, first_backoff_seconds=0.01, max_restarts=2) as supervisor:
        wait_until("it is given up", lambda: supervisor.status()["bad"].state == "failed")
        status = supervisor.status()["bad"]
        assert (status.restarts, status.exit_code) == (2, 3)
        assert supervisor.status()["good"].state == "running"
        assert not supervisor.wait(0.0)
    assert "bad ended with exit code 3; it is given up" in caplog.text


def test_restarts_long_ago_do_not_count() -> None:
    with Supervisor(
        {"a": shell("exit 3")}, first_backoff_seconds=0.1, max_restarts=1, restart_window_seconds=0.05
    ) as supervisor:
        wait_until("it was restarted more often", lambda: supervisor.status()["a"].restarts >= 3)


def test_pauses_grow_and_a_healthy_run_begins_them_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def remember(failures: int, **settings: float) -> float:
        asked.append(failures)
        return 0.001

    monkeypatch.setattr(module, "backoff_seconds", remember)
    with Supervisor({"a": shell("exit 1")}, max_restarts=3) as supervisor:
        assert supervisor.wait(15.0)
    assert asked == [1, 2, 3]
    asked.clear()
    with Supervisor({"a": shell("exit 1")}, max_restarts=3, healthy_seconds=0.0) as supervisor:
        assert supervisor.wait(15.0)
    assert asked == [1, 1, 1]


def test_a_command_that_cannot_run_says_why() -> None:
    with Supervisor({"a": ["/no/such/program"]}, max_restarts=0) as supervisor:
        assert supervisor.wait(15.0)
        status = supervisor.status()["a"]
    assert (status.state, status.exit_code) == ("failed", 127)
    assert status.error == "cannot run /no/such/program: No such file or directory"


def test_a_machine_that_cannot_start_processes_for_a_moment_is_tried_again(
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


def test_nothing_that_a_process_prints_is_lost() -> None:
    output = Output()
    script = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; echo oops >&2; printf 'no end'"
    with Supervisor({"a": shell(script), "b": shell("echo b")}, on_output=output) as supervisor:
        assert supervisor.wait(15.0)
    assert output.of("a") == [*(f"line {i}" for i in range(3000)), "oops", "no end"]
    assert output.of("b") == ["b"]


def test_an_endless_line_comes_in_pieces_and_strange_bytes_come_as_marks() -> None:
    output = Output()
    script = f"head -c {3 * LONGEST_LINE_BYTES} /dev/zero | tr '\\0' x; echo; printf '\\377\\n'"
    with Supervisor({"a": shell(script)}, on_output=output) as supervisor:
        assert supervisor.wait(15.0)
    *pieces, strange = output.of("a")
    assert "".join(pieces) == "x" * (3 * LONGEST_LINE_BYTES)
    assert max(map(len, pieces)) <= 2 * LONGEST_LINE_BYTES
    assert strange == "�"


def test_an_output_handler_that_fails_is_reported_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def fail(name: str, line: str) -> None:
        raise RuntimeError("of the handler")

    with Supervisor({"a": shell("echo x")}, on_output=fail) as supervisor:
        assert supervisor.wait(15.0)
        assert supervisor.status()["a"].state == "finished"
    assert "the output handler failed on a line of a" in caplog.text


def test_log_files_keep_the_output_of_every_run(tmp_path: Path) -> None:
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


def test_the_environment_is_added_to_the_own_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLT_OWN", "own")
    output = Output()
    with Supervisor(
        {"a": shell('echo "$RLT_OWN $RLT_ADDED"')}, environment={"RLT_ADDED": "added"}, on_output=output
    ) as supervisor:
        assert supervisor.wait(15.0)
    assert output.of("a") == ["own added"]


STUBBORN = shell("trap '' INT TERM; echo ready; while :; do sleep 0.05; done")
POLITE_SCRIPT = "import time\ntry: print('ready', flush=True); time.sleep(60)\nfinally: print('bye')"
POLITE = [sys.executable, "-ISc", POLITE_SCRIPT]


def test_stop_is_polite_then_firm_and_tells_whom_it_had_to_kill() -> None:
    output = Output()
    supervisor = Supervisor({"polite": POLITE, "stubborn": STUBBORN}, on_output=output).start()
    pids = [pid_of(supervisor, name) for name in ("polite", "stubborn")]
    wait_until("both are ready", lambda: len(output.lines) == 2)
    started = time.monotonic()
    assert supervisor.stop(0.5) == ["stubborn"]
    assert time.monotonic() - started < 4.0
    assert not [pid for pid in pids if is_alive(pid)]
    assert "bye" in output.of("polite")  # SIGINT let it finish
    assert {status.state for status in supervisor.status().values()} == {"stopped"}
    assert supervisor.status()["stubborn"].exit_code == -9
    assert supervisor.stop() == ["stubborn"]


def test_a_process_that_ignores_interrupts_is_terminated_before_it_is_killed() -> None:
    output = Output()
    script = "trap '' INT; trap 'echo terminated; exit 5' TERM; echo ready; while :; do sleep 0.05; done"
    supervisor = Supervisor({"a": shell(script)}, on_output=output).start()
    wait_until("it is ready", lambda: bool(output.lines))
    assert supervisor.stop(1.0) == []
    assert "terminated" in output.of("a")
    assert supervisor.status()["a"].exit_code == 5


def test_stop_ends_a_pause_and_nothing_is_started_after_it() -> None:
    with Supervisor({"a": shell("exit 1")}, first_backoff_seconds=30.0) as supervisor:
        wait_until("it pauses", lambda: supervisor.status()["a"].state == "backing off")
        started = time.monotonic()
        assert supervisor.stop() == []
        assert time.monotonic() - started < 5.0
        assert supervisor.status()["a"].state == "stopped"
        assert supervisor.wait(0.0)


def test_stop_is_bounded_even_if_the_output_handler_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GUARD_MARGIN_SECONDS", 0.0)
    threads = threading.active_count()
    hanging, release = threading.Event(), threading.Event()

    def hang(name: str, line: str) -> None:
        hanging.set()
        release.wait(15.0)

    supervisor = Supervisor({"a": shell("echo x; exec sleep 60")}, on_output=hang).start()
    pid = pid_of(supervisor, "a")
    assert hanging.wait(15.0)
    assert supervisor.stop(0.1) == ["a"]
    wait_until("it is dead, long before it would end by itself", lambda: not is_alive(pid))
    release.set()
    wait_until("the thread ends", lambda: threading.active_count() == threads)


def test_a_handler_may_stop_the_supervisor(caplog: pytest.LogCaptureFixture) -> None:
    def stop(name: str, line: str) -> None:
        supervisor.stop()

    supervisor = Supervisor({"a": shell("echo stop; exec sleep 60")}, on_output=stop)
    with supervisor:
        wait_until("it is stopped", lambda: supervisor.status()["a"].state == "stopped")
    assert caplog.text == ""


def test_what_a_process_started_ends_with_it() -> None:
    output = Output()
    with Supervisor({"a": shell("sleep 60 & echo $!; exit 0")}, on_output=output) as supervisor:
        assert supervisor.wait(15.0)
        grandchild = int(output.of("a")[0])
        wait_until("the grandchild ends", lambda: not is_alive(grandchild))


def test_a_supervisor_starts_once() -> None:
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
        ("SIGKILL, with a forked child that lives on", "time.sleep(60)", signal.SIGKILL),
    ],
)
def test_no_process_is_left_however_the_owner_ends(
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
        pids = [int(word) for word in owner.stdout.readline().split()]  # the process, and what it started
    guards = [parent_of(pid) for pid in pids] if number is not None else []
    try:
        if number is not None:
            assert all(map(is_alive, pids))
            if forks:
                owner.send_signal(number)
            else:
                os.killpg(owner.pid, number)
        owner.wait(15.0)
        if number in (None, signal.SIGINT):  # Python could tidy up before it went
            assert not any(map(is_alive, pids + guards))
        wait_until(f"all end after {name}", lambda: not any(map(is_alive, pids + guards)))
    finally:
        if forks:
            os.killpg(owner.pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tie a process to its parent")
def test_a_process_whose_guard_is_killed_ends_and_is_started_again() -> None:
    with Supervisor({"a": SLEEP}, first_backoff_seconds=0.01) as supervisor:
        first = pid_of(supervisor, "a")
        os.kill(parent_of(first), signal.SIGKILL)
        wait_until("it runs again", lambda: supervisor.status()["a"].pid not in (None, first))
        assert not is_alive(first)
