"""What Prometheus is given: every figure of the runs on a server, read anew each time it asks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.keys import Keys
from rlbroker.errors import ConnectionFailed, DeadlineExceeded, PeerError, RlbrokerError
from rlbroker.metrics.counters import EXACT_BELOW
from rlbroker.metrics.history import Sample, read_history
from rlbroker.ops.exporter.metrics import (
    LEARNER_FIGURES,
    RUN_FIGURES,
    WORKER_FIGURES,
    WORKERS_LISTED,
    Member,
    RunMetric,
)
from rlbroker.ops.inspect.runs import choose_run, run_names
from rlbroker.ops.inspect.snapshot import Snapshot, take_snapshot

logger = logging.getLogger("rlbroker")

#: Upper bounds of the staleness histogram's buckets. The history counts from 16 on by powers of two.
STALENESS_BOUNDS: Final = (0, 1, 2, 3, 4, 6, 8, 10, 12, 15, 31, 63, 127, 255, 511, 1023)

Looked = TypeVar("Looked")


@dataclass(frozen=True)
class Reading:
    """What was read of one run; without a snapshot it could not be read."""

    run: str
    snapshot: Snapshot | None = None
    sample: Sample | None = None


class MetricsCollector(Collector):
    """Reads the figures of one run, or of all runs on a server, when it is asked for them. Keeps none."""

    def __init__(
        self, connection: Connection, *, version: str, run: str | None = None, timeout_seconds: float = 5.0
    ) -> None:
        """Prepare to read; nothing is asked yet.

        Args:
            connection: way to the server, which need not be there.
            version: of this program.
            run: name of the run; all that are on the server when it is asked for them by default.
            timeout_seconds: how long one reading may take; what was not read by then cannot be read.
        """
        self._connection, self._version, self._run = connection, version, run
        self._timeout_seconds = timeout_seconds
        self._reading = threading.Lock()
        self._problems: dict[str, str] = {}

    def describe(self) -> Iterable[Metric]:
        """Give every metric without figures, so that single ones can be asked for."""
        return [*_own(False, 0.0, self._version), *_families(())]

    def collect(self) -> Iterator[Metric]:
        """Read everything now. Those who ask at once are answered one after the other: the server is others'.

        Raises:
            DeadlineExceeded: those who asked before are not answered yet.
        """
        began, deadline = time.perf_counter(), Deadline(self._timeout_seconds)
        if not self._reading.acquire(timeout=deadline.remaining):
            raise DeadlineExceeded(f"others who asked before were not answered within {deadline.seconds:g} s")
        try:
            readings = self._read(deadline)
        finally:
            self._reading.release()
        families = list(_families(readings or ()))
        took_seconds = time.perf_counter() - began
        yield from _own(readings is not None, took_seconds, self._version)
        yield from families

    def _read(self, deadline: Deadline) -> list[Reading] | None:
        """Give what can be read of each run; None if the server does not answer."""
        with within(deadline):
            try:
                # That nobody answers is to be said long before whoever asks stops waiting.
                self._connection.execute("PING", deadline=Deadline(self._timeout_seconds / 2))
                names = run_names(self._connection) if self._run is None else [self._run]
                readings = [self._read_run(name, deadline) for name in names]
            except PeerError as error:
                self._note("", str(error))
                return None
        for name in self._problems.keys() - {"", *names}:  # these runs are gone
            del self._problems[name]
        self._note("", "")
        return readings

    def _read_run(self, run: str, deadline: Deadline) -> Reading:
        """Read one run. One that cannot be read must not hide the others."""
        try:
            if deadline.over:
                raise DeadlineExceeded(f"there was no time left after {self._timeout_seconds:g} s")
            choose_run(self._connection, run)
            snapshot = take_snapshot(self._connection, run)
            newest = read_history(self._connection, Keys(run), count=1)
        except ConnectionFailed:
            raise
        except Exception as error:  # noqa: BLE001 - whatever somebody wrote into this run
            known = isinstance(error, RlbrokerError)
            self._note(run, str(error) if known else f"unexpected {type(error).__name__}: {error}")
            return Reading(run)
        self._note(run, "")
        return Reading(run, snapshot, newest[-1] if newest else None)

    def _note(self, run: str, problem: str) -> None:
        """Say what is wrong when it begins, and when it is over; not each time."""
        before = self._problems.pop(run, "")
        if problem:
            self._problems[run] = problem
        if bool(problem) == bool(before):
            return
        what = f"the run {run!r}" if run else f"{self._connection.address}"
        if problem:
            logger.warning("%s cannot be read: %s", what, problem)
        else:
            logger.warning("%s can be read again", what)


def _own(up: bool, took_seconds: float, version: str) -> list[Metric]:
    return [
        GaugeMetricFamily("rlbroker_up", "Whether the Redis server answered.", up),
        GaugeMetricFamily("rlbroker_scrape_seconds", "How long it took to read these figures.", took_seconds),
        InfoMetricFamily("rlbroker_build", "The release of rlbroker that reads.", {"version": version}),
    ]


def _families(readings: Sequence[Reading]) -> Iterator[Metric]:
    """Give the metrics of all runs: those of one name belong together."""
    readable = GaugeMetricFamily(
        "rlbroker_run_readable",
        "Whether the run could be read: 0 if another release or program wrote it, or it is not there.",
        labels=["run"],
    )
    for reading in readings:
        readable.add_metric([reading.run], reading.snapshot is not None)
    yield readable
    runs = [((one.run,), one.snapshot) for one in readings if one.snapshot]
    yield from _metrics(RUN_FIGURES, ("run",), runs)
    members = [
        ((run[0], str(member.info.worker_id)), member)
        for run, snapshot in runs
        for member in _members(snapshot)
    ]
    yield from _metrics(WORKER_FIGURES, ("run", "worker"), members)
    learners = [((one.run,), (one.snapshot, one.sample)) for one in readings if one.snapshot and one.sample]
    yield from _metrics(LEARNER_FIGURES, ("run",), learners)
    histogram = HistogramMetricFamily(
        "rlbroker_batch_staleness_versions",
        "Staleness of the batches that this learner collected: how many versions old the weights were that produced "
        "them. The sum is estimated above 15.",
        labels=["run"],
    )
    for one in readings:
        if one.snapshot and one.sample:
            buckets, total = staleness_buckets(one.sample.staleness)
            histogram.add_metric([one.run], buckets, total)
    yield histogram


def _members(snapshot: Snapshot) -> list[Member]:
    there = [
        Member(snapshot, status.info, status)
        for status in snapshot.workers.values()
        if status.info is not None
    ]
    return there[:WORKERS_LISTED]


def _metrics(
    figures: Sequence[RunMetric[Looked]],
    labels: tuple[str, ...],
    looks: Sequence[tuple[tuple[str, ...], Looked]],
) -> Iterator[Metric]:
    for figure in figures:
        make = CounterMetricFamily if figure.kind == "counter" else GaugeMetricFamily
        family = make(figure.name, figure.says, labels=[*labels, "reason"] if figure.by_reason else labels)
        for values, looked in looks:
            found = figure.of(looked)
            if isinstance(found, Mapping):
                for reason, number in found.items():
                    family.add_metric([*values, reason], number)
            elif found is not None:
                family.add_metric(values, found)
        yield family


def staleness_buckets(counts: Mapping[int, int]) -> tuple[list[tuple[str, float]], float]:
    """Give a histogram's buckets, each with all that are not above its bound, and the sum of all.

    >>> buckets, total = staleness_buckets({0: 5, 1: 2, 16: 1})
    >>> buckets[0], buckets[1], buckets[9], buckets[10], buckets[-1], total
    (('0.0', 5), ('1.0', 7), ('15.0', 7), ('31.0', 8), ('+Inf', 8), 25.5)
    """
    highest = {low: low if low < EXACT_BELOW else 2 * low - 1 for low in counts}
    buckets: list[tuple[str, float]] = [
        (f"{bound:.1f}", sum(count for low, count in counts.items() if highest[low] <= bound))
        for bound in STALENESS_BOUNDS
    ]
    buckets.append(("+Inf", sum(counts.values())))
    return buckets, sum((low + highest[low]) / 2 * count for low, count in counts.items())
