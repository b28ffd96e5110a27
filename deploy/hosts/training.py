"""The processes of the demo on the hosts, and the reports of its learner."""

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

#: How long a process may take to end, after a signal or on its own.
END_SECONDS = 20.0

#: The same, after a failure or when a user waits.
SHORT_END_SECONDS = 5.0

#: How many characters of the output are shown of a process that failed.
TAIL_CHARACTERS = 2000


@dataclass
class LearnerReports:
    """The reports of the learner so far. Times are those of `time.monotonic()` in this process."""

    batches: list[tuple[float, int]] = field(default_factory=list)  #: the time of collection and the worker
    reports: list[tuple[float, Progress]] = field(default_factory=list)

    @classmethod
    def read_from(cls, lines: IO[str]) -> LearnerReports:
        """Return an object that reads the learner's lines in a background thread."""
        reports = cls()
        threading.Thread(target=reports._read, args=(lines,), name="reports", daemon=True).start()
        return reports

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            now, report = time.monotonic(), parse_report(line)
            if isinstance(report, Progress):
                started = now - report.seconds
                self.batches += [(started + seconds, worker) for seconds, worker, _ in report.batches]
                self.reports.append((now, report))

    @property
    def version(self) -> int:
        """The latest version; 0 before the first."""
        return self.reports[-1][1].version if self.reports else 0

    @property
    def steps(self) -> int:
        """The number of environment steps that the learner has collected."""
        return self.reports[-1][1].steps if self.reports else 0

    def worker(self, worker_id: int) -> DemoWorkerStatus | None:
        """Return a worker's status in the learner's roster, or None if the worker is not in it."""
        roster = self.reports[-1][1].workers if self.reports else ()
        return next((status for status in roster if status.worker_id == worker_id), None)

    def states(self, workers: Sequence[int]) -> set[str]:
        """Return the states of these workers."""
        return {status.state if status else "missing" for status in map(self.worker, workers)}

    def time_all_alive(self, workers: Sequence[int], since: float) -> float | None:
        """Return the time at which all these workers were first seen alive since `since`, or None."""
        for at, report in list(self.reports):
            alive = {status.worker_id for status in report.workers if status.state == "alive"}
            if at >= since and alive.issuperset(workers):
                return at
        return None

    def collection_times(self, worker: int, since: float, until: float = float("inf")) -> list[float]:
        """Return the times at which batches of a worker were collected, from `since` to `until`."""
        return [at for at, sender in list(self.batches) if sender == worker and since <= at < until]


class Processes:
    """The processes on the hosts."""

    def __init__(self, folder: Path) -> None:
        """Write the stderr of each process to its own file in the folder."""
        self._folder = folder
        self._running: dict[str, subprocess.Popen[str]] = {}

    def start(
        self, name: str, host: Host, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        """Start a process. Its stdout is a pipe to the caller, its stderr goes to its file."""
        with self.log_of(name).open("w") as log:
            process = subprocess.Popen(
                host.command(*command),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches only this process, which ends the others in order
            )
        self._running[name] = process
        return process

    def log_of(self, name: str) -> Path:
        """Return the path of the file with a process's stderr."""
        return self._folder / f"{name}.log"

    def check(self) -> None:
        """Check that all processes still run.

        Raises:
            RuntimeError: a process has ended.
        """
        for name, process in self._running.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with exit code {process.returncode}")

    def tail_of(self, name: str) -> str:
        """Return the end of a process's stderr."""
        return self.log_of(name).read_text(errors="replace")[-TAIL_CHARACTERS:].strip()

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self._running[name].send_signal(number)

    def wait(self, name: str, seconds: float = END_SECONDS) -> int:
        """Wait until a process ends, and kill it after the given time; return its exit code."""
        process = self._running.pop(name)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    @contextlib.contextmanager
    def end_at_exit(self) -> Iterator[Processes]:
        """End the running processes at the end of the block. The server was started first and is ended last."""
        try:
            yield self
        finally:
            names = list(self._running)
            for group in (names[1:], names[:1]):
                for name in group:
                    self.signal(name, signal.SIGTERM)
                end = time.monotonic() + SHORT_END_SECONDS
                for name in group:
                    self.wait(name, max(0.0, end - time.monotonic()))
