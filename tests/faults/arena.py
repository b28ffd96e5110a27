"""One run under faults: its server, its proxy, its processes, their logs, and the checks of the result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

from proxy import Proxy
from redis_cluster import Cluster
from sentinel_trio import SentinelTrio
from servers import FaultyServer

from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import text_fields
from rlbroker.control.outcomes import WorkerOutcomes

HERE = Path(__file__).parent


class LoggedProcess:
    """A process that logs lines of JSON."""

    def __init__(self, program: str, arguments: dict[str, Any]) -> None:
        self.log = Path(arguments["log"])
        self.arguments, self._program = arguments, program
        self._read, self._lines = 0, dict[str, list[dict[str, Any]]]()
        self.interrupted = False  #: whether an incarnation was killed or fenced during an operation
        with self.log.with_suffix(".stderr").open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", str(HERE / program), json.dumps(arguments)],
                stdout=stderr,
                stderr=stderr,
            )

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the logged lines with this field, of all incarnations that share the log."""
        if self.log.exists():
            with self.log.open() as log:
                log.seek(self._read)
                whole, newline, _ = log.read().rpartition("\n")  # the last line may be incomplete
            self._read += len(whole) + len(newline)
            for line in map(json.loads, filter(None, whole.split("\n"))):
                for field in line:
                    self._lines.setdefault(field, []).append(line)
        return self._lines.get(name, [])

    @property
    def is_endless(self) -> bool:
        """Whether it sends batches until SIGUSR1."""
        return self.arguments.get("batches", 0) is None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.interrupted = True
        self.process.wait()

    def restart(self, **changes: Any) -> LoggedProcess:
        """Start the program again with the same log, after the process died."""
        process = LoggedProcess(self._program, self.arguments | changes)
        process.interrupted = True
        return process

    def stderr_tail(self) -> str:
        return self.log.with_suffix(".stderr").read_text()[-3000:]


class Arena:
    """A learner and workers on one server, behind a proxy, or on a Cluster or a Sentinel trio, without a proxy."""

    def __init__(self, server: FaultyServer | Cluster | SentinelTrio, folder: Path, seed: int) -> None:
        self.server, self.folder, self.seed = server, folder, seed
        # Nodes of a group announce their own addresses, so clients would bypass a proxy.
        self._proxy = Proxy(server.address, seed) if isinstance(server, FaultyServer) else None
        self.run = f"faults-{seed}"
        self.keys = Keys(self.run)
        self.workers: list[LoggedProcess] = []
        self.learner: LoggedProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in (*self.workers, self.learner):
            if process is not None:
                process.kill()
        if self._proxy:
            self._proxy.close()

    @property
    def proxy(self) -> Proxy:
        assert self._proxy, "only a single server has a proxy"
        return self._proxy

    def _url(self, *, direct: bool) -> str:
        return self._proxy.url if self._proxy and not direct else self.server.url

    def start_learner(self, *, direct: bool = False, **options: Any) -> LoggedProcess:
        """Start the learner with options of fault_learner.py."""
        arguments = {
            "url": self._url(direct=direct),
            "run": self.run,
            "log": str(self.folder / "learner.log"),
            "checkpoint": str(self.folder / "checkpoint.json"),
            "finish": str(self.folder / "finish"),
            "pause": str(self.folder / "pause"),
            "timeout": 10.0,
            "versions": 5,
            "version_seconds": 0.1,
            "commands": 3,
            "die": None,
            "max_batches": 64,
            "collect_seconds": 0.0,
            "settings": {},
        }
        self.learner = LoggedProcess("fault_learner.py", arguments | options)
        return self.learner

    def start_worker(
        self, worker_id: int, *, name: str = "", direct: bool = False, **options: Any
    ) -> LoggedProcess:
        """Start a worker with options of fault_worker.py."""
        arguments = {
            "url": self._url(direct=direct),
            "run": self.run,
            "log": str(self.folder / f"worker-{worker_id}{name}.log"),
            "worker_id": worker_id,
            "level": "redis",
            "when_full": None,
            "timeout": 10.0,
            "batches": 100,
            "bytes": 100,
            "pause": 0.0,
        }
        worker = LoggedProcess("fault_worker.py", arguments | options)
        self.workers.append(worker)
        return worker

    def wait(self, what: str, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
        """Wait until a condition holds; fail with the logged errors if it times out, or if a process fails."""
        end = time.monotonic() + seconds
        while True:
            found = condition()
            if found:
                return found
            for process in (*self.workers, self.learner):
                if process is not None and process.process.poll() not in (None, 0, -signal.SIGKILL):
                    raise AssertionError(
                        f"seed {self.seed}: {process.log.name} failed:\n{process.stderr_tail()}"
                    )
            if time.monotonic() > end:
                tails = "\n".join(
                    f"{one.log.name}: {one.stderr_tail()}" for one in (*self.workers, self.learner) if one
                )
                raise AssertionError(
                    f"seed {self.seed}: timed out after {seconds:g} s waiting until {what}\n{tails}"
                )
            time.sleep(0.02)

    def count_produced(self) -> int:
        """Return the number of batches that the workers have logged."""
        return sum(len(worker.lines("produced")) for worker in self.workers)

    def count_inserted(self) -> int:
        """Return the number of batches that all incarnations of the learner have logged."""
        assert self.learner is not None
        return len(self.learner.lines("inserted"))

    def all_workers_send(self) -> bool:
        """Whether the learner has logged batches of every worker; processes may take seconds to start."""
        assert self.learner is not None
        return len({line["inserted"][0] for line in self.learner.lines("inserted")}) == len(self.workers)

    def start_all(self, level: str) -> None:
        """Start a learner and three endless workers, and wait until the learner inserts batches of each."""
        learner = self.start_learner(versions=0, version_seconds=0.3)
        self.wait("the learner has opened the run", lambda: learner.lines("opened"))
        for number in range(3):
            self.start_worker(number, batches=None, pause=0.01, level=level)
        self.wait(
            "the learner inserts batches of every worker",
            lambda: self.count_inserted() > 100 and self.all_workers_send(),
        )

    def pause(self) -> None:
        """Pause the learner, so that batches wait on the server."""
        (self.folder / "pause").touch()

    def resume(self) -> None:
        """Resume the learner."""
        (self.folder / "pause").unlink(missing_ok=True)

    def finish(self, seconds: float = 90.0) -> dict[str, Any]:
        """Finish the workers, then the learner, and return the learner's report."""
        learner = self.learner
        assert learner is not None
        running = [worker for worker in self.workers if worker.process.poll() is None]
        for worker in running:
            if worker.is_endless:
                worker.signal(signal.SIGUSR1)
        self.wait(
            "the workers have sent all batches",
            lambda: all(one.lines("finished") for one in running),
            seconds,
        )
        (self.folder / "finish").touch()
        (line,) = self.wait("the learner has reported", lambda: learner.lines("report"), seconds)
        self.wait(
            "all processes have ended",
            lambda: all(one.process.poll() is not None for one in (*running, learner)),
            30.0,
        )
        report: dict[str, Any] = line["report"]
        return report

    def finish_and_check(self, level: str) -> list[tuple[int, int, int]]:
        """Finish all processes, check the result, and return the lost batches; at level `learner` none may be lost."""
        return self.check(self.finish(120.0), lost="nothing" if level == "learner" else "vanished")

    def check(
        self, report: dict[str, Any], *, lost: str = "nothing", hostile_count: int = 0
    ) -> list[tuple[int, int, int]]:
        """Check that each produced batch was inserted once and in order, or counted as lost, and that all is final.

        Args:
            report: the learner's report.
            lost: `nothing`, or the reason under which each missing batch must be counted.
            hostile_count: the number of forged batches, which may be counted as corrupt.

        Returns:
            The worker, incarnation and sequence of each missing batch.
        """
        produced: set[tuple[int, int, int]] = {
            (self._worker_id(worker), *line["produced"])
            for worker in self.workers
            for line in worker.lines("produced")
        }
        buffer = json.loads((self.folder / "checkpoint.json").read_text())["buffer"]
        inserted = [tuple(one[:3]) for one in buffer]
        prefix = f"seed {self.seed}: "
        duplicates = [one for one, count in Counter(inserted).items() if count > 1]
        assert not duplicates, f"{prefix}inserted twice: {duplicates[:10]}"
        # A worker that was killed while it sent a batch did not log the batch, which may have arrived.
        interrupted = {self._worker_id(worker) for worker in self.workers if worker.interrupted}
        last = {(worker, incarnation): 0 for worker, incarnation, _ in inserted}
        last |= {one[:2]: one[2] for one in sorted(produced)}
        produced |= {
            (*one, sequence + 1)
            for one, sequence in last.items()
            if one[0] in interrupted and (*one, sequence + 1) in set(inserted)
        }
        unknown = set(inserted) - produced
        assert not unknown, f"{prefix}inserted and never produced: {sorted(unknown)[:10]}"
        for one in {(worker, incarnation) for worker, incarnation, _ in inserted}:
            sequences = [
                sequence for worker, incarnation, sequence in inserted if (worker, incarnation) == one
            ]
            assert sequences == sorted(sequences), f"{prefix}out of order: {one}"
        missing = sorted(produced - set(inserted))
        counted: Counter[str] = Counter()
        for count in report["counts"].values():
            assert count["waiting"] == count["in_hand"] == 0, f"{prefix}{report['counts']}"
            counted.update(count["lost"])
        # Batches that never got a sequence are not among the produced ones.
        counted = Counter(
            {reason: n for reason, n in counted.items() if reason not in ("dropped_newest", "fenced")}
        )
        assert counted.pop("corrupt", 0) <= hostile_count, f"{prefix}{report['counts']}"
        if lost == "nothing":
            assert not missing, f"{prefix}missing: {missing[:10]} of {len(missing)}; counted: {dict(counted)}"
        assert counted == ({lost: len(missing)} if missing else {}), (
            f"{prefix}missing {missing[:10]}: {counted}"
        )
        delivered = Counter(worker for worker, _, _ in inserted)
        assert all(
            count["delivered"] == delivered[int(worker)] for worker, count in report["counts"].items()
        ), f"{prefix}{report['counts']}, expected {delivered} delivered"
        self._check_ledger(report)
        return missing

    def _check_ledger(self, report: dict[str, Any]) -> None:
        with self.server.client() as client:
            assert client.hlen(self.keys.pending) == 0, f"seed {self.seed}: commands without an outcome"
            for key in client.scan_iter(self.keys.outcomes("*")):
                assert b"waiting" not in client.hvals(key)
            for worker, missed in report["missed"].items():
                outcomes = WorkerOutcomes.from_fields(
                    text_fields(client.hgetall(self.keys.ledger(int(worker))))
                )
                assert outcomes.applied_total + sum(outcomes.missed.values()) <= outcomes.settled
                assert missed["recorded"] == sum(outcomes.missed.values()), (
                    f"seed {self.seed}: worker {worker}"
                )
                assert missed["behind"] == 0, f"seed {self.seed}: worker {worker} has open versions"
        for worker in self.workers:
            notes = [line["note"] for line in worker.lines("note")]
            assert len(notes) == len(set(notes)), f"seed {self.seed}: a command was run twice: {notes}"

    def _worker_id(self, worker: LoggedProcess) -> int:
        return int(worker.arguments["worker_id"])


def log_times(process: LoggedProcess, name: str, after: float) -> Iterator[float]:
    """Return the times of the lines with this field that a process logged after a time."""
    return (line["t"] for line in process.lines(name) if line["t"] > after)


def measure_recovery(arena: Arena, back: float, seconds: float = 10.0) -> dict[str, float]:
    """Measure the seconds from `back` until each worker's next batch is inserted and its next version applied.

    Args:
        arena: the run.
        back: the time at which the fault ended.
        seconds: the longest recovery that passes.
    """
    learner = arena.learner
    assert learner is not None
    senders = {worker.arguments["worker_id"] for worker in arena.workers}

    def inserted() -> float | None:
        first = dict[int, float]()
        for line in learner.lines("inserted"):
            if line["t"] > back:
                first.setdefault(line["inserted"][0], line["t"])
        return max(first.values()) if first.keys() >= senders else None

    last = arena.wait("a batch of every worker is inserted", inserted, seconds + 20)
    applied = [
        arena.wait(
            "the worker has applied a version",
            partial(_first_log_time, worker, "version", back),
            seconds + 20,
        )
        for worker in arena.workers
    ]
    took = {"to_batch": round(last - back, 2), "to_version": round(max(applied) - back, 2)}
    assert max(took.values()) <= seconds, f"seed {arena.seed}: {took}"
    return took


def _first_log_time(process: LoggedProcess, name: str, after: float) -> float | None:
    return next(log_times(process, name, after), None)
