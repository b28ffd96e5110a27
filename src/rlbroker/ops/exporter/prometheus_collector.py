"""The collector, which reads the metrics from the server at each scrape of Prometheus."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

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
from rlbroker.backend.locks import CallLock
from rlbroker.errors import ConnectionFailed, DeadlineExceeded, PeerError, RlbrokerError
from rlbroker.metrics.counters import EXACT_BELOW
from rlbroker.metrics.history import Sample, read_history
from rlbroker.ops.exporter.metrics import (
    LEARNER_METRICS,
    RUN_METRICS,
    WORKER_METRICS,
    WORKERS_LISTED,
    Member,
    RunMetric,
)
from rlbroker.ops.inspect.runs import choose_run, list_run_names
from rlbroker.ops.inspect.snapshot import Snapshot, WorkerStatus, take_snapshot

logger = logging.getLogger("rlbroker")

#: Upper bounds of the staleness histogram's buckets. From 16 on, the history counts by powers of two.
STALENESS_BOUNDS: Final = (0, 1, 2, 3, 4, 6, 8, 10, 12, 15, 31, 63, 127, 255, 511, 1023)


@dataclass(frozen=True)
class RunReading:
    """What one scrape read of a run; the snapshot is None if the run cannot be read."""

    run: str
    snapshot: Snapshot | None = None
    sample: Sample | None = None


class MetricsCollector(Collector):
    """Reads the metrics of one run, or of all runs on a server, at each scrape."""

    def __init__(
        self, connection: Connection, *, version: str, run: str | None = None, timeout_seconds: float = 5.0
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            version: the release of rlbroker.
            run: the run; None for all that exist at the time of a scrape.
            timeout_seconds: limit of one scrape; runs that were not read by then count as unreadable.
        """
        self._connection, self._version, self._run = connection, version, run
        self._timeout_seconds = timeout_seconds
        self._scrapes = CallLock()
        self._problems: dict[str, str] = {}

    def describe(self) -> Iterable[Metric]:
        """Return every metric without values: Prometheus may request single metrics by name."""
        return [*_build_own_families(False, 0.0, self._version), *build_families(())]

    def collect(self) -> Iterator[Metric]:
        """Read all metrics. A scrape waits until an earlier one has ended, to spare the server.

        Raises:
            DeadlineExceeded: an earlier scrape has not ended in time.
        """
        began, deadline = time.perf_counter(), Deadline(self._timeout_seconds)
        answers = self._scrapes.run_within(deadline.remaining, lambda: [self._read(deadline)])
        if answers is None:
            raise DeadlineExceeded(f"an earlier scrape did not end within {deadline.seconds:g} s")
        (readings,) = answers
        families = list(build_families(readings or ()))
        took_seconds = time.perf_counter() - began
        yield from _build_own_families(readings is not None, took_seconds, self._version)
        yield from families

    def _read(self, deadline: Deadline) -> list[RunReading] | None:
        """Read all runs; return None if the server does not answer."""
        with within(deadline):
            try:
                # Half the timeout: the scrape must report a silent server before Prometheus gives up.
                self._connection.execute("PING", deadline=Deadline(self._timeout_seconds / 2))
                names = list_run_names(self._connection) if self._run is None else [self._run]
                readings = [self._read_run(name, deadline) for name in names]
            except PeerError as error:
                self._log_problem("", str(error))
                return None
        for name in self._problems.keys() - {"", *names}:  # runs that no longer exist
            del self._problems[name]
        self._log_problem("", "")
        return readings

    def _read_run(self, run: str, deadline: Deadline) -> RunReading:
        """Read one run; an error in one run must not hide the others."""
        try:
            if deadline.over:
                raise DeadlineExceeded(f"there was no time left after {self._timeout_seconds:g} s")
            choose_run(self._connection, run)
            snapshot = take_snapshot(self._connection, run)
            newest = read_history(self._connection, Keys(run), count=1)
        except ConnectionFailed:
            raise
        except Exception as error:  # noqa: BLE001 - another program may have written anything into this run
            known = isinstance(error, RlbrokerError)
            self._log_problem(run, str(error) if known else f"unexpected {type(error).__name__}: {error}")
            return RunReading(run)
        self._log_problem(run, "")
        return RunReading(run, snapshot, newest[-1] if newest else None)

    def _log_problem(self, run: str, problem: str) -> None:
        """Log a problem of a run, or of the server, when it begins and when it ends, not at each scrape."""
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


def _build_own_families(up: bool, took_seconds: float, version: str) -> list[Metric]:
    """Build the metrics of the exporter itself."""
    return [
        GaugeMetricFamily("rlbroker_up", "Whether the Redis server answered.", up),
        GaugeMetricFamily("rlbroker_scrape_seconds", "Time that reading these metrics took.", took_seconds),
        InfoMetricFamily(
            "rlbroker_build", "The release of rlbroker that the exporter runs.", {"version": version}
        ),
    ]


def build_families(readings: Sequence[RunReading]) -> Iterator[Metric]:
    """Build the metrics of all runs, grouped by name as Prometheus requires."""
    readable = GaugeMetricFamily(
        "rlbroker_run_readable",
        "Whether the run could be read: 0 if another release or program wrote it, or it does not exist.",
        labels=["run"],
    )
    for reading in readings:
        readable.add_metric([reading.run], reading.snapshot is not None)
    yield readable
    runs = [(reading.run, reading.snapshot) for reading in readings if reading.snapshot]
    yield from _read_metrics(
        RUN_METRICS, ("run",), [((run,), snapshot, snapshot.workers.values()) for run, snapshot in runs]
    )
    members = [
        ((run, str(info.worker_id)), Member(snapshot, info, status), (status,))
        for run, snapshot in runs
        for info in snapshot.members[:WORKERS_LISTED]
        for status in (snapshot.workers[info.worker_id],)
    ]
    yield from _read_metrics(WORKER_METRICS, ("run", "worker"), members)
    learners = [((reading.run,), reading, ()) for reading in readings if reading.snapshot and reading.sample]
    yield from _read_metrics(LEARNER_METRICS, ("run",), learners)
    histogram = HistogramMetricFamily(
        "rlbroker_batch_staleness_versions",
        "Staleness of the batches that this learner collected, in versions. The sum is estimated above 15.",
        labels=["run"],
    )
    for reading in readings:
        if reading.snapshot and reading.sample:
            histogram.add_metric([reading.run], *staleness_buckets(reading.sample.staleness))
    yield histogram


def _read_metrics(
    metrics: Sequence[RunMetric],
    labels: tuple[str, ...],
    sources: Sequence[tuple[tuple[str, ...], Any, Iterable[WorkerStatus]]],
) -> Iterator[Metric]:
    """Build metrics from sources, each with its values of the labels and its workers."""
    for metric in metrics:
        make = CounterMetricFamily if metric.name.endswith("_total") else GaugeMetricFamily
        names = (*labels, "reason") if metric.reasons else labels
        family = make(metric.name, metric.description, labels=names)
        for values, source, workers in sources:
            for reason, number in metric.read(source, workers).items():
                family.add_metric((*values, reason) if metric.reasons else values, number)
        yield family


def staleness_buckets(counts: Mapping[int, int]) -> tuple[list[tuple[str, float]], float]:
    """Return a histogram's buckets, each with all batches up to its bound, and the sum of all staleness.

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
