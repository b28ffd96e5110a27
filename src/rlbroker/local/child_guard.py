"""A small process that runs one command, and ends it when whoever asked for it is gone.

Run by path (``python -I -S guard.py PARENT_PID``), so that it needs nothing of rlbroker and starts in 20 ms.
Standard input is a pipe from the parent, one JSON document per line: first what to run, later perhaps how to
stop it. Standard output is a pipe to the parent: ``{"pid"}`` or ``{"error"}``, then ``{"exit", "killed"}``.
Standard error is where the command's own output goes.

Why a process: an ``atexit`` handler does not survive SIGKILL, and PR_SET_PDEATHSIG is tied to the *thread*
that started the child and cannot remove a directory. The guard is single-threaded, so it may use both
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

#: How long a killed process may take to disappear (it may hang in the kernel) before the guard gives up.
KILL_SECONDS = 5.0
#: Where the parent's end cannot be waited for (no pidfd), how often to look whether we were orphaned.
ORPHAN_CHECK_SECONDS = 0.5
PR_SET_PDEATHSIG = 1

COMMANDS, REPORTS, OUTPUT = 0, 1, 2


class EventSources:
    """Everything the guard listens to: its signals, the parent's pipe, and the parent's life."""

    def __init__(self, parent_pid: int) -> None:
        """Listen from here on."""
        self.parent_pid = parent_pid
        self.parent_gone = False
        self.terminated = False
        self.messages: list[Any] = []
        self._partial = b""
        self._signals, wakeup = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup)
        # Handlers and not SIG_IGN: an ignored signal would stay ignored in the command.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._sources = {self._signals, COMMANDS}
        # The pipe alone is not enough: a process that the parent forked holds the other end open too.
        self._parent: int | None = None
        with contextlib.suppress(AttributeError, OSError):
            self._parent = os.pidfd_open(parent_pid)
            self._sources.add(self._parent)

    def listen(self, seconds: float | None) -> None:
        """Wait for anything to happen, at most so long; what the parent says is added to ``messages``."""
        if self._parent is None and not self.parent_gone:
            seconds = ORPHAN_CHECK_SECONDS if seconds is None else min(seconds, ORPHAN_CHECK_SECONDS)
        ready, _, _ = select.select(self._sources, (), (), seconds)
        if self._signals in ready:
            numbers = set(os.read(self._signals, 4096))
            self.terminated |= bool(numbers & {signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
        if COMMANDS in ready:
            self._read()
        if self._parent in ready or os.getppid() != self.parent_pid:
            self.parent_gone = True
        if self.parent_gone:
            self._sources = {self._signals}

    def _read(self) -> None:
        piece = os.read(COMMANDS, 65536)
        self.parent_gone |= not piece
        *lines, self._partial = (self._partial + piece).split(b"\n")
        self.messages += [json.loads(line) for line in lines]


def report(**facts: object) -> None:
    """Tell the parent, if it is still there."""
    with contextlib.suppress(OSError):
        os.write(REPORTS, json.dumps(facts).encode() + b"\n")


def start(task: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start the command in a process group of its own, to be killed if the guard is."""
    guard_pid = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def die_with_guard() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != guard_pid:  # it died before the line above: no signal will come
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
    """Signal the command and whatever it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def run(ears: EventSources, task: dict[str, Any]) -> None:
    """Run the command to its end, which the parent may ask for, or bring about by going away."""
    try:
        child = start(task)
    except OSError as error:
        report(error=f"cannot run {task['command'][0]}: {error.strerror}")
        return
    report(pid=child.pid)
    steps: list[tuple[int, float]] | None = None  # signals to send, each with the time it is given
    killed = False
    due: float | None = None
    while child.poll() is None:
        if not ears.messages:  # the order to stop may have come together with the task
            ears.listen(None if due is None else max(0.0, due - time.monotonic()))
        if ears.messages:
            steps, due = ears.messages.pop(0), 0.0
        elif steps is None and (ears.parent_gone or ears.terminated):
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
    signal_group(child, signal.SIGKILL)  # what the command started and left behind
    report(exit=child.returncode, killed=killed)


def remove(directory: str) -> None:
    """Remove the directory; again if a process that is just dying wrote into it meanwhile."""
    for _ in range(20):
        shutil.rmtree(directory, ignore_errors=True)
        if not os.path.exists(directory):  # noqa: PTH110 - the guard starts faster without pathlib
            return
        time.sleep(0.05)


def main() -> None:
    """Wait for the task, run it in its directory, and leave nothing."""
    ears = EventSources(int(sys.argv[1]))
    while not ears.messages:
        if ears.parent_gone or ears.terminated:
            return
        ears.listen(None)
    task = ears.messages.pop(0)
    directory = task["directory"]
    if directory is None:
        run(ears, task)
        return
    try:
        os.mkdir(directory, 0o700)  # noqa: PTH102 - the guard starts faster without pathlib
    except OSError as error:
        report(error=f"cannot make the directory {directory}: {error.strerror}")
        return
    try:
        run(ears, task)
    finally:
        remove(directory)


if __name__ == "__main__":
    main()
