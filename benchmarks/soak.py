"""A crowd at work for minutes: whether anybody's memory grows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
    points: list[Point] = []
    with crowd(url, workers, host_cache=True) as simulated:
        while sum(point.seconds for point in points) < 60 * minutes:
            points.append(simulated.do(work))
            progress(f"soak: {_told(points)}")
    warm = points[int(len(points) * WARM_PART) :]
    at = np.cumsum([point.seconds for point in points])[-len(warm) :] / 60
    held = {
        "learner": [point.learner.memory_bytes / 1e6 for point in warm],
        "workers": [point.crowd_memory_bytes / 1e6 for point in warm],
        "server": [point.server.memory_bytes / 1e6 for point in warm],
    }
    name = f"{workers:,} workers for {minutes:g} minutes"
    batches = sum(point.batches for point in points)
    note = f"{batches:,} batches, {_applied(points)}, {points[-1].warnings:,} warnings"
    return [
        row
        for who, megabytes in held.items()
        for row in (
            Row(
                f"{name}: memory of {who}",
                "after the first part",
                "",
                megabytes[-1:],
                megabytes[:1],
                "MB",
                False,
                None,
                note,
            ),
            Row(
                f"{name}: growth of {who} per minute", "", "", [_slope(at, megabytes)], [], "MB", False, None
            ),
        )
    ]


def _slope(minutes: NDArray[np.float64], megabytes: list[float]) -> float:
    """Give the growth per minute: the slope of the straight line through the samples."""
    return float(np.polyfit(minutes, megabytes, 1)[0]) if len(megabytes) > 1 else float("nan")


def _applied(points: list[Point]) -> str:
    expected = sum(point.versions * point.workers for point in points)
    return f"{sum(len(point.milliseconds) for point in points):,} of {expected:,} versions applied"


def _told(points: list[Point]) -> str:
    last = points[-1]
    return (
        f"{sum(point.seconds for point in points):.0f} s; memory of learner {last.learner.memory_bytes / 1e6:.1f}, "
        f"workers {last.crowd_memory_bytes / 1e6:.1f}, server {last.server.memory_bytes / 1e6:.1f} MB; CPU "
        f"{last.learner.cpu_seconds / last.seconds:.2f}, {last.crowd_cpu_seconds / last.seconds:.2f}, "
        f"{last.server.cpu_seconds / last.seconds:.2f} cores; {last.batches} batches; {_applied([last])}; "
        f"{last.warnings} warnings"
    )
