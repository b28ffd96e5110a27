"""A run over a span of time: rates, totals, and the versions that each worker ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import parsing
from rlbroker.control.ledger_reader import read_missed_records
from rlbroker.metrics.history import Interval, Sample, intervals, read_history
from rlbroker.ops.inspect.bottleneck import Bottleneck
from rlbroker.ops.inspect.findings import Finding, list_findings
from rlbroker.ops.inspect.snapshot import Snapshot, take_snapshot
from rlbroker.types import Missed

#: As many points of a line as a plot on a phone can show.
POINTS: Final = 200

#: The least time that a sample covers: one that is due after a second may come a little late.
_COVERED_SECONDS: Final = 3.0

#: The names that `Timeline.total` takes: totals of one learner, which only grow.
_TOTALS: Final = (
    "published",
    "published_raw_bytes",
    "published_stored_bytes",
    "encode_seconds",
    "send_seconds",
    "publish_seconds",
    "collected",
    "rows",
    "collected_raw_bytes",
    "collected_stored_bytes",
    "decode_seconds",
    "wait_seconds",
    "room_seconds",
)


def _worker_seconds(interval: Interval) -> float:
    """Return the length of an interval times the number of live workers."""
    return interval.seconds * (interval.before.alive + interval.after.alive) / 2


def _clamp(share: float) -> float:
    # A wait is counted when it ends, and may have begun before the interval.
    return min(1.0, max(0.0, share))


def _room_share(interval: Interval) -> float:
    worker_seconds = _worker_seconds(interval)
    return _clamp(interval.growth("room_seconds") / worker_seconds) if worker_seconds else 0.0


#: The metrics of a run between two samples. Shares of the time are from 0 to 1; staleness is that of collected batches,
#: None without any; the last four are of the moment at which the interval ended.
METRICS: Final[Mapping[str, Callable[[Interval], float | None]]] = {
    "batches_per_second": lambda interval: interval.rate("collected"),
    "rows_per_second": lambda interval: interval.rate("rows"),
    "bytes_per_second": lambda interval: interval.rate("collected_raw_bytes"),
    "stored_bytes_per_second": lambda interval: interval.rate("collected_stored_bytes"),
    "versions_per_second": lambda interval: interval.rate("published"),
    "published_bytes_per_second": lambda interval: interval.rate("published_raw_bytes"),
    "published_stored_bytes_per_second": lambda interval: interval.rate("published_stored_bytes"),
    "staleness_median": lambda interval: interval.staleness_quantile(0.5),
    "staleness_90": lambda interval: interval.staleness_quantile(0.9),
    "learner_waits": lambda interval: _clamp(interval.rate("wait_seconds")),
    "workers_wait": _room_share,
    "encoding": lambda interval: interval.rate("encode_seconds"),
    "sending": lambda interval: interval.rate("send_seconds"),
    "waiting": lambda interval: interval.after.waiting,
    "in_hand": lambda interval: interval.after.in_hand,
    "alive": lambda interval: interval.after.alive,
    "away": lambda interval: interval.after.away,
}


@dataclass(frozen=True)
class TimelinePoint:
    """What happened between two samples of the history.

    Attributes:
        at: when it ended, seconds since 1970 by the server's clock.
        seconds: its length.
        continues: whether it begins where the previous point ended; False after a gap, and for the first point.
        values: the values of `METRICS`.
    """

    at: float
    seconds: float
    continues: bool
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class VersionsBehind:
    """How many versions one worker was behind, over the time in which it ran any.

    Attributes:
        median: p50 over time.
        ninth: p90 over time.
        most: the maximum.
    """

    median: int
    ninth: int
    most: int


@dataclass(frozen=True)
class Timeline:
    """A snapshot of a run and its history over a span of time.

    Attributes:
        samples: the history of the span, oldest first.
        records: the missed updates of the span, oldest first.
    """

    snapshot: Snapshot
    samples: Sequence[Sample]
    records: Sequence[Missed]

    @cached_property
    def findings(self) -> list[Finding]:
        """What is wrong now, critical findings first."""
        return list_findings(self.snapshot)

    @property
    def begin(self) -> float:
        """The time of the first sample, or of the snapshot if there is none; seconds since 1970."""
        return self.samples[0].at if self.samples else self.snapshot.at

    @property
    def end(self) -> float:
        """The time of the last sample, or of the snapshot if there is none; seconds since 1970."""
        return self.samples[-1].at if self.samples else self.snapshot.at

    @cached_property
    def intervals(self) -> list[Interval]:
        """The intervals between samples of one learner."""
        return [interval for interval in intervals(list(self.samples)) if interval.seconds > 0]

    @property
    def seconds(self) -> float:
        """The length of the history without its gaps."""
        return sum(interval.seconds for interval in self.intervals)

    @property
    def restarts(self) -> list[float]:
        """The times at which a new learner continued the run, seconds since 1970."""
        pairs = zip(self.samples, self.samples[1:], strict=False)
        return [after.at for before, after in pairs if after.epoch != before.epoch]

    def total(self, name: str) -> float:
        """Return the growth of one of the history's totals over the span."""
        return sum(interval.growth(name) for interval in self.intervals)

    def rate(self, name: str) -> float:
        """Return the growth of a total per second; 0 without history."""
        return self.total(name) / self.seconds if self.seconds else 0.0

    @cached_property
    def bottleneck(self) -> Bottleneck:
        """The bottleneck of the span."""
        worker_seconds = sum(map(_worker_seconds, self.intervals))
        return Bottleneck(
            seconds=self.seconds,
            collected=self.total("collected"),
            learner_waits=_clamp(self.rate("wait_seconds")),
            workers_wait=_clamp(self.total("room_seconds") / worker_seconds) if worker_seconds else 0.0,
            encoding=self.rate("encode_seconds"),
            sending=self.rate("send_seconds"),
            publishing=self.rate("publish_seconds"),
        )

    def points(self, count: int = POINTS) -> list[TimelinePoint]:
        """Return the history as about `count` points."""
        points: list[TimelinePoint] = []
        last: Sample | None = None
        for interval in intervals(thin_out(self.samples, count)):
            if interval.seconds > 0:
                values = {name: metric(interval) for name, metric in METRICS.items()}
                continues = last is interval.before
                points.append(TimelinePoint(interval.after.at, interval.seconds, continues, values))
                last = interval.after
        return points

    @cached_property
    def behind(self) -> dict[int, VersionsBehind]:
        """How many versions each worker was behind, by worker id; workers that ran no version are omitted."""
        milliseconds_by_worker: dict[int, Counter[int]] = {}
        for interval in self.intervals:
            for worker, version in interval.before.running.items():
                if version:
                    behind = max(0, interval.before.version - version)
                    by_distance = milliseconds_by_worker.setdefault(worker, Counter())
                    by_distance[behind] += max(1, round(interval.seconds * 1000))
        return {
            worker: VersionsBehind(_quantile(by_distance, 0.5), _quantile(by_distance, 0.9), max(by_distance))
            for worker, by_distance in sorted(milliseconds_by_worker.items())
        }

    @property
    def losses(self) -> dict[str, int]:
        """Batches lost since the run began, of all workers, by reason; the most frequent first."""
        losses = Counter[str]()
        for status in self.snapshot.workers.values():
            if status.counts:
                losses.update(status.counts.lost)
        return {why: count for why, count in losses.most_common() if count}

    @property
    def missed(self) -> dict[int, dict[str, int]]:
        """Versions missed since the run began, by worker and reason; workers that missed none are omitted."""
        return {
            worker: {why: count for why, count in status.missed.by_reason.items() if count}
            for worker, status in self.snapshot.workers.items()
            if status.missed.total
        }

    @property
    def delivered(self) -> int:
        """Batches delivered since the run began."""
        return sum(status.delivered for status in self.snapshot.workers.values())

    @property
    def lost(self) -> int:
        """Batches lost since the run began."""
        return sum(self.losses.values())

    @property
    def verdict(self) -> str:
        """The state of the run in one sentence."""
        learner, findings = self.snapshot.learner, self.findings
        critical = [finding for finding in findings if finding.severity == "critical"]
        if critical:
            verdict = critical[0].what
            verdict += f"; {len(findings) - 1:,} more below" if len(findings) > 1 else ""
        elif findings:
            count = "1 finding" if len(findings) == 1 else f"{len(findings):,} findings"
            verdict = f"{count} below; {self.bottleneck.what}"
        elif learner is not None and learner.state == "ended":
            verdict = f"the run has ended, and nothing is wrong; {self.bottleneck.what}"
        else:
            verdict = f"nothing is wrong; {self.bottleneck.what}"
        return verdict[0].upper() + verdict[1:] + "."

    def to_json(self) -> dict[str, Any]:
        """Return the data of the report as values for JSON.

        Returns:
            What `Snapshot.to_json` returns; each of `workers` also has `behind`: null, or the fields of
            `VersionsBehind`.
            `verdict`: text. `findings`: a list of the fields of `Finding`, and `advice`.
            `history`: `begin`, `end`, `seconds`, `samples`, `restarts`. `totals`: the growth of each total.
            `bottleneck`: as `Bottleneck.to_json`. `delivered`, `lost`: numbers. `losses`: by reason.
            `missed`: by worker and reason. `points`: `at`, `seconds`, `continues`, and each of
            `METRICS`.
        """
        result = self.snapshot.to_json()
        for worker, status in result["workers"].items():
            behind = self.behind.get(int(worker))
            status["behind"] = asdict(behind) if behind else None
        return result | {
            "verdict": self.verdict,
            "findings": [finding.to_json() for finding in self.findings],
            "history": {
                "begin": self.begin,
                "end": self.end,
                "seconds": self.seconds,
                "samples": len(self.samples),
                "restarts": self.restarts,
            },
            "totals": {name: self.total(name) for name in _TOTALS},
            "bottleneck": self.bottleneck.to_json(),
            "delivered": self.delivered,
            "lost": self.lost,
            "losses": self.losses,
            "missed": {str(worker): reasons for worker, reasons in self.missed.items()},
            "points": [
                {"at": point.at, "seconds": point.seconds, "continues": point.continues, **point.values}
                for point in self.points()
            ],
        }


@dataclass(frozen=True)
class MissedMark:
    """A count of the versions that one worker missed in one cell of time, for one reason.

    Attributes:
        lane: index of the worker in `VersionLanes.workers`.
        column: index of the cell.
    """

    lane: int
    column: int
    why: str
    count: int


@dataclass(frozen=True)
class VersionLanes:
    """The versions that workers ran over a span of time: a lane for each worker, cut into cells of equal time.

    Attributes:
        workers: the worker id of each lane, sorted.
        begin: start of the first cell, seconds since 1970.
        end: end of the last cell.
        versions: by lane, the version in each cell; 0 if unknown.
        marks: missed versions.
    """

    workers: Sequence[int]
    begin: float
    end: float
    versions: Sequence[Sequence[int]]
    marks: Sequence[MissedMark]

    @property
    def columns(self) -> int:
        """The number of cells of each lane."""
        return len(self.versions[0]) if self.versions else 0


def read_timeline(connection: Connection, run: str, *, span_seconds: float | None = None) -> Timeline:
    """Read a snapshot of a run and its history.

    Args:
        span_seconds: only this much of the history up to its last sample, which may be old; None for all of it.
    """
    keys = Keys(run)
    snapshot = take_snapshot(connection, run)
    samples: Sequence[Sample] = read_history(connection, keys)
    since = 0.0
    if span_seconds is not None:
        since = (samples[-1].at if samples else snapshot.at) - span_seconds
        samples = [sample for sample in samples if sample.at >= since]
    elif samples:
        since = samples[0].at
    with parsing(keys.missed):
        records = read_missed_records(connection, keys, since=since)
    return Timeline(snapshot, samples, records)


def thin_out(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return about `count` samples, evenly spaced in time, with the first and last sample of each learner.

    No growth is lost: the interval between two kept samples includes the growth between them.
    """
    if len(samples) <= count:
        return list(samples)
    begin = samples[0].at
    step = max((samples[-1].at - begin) / count, 1e-3)
    kept: list[Sample] = []
    for number, sample in enumerate(samples):
        before = samples[number - 1] if number else None
        after = samples[number + 1] if number + 1 < len(samples) else None
        is_end = (
            before is None or after is None or before.epoch != sample.epoch or after.epoch != sample.epoch
        )
        if is_end or (after and int((after.at - begin) / step) != int((sample.at - begin) / step)):
            kept.append(sample)
    return kept


def build_lanes(timeline: Timeline, columns: int) -> VersionLanes:
    """Cut the span into at most `columns` cells of at least a second, and find each worker's version in each cell."""
    samples = timeline.samples
    if len(samples) < 2 or timeline.end <= timeline.begin:
        return VersionLanes((), timeline.begin, timeline.end, (), ())
    begin, end = timeline.begin, timeline.end
    columns = max(1, min(columns, round(end - begin)))
    width = (end - begin) / columns
    workers = sorted({worker for sample in samples for worker in sample.running})
    lanes = {worker: [0] * columns for worker in workers}
    for sample, until in zip(samples, _covered_until(samples), strict=True):
        # A cell gets the last version within it, as later samples overwrite earlier ones.
        first = min(columns - 1, int((sample.at - begin) / width))
        last = min(columns - 1, max(first, int((until - begin) / width - 1e-9)))
        for worker, version in sample.running.items():
            lane = lanes[worker]
            for column in range(first, last + 1):
                lane[column] = version
    index = {worker: number for number, worker in enumerate(workers)}
    marks = _make_marks(timeline.records, index, begin, width, columns)
    return VersionLanes(workers, begin, end, list(lanes.values()), marks)


def _covered_until(samples: Sequence[Sample]) -> list[float]:
    """Return the time until which each sample is valid: until the next one, or until a gap begins.

    A gap is much longer than the usual distance of samples: no learner was alive, or its samples were lost.
    """
    ends = []
    for number, sample in enumerate(samples):
        before = samples[number - 1] if number else None
        after = samples[number + 1] if number + 1 < len(samples) else None
        distances = [
            abs(sample.at - other.at) for other in (before, after) if other and other.epoch == sample.epoch
        ]
        until = sample.at + max(_COVERED_SECONDS, 2.5 * min(distances, default=0.0))
        ends.append(min(until, after.at) if after else sample.at)
    return ends


def _make_marks(
    records: Sequence[Missed], index: dict[int, int], begin: float, width: float, columns: int
) -> list[MissedMark]:
    counts = Counter[tuple[int, int, str]]()
    for record in records:
        column = int((record.at - begin) / width)
        if record.what == "weights" and record.worker_id in index and 0 <= column <= columns:
            counts[index[record.worker_id], min(column, columns - 1), record.why] += record.count
    return [MissedMark(lane, column, why, count) for (lane, column, why), count in counts.items()]


def _quantile(counts: Counter[int], share: float) -> int:
    wanted, seen = share * counts.total(), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted:
            return value
    return max(counts)
