"""A run looked at again and again: its state, what changed since, and the last minute of its history."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.metrics.history import Interval, Sample, intervals, read_history
from rlbroker.ops.inspect.findings import Finding, find
from rlbroker.ops.inspect.snapshot import Observer, Snapshot, WorkerStatus
from rlbroker.types import Liveness

#: Samples of the history that are looked at: the last minute.
SAMPLES: Final = 60

#: Over how long rates of single workers are taken. Workers say only once a second how long they waited.
RATE_SECONDS: Final = 5.0

#: After how long without a sample the last figures are no longer those of now.
CURRENT_SECONDS: Final = 5.0


@dataclass(frozen=True)
class WorkerLine:
    """What one line about a worker says; what is not known is None.

    Attributes:
        state: `alive`, `away`, or `left`.
        version: the weights that it runs.
        staleness: versions published since.
        batches_per_second: that it produced lately.
        waiting: batches in its queue.
        in_hand: batches that the learner has and has not acknowledged.
        lost: batches that were produced and not delivered, for whatever reason.
        missed: versions and commands.
        unpolled_seconds: since it last looked for weights and commands.
        room_share: part of the time lately in which it waited for room in its queue.
        last_seen_seconds: since its last heartbeat.
        process: host and pid, as it wrote them.
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
    """What one look showed.

    Attributes:
        snapshot: the state of the run.
        findings: what is wrong, the worst first.
        lines: its workers, by id.
        series: by name, a figure of the learner for each second of the last minute, oldest first; None where there
            was nothing to measure. See `SERIES`.
        current: whether the last of these figures are those of now.
    """

    snapshot: Snapshot
    findings: Sequence[Finding]
    lines: Sequence[WorkerLine]
    series: Mapping[str, Sequence[float | None]]
    current: bool

    def to_json(self) -> dict[str, Any]:
        """Give the view as what JSON can hold.

        Returns:
            `run`, `at`, `learner` (its state), `version`, `alive`, `used_bytes`;
            `figures`: the newest of each series, null where there is none of now;
            `workers`: by id, the fields of `WorkerLine` but for the id;
            `findings`: as `Finding.to_json`.
        """
        snapshot = self.snapshot
        return {
            "run": snapshot.run,
            "at": snapshot.at,
            "learner": snapshot.learner.state if snapshot.learner else "none",
            "version": snapshot.pointer.version if snapshot.pointer else 0,
            "alive": sum(line.state == "alive" for line in self.lines),
            "used_bytes": snapshot.server.used_bytes,
            "figures": {name: self.newest(name) for name in SERIES},
            "workers": {
                str(line.worker): {name: value for name, value in vars(line).items() if name != "worker"}
                for line in self.lines
            },
            "findings": [one.to_json() for one in self.findings],
        }

    def newest(self, name: str) -> float | None:
        """Give the figure of now of a series, if there is one."""
        values = self.series[name]
        return values[-1] if values and self.current else None


#: The figures of the whole run, each from what happened between two samples.
SERIES: Final[Mapping[str, Callable[[Interval], float | None]]] = {
    "batches_per_second": lambda one: one.rate("collected"),
    "rows_per_second": lambda one: one.rate("rows"),
    "staleness": lambda one: one.mean_staleness,
    "waiting": lambda one: float(one.after.waiting),
    "missed_per_second": lambda one: one.rate("missed"),
    "encode_share": lambda one: one.share("encode_seconds"),
    "send_share": lambda one: one.share("send_seconds"),
    "wait_share": lambda one: one.share("wait_seconds"),
}


@dataclass(frozen=True)
class _Sums:
    """What rates of workers are differences of: by worker id, with the life that it is of."""

    at: float
    produced: Mapping[int, int]
    room_seconds: Mapping[int, tuple[int, float]]


class RunWatch:
    """Looks at one run as often as it is told to, and remembers what rates are made of."""

    def __init__(self, connection: Connection, run: str) -> None:
        """Prepare; nothing is read yet."""
        self._connection, self._keys = connection, Keys(run)
        self._observer = Observer(connection, run)
        self._samples: deque[Sample] = deque(maxlen=SAMPLES + 1)
        self._sums: deque[_Sums] = deque()

    def look(self) -> RunView:
        """Look at the run; the first look has no rates of workers.

        Raises:
            WireError: what is stored is not what learners and workers write.
            PeerError: the server refused, or could not be reached in time.
        """
        snapshot = self._observer.look()
        self._read_history()
        self._remember(snapshot)
        findings = find(snapshot)
        troubled = {one.worker for one in findings}
        spans = intervals(self._samples)
        return RunView(
            snapshot=snapshot,
            findings=findings,
            lines=[
                self._line(worker, status, troubled=worker in troubled)
                for worker, status in snapshot.workers.items()
            ],
            series={name: [figure(one) for one in spans] for name, figure in SERIES.items()},
            current=bool(spans) and snapshot.at - spans[-1].after.at < CURRENT_SECONDS,
        )

    def _read_history(self) -> None:
        # Half a second behind the last one: an id of the server's clock does not survive being a float exactly.
        since = self._samples[-1].at + 0.5 if self._samples else 0.0
        found = read_history(self._connection, self._keys, since=since, count=SAMPLES + 1)
        self._samples.extend(found)

    def _remember(self, snapshot: Snapshot) -> None:
        sums = _Sums(
            snapshot.at,
            {worker: one.counts.produced for worker, one in snapshot.workers.items() if one.counts},
            {info.worker_id: (info.incarnation, info.room_seconds) for info in snapshot.members},
        )
        if self._sums and sums.at <= self._sums[-1].at:  # another server, with another clock
            self._sums.clear()
        self._sums.append(sums)
        while len(self._sums) > 2 and sums.at - self._sums[1].at >= RATE_SECONDS:
            self._sums.popleft()

    def _line(self, worker: int, one: WorkerStatus, *, troubled: bool) -> WorkerLine:
        info, counts = one.info, one.counts
        silent_seconds = info.last_seen_seconds if info and info.state == "away" else 0.0
        return WorkerLine(
            worker=worker,
            state=info.state if info else "left",
            version=info.version if info else None,
            staleness=info.staleness if info else None,
            batches_per_second=self._batches_per_second(worker),
            waiting=counts.waiting if counts else 0,
            in_hand=counts.in_hand if counts else 0,
            lost=sum(counts.lost.values()) if counts else 0,
            missed=one.missed.total + one.missed.commands,
            unpolled_seconds=info.unpolled_seconds + silent_seconds if info else None,
            room_share=self._room_share(worker),
            last_seen_seconds=info.last_seen_seconds if info else None,
            process=f"{info.host}:{info.pid}" if info and info.host else "",
            troubled=troubled,
        )

    def _batches_per_second(self, worker: int) -> float | None:
        first, last = self._sums[0], self._sums[-1]
        if last.at <= first.at or worker not in last.produced:
            return None
        return max(0, last.produced[worker] - first.produced.get(worker, 0)) / (last.at - first.at)

    def _room_share(self, worker: int) -> float | None:
        first, last = self._sums[0], self._sums[-1]
        life, seconds = last.room_seconds.get(worker, (0, 0.0))
        life_before, before = first.room_seconds.get(worker, (-1, 0.0))
        if last.at <= first.at or life != life_before:
            return None
        return min(1.0, max(0.0, seconds - before) / (last.at - first.at))
