"""A supervisor of local processes: it restarts those that fail, and ends all of them with this process."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import re
import selectors
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from rlbroker.backend.locks import CallLock
from rlbroker.backend.text import counted
from rlbroker.errors import Closed, InvalidArgument
from rlbroker.local.child_process import GUARD_MARGIN_SECONDS, GuardedProcess, StopSteps
from rlbroker.local.restarts import RestartPolicy, RestartSchedule

_logger = logging.getLogger("rlbroker")

#: A longer line of output is passed on in pieces, so that output without line ends does not fill the memory.
LONGEST_LINE_BYTES = 64 * 1024
#: How long `Supervisor.start` waits until its processes run. They need a fraction of a second.
START_SECONDS = 10.0

#: How often a call that waits looks at the processes.
CHECK_SECONDS = 0.02
#: The exit code of shells for a command that cannot be run.
CANNOT_RUN = 127
STANDARD_ERROR = 2

State = Literal["running", "backing off", "finished", "failed", "stopped"]


@dataclass(frozen=True)
class ProcessStatus:
    """The state of one supervised process."""

    name: str
    #: "finished" ended with exit code 0; "failed" was restarted too often, and is not restarted any more.
    state: State
    #: None while the process does not run, and for the first milliseconds of a restart.
    pid: int | None
    restarts: int
    #: Of its last end; negative for a signal, as in `subprocess`; None before the first end.
    exit_code: int | None
    #: Why the process could not be started or watched the last time; None without an error.
    error: str | None
    #: When the process entered this state, in seconds since the epoch.
    since: float


class _OutputPipe:
    """A pipe that passes a process's output to a handler, line by line, without blocking."""

    def __init__(self, name: str, handler: Callable[[str, str], None]) -> None:
        self.name = name
        self._handler = handler
        self._partial_line = b""
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)

    def forward(self) -> None:
        """Pass on what is available, at most one read, so that one busy process does not delay the others."""
        if data := self._read():
            self._split(data)

    def finish(self) -> None:
        """Pass on the rest of the output, including a last line without an end, and close the pipe."""
        while data := self._read():
            self._split(data)
        if self._partial_line:
            self._call_handler(self._partial_line)
        os.close(self.reader)

    def _read(self) -> bytes | None:
        try:
            return os.read(self.reader, LONGEST_LINE_BYTES)
        except BlockingIOError:
            return None

    def _split(self, data: bytes) -> None:
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        for line in lines:
            self._call_handler(line)
        while len(self._partial_line) >= LONGEST_LINE_BYTES:
            self._call_handler(self._partial_line[:LONGEST_LINE_BYTES])
            self._partial_line = self._partial_line[LONGEST_LINE_BYTES:]

    def _call_handler(self, line: bytes) -> None:
        try:
            self._handler(self.name, line.decode(errors="replace"))
        except Exception:
            _logger.exception("the output handler failed on a line of %s", self.name)


class _Child:
    """The command of one name, the process that runs it, and the restarts of that process."""

    def __init__(self, name: str, command: Sequence[str], policy: RestartPolicy) -> None:
        self.name = name
        self.command = command
        self.process: GuardedProcess | None = None
        self.output: _OutputPipe | None = None
        self.schedule = RestartSchedule(policy)
        self.restart_count = 0
        self.started = 0.0
        self.due: float | None = None  # when to start the process, in monotonic time
        self.exit_code: int | None = None
        self.error: str | None = None
        self.state: State = "stopped"
        self.since = time.time()

    def enter(self, state: State) -> None:
        self.state = state
        self.since = time.time()

    def status(self) -> ProcessStatus:
        pid = None if self.process is None else self.process.pid
        return ProcessStatus(
            self.name, self.state, pid, self.restart_count, self.exit_code, self.error, self.since
        )

    def restart_later(self) -> None:
        """Plan the restart after a failure, or give up."""
        reason = self.error or f"ended with exit code {self.exit_code}"
        pause = self.schedule.plan_restart(self.started)
        if pause is None:
            restarts = counted(len(self.schedule.recent_restarts), "restart")
            _logger.error("%s %s; giving up after %s", self.name, reason, restarts)
            self.enter("failed")
            return
        _logger.warning("%s %s; restarting in %.2g s", self.name, reason, pause)
        self.due = time.monotonic() + pause
        self.enter("backing off")


class Supervisor:
    """Runs one command per name, and restarts a command that fails.

    A process that ends with exit code 0 is finished. Any other end is a failure, and the process is restarted. The
    pause before a restart doubles from ``first_backoff_seconds`` to ``longest_backoff_seconds``; a run of
    ``healthy_seconds`` resets it. After ``max_restarts`` within ``restart_window_seconds`` the supervisor gives up
    on this process.

    ``environment`` is added to this process's environment. Output (both streams, in order) is appended to
    ``log_directory/<name>.log``, or passed line by line to ``on_output(name, line)``, or else written to this
    process's standard error. ``on_output`` is called in the supervisor's thread and must return quickly.

    To stop a process, the supervisor sends ``stop_signal``, SIGTERM and SIGKILL, one after the other within
    ``stop_timeout_seconds``, to the process and to all processes that it started. All of them also end when this
    process ends, even by SIGKILL. Ctrl-C in the terminal reaches only this process.

    Safe to use from several threads, not in a forked child.
    """

    def __init__(
        self,
        commands: Mapping[str, Sequence[str]],
        *,
        environment: Mapping[str, str] | None = None,
        log_directory: Path | None = None,
        on_output: Callable[[str, str], None] | None = None,
        first_backoff_seconds: float = 0.5,
        longest_backoff_seconds: float = 30.0,
        healthy_seconds: float = 30.0,
        max_restarts: int = 10,
        restart_window_seconds: float = 600.0,
        stop_signal: signal.Signals = signal.SIGINT,
        stop_timeout_seconds: float = 10.0,
    ) -> None:
        """Check the arguments. `start` starts the processes.

        Raises:
            InvalidArgument: an argument is invalid, or two arguments contradict each other.
        """
        for name, command in commands.items():
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
                raise InvalidArgument(f"a name must consist of letters, digits and _ . -, not {name!r}")
            if isinstance(command, str) or not command:
                raise InvalidArgument(f"the command of {name!r} must be a list of arguments, not {command!r}")
        if log_directory is not None and on_output is not None:
            raise InvalidArgument("pass log_directory or on_output, not both")
        if not 0 < first_backoff_seconds <= longest_backoff_seconds:
            raise InvalidArgument(
                "first_backoff_seconds must be positive and at most longest_backoff_seconds"
            )
        if max_restarts < 0 or restart_window_seconds <= 0 or healthy_seconds < 0 or stop_timeout_seconds < 0:
            raise InvalidArgument(
                "max_restarts, healthy_seconds and stop_timeout_seconds must be at least 0, "
                "and restart_window_seconds must be positive"
            )
        policy = RestartPolicy(
            first_backoff_seconds,
            longest_backoff_seconds,
            healthy_seconds,
            max_restarts,
            restart_window_seconds,
        )
        self._environment = dict(environment or {})
        self._log_directory = log_directory
        self._on_output = on_output
        self._stop_signal = stop_signal
        self._stop_timeout_seconds = stop_timeout_seconds
        self._children = {name: _Child(name, list(command), policy) for name, command in commands.items()}
        #: The status of each process, and whether any runs or will. Replaced in one assignment after each change, so
        #: that calls need no lock, which an interrupt could leave behind.
        self._published: tuple[dict[str, ProcessStatus], bool] = ({}, False)
        self._publish()
        self._stopping = CallLock()
        self._stop_steps: StopSteps | None = None  # set once a stop is requested
        self._killed: list[str] = []
        self._thread: threading.Thread | None = None
        self._wake_reader = self._wake_writer = -1
        self._owner_pid = os.getpid()

    def start(self) -> Self:
        """Start every process, and the thread that watches them.

        Raises:
            Closed: the supervisor was started before.
        """
        if self._thread is not None:
            raise Closed("a Supervisor can be started only once: create a new one")
        if self._log_directory is not None:
            self._log_directory.mkdir(parents=True, exist_ok=True)
        self._wake_reader, self._wake_writer = os.pipe()
        for child in self._children.values():
            child.due = 0.0
        self._publish()
        self._thread = threading.Thread(target=self._run, name="rlbroker-supervisor", daemon=True)
        atexit.register(self.stop)
        try:
            self._thread.start()
            if not _wait_until(self._were_started, START_SECONDS):
                _logger.warning("some processes have not started within %g s", START_SECONDS)
        except BaseException:  # including Ctrl-C, which must not leave a process behind
            self.stop()
            raise
        return self

    def status(self) -> dict[str, ProcessStatus]:
        """Return the status of each process, by name."""
        return dict(self._published[0])

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until no process runs and none will be restarted; return False if that takes too long."""
        return _wait_until(lambda: not self._published[1], timeout_seconds)

    def stop(self, timeout_seconds: float | None = None) -> list[str]:
        """Stop every process; return the names of those that had to be killed.

        Takes at most the timeout (default: ``stop_timeout_seconds``), and a few seconds more if a process hangs in
        the kernel. A second call only returns the same names again.
        """
        if os.getpid() != self._owner_pid or self._thread is None:
            return []
        timeout = self._stop_timeout_seconds if timeout_seconds is None else timeout_seconds
        if threading.current_thread() is self._thread:  # called by on_output: the thread cannot join itself
            self._request_stop(timeout)
            return []
        return self._stopping.run(self._stop, self._thread, timeout)

    def _stop(self, thread: threading.Thread, timeout: float) -> list[str]:
        if thread.is_alive():
            self._request_stop(timeout)
            thread.join(timeout + GUARD_MARGIN_SECONDS + 1.0)
        if thread.is_alive():  # on_output does not return
            for child in self._children.values():
                process = child.process
                if process is not None:
                    process.kill()
                    self._killed.append(child.name)
        elif self._wake_writer >= 0:
            pipe = self._wake_reader, self._wake_writer
            self._wake_reader = self._wake_writer = -1
            for end in pipe:
                os.close(end)
        atexit.unregister(self.stop)
        return sorted(set(self._killed))

    def __enter__(self) -> Self:
        """Start the processes."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the processes."""
        self.stop()

    def _request_stop(self, timeout_seconds: float) -> None:
        self._stop_steps = _split_timeout(self._stop_signal, timeout_seconds)
        os.write(self._wake_writer, b"s")

    def _publish(self) -> None:
        self._published = {name: child.status() for name, child in self._children.items()}, self._is_busy()

    def _were_started(self) -> bool:
        """Return whether the first start of each process has succeeded or failed."""
        return all(one.exit_code is not None or one.pid is not None for one in self._published[0].values())

    def _is_busy(self) -> bool:
        return any(child.process is not None or child.due is not None for child in self._children.values())

    def _run(self) -> None:
        """Start, watch and stop the processes. Only the supervisor's own thread uses them."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_reader, selectors.EVENT_READ)
            try:
                while self._stop_steps is None:
                    self._start_due(selector)
                    self._handle_events(selector, self._next_due())
                self._stop_all(selector, self._stop_steps)
            finally:
                # If this thread failed, nothing watches the processes any more, so end them.
                self._stop_steps = self._stop_steps or ()
                for child in self._children.values():
                    if child.process is not None:
                        child.process.kill()
                        child.process.wait(1.0)
                        self._handle_end(selector, child)

    def _next_due(self) -> float | None:
        return min((child.due for child in self._children.values() if child.due is not None), default=None)

    def _start_due(self, selector: selectors.BaseSelector) -> None:
        for child in self._children.values():
            if child.due is not None and child.due <= time.monotonic():
                self._launch(selector, child)

    def _handle_events(self, selector: selectors.BaseSelector, until: float | None) -> None:
        """Wait for an event of any process, or until the time ``until``, and handle the events."""
        for key, _ in selector.select(None if until is None else max(0.0, until - time.monotonic())):
            child: _Child | None = key.data
            if child is None:
                os.read(self._wake_reader, 4096)
            elif isinstance(key.fileobj, GuardedProcess):
                had_pid, ended = key.fileobj.pid is not None, key.fileobj.read_reports()
                if ended:
                    self._handle_end(selector, child)
                self._publish()
                if not ended and not had_pid and key.fileobj.pid is not None and child.output is not None:
                    # Not earlier: a handler that hangs would keep `start` from seeing the process's pid.
                    selector.register(child.output.reader, selectors.EVENT_READ, child)
            elif child.output is not None:
                child.output.forward()

    def _stop_all(self, selector: selectors.BaseSelector, steps: StopSteps) -> None:
        deadline = time.monotonic() + sum(seconds for _, seconds in steps) + GUARD_MARGIN_SECONDS
        for child in self._children.values():
            if child.due is not None:
                child.due = None
                child.enter("stopped")
            elif child.process is not None:
                child.process.request_stop(steps)
        self._publish()
        while self._is_busy() and time.monotonic() < deadline:
            self._handle_events(selector, deadline)

    def _launch(self, selector: selectors.BaseSelector, child: _Child) -> None:
        log: int | None = None
        output: _OutputPipe | None = None
        process: GuardedProcess | None = None
        error = None
        try:
            if self._on_output is not None:
                output = _OutputPipe(child.name, self._on_output)
            elif self._log_directory is not None:
                path = self._log_directory / f"{child.name}.log"
                log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            process = GuardedProcess(
                child.command,
                stop_steps=_split_timeout(self._stop_signal, self._stop_timeout_seconds),
                output=output.writer if output is not None else STANDARD_ERROR if log is None else log,
                environment={**os.environ, **self._environment},
            )
        except OSError as reason:  # out of processes, files or space: a later try may succeed
            error = f"cannot start a process: {reason}"
        finally:
            if log is not None:
                os.close(log)
            if output is not None:
                os.close(output.writer)
        child.due = None
        child.started = time.monotonic()
        child.restart_count += child.exit_code is not None
        child.process, child.output = process, output
        child.error = error
        child.enter("running")
        self._publish()
        if process is None:
            self._handle_end(selector, child)
            return
        selector.register(process, selectors.EVENT_READ, child)

    def _handle_end(self, selector: selectors.BaseSelector, child: _Child) -> None:
        """Record the end of a process, and plan its restart if it failed."""
        process, output = child.process, child.output
        if process is not None:
            with contextlib.suppress(KeyError):
                selector.unregister(process)
        if output is not None:
            with contextlib.suppress(KeyError):
                selector.unregister(output.reader)
            output.finish()
        child.process = child.output = None
        exit_code = None
        if process is not None:
            exit_code, child.error = process.exit_code, process.error
            if process.killed and self._stop_steps is not None:
                self._killed.append(child.name)
        child.exit_code = CANNOT_RUN if exit_code is None else exit_code
        if self._stop_steps is not None:
            child.enter("stopped")
        elif child.exit_code == 0:
            child.enter("finished")
        else:
            child.restart_later()
        self._publish()


def _wait_until(condition: Callable[[], bool], timeout_seconds: float | None) -> bool:
    """Wait until a condition holds; return False at the timeout. A condition variable could be left locked."""
    end = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(CHECK_SECONDS)
    return True


def _split_timeout(first: signal.Signals, seconds: float) -> StopSteps:
    """Return the stop steps that use ``seconds``: most of them for the first signal, the rest for SIGTERM."""
    if first == signal.SIGTERM:
        return [(first, seconds)]
    return [(first, 0.7 * seconds), (signal.SIGTERM, 0.3 * seconds)]
