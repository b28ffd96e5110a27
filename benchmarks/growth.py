"""The costs of learner, server and workers as the number of workers grows, and a cost model fitted to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.costs import IDLE_RESOURCES, RESOURCES, fit_rows
from benchmarks.measure import Row, progress
from benchmarks.simulated_run import Measurement, SimulatedRun, Workload, start_simulated_run

SIZES = (1, 8, 64, 256, 1000)

#: Limits of what all workers together load, or download, per version. Larger combinations are not measured.
LOADED_BYTES, DOWNLOADED_BYTES = 1 << 30, 256 << 20

#: Per worker: how long to wait after the start, because all workers joining at once keep two cores busy.
SETTLE_SECONDS = 0.04

#: With more workers than this, versions are published less often: two cores need some seconds to deliver a version to a
#: thousand workers.
WORKERS_AT_FULL_RATE = 200


@dataclass(frozen=True)
class Sizes:
    """The sizes of the workloads."""

    seconds: float
    batches_per_second: float
    read_seconds: float
    versions: tuple[tuple[int, float], ...]  #: size in bytes, and seconds between two versions


FULL = Sizes(4.0, 200.0, 0.1, ((64 << 10, 2.0), (4 << 20, 2.0)))
QUICK = Sizes(0.4, 50.0, 0.1, ((64 << 10, 0.2), (1 << 20, 0.2)))


def run(url: str, *, quick: bool, repetitions: int, workers: int | None = None) -> list[Row]:
    """Return the rows for growing numbers of workers, and those of the cost model."""
    sizes = QUICK if quick else FULL
    highest = workers or (2 if quick else SIZES[-1])
    counts = sorted({count for count in SIZES if count < highest} | {highest})
    idle: list[Measurement] = []
    found: dict[tuple[str, int], list[Measurement]] = {}
    for count in counts:
        for host_cache in (True, False) if count > 1 else (True,):
            progress(f"growth: {count} workers, {'one download per host' if host_cache else 'no host cache'}")
            with start_simulated_run(url, count, host_cache=host_cache) as simulated:
                first = simulated.measure(Workload(max(sizes.seconds, count * SETTLE_SECONDS)))
                if host_cache:
                    idle.append(first)
                for _ in range(repetitions):
                    for name, workload in _workloads(sizes, simulated).items():
                        found.setdefault((name, count), []).append(simulated.measure(workload))
    measurements = [measurement for group in found.values() for measurement in group if measurement.kept_up]
    return [*_rows(found, counts), *fit_rows(measurements, RESOURCES), *fit_rows(idle, IDLE_RESOURCES)]


def _workloads(sizes: Sizes, simulated: SimulatedRun) -> dict[str, Workload]:
    """Return the workloads of a simulated run, by name."""
    workloads = {}
    if simulated.hosts:
        workloads["idle"] = Workload(sizes.seconds)
        workloads["one by one"] = Workload(sizes.seconds, sizes.batches_per_second)
        workloads["many at a time"] = Workload(
            sizes.seconds, sizes.batches_per_second, read_seconds=sizes.read_seconds
        )
    kind = "a download per host" if simulated.hosts else "a download per worker"
    longer = max(1.0, simulated.workers / WORKERS_AT_FULL_RATE)
    for size, pause in sizes.versions:
        if simulated.workers * size <= (LOADED_BYTES if simulated.hosts else DOWNLOADED_BYTES):
            workloads[f"{size >> 10} KB, {kind}"] = Workload(
                longer * sizes.seconds, 0.0, longer * pause, size
            )
    return workloads


def _rows(found: dict[tuple[str, int], list[Measurement]], counts: list[int]) -> list[Row]:
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        for label, unit, metric in _metrics(name):
            first = next(count for count in counts if (name, count) in found)
            for count in counts:
                if count != first and (measurements := found.get((name, count))):
                    ours = [metric(measurement) for measurement in measurements]
                    theirs = [metric(measurement) for measurement in found[name, first]]
                    rows.append(
                        Row(
                            f"{label}: {count:,} workers",
                            f"{first} worker" + "s" * (first > 1),
                            "",
                            [sample for sample in ours if not np.isnan(sample)],
                            [sample for sample in theirs if not np.isnan(sample)],
                            unit,
                            False,
                            None,
                            _note(measurements),
                        )
                    )
    return rows


def _note(measurements: list[Measurement]) -> str:
    """Return a note on versions that were not applied, and on warnings."""
    warnings = sum(measurement.warnings for measurement in measurements)
    expected = sum(measurement.versions * measurement.workers for measurement in measurements)
    applied = sum(len(measurement.milliseconds) for measurement in measurements)
    notes = [f"{applied:,} of {expected:,} applied"] if applied < expected else []
    return "; ".join(notes + ([f"{warnings:,} warnings"] if warnings else []))


def _metrics(name: str) -> list[tuple[str, str, Callable[[Measurement], float]]]:
    """Return the metrics of one workload: label, unit and function."""
    if name == "idle":
        return [
            ("learner's CPU, all idle", "ms/s", lambda m: 1e3 * m.learner.cpu_seconds / m.seconds),
            ("server's CPU, all idle", "ms/s", lambda m: 1e3 * m.server.cpu_seconds / m.seconds),
            ("commands, all idle", "/s", lambda m: sum(m.server.commands.values()) / m.seconds),
            (
                "CPU of each idle worker",
                "ms/s",
                lambda m: 1e3 * m.workers_cpu_seconds / m.seconds / m.workers,
            ),
            ("server's memory", "MB", lambda m: m.server.memory_bytes / 1e6),
            ("server's peak memory", "MB", lambda m: m.server.peak_memory_bytes / 1e6),
            ("connections, the learner's included", "", lambda m: m.server.connections),
        ]
    if name in ("one by one", "many at a time"):
        return [
            (
                f"learner's CPU per batch of 4 KB, {name}",
                "µs",
                lambda m: 1e6 * m.learner.cpu_seconds / m.batches,
            ),
            (
                f"server's CPU per batch of 4 KB, {name}",
                "µs",
                lambda m: 1e6 * m.server.cpu_seconds / m.batches,
            ),
            (f"batches collected, {name}", "/s", lambda m: m.batches_per_second),
        ]
    return [
        (f"{name}, publish to applied, p50", "ms", lambda m: _percentile(m, 50)),
        (f"{name}, publish to applied, p99", "ms", lambda m: _percentile(m, 99)),
        (f"{name}, server's CPU", "ms/s", lambda m: 1e3 * m.server.cpu_seconds / m.seconds),
        (f"{name}, from the server", "MB/s", lambda m: m.server.sent_bytes / m.seconds / 1e6),
    ]


def _percentile(measurement: Measurement, percent: float) -> float:
    return (
        float(np.percentile(measurement.milliseconds, percent)) if measurement.milliseconds else float("nan")
    )
