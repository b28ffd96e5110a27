"""A simulated run for minutes: the growth of memory of learner, workers and server."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.measure import Row, progress
from benchmarks.simulated_run import Measurement, Workload, start_simulated_run

#: The duration of a sample, in which one version is published.
SAMPLE_SECONDS, QUICK_SAMPLE_SECONDS = 20.0, 0.5

#: The first part of the time, in which caches and pools fill, is not measured.
WARM_UP_PART = 0.3


def run(
    url: str, *, quick: bool, repetitions: int, workers: int | None = None, minutes: float | None = None
) -> list[Row]:
    """Return the growth of memory per minute of learner, workers and server. `repetitions` is not used."""
    workers = workers or (2 if quick else 1000)
    minutes = minutes or (0.05 if quick else 10.0)
    seconds = QUICK_SAMPLE_SECONDS if quick else SAMPLE_SECONDS
    workload = Workload(seconds, float(min(workers, 100)), seconds, 64 << 10)
    measurements, minutes_at = list[Measurement](), list[float]()
    with start_simulated_run(url, workers, host_cache=True) as simulated:
        started = time.monotonic()
        while not minutes_at or minutes_at[-1] < minutes:
            measurements.append(simulated.measure(workload))
            minutes_at.append((time.monotonic() - started) / 60)
            progress(f"soak: {minutes_at[-1]:.1f} minutes; {_describe(measurements[-1])}")
    return _rows(f"{workers:,} workers for {minutes:g} minutes", measurements, minutes_at)


def _rows(name: str, measurements: list[Measurement], minutes_at: list[float]) -> list[Row]:
    batches = sum(measurement.batches for measurement in measurements)
    warnings = sum(measurement.warnings for measurement in measurements)
    note = f"{batches:,} batches, {_applied(measurements)}, {warnings:,} warnings"
    warm_up = int(len(measurements) * WARM_UP_PART)
    memory_megabytes = {
        "learner": [measurement.learner.memory_bytes / 1e6 for measurement in measurements],
        "workers": [measurement.workers_memory_bytes / 1e6 for measurement in measurements],
        "server": [measurement.server.memory_bytes / 1e6 for measurement in measurements],
    }
    cores = {
        "learner": [measurement.learner.cpu_seconds / measurement.seconds for measurement in measurements],
        "workers": [measurement.workers_cpu_seconds / measurement.seconds for measurement in measurements],
        "server": [measurement.server.cpu_seconds / measurement.seconds for measurement in measurements],
    }
    latencies = sorted(latency for measurement in measurements for latency in measurement.milliseconds)
    rows = []
    for part, megabytes in memory_megabytes.items():
        memory, growth = f"{name}: memory of {part}", f"{name}: growth of {part} per minute"
        rows += [
            Row(
                memory,
                "after the first part",
                "",
                megabytes[-1:],
                megabytes[warm_up : warm_up + 1],
                "MB",
                False,
                None,
                note,
            ),
            Row(growth, "", "", [_slope(minutes_at[warm_up:], megabytes[warm_up:])], [], "MB", False, None),
            Row(f"{name}: CPU of {part}", "", "", cores[part], [], "cores", False, None),
        ]
    for percent in (50, 99):
        percentile = [float(np.percentile(latencies, percent))] if latencies else []
        rows.append(Row(f"{name}: publish to applied, p{percent}", "", "", percentile, [], "ms", False, None))
    return rows


def _slope(minutes: list[float], megabytes: list[float]) -> float:
    """Return the growth per minute: the slope of a line fitted to the samples."""
    return float(np.polyfit(minutes, megabytes, 1)[0]) if len(megabytes) > 1 else float("nan")


def _applied(measurements: list[Measurement]) -> str:
    expected = sum(measurement.versions * measurement.workers for measurement in measurements)
    return f"{sum(len(measurement.milliseconds) for measurement in measurements):,} of {expected:,} versions applied"


def _describe(last: Measurement) -> str:
    return (
        f"memory of learner {last.learner.memory_bytes / 1e6:.1f}, "
        f"workers {last.workers_memory_bytes / 1e6:.1f}, server {last.server.memory_bytes / 1e6:.1f} MB; CPU "
        f"{last.learner.cpu_seconds / last.seconds:.2f}, {last.workers_cpu_seconds / last.seconds:.2f}, "
        f"{last.server.cpu_seconds / last.seconds:.2f} cores; {last.batches} batches; {_applied([last])}; "
        f"{last.warnings} warnings"
    )
