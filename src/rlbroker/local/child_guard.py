"""A small guard process that runs one command and ends it when the parent process ends.

The parent runs this file by its path (``python -I -S child_guard.py PARENT_PID``), so the guard imports nothing
of rlbroker and starts in 20 ms. Standard input is a pipe from the parent with one JSON document per line: first
the task, later perhaps the stop steps. Standard output is a pipe to the parent: ``{"pid"}`` or ``{"error"}``,
then ``{"exit", "killed"}``. Standard error receives the command's own output.

Why a separate process: an ``atexit`` handler does not survive SIGKILL. PR_SET_PDEATHSIG is tied to the *thread*
that started the child, and it cannot remove a directory. The guard is single-threaded, so it can use both
PR_SET_PDEATHSIG (the command dies even if the guard is killed) and ``preexec_fn``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

#: How long the guard waits for a killed process to disappear. The process may hang in the kernel.
KILL_SECONDS = 5.0
#: How often to check whether the parent has ended, on systems without a pidfd to wait on.
PARENT_CHECK_SECONDS = 0.5
PR_SET_PDEATHSIG = 1

#: File descriptors: messages from the parent, reports to the parent, the command's output.
MESSAGES, REPORTS, OUTPUT = 0, 1, 2


class EventSources:
    """The events that the guard waits for: signals, messages from the parent, and the parent's end."""

    def __init__(self, parent_pid: int) -> None:
        """Install the signal handlers, and watch the parent from now on."""
        self.parent_pid = parent_pid
        self.parent_ended = False
        self.terminated = False
        self.messages: list[Any] = []
        self._partial_line = b""
        self._signals, wakeup = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup)
        # Handlers and not SIG_IGN: the command would inherit an ignored signal.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._sources = {self._signals, MESSAGES}
        # End-of-file on the pipe is not enough: a process that the parent forked keeps the other end open.
        self._parent_pidfd: int | None = None
        with contextlib.suppress(AttributeError, OSError):
            self._parent_pidfd = os.pidfd_open(parent_pid)
            self._sources.add(self._parent_pidfd)

    def wait(self, seconds: float | None) -> None:
        """Wait for the next event, for at most ``seconds``; append the parent's messages to ``messages``."""
        if self._parent_pidfd is None and not self.parent_ended:
            seconds = PARENT_CHECK_SECONDS if seconds is None else min(seconds, PARENT_CHECK_SECONDS)
        ready, _, _ = select.select(self._sources, (), (), seconds)
        if self._signals in ready:
            numbers = set(os.read(self._signals, 4096))
            self.terminated |= bool(numbers & {signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
        if MESSAGES in ready:
            self._read_messages()
        if self._parent_pidfd in ready or os.getppid() != self.parent_pid:
            self.parent_ended = True
        if self.parent_ended:
            self._sources = {self._signals}

    def _read_messages(self) -> None:
        data = os.read(MESSAGES, 65536)
        self.parent_ended |= not data
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        self.messages += [json.loads(line) for line in lines]


def report(**facts: object) -> None:
    """Send a report to the parent, if it still runs."""
    with contextlib.suppress(OSError):
        os.write(REPORTS, json.dumps(facts).encode() + b"\n")


def start_command(task: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start the command in its own process group; on Linux it is killed when the guard ends."""
    guard_pid = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def die_with_guard() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != guard_pid:  # the guard ended before prctl: no signal will come
                os._exit(1)

    child = subprocess.Popen(
        task["command"],
        stdin=subprocess.PIPE if task["input"] else subprocess.DEVNULL,
        stdout=OUTPUT,
        stderr=OUTPUT,
        process_group=0,
        preexec_fn=die_with_guard,
    )
    if child.stdin:
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(task["input"].encode())
    return child


def signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the command and to the processes that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def run_command(events: EventSources, task: dict[str, Any]) -> None:
    """Run the command until it ends. Stop it when the parent asks for that, or when the parent ends."""
    try:
        child = start_command(task)
    except OSError as error:
        report(error=f"cannot run {task['command'][0]}: {error.strerror}")
        return
    report(pid=child.pid)
    steps: list[tuple[int, float]] | None = None  # the signals still to send, each with its seconds
    killed = False
    due: float | None = None
    while child.poll() is None:
        if not events.messages:  # the stop steps may have arrived together with the task
            events.wait(None if due is None else max(0.0, due - time.monotonic()))
        if events.messages:
            steps, due = events.messages.pop(0), 0.0
        elif steps is None and (events.parent_ended or events.terminated):
            steps, due = task["stop"], 0.0
        if steps is None or due is None or time.monotonic() < due or child.poll() is not None:
            continue
        if steps:
            number, seconds = steps.pop(0)
        elif not killed:
            number, seconds, killed = signal.SIGKILL, KILL_SECONDS, True
        else:
            break
        signal_group(child, number)
        due = time.monotonic() + seconds
    signal_group(child, signal.SIGKILL)  # processes that the command started and left running
    report(exit=child.returncode, killed=killed)


def remove_directory(directory: str) -> None:
    """Remove the directory; try again while a dying process still writes into it."""
    for _ in range(20):
        shutil.rmtree(directory, ignore_errors=True)
        if not os.path.exists(directory):  # noqa: PTH110 - the guard starts faster without pathlib
            return
        time.sleep(0.05)


def main() -> None:
    """Wait for the task, run it in its directory, and remove the directory."""
    events = EventSources(int(sys.argv[1]))
    while not events.messages:
        if events.parent_ended or events.terminated:
            return
        events.wait(None)
    task = events.messages.pop(0)
    directory = task["directory"]
    if directory is None:
        run_command(events, task)
        return
    try:
        os.mkdir(directory, 0o700)  # noqa: PTH102 - the guard starts faster without pathlib
    except OSError as error:
        report(error=f"cannot make the directory {directory}: {error.strerror}")
        return
    try:
        run_command(events, task)
    finally:
        remove_directory(directory)


if __name__ == "__main__":
    main()
