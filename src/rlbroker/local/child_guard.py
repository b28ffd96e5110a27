"""A small guard process that runs one command and ends it when the parent process ends.

The parent runs this file by its path (``python -I -S child_guard.py PARENT_PID``), so the guard imports nothing
of rlbroker and starts in 20 ms. Standard input is a pipe from the parent with the task, one line of JSON; it stays
open until the parent ends. SIGTERM to the guard stops the command. Standard output is a pipe to the parent:
``{"pid"}`` or ``{"error"}``, then ``{"exit", "killed"}``. Standard error receives the command's own output.

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

#: File descriptors: the task from the parent, reports to the parent, the command's output.
TASK, REPORTS, OUTPUT = 0, 1, 2
#: Signals that make the guard stop the command.
STOP_SIGNALS = {signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}


class EventSources:
    """The events that the guard waits for: signals, the task, and the parent's end."""

    def __init__(self, parent_pid: int) -> None:
        """Install the signal handlers, and watch the parent from now on."""
        self.parent_pid = parent_pid
        self.received = b""
        #: Whether the command is to end: the parent has ended, or asks for it.
        self.stopping = False
        self._signals, wakeup = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup)
        # Handlers and not SIG_IGN: the command would inherit an ignored signal.
        for number in (signal.SIGINT, signal.SIGCHLD, *STOP_SIGNALS):
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._sources = {self._signals, TASK}
        # End-of-file on the pipe is not enough: a process that the parent forked keeps the other end open.
        self._parent_pidfd: int | None = None
        with contextlib.suppress(AttributeError, OSError):
            self._parent_pidfd = os.pidfd_open(parent_pid)
            self._sources.add(self._parent_pidfd)

    def wait(self, seconds: float | None) -> None:
        """Wait for the next event, for at most ``seconds``; append what the parent sent to ``received``."""
        if self._parent_pidfd is None and not self.stopping:
            seconds = PARENT_CHECK_SECONDS if seconds is None else min(seconds, PARENT_CHECK_SECONDS)
        ready, _, _ = select.select(self._sources, (), (), seconds)
        if self._signals in ready:
            self.stopping |= not STOP_SIGNALS.isdisjoint(os.read(self._signals, 4096))
        if TASK in ready:
            data = os.read(TASK, 65536)
            self.received += data
            self.stopping |= not data
        if self._parent_pidfd in ready or os.getppid() != self.parent_pid:
            self.stopping = True
        if self.stopping:
            self._sources = {self._signals}


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
    while child.poll() is None and not events.stopping:
        events.wait(None)
    killed = False
    for number, seconds in (*task["stop"], (signal.SIGKILL, KILL_SECONDS)):
        if child.poll() is not None:
            break
        signal_group(child, number)
        killed = number == signal.SIGKILL
        due = time.monotonic() + seconds
        while child.poll() is None and (left := due - time.monotonic()) > 0:
            events.wait(left)
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
    while not events.received.endswith(b"\n"):
        if events.stopping:
            return
        events.wait(None)
    task = json.loads(events.received)
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
