"""A child process that never outlives its parent: the parent's side of `child_guard`."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_GUARD = Path(__file__).with_name("child_guard.py")

#: Time that the guard needs beyond the stop steps, to see a killed process disappear and to clean up.
GUARD_MARGIN_SECONDS = 7.0

#: Signals to send one after the other, each with the seconds to wait after it. SIGKILL follows automatically.
StopSteps = Sequence[tuple[signal.Signals, float]]


class GuardedProcess:
    """One command, run by its own guard process. Not safe to use from two threads at once.

    ``output`` is the file descriptor that receives the command's output. ``directory`` is created (mode 0700)
    before the command starts, and removed with its contents after the command ended. ``input_text`` becomes the
    command's standard input: unlike arguments and files, no other process can read it.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stop_steps: StopSteps,
        output: int,
        directory: Path | None = None,
        input_text: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the guard, which starts the command. `read_reports` and `wait` update the attributes."""
        self.pid: int | None = None
        self.exit_code: int | None = None
        #: Whether the command had to be killed with SIGKILL.
        self.killed = False
        #: Why the command could not be started or watched; None without an error.
        self.error: str | None = None
        self.ended = False
        self._directory = directory
        self._stop_seconds = sum(seconds for _, seconds in stop_steps) + GUARD_MARGIN_SECONDS
        self._partial_line = b""
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            bufsize=0,
            start_new_session=True,  # else Ctrl-C in the terminal would end the guard before the command
            env=environment,
        )
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        self._reports = self._guard.stdout
        os.set_blocking(self._reports.fileno(), False)
        task = {
            "command": list(command),
            "stop": list(stop_steps),
            "directory": None if directory is None else str(directory),
            "input": input_text,
        }
        line = json.dumps(task).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # the guard has ended: `read_reports` will notice
            while line:  # a signal handler can cut a long write short
                line = line[os.write(self._guard.stdin.fileno(), line) :]

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is a report to read."""
        return self._reports.fileno()

    def read_reports(self) -> bool:
        """Read the guard's reports without waiting; return whether command and guard have ended."""
        while not self.ended:
            try:
                data = os.read(self._reports.fileno(), 65536)
            except BlockingIOError:
                break
            if not data:
                self._reap_guard()
                break
            *lines, self._partial_line = (self._partial_line + data).split(b"\n")
            for line in lines:
                report = json.loads(line)
                self.pid = report.get("pid", self.pid)
                self.exit_code = report.get("exit", self.exit_code)
                self.killed = report.get("killed", self.killed)
                self.error = report.get("error", self.error)
        return self.ended

    def wait(self, seconds: float) -> bool:
        """Wait until command and guard have ended, for at most ``seconds``; return whether they have."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            if not self.ended:
                selector.register(self._reports, selectors.EVENT_READ)
            while not self.read_reports():
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                selector.select(remaining)
        return True

    def request_stop(self) -> None:
        """Request the guard to stop the command; return at once."""
        if not self.ended:
            self._guard.terminate()

    def stop(self) -> None:
        """Stop the command and wait until it has ended, for at most the time of the steps and a margin."""
        if self.read_reports():
            return
        self.request_stop()
        if not self.wait(self._stop_seconds):
            self.kill()
            self.wait(1.0)

    def kill(self) -> None:
        """Kill guard and command at once, from any thread; `read_reports` still reports the end."""
        self.killed = True
        self._guard.kill()
        self._kill_group()

    def _reap_guard(self) -> None:
        """Reap the guard; clean up in its place if it was killed."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(1.0)  # the guard closed its pipe, so it has no work left
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        if self._guard.returncode != 0:
            self.error = self.error or f"its guard process ended with {self._guard.returncode}"
            if self.pid is not None and self.exit_code is None:
                self._kill_group()
                self.exit_code = -signal.SIGKILL
            if self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)
        self._reports.close()
        self.ended = True

    def _kill_group(self) -> None:
        if self.pid is not None and self.exit_code is None:  # after its end another process may have the pid
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
