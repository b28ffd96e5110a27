"""The parent's side of `guard`: a process that does not outlive us, however we end."""

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

#: What the guard needs beyond the stop steps: to see a killed process disappear, and to tidy up.
GUARD_MARGIN_SECONDS = 7.0

#: Signals to send one after the other, each with the seconds it is given; SIGKILL follows by itself.
StopSteps = Sequence[tuple[signal.Signals, float]]


class GuardedProcess:
    """One command, run by a guard process of its own. Not safe to use from two threads at once.

    ``output`` is the file descriptor that gets the command's output. ``directory`` is made (mode 0700) before
    the command starts and removed, with all that is in it, after it ended. ``input_text`` becomes the
    command's standard input: unlike arguments and files, nobody else can read it.
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
        """Start the guard, which starts the command; `pump` and `wait` tell what came of it."""
        self.pid: int | None = None
        self.exit_code: int | None = None
        #: Whether it had to be killed with SIGKILL.
        self.killed = False
        #: Why the command could not be started or watched, if so.
        self.error: str | None = None
        self.ended = False
        self._directory = directory
        self._stop_steps = stop_steps
        self._partial = b""
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            bufsize=0,
            start_new_session=True,  # Ctrl-C in our terminal must not end the guard before its work
            env=environment,
        )
        assert self._guard.stdout is not None
        self._reports = self._guard.stdout
        os.set_blocking(self._reports.fileno(), False)
        self._send(
            {
                "command": list(command),
                "stop": list(stop_steps),
                "directory": None if directory is None else str(directory),
                "input": input_text,
            }
        )

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is something to `pump`."""
        return self._reports.fileno()

    def pump(self) -> bool:
        """Take in what the guard has reported, without waiting; return whether it all ended."""
        while not self.ended:
            try:
                piece = os.read(self._reports.fileno(), 65536)
            except BlockingIOError:
                break
            if not piece:
                self._finish()
                break
            *lines, self._partial = (self._partial + piece).split(b"\n")
            for line in lines:
                facts = json.loads(line)
                self.pid = facts.get("pid", self.pid)
                self.exit_code = facts.get("exit", self.exit_code)
                self.killed = facts.get("killed", self.killed)
                self.error = facts.get("error", self.error)
        return self.ended

    def wait(self, seconds: float) -> bool:
        """Wait at most so long for the end of command and guard; return whether it came."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            if not self.ended:
                selector.register(self._reports, selectors.EVENT_READ)
            while not self.pump():
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                selector.select(remaining)
        return True

    def ask_to_stop(self, stop_steps: StopSteps | None = None) -> None:
        """Have the guard stop the command; returns at once."""
        self._send(list(self._stop_steps if stop_steps is None else stop_steps))

    def stop(self, stop_steps: StopSteps | None = None) -> None:
        """Stop the command and wait until nothing is left of it; bounded by the steps and a margin."""
        if self.pump():
            return
        steps = self._stop_steps if stop_steps is None else stop_steps
        self.ask_to_stop(steps)
        if not self.wait(sum(seconds for _, seconds in steps) + GUARD_MARGIN_SECONDS):
            self.kill()
            self.wait(1.0)

    def kill(self) -> None:
        """Kill guard and command where they stand, from any thread; `pump` tells of the end as always."""
        self.killed = True
        self._guard.kill()
        self._kill_group()

    def _send(self, message: object) -> None:
        if self.ended:
            return
        assert self._guard.stdin is not None
        line = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # the guard is gone: `pump` will find out
            while line:  # a signal handler can cut a long write short
                line = line[os.write(self._guard.stdin.fileno(), line) :]

    def _finish(self) -> None:
        """Reap the guard, and do its work if it was killed before it could."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(1.0)  # its pipe is closed: it has nothing left to do
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
        if self.pid is not None and self.exit_code is None:  # later the number may be another process's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
