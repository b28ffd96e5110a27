"""A live view of a run: repeated snapshots, rates between them, and the last minute of the learner's history."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.metrics.history import Interval, Sample, intervals, read_history
from rlbroker.ops.inspect.findings import Finding, list_findings
from rlbroker.ops.inspect.snapshot import Snapshot, SnapshotReader, WorkerStatus
from rlbroker.ops.inspect.timeline import METRICS
from rlbroker.types import Liveness

#: Samples of the history to show: the last minute.
SAMPLES: Final = 60

#: The span over which the rates of a worker are measured. Workers report their waits only once a second.
RATE_SECONDS: Final = 5.0

#: Age from which the newest sample is no longer current.
CURRENT_SECONDS: Final = 5.0


@dataclass(frozen=True)
class WorkerLine:
    """One worker's line of the table; unknown fields are None.

    Attributes:
        state: `alive`, `away`, or `left`.
        version: the version that it runs.
        staleness: versions published since.
        batches_per_second: batches that it produced in the last seconds.
        waiting: batches in its queue.
        in_hand: batches that the learner has read and not acknowledged.
        lost: batches that were produced and will not be delivered, for any reason.
        missed: missed versions and commands.
        unpolled_seconds: time since it last polled.
        room_share: share of the last seconds in which it waited for room in its queue.
        last_seen_seconds: age of its last heartbeat.
        process: host and pid, as the worker wrote them.
        troubled: whether a finding is about it.
    """

    worker: int
    state: Liveness | Literal["left"]
    version: int | None
    staleness: int | None
    batches_per_second: float | None
    waiting: int
    in_hand: int
    lost: int
    missed: int
    unpolled_seconds: float | None
    room_share: float | None
    last_seen_seconds: float | None
    process: str
    troubled: bool


@dataclass(frozen=True)
class RunView:
    """A snapshot of a run with its rates.

    Attributes:
        snapshot: the state of the run.
        findings: what is wrong, critical findings first.
        lines: its workers, by id.
        series: each metric of `SERIES` for every second of the last minute, oldest first; None for no value.
        current: whether the last values of the series are current.
    """

    snapshot: Snapshot
    findings: Sequence[Finding]
    lines: Sequence[WorkerLine]
    series: Mapping[str, Sequence[float | None]]
    current: bool

    def to_json(self) -> dict[str, Any]:
        """Return the view as values for JSON.

        Returns:
            `run`, `at`, `learner` (its state), `version`, `alive`, `used_bytes`;
            `figures`: the newest value of each series, null without a current one;
            `workers`: by id, the fields of `WorkerLine` without the id;
            `findings`: as `Finding.to_json`.
        """
        snapshot = self.snapshot
        return {
            "run": snapshot.run,
            "at": snapshot.at,
            "learner": snapshot.learner_state,
            "version": snapshot.version,
            "alive": snapshot.alive,
            "used_bytes": snapshot.server.used_bytes,
            "figures": {name: self.newest(name) for name in SERIES},
            "workers": {
                str(line.worker): {name: value for name, value in vars(line).items() if name != "worker"}
                for line in self.lines
            },
            "findings": [finding.to_json() for finding in self.findings],
        }

    def newest(self, name: str) -> float | None:
        """Return the newest value of a series; None if it is not current."""
        values = self.series[name]
        return values[-1] if values and self.current else None


#: The metrics of the whole run, each computed from the interval between two samples.
SERIES: Final[Mapping[str, Callable[[Interval], float | None]]] = {
    **{name: METRICS[name] for name in ("batches_per_second", "rows_per_second", "waiting")},
    "staleness": lambda interval: interval.mean_staleness,
    "missed_per_second": lambda interval: interval.rate("missed"),
    "encode_share": METRICS["encoding"],
    "send_share": METRICS["sending"],
    "wait_share": METRICS["learner_waits"],
}


class RunWatch:
    """Reads views of one run, and keeps the samples and snapshots that rates are computed from."""

    def __init__(self, connection: Connection, run: str) -> None:
        """Prepare; nothing is read yet."""
        self._connection, self._keys = connection, Keys(run)
        self._reader = SnapshotReader(connection, run)
        self._samples: deque[Sample] = deque(maxlen=SAMPLES + 1)
        self._snapshots: deque[Snapshot] = deque()

    def read(self) -> RunView:
        """Read a view of the run. The first view has no rates of workers.

        Raises:
            WireError: the run's keys hold what no learner or worker writes.
        """
        snapshot = self._reader.read()
        self._read_history()
        self._add_snapshot(snapshot)
        findings = list_findings(snapshot)
        troubled = {finding.worker for finding in findings}
        spans = intervals(self._samples)
        return RunView(
            snapshot=snapshot,
            findings=findings,
            lines=[
                self._make_line(worker, status, troubled=worker in troubled)
                for worker, status in snapshot.workers.items()
            ],
            series={name: [metric(span) for span in spans] for name, metric in SERIES.items()},
            current=bool(spans) and snapshot.at - spans[-1].after.at < CURRENT_SECONDS,
        )

    def _read_history(self) -> None:
        # Half a second after the last sample: as a float, its time is not exact enough to exclude just that sample.
        since = self._samples[-1].at + 0.5 if self._samples else 0.0
        self._samples.extend(read_history(self._connection, self._keys, since=since, count=SAMPLES + 1))

    def _add_snapshot(self, snapshot: Snapshot) -> None:
        snapshots = self._snapshots
        if (
            snapshots and snapshot.at <= snapshots[-1].at
        ):  # after a failover: the new server has another clock
            snapshots.clear()
        snapshots.append(snapshot)
        while len(snapshots) > 2 and snapshot.at - snapshots[1].at >= RATE_SECONDS:
            snapshots.popleft()

    def _make_line(self, worker: int, status: WorkerStatus, *, troubled: bool) -> WorkerLine:
        info = status.info
        silent_seconds = info.last_seen_seconds if info and info.state == "away" else 0.0
        return WorkerLine(
            worker=worker,
            state=info.state if info else "left",
            version=info.version if info else None,
            staleness=info.staleness if info else None,
            batches_per_second=self._batches_per_second(worker),
            waiting=status.waiting,
            in_hand=status.in_hand,
            lost=status.lost,
            missed=status.missed_total,
            unpolled_seconds=info.unpolled_seconds + silent_seconds if info else None,
            room_share=self._room_share(worker),
            last_seen_seconds=info.last_seen_seconds if info else None,
            process=f"{info.host}:{info.pid}" if info and info.host else "",
            troubled=troubled,
        )

    def _batches_per_second(self, worker: int) -> float | None:
        first, last, seconds = self._ends(worker)
        if not seconds or not last or not last.counts:
            return None
        before = first.counts.produced if first and first.counts else 0
        return max(0, last.counts.produced - before) / seconds

    def _room_share(self, worker: int) -> float | None:
        first, last, seconds = self._ends(worker)
        if not seconds or not first or not first.info or not last or not last.info:
            return None
        if first.info.incarnation != last.info.incarnation:
            return None
        return min(1.0, max(0.0, last.info.room_seconds - first.info.room_seconds) / seconds)

    def _ends(self, worker: int) -> tuple[WorkerStatus | None, WorkerStatus | None, float]:
        """Return a worker in the first and in the last snapshot, and the seconds between these."""
        first, last = self._snapshots[0], self._snapshots[-1]
        return first.workers.get(worker), last.workers.get(worker), last.at - first.at
