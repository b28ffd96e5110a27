"""Keeps local processes running: restarts those that fail, and lets none outlive this process."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import random
import re
import selectors
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from rlbroker.backend.text import counted
from rlbroker.errors import Closed, InvalidArgument
from rlbroker.local.child_process import GUARD_MARGIN_SECONDS, GuardedProcess, StopSteps

_logger = logging.getLogger("rlbroker")

#: A longer line of output is handed on in pieces, so that a process without line ends fills no memory.
LONGEST_LINE_BYTES = 64 * 1024
#: How long `Supervisor.start` waits to see its processes; they need a fraction of a second.
START_SECONDS = 10.0
#: Shells' exit code for a command that cannot be run.
CANNOT_RUN = 127
STANDARD_ERROR = 2

State = Literal["running", "backing off", "finished", "failed", "stopped"]


@dataclass(frozen=True)
class ProcessStatus:
    """What one supervised process does now."""

    name: str
    #: "finished" ended with exit code 0; "failed" was restarted too often and is given up.
    state: State
    #: None while it does not run, and for the first milliseconds of a restart.
    pid: int | None
    restarts: int
    #: Of its last end; negative for a signal, as in `subprocess`; None before the first end.
    exit_code: int | None
    #: Why it could not be started or watched the last time, if so.
    error: str | None
    #: When it came into this state: seconds since the epoch.
    since: float


def backoff_seconds(failures: int, *, first: float, longest: float, chance: float) -> float:
    """Return the pause after so many failures in a row: doubling, and a random half of it.

    ``chance`` is a random number from 0 to 1. Without it workers that fail together (the server went away)
    would come back together, again and again.

    >>> [backoff_seconds(n, first=0.5, longest=3.0, chance=1.0) for n in (1, 2, 3, 4, 2000)]
    [0.5, 1.0, 2.0, 3.0, 3.0]
    >>> backoff_seconds(3, first=0.5, longest=3.0, chance=0.0)
    1.0
    """
    pause = min(longest, first * 2.0 ** min(failures - 1, 60))
    return pause * (0.5 + 0.5 * chance)


class _Output:
    """Hands a process's output on, line by line, without ever waiting for it."""

    def __init__(self, name: str, handler: Callable[[str, str], None]) -> None:
        self.name = name
        self._handler = handler
        self._partial = b""
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)

    def pump(self) -> None:
        """Hand on what is there, at most one piece, so that one loud process does not silence the others."""
        if piece := self._read():
            self._take(piece)

    def finish(self) -> None:
        """Hand on all that was written, the last line without an end too."""
        while piece := self._read():
            self._take(piece)
        if self._partial:
            self._hand_on(self._partial)
        os.close(self.reader)

    def _read(self) -> bytes | None:
        try:
            return os.read(self.reader, LONGEST_LINE_BYTES)
        except BlockingIOError:
            return None

    def _take(self, piece: bytes) -> None:
        *lines, self._partial = (self._partial + piece).split(b"\n")
        for line in lines:
            self._hand_on(line)
        while len(self._partial) >= LONGEST_LINE_BYTES:
            self._hand_on(self._partial[:LONGEST_LINE_BYTES])
            self._partial = self._partial[LONGEST_LINE_BYTES:]

    def _hand_on(self, line: bytes) -> None:
        try:
            self._handler(self.name, line.decode(errors="replace"))
        except Exception:
            _logger.exception("the output handler failed on a line of %s", self.name)


class _Child:
    """One name's command, and the process that runs it now, if any."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.command = command
        self.process: GuardedProcess | None = None
        self.output: _Output | None = None
        self.restarts: deque[float] = deque()  # when, within the window
        self.restart_count = 0
        self.failures = 0  # in a row
        self.started = 0.0
        self.due: float | None = None  # when to start it again
        self.exit_code: int | None = None
        self.error: str | None = None
        self.state: State = "stopped"
        self.since = time.time()

    def enter(self, state: State) -> None:
        self.state = state
        self.since = time.time()

    def has_begun(self) -> bool:
        """Whether its first start has succeeded or failed."""
        return self.exit_code is not None or (self.process is not None and self.process.pid is not None)

    def status(self) -> ProcessStatus:
        pid = None if self.process is None else self.process.pid
        return ProcessStatus(
            self.name, self.state, pid, self.restart_count, self.exit_code, self.error, self.since
        )


class Supervisor:
    """Runs a command per name, and starts it again when it fails.

    A process that ends with exit code 0 is finished. Any other end is a failure: it is started again after a
    pause that doubles from ``first_backoff_seconds`` to ``longest_backoff_seconds`` and begins anew after a
    run of ``healthy_seconds``; after ``max_restarts`` within ``restart_window_seconds`` it is given up.

    ``environment`` is added to this process's own. Output (both streams, in order) goes to
    ``log_directory/<name>.log``, appended; or line by line to ``on_output(name, line)``, called in the
    supervisor's thread, where it must be quick; or else to this process's standard error.

    To stop, ``stop_signal`` is sent to the process and all that it started, then SIGTERM, then SIGKILL,
    within ``stop_timeout_seconds``. What a process started ends with it. All of them end with this process,
    whatever ends it, SIGKILL too; Ctrl-C in the terminal reaches this process only.

    Raises `InvalidArgument`. Safe to use from several threads, not in a forked child.
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
        """Check the arguments; nothing starts yet."""
        for name, command in commands.items():
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
                raise InvalidArgument(f"a name may have letters, digits and _ . - in it: not {name!r}")
            if isinstance(command, str) or not command:
                raise InvalidArgument(f"the command of {name!r} must be a list of arguments, not {command!r}")
        if log_directory is not None and on_output is not None:
            raise InvalidArgument("give log_directory or on_output, not both")
        if not 0 < first_backoff_seconds <= longest_backoff_seconds:
            raise InvalidArgument("first_backoff_seconds must be positive, and the longest no shorter")
        if max_restarts < 0 or restart_window_seconds <= 0 or healthy_seconds < 0 or stop_timeout_seconds < 0:
            raise InvalidArgument("max_restarts and the times must not be negative, nor the window zero")
        self._environment = dict(environment or {})
        self._log_directory = log_directory
        self._on_output = on_output
        self._first_backoff = first_backoff_seconds
        self._longest_backoff = longest_backoff_seconds
        self._healthy_seconds = healthy_seconds
        self._max_restarts = max_restarts
        self._window = restart_window_seconds
        self._stop_signal = stop_signal
        self._stop_timeout = stop_timeout_seconds
        self._children = {name: _Child(name, list(command)) for name, command in commands.items()}
        self._changed = threading.Condition()  # guards the children's fields, and tells of their changes
        self._stop_lock = threading.Lock()
        self._stop_steps: StopSteps | None = None  # once set, it is time to stop
        self._killed: list[str] = []
        self._thread: threading.Thread | None = None
        self._wake_reader = self._wake_writer = -1
        self._owner_pid = os.getpid()

    def start(self) -> Self:
        """Start every process, and the thread that watches them. Raises `Closed` the second time."""
        if self._thread is not None:
            raise Closed("a Supervisor starts once: make a new one")
        if self._log_directory is not None:
            self._log_directory.mkdir(parents=True, exist_ok=True)
        self._wake_reader, self._wake_writer = os.pipe()
        for child in self._children.values():
            child.due = 0.0
        self._thread = threading.Thread(target=self._run, name="rlbroker-supervisor", daemon=True)
        atexit.register(self.stop)
        try:
            self._thread.start()
            with self._changed:
                begun = self._changed.wait_for(
                    lambda: all(child.has_begun() for child in self._children.values()), START_SECONDS
                )
            if not begun:
                _logger.warning("some processes have not started within %g s", START_SECONDS)
        except BaseException:  # Ctrl-C too must leave no process
            self.stop()
            raise
        return self

    def status(self) -> dict[str, ProcessStatus]:
        """Return what each process does, by name."""
        with self._changed:
            return {name: child.status() for name, child in self._children.items()}

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until no process runs or will be started again; return whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy(), timeout_seconds)

    def stop(self, timeout_seconds: float | None = None) -> list[str]:
        """Stop every process; return the names of those that had to be killed.

        Bounded by the timeout (default: ``stop_timeout_seconds``) and a few seconds for what hangs in the
        kernel. Calling it again does nothing and returns the same.
        """
        if os.getpid() != self._owner_pid or self._thread is None:
            return []
        timeout = self._stop_timeout if timeout_seconds is None else timeout_seconds
        if threading.current_thread() is self._thread:  # from on_output: it cannot wait for itself
            self._request_stop(timeout)
            return []
        with self._stop_lock:
            if self._thread.is_alive():
                self._request_stop(timeout)
                self._thread.join(timeout + GUARD_MARGIN_SECONDS + 1.0)
            if self._thread.is_alive():  # on_output does not return
                for child in self._children.values():
                    process = child.process
                    if process is not None:
                        process.kill()
                        self._killed.append(child.name)
            elif self._wake_writer >= 0:
                os.close(self._wake_reader)
                os.close(self._wake_writer)
                self._wake_reader = self._wake_writer = -1
            atexit.unregister(self.stop)
            return sorted(set(self._killed))

    def __enter__(self) -> Self:
        """Start."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()

    def _request_stop(self, timeout_seconds: float) -> None:
        self._stop_steps = _stop_steps(self._stop_signal, timeout_seconds)
        os.write(self._wake_writer, b"s")

    def _busy(self) -> bool:
        return any(child.process is not None or child.due is not None for child in self._children.values())

    def _run(self) -> None:
        """Watch the processes, in the supervisor's own thread, which alone touches them."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_reader, selectors.EVENT_READ)
            try:
                while self._stop_steps is None:
                    self._start_due(selector)
                    self._handle_events(selector, self._next_due())
                self._stop_all(selector, self._stop_steps)
            finally:
                # If this thread failed, nobody watches any more: better no process than a forgotten one.
                self._stop_steps = self._stop_steps or ()
                for child in self._children.values():
                    if child.process is not None:
                        child.process.kill()
                        child.process.wait(1.0)
                        self._bury(selector, child)

    def _next_due(self) -> float | None:
        return min((child.due for child in self._children.values() if child.due is not None), default=None)

    def _start_due(self, selector: selectors.BaseSelector) -> None:
        for child in self._children.values():
            if child.due is not None and child.due <= time.monotonic():
                self._launch(selector, child)

    def _handle_events(self, selector: selectors.BaseSelector, until: float | None) -> None:
        """Wait for news of any process, or for the moment ``until``, and take it in."""
        for key, _ in selector.select(None if until is None else max(0.0, until - time.monotonic())):
            child: _Child | None = key.data
            if child is None:
                os.read(self._wake_reader, 4096)
            elif isinstance(key.fileobj, GuardedProcess):
                with self._changed:
                    known, ended = key.fileobj.pid is not None, key.fileobj.pump()
                    self._changed.notify_all()
                if ended:
                    self._bury(selector, child)
                elif not known and key.fileobj.pid is not None and child.output is not None:
                    # Not before: a handler that hangs must not keep its process from being known.
                    selector.register(child.output.reader, selectors.EVENT_READ, child)
            elif child.output is not None:
                child.output.pump()

    def _stop_all(self, selector: selectors.BaseSelector, steps: StopSteps) -> None:
        deadline = time.monotonic() + sum(seconds for _, seconds in steps) + GUARD_MARGIN_SECONDS
        with self._changed:
            for child in self._children.values():
                if child.due is not None:
                    child.due = None
                    child.enter("stopped")
                elif child.process is not None:
                    child.process.ask_to_stop(steps)
            self._changed.notify_all()
        while self._busy() and time.monotonic() < deadline:
            self._handle_events(selector, deadline)

    def _launch(self, selector: selectors.BaseSelector, child: _Child) -> None:
        log: int | None = None
        output: _Output | None = None
        process: GuardedProcess | None = None
        error = None
        try:
            if self._on_output is not None:
                output = _Output(child.name, self._on_output)
            elif self._log_directory is not None:
                path = self._log_directory / f"{child.name}.log"
                log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            process = GuardedProcess(
                child.command,
                stop_steps=_stop_steps(self._stop_signal, self._stop_timeout),
                output=output.writer if output is not None else STANDARD_ERROR if log is None else log,
                environment={**os.environ, **self._environment},
            )
        except OSError as reason:  # no more processes, files, or space: that may pass
            error = f"cannot start a process: {reason}"
        finally:
            if log is not None:
                os.close(log)
            if output is not None:
                os.close(output.writer)
        with self._changed:
            child.due = None
            child.started = time.monotonic()
            child.restart_count += child.exit_code is not None
            child.process, child.output = process, output
            child.error = error
            child.enter("running")
        if process is None:
            self._bury(selector, child)
            return
        selector.register(process, selectors.EVENT_READ, child)

    def _bury(self, selector: selectors.BaseSelector, child: _Child) -> None:
        """Take note of an end, and decide what comes next."""
        process, output = child.process, child.output
        if process is not None:
            with contextlib.suppress(KeyError):
                selector.unregister(process)
        if output is not None:
            with contextlib.suppress(KeyError):
                selector.unregister(output.reader)
            output.finish()
        with self._changed:
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
                self._plan_restart(child)
            self._changed.notify_all()

    def _plan_restart(self, child: _Child) -> None:
        now = time.monotonic()
        reason = child.error or f"ended with exit code {child.exit_code}"
        if now - child.started >= self._healthy_seconds:
            child.failures = 0
        child.failures += 1
        while child.restarts and child.restarts[0] <= now - self._window:
            child.restarts.popleft()
        if len(child.restarts) >= self._max_restarts:
            restarts = counted(len(child.restarts), "restart")
            _logger.error("%s %s; it is given up after %s", child.name, reason, restarts)
            child.enter("failed")
            return
        child.restarts.append(now)
        pause = backoff_seconds(
            child.failures,
            first=self._first_backoff,
            longest=self._longest_backoff,
            chance=random.SystemRandom().random(),
        )
        _logger.warning("%s %s; it is started again in %.2g s", child.name, reason, pause)
        child.due = now + pause
        child.enter("backing off")


def _stop_steps(first: signal.Signals, seconds: float) -> StopSteps:
    if first == signal.SIGTERM:
        return [(first, seconds)]
    return [(first, 0.7 * seconds), (signal.SIGTERM, 0.3 * seconds)]
