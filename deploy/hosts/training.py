"""The demo's training as processes on the hosts, and what its learner reports."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from deploy.hosts.network import Host
from rlbroker.demo.training_progress import DemoWorkerStatus, Progress, parse_report

#: How long a process gets to end, after a signal or by itself.
END_SECONDS = 20.0

#: The same, where something failed or a person waits.
HURRY_SECONDS = 5.0

#: Of a process that failed, so much of what it said last is shown.
TAIL_CHARACTERS = 2000


@dataclass
class Course:
    """What the learner has reported so far; times are those of `time.monotonic()` here."""

    batches: list[tuple[float, int]] = field(
        default_factory=list
    )  #: when the learner got it; of which worker
    reports: list[tuple[float, Progress]] = field(default_factory=list)

    @classmethod
    def of(cls, lines: IO[str]) -> Course:
        """Read the learner's lines in the background."""
        course = cls()
        threading.Thread(target=course._read, args=(lines,), name="reports", daemon=True).start()
        return course

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            now, report = time.monotonic(), parse_report(line)
            if isinstance(report, Progress):
                began = now - report.seconds
                self.batches += [(began + seconds, worker) for seconds, worker, _ in report.batches]
                self.reports.append((now, report))

    @property
    def version(self) -> int:
        """The newest version; 0 before the first."""
        return self.reports[-1][1].version if self.reports else 0

    @property
    def steps(self) -> int:
        """Steps of environments that the learner has trained on."""
        return self.reports[-1][1].steps if self.reports else 0

    def worker(self, worker_id: int) -> DemoWorkerStatus | None:
        """Give what the learner's roster says of a worker; None if it is not there."""
        roster = self.reports[-1][1].workers if self.reports else ()
        return next((one for one in roster if one.worker_id == worker_id), None)

    def states(self, workers: Sequence[int]) -> set[str]:
        """Give in which states these workers are."""
        return {one.state if one else "missing" for one in map(self.worker, workers)}

    def alive_since(self, workers: Sequence[int], since: float) -> float | None:
        """Give when all of these workers were first seen alive after a time; None if they were not yet."""
        for at, report in list(self.reports):
            alive = {one.worker_id for one in report.workers if one.state == "alive"}
            if at >= since and alive.issuperset(workers):
                return at
        return None

    def collected(self, worker: int, since: float, until: float = float("inf")) -> list[float]:
        """Give when batches of a worker were collected within a time."""
        return [at for at, sender in list(self.batches) if sender == worker and since <= at < until]


class Processes:
    """Processes on the hosts; each is ended by its own pid."""

    def __init__(self, folder: Path) -> None:
        """Write what each of them says into the folder, a file for each."""
        self._folder = folder
        self._running: dict[str, subprocess.Popen[str]] = {}

    def start(
        self, name: str, host: Host, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        """Start a process; stdout is a pipe for who started it, the rest goes to its file."""
        with self.log_of(name).open("w") as log:
            process = subprocess.Popen(
                host.command(*command),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for us alone: we end them in order
            )
        self._running[name] = process
        return process

    def log_of(self, name: str) -> Path:
        """Give the file that holds what a process says."""
        return self._folder / f"{name}.log"

    def check(self) -> None:
        """Find those that ended.

        Raises:
            RuntimeError: one did.
        """
        for name, process in self._running.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with exit code {process.returncode}")

    def tail_of(self, name: str) -> str:
        """Give what a process said last."""
        return self.log_of(name).read_text(errors="replace")[-TAIL_CHARACTERS:].strip()

    def signal(self, name: str, number: signal.Signals) -> None:
        """Ask one to end."""
        with contextlib.suppress(ProcessLookupError):
            self._running[name].send_signal(number)

    def wait(self, name: str, seconds: float = END_SECONDS) -> int:
        """Wait for the end of one, and end it by force if need be; give its exit code."""
        process = self._running.pop(name)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    @contextlib.contextmanager
    def ended_at_last(self) -> Iterator[Processes]:
        """End those that still run when the block ends: the first one, which the others need, at last."""
        try:
            yield self
        finally:
            names = list(self._running)
            for group in (names[1:], names[:1]):
                for name in group:
                    self.signal(name, signal.SIGTERM)
                end = time.monotonic() + HURRY_SECONDS
                for name in group:
                    self.wait(name, max(0.0, end - time.monotonic()))
