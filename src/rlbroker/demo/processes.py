"""The child processes of `rlbroker demo`: their output as lines, their restarts and their end."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from rlbroker.local.child_process import GuardedProcess, StopSteps

_logger = logging.getLogger("rlbroker")

#: The pause before a failed process is started again.
RESTART_SECONDS: Final = 1.0

#: How a process is stopped; SIGKILL follows. A Python process with torch needs a second to exit.
STOP_STEPS: Final[StopSteps] = ((signal.SIGINT, 0.7), (signal.SIGTERM, 0.3))


class DemoProcess:
    """A command that ends with this process, also if this process is killed. Not safe to use from several threads.

    Attributes:
        name: for messages.
        restarts: how often it was restarted after a failure.
    """

    def __init__(self, name: str, command: Sequence[str], url: str, *, max_restarts: int = 0) -> None:
        """Prepare a command for the server at `url`; the first `poll` starts it."""
        self.name, self.restarts = name, 0
        self._command, self._max_restarts = command, max_restarts
        # Not as an argument: other users can read arguments, and the URL contains a password.
        self._environment = {**os.environ, "RLBROKER_REDIS_URL": url}
        self._process: GuardedProcess | None = None
        self._due: float | None = 0.0  # when to start the command, in monotonic time
        self._output = -1
        self._partial_line = b""

    @property
    def pid(self) -> int | None:
        """The process id; None while the process does not run."""
        return self._process.pid if self._process else None

    @property
    def ended(self) -> bool:
        """Whether the process has ended and will not be restarted."""
        return self._process is None and self._due is None

    def poll(self) -> list[str]:
        """Start the command if it is due, and return the new lines of its output. Call this often, until it has ended.

        A command with another exit code than 0 has failed, and is due again unless `max_restarts` are used up.
        """
        if self._due is not None and self._due <= time.monotonic():
            self._start()
        if self._process is None:
            return []
        ended = self._process.read_reports()
        lines = self._read_lines(all_of_it=ended)
        if ended:
            lines += [self._process.error] if self._process.error else []
            self._handle_end(self._process)
        return lines

    def request_stop(self) -> None:
        """Request the end of the process, by SIGINT, SIGTERM and SIGKILL, without a restart; return at once."""
        self._due, self._max_restarts = None, 0
        if self._process:
            self._process.request_stop()

    def kill(self) -> None:
        """Kill the process, and all that it started."""
        self._due, self._max_restarts = None, 0
        if self._process:
            self._process.kill()

    def _start(self) -> None:
        self._output, writer = os.pipe()
        os.set_blocking(self._output, False)
        try:
            self._process = GuardedProcess(
                self._command, stop_steps=STOP_STEPS, output=writer, environment=self._environment
            )
        finally:
            os.close(writer)
        self._due = None

    def _read_lines(self, *, all_of_it: bool) -> list[str]:
        data = b""
        with suppress(BlockingIOError):
            while piece := os.read(self._output, 1 << 16):
                data += piece
                if not all_of_it:
                    break
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        if all_of_it and self._partial_line:
            lines.append(self._partial_line)
            self._partial_line = b""
        return [line.decode(errors="replace") for line in lines]

    def _handle_end(self, process: GuardedProcess) -> None:
        os.close(self._output)
        self._process = None
        if process.exit_code != 0 and self.restarts < self._max_restarts:
            _logger.warning("%s ended with exit code %s and is restarted", self.name, process.exit_code)
            self.restarts += 1
            self._due = time.monotonic() + RESTART_SECONDS


def wait_for(processes: Sequence[DemoProcess], seconds: float) -> bool:
    """Wait until processes have ended, for at most `seconds`; drop their output, and return whether they have."""
    deadline = time.monotonic() + seconds
    while not all(process.ended for process in processes):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
        for process in processes:
            process.poll()
    return True
