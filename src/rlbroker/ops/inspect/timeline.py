"""The course of a run over a span of time: what its history and its record of missed updates say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import parsing
from rlbroker.control.ledger import Ledger
from rlbroker.metrics.history import Interval, Sample, intervals, read_history
from rlbroker.ops.inspect.bottleneck import Bottleneck, judge
from rlbroker.ops.inspect.findings import Finding, find
from rlbroker.ops.inspect.snapshot import Snapshot, take_snapshot
from rlbroker.types import Missed

#: Points of a line that a plot as wide as a telephone can show.
POINTS: Final = 200

#: What `Timeline.total` can be asked for: sums that only grow while one learner lives.
_SUMS: Final = (
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


@dataclass(frozen=True)
class TimelinePoint:
    """What happened between two samples of the history.

    Attributes:
        at: when it ended, the server's clock, seconds since the epoch.
        seconds: how long it lasted.
        continues: whether it begins where the point before ended; False after a gap, and for the first.
        batches_per_second: batches that the learner's code got.
        rows_per_second: their rows.
        bytes_per_second: their bytes, as arrays.
        stored_bytes_per_second: the same, as they went through Redis.
        versions_per_second: versions published.
        published_bytes_per_second: their bytes, as tensors.
        published_stored_bytes_per_second: the same, as they were stored.
        staleness_median: of the batches that the learner's code got; None without one.
        staleness_90: nine of ten had this staleness or less; None without one.
        learner_waits: share of the time in which the learner waited for data.
        workers_wait: share of the workers' time in which they waited for room.
        encoding: share of the time that compressing weights took.
        sending: share of the time that sending weights took.
        waiting: batches in the queues, at its end.
        in_hand: batches that the learner had read and not acknowledged, at its end.
        alive: workers heard of within their lease, at its end.
        away: members that were not.
    """

    at: float
    seconds: float
    continues: bool
    batches_per_second: float
    rows_per_second: float
    bytes_per_second: float
    stored_bytes_per_second: float
    versions_per_second: float
    published_bytes_per_second: float
    published_stored_bytes_per_second: float
    staleness_median: float | None
    staleness_90: float | None
    learner_waits: float
    workers_wait: float
    encoding: float
    sending: float
    waiting: int
    in_hand: int
    alive: int
    away: int


@dataclass(frozen=True)
class Behind:
    """How many versions one worker was behind, over the time that it ran any.

    Attributes:
        median: half of the time it was so many behind, or fewer.
        ninth: nine tenths of the time it was so many behind, or fewer.
        most: the most that it ever was.
    """

    median: int
    ninth: int
    most: int


@dataclass(frozen=True)
class Timeline:
    """What is known of a run: one look at it, and its history over a span of time.

    Attributes:
        snapshot: the look.
        samples: the history of the span, oldest first; empty where there is none.
        records: what was recorded as missed in the span, oldest first.
    """

    snapshot: Snapshot
    samples: Sequence[Sample]
    records: Sequence[Missed]

    @cached_property
    def findings(self) -> list[Finding]:
        """What is wrong now, the worst first."""
        return find(self.snapshot)

    @property
    def begin(self) -> float:
        """When the span begins, seconds since the epoch: with the first sample, or now without one."""
        return self.samples[0].at if self.samples else self.snapshot.at

    @property
    def end(self) -> float:
        """When the span ends: with the last sample, or now without one."""
        return self.samples[-1].at if self.samples else self.snapshot.at

    @cached_property
    def intervals(self) -> list[Interval]:
        """The time between samples of one learner."""
        return [one for one in intervals(list(self.samples)) if one.seconds > 0]

    @property
    def seconds(self) -> float:
        """For how long there are figures, gaps left out."""
        return sum(one.seconds for one in self.intervals)

    @property
    def restarts(self) -> list[float]:
        """When a new learner went on with the run, seconds since the epoch."""
        both = zip(self.samples, self.samples[1:], strict=False)
        return [after.at for before, after in both if after.epoch != before.epoch]

    def total(self, name: str) -> float:
        """Give how much one of the history's sums grew in the span."""
        return sum(one.growth(name) for one in self.intervals)

    def rate(self, name: str) -> float:
        """Give the same for each second; 0 without history."""
        return self.total(name) / self.seconds if self.seconds else 0.0

    @cached_property
    def bottleneck(self) -> Bottleneck:
        """Who waits for whom."""
        worker_seconds = sum(_worker_seconds(one) for one in self.intervals)
        return judge(
            self.seconds,
            learner_waits=_bounded(self.rate("wait_seconds")),
            workers_wait=_bounded(self.total("room_seconds") / worker_seconds) if worker_seconds else 0.0,
            encoding=self.rate("encode_seconds"),
            sending=self.rate("send_seconds"),
            publishing=self.rate("publish_seconds"),
            collected=self.total("collected"),
        )

    def points(self, count: int = POINTS) -> list[TimelinePoint]:
        """Give the history as lines of about so many points."""
        found: list[TimelinePoint] = []
        last: Sample | None = None
        for one in intervals(thin(self.samples, count)):
            if one.seconds > 0:
                found.append(_point(one, continues=last is one.before))
                last = one.after
        return found

    @cached_property
    def behind(self) -> dict[int, Behind]:
        """How many versions each worker was behind, by worker id; only those that ran one."""
        times: dict[int, Counter[int]] = {}
        for one in self.intervals:
            for worker, version in one.before.running.items():
                if version:
                    by = max(0, one.before.version - version)
                    # Milliseconds, as counters count.
                    times.setdefault(worker, Counter())[by] += max(1, round(one.seconds * 1000))
        return {
            worker: Behind(_quantile(found, 0.5), _quantile(found, 0.9), max(found))
            for worker, found in sorted(times.items())
        }

    @property
    def losses(self) -> dict[str, int]:
        """Batches lost since the run began, by reason, of all workers; the largest first."""
        found = Counter[str]()
        for status in self.snapshot.workers.values():
            if status.counts:
                found.update(status.counts.lost)
        return {why: count for why, count in found.most_common() if count}

    @property
    def missed(self) -> dict[int, dict[str, int]]:
        """Versions missed since the run began, by worker and reason; only who missed any."""
        return {
            worker: {why: count for why, count in status.missed.by_reason.items() if count}
            for worker, status in self.snapshot.workers.items()
            if status.missed.total
        }

    @property
    def delivered(self) -> int:
        """Batches delivered since the run began."""
        return sum(one.counts.delivered for one in self.snapshot.workers.values() if one.counts)

    @property
    def lost(self) -> int:
        """Batches lost since the run began."""
        return sum(self.losses.values())

    @property
    def verdict(self) -> str:
        """The run in one sentence."""
        learner, findings = self.snapshot.learner, self.findings
        critical = [one for one in findings if one.severity == "critical"]
        if critical:
            said = critical[0].what
            said += f"; {len(findings) - 1:,} more below" if len(findings) > 1 else ""
        elif findings:
            things = "one thing needs" if len(findings) == 1 else f"{len(findings):,} things need"
            said = f"{things} a look; {self.bottleneck.what}"
        elif learner is not None and learner.state == "ended":
            said = f"the run has ended, and nothing was found wrong; {self.bottleneck.what}"
        else:
            said = f"nothing was found wrong; {self.bottleneck.what}"
        return said[0].upper() + said[1:] + "."

    def to_json(self) -> dict[str, Any]:
        """Give the figures that the report is made from, as what JSON can hold.

        Returns:
            What `Snapshot.to_json` gives; each of `workers` also has `behind`: null, or the fields of `Behind`.
            `verdict`: text. `findings`: a list of the fields of `Finding`, and `advice`.
            `history`: `begin`, `end`, `seconds`, `samples`, `restarts`. `totals`: what its sums grew by.
            `bottleneck`: the fields of `Bottleneck`. `delivered`, `lost`: numbers. `losses`: by reason.
            `missed`: by worker and reason. `points`: a list of the fields of `TimelinePoint`.
        """
        found = self.snapshot.to_json()
        for worker, status in found["workers"].items():
            behind = self.behind.get(int(worker))
            status["behind"] = asdict(behind) if behind else None
        return found | {
            "verdict": self.verdict,
            "findings": [one.to_json() for one in self.findings],
            "history": {
                "begin": self.begin,
                "end": self.end,
                "seconds": self.seconds,
                "samples": len(self.samples),
                "restarts": self.restarts,
            },
            "totals": {name: self.total(name) for name in _SUMS},
            "bottleneck": asdict(self.bottleneck),
            "delivered": self.delivered,
            "lost": self.lost,
            "losses": self.losses,
            "missed": {str(worker): reasons for worker, reasons in self.missed.items()},
            "points": [asdict(one) for one in self.points()],
        }


def read_timeline(connection: Connection, run: str, *, span_seconds: float | None = None) -> Timeline:
    """Look at a run and read its history; nothing is changed.

    Args:
        connection: way to the server.
        run: name of the run.
        span_seconds: how much of the history, up to its last sample, so that it can be asked for after the run's
            end too; None for all of it.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    keys = Keys(run)
    snapshot = take_snapshot(connection, run)
    samples: Sequence[Sample] = read_history(connection, keys)
    since = 0.0
    if span_seconds is not None:
        since = (samples[-1].at if samples else snapshot.at) - span_seconds
        samples = [one for one in samples if one.at >= since]
    elif samples:
        since = samples[0].at
    with parsing(keys.missed):
        records = Ledger(connection, keys).records(since=since)
    return Timeline(snapshot, samples, records)


def thin(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Leave out samples until about so many are left, evenly over time; what each learner began and ended with stays.

    Their sums only grow, so that what lies between two that stay is still counted in full.
    """
    if len(samples) <= count:
        return list(samples)
    begin = samples[0].at
    step = max((samples[-1].at - begin) / count, 1e-3)
    kept: list[Sample] = []
    for number, one in enumerate(samples):
        before = samples[number - 1] if number else None
        after = samples[number + 1] if number + 1 < len(samples) else None
        ends = before is None or after is None or before.epoch != one.epoch or after.epoch != one.epoch
        if ends or (after and int((after.at - begin) / step) != int((one.at - begin) / step)):
            kept.append(one)
    return kept


def _point(one: Interval, *, continues: bool) -> TimelinePoint:
    worker_seconds = _worker_seconds(one)
    room = one.rate("room_seconds") * one.seconds
    return TimelinePoint(
        at=one.after.at,
        seconds=one.seconds,
        continues=continues,
        batches_per_second=one.rate("collected"),
        rows_per_second=one.rate("rows"),
        bytes_per_second=one.rate("collected_raw_bytes"),
        stored_bytes_per_second=one.rate("collected_stored_bytes"),
        versions_per_second=one.rate("published"),
        published_bytes_per_second=one.rate("published_raw_bytes"),
        published_stored_bytes_per_second=one.rate("published_stored_bytes"),
        staleness_median=one.staleness_quantile(0.5),
        staleness_90=one.staleness_quantile(0.9),
        learner_waits=_bounded(one.rate("wait_seconds")),
        workers_wait=_bounded(room / worker_seconds) if worker_seconds else 0.0,
        encoding=one.rate("encode_seconds"),
        sending=one.rate("send_seconds"),
        waiting=one.after.waiting,
        in_hand=one.after.in_hand,
        alive=one.after.alive,
        away=one.after.away,
    )


def _worker_seconds(one: Interval) -> float:
    """Give the time of all workers alive in an interval, added up."""
    return one.seconds * (one.before.alive + one.after.alive) / 2


def _bounded(share: float) -> float:
    # A wait is counted when it ends, and may have begun before the interval.
    return min(1.0, max(0.0, share))


def _quantile(found: Counter[int], share: float) -> int:
    wanted, seen = share * found.total(), 0
    for value in sorted(found):
        seen += found[value]
        if seen >= wanted:
            return value
    return max(found)
