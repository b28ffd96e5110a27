"""A crowd at work for minutes: whether anybody's memory grows."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.crowd import Point, Work, crowd
from benchmarks.measure import Row, progress

#: A sample each so often, with one version in it.
SAMPLE_SECONDS, QUICK_SAMPLE_SECONDS = 20.0, 0.5

#: The first part of the time, in which caches and pools fill, does not count.
WARM_PART = 0.3


def run(
    url: str, *, quick: bool, repetitions: int, workers: int | None = None, minutes: float | None = None
) -> list[Row]:
    """Give the growth of the memory of learner, workers and server per minute; there is one repetition."""
    workers = workers or (2 if quick else 1000)
    minutes = minutes or (0.05 if quick else 10.0)
    seconds = QUICK_SAMPLE_SECONDS if quick else SAMPLE_SECONDS
    work = Work(seconds, float(min(workers, 100)), seconds, 64 << 10)
    points, at = list[Point](), list[float]()
    with crowd(url, workers, host_cache=True) as simulated:
        began = time.monotonic()
        while not at or at[-1] < minutes:
            points.append(simulated.do(work))
            at.append((time.monotonic() - began) / 60)
            progress(f"soak: {at[-1]:.1f} minutes; {_told(points[-1])}")
    return _rows(f"{workers:,} workers for {minutes:g} minutes", points, at)


def _rows(name: str, points: list[Point], at: list[float]) -> list[Row]:
    batches = sum(point.batches for point in points)
    note = f"{batches:,} batches, {_applied(points)}, {sum(point.warnings for point in points):,} warnings"
    warm = int(len(points) * WARM_PART)
    held = {
        "learner": [point.learner.memory_bytes / 1e6 for point in points],
        "workers": [point.crowd_memory_bytes / 1e6 for point in points],
        "server": [point.server.memory_bytes / 1e6 for point in points],
    }
    used = {
        "learner": [point.learner.cpu_seconds / point.seconds for point in points],
        "workers": [point.crowd_cpu_seconds / point.seconds for point in points],
        "server": [point.server.cpu_seconds / point.seconds for point in points],
    }
    late = sorted(one for point in points for one in point.milliseconds)
    rows = []
    for who, megabytes in held.items():
        memory, growth = f"{name}: memory of {who}", f"{name}: growth of {who} per minute"
        rows += [
            Row(
                memory,
                "after the first part",
                "",
                megabytes[-1:],
                megabytes[warm : warm + 1],
                "MB",
                False,
                None,
                note,
            ),
            Row(growth, "", "", [_slope(at[warm:], megabytes[warm:])], [], "MB", False, None),
            Row(f"{name}: CPU of {who}", "", "", used[who], [], "cores", False, None),
        ]
    for percent in (50, 99):
        percentile = [float(np.percentile(late, percent))] if late else []
        rows.append(Row(f"{name}: publish to applied, p{percent}", "", "", percentile, [], "ms", False, None))
    return rows


def _slope(minutes: list[float], megabytes: list[float]) -> float:
    """Give the growth per minute: the slope of the straight line through the samples."""
    return float(np.polyfit(minutes, megabytes, 1)[0]) if len(megabytes) > 1 else float("nan")


def _applied(points: list[Point]) -> str:
    expected = sum(point.versions * point.workers for point in points)
    return f"{sum(len(point.milliseconds) for point in points):,} of {expected:,} versions applied"


def _told(last: Point) -> str:
    return (
        f"memory of learner {last.learner.memory_bytes / 1e6:.1f}, "
        f"workers {last.crowd_memory_bytes / 1e6:.1f}, server {last.server.memory_bytes / 1e6:.1f} MB; CPU "
        f"{last.learner.cpu_seconds / last.seconds:.2f}, {last.crowd_cpu_seconds / last.seconds:.2f}, "
        f"{last.server.cpu_seconds / last.seconds:.2f} cores; {last.batches} batches; {_applied([last])}; "
        f"{last.warnings} warnings"
    )
