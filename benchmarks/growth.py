"""What the learner, the server and the workers need as a crowd grows, and a cost model fitted to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.costs import FIGURES, SETTLED_FIGURES, fit
from benchmarks.crowd import Crowd, Point, Work, crowd
from benchmarks.measure import Row, progress

SIZES = (1, 8, 64, 256, 1000)

#: No version is measured of which all workers together would load more, or download more.
LOADED_BYTES, DOWNLOADED_BYTES = 1 << 30, 256 << 20


#: For each worker, as all that join at the same time keep two cores busy for a while.
SETTLE_SECONDS = 0.04

#: More workers than this get versions more seldom: two cores need some seconds to give each of a thousand a version.
ALL_AT_WORK = 200


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    seconds: float
    batches_per_second: float
    read_seconds: float
    versions: tuple[tuple[int, float], ...]  #: bytes, and seconds between two of them


FULL = Sizes(4.0, 200.0, 0.1, ((64 << 10, 2.0), (4 << 20, 2.0)))
QUICK = Sizes(0.4, 50.0, 0.1, ((64 << 10, 0.2), (1 << 20, 0.2)))


def run(url: str, *, quick: bool, repetitions: int, workers: int | None = None) -> list[Row]:
    """Give the rows of crowds of growing sizes, and those of the cost model."""
    sizes = QUICK if quick else FULL
    most = workers or (2 if quick else SIZES[-1])
    counts = sorted({count for count in SIZES if count < most} | {most})
    settled: list[Point] = []
    found: dict[tuple[str, int], list[Point]] = {}
    for count in counts:
        for host_cache in (True, False) if count > 1 else (True,):
            progress(f"growth: {count} workers, {'one download per host' if host_cache else 'no host cache'}")
            with crowd(url, count, host_cache=host_cache) as simulated:
                first = simulated.do(Work(max(sizes.seconds, count * SETTLE_SECONDS)))
                if host_cache:
                    settled.append(first)
                for _ in range(repetitions):
                    for name, work in _works(sizes, simulated).items():
                        found.setdefault((name, count), []).append(simulated.do(work))
    points = [point for some in found.values() for point in some if point.kept_up]
    return [*_rows(found, counts), *fit(points, FIGURES), *fit(settled, SETTLED_FIGURES)]


def _works(sizes: Sizes, simulated: Crowd) -> dict[str, Work]:
    """Give what a crowd does, by name."""
    works = {}
    if simulated.hosts:
        works["idle"] = Work(sizes.seconds)
        works["one by one"] = Work(sizes.seconds, sizes.batches_per_second)
        works["many at a time"] = Work(
            sizes.seconds, sizes.batches_per_second, read_seconds=sizes.read_seconds
        )
    kind = "a download per host" if simulated.hosts else "a download per worker"
    longer = max(1.0, simulated.workers / ALL_AT_WORK)
    for size, pause in sizes.versions:
        if simulated.workers * size <= (LOADED_BYTES if simulated.hosts else DOWNLOADED_BYTES):
            works[f"{size >> 10} KB, {kind}"] = Work(longer * sizes.seconds, 0.0, longer * pause, size)
    return works


def _rows(found: dict[tuple[str, int], list[Point]], counts: list[int]) -> list[Row]:
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        for label, unit, figure in _figures(name):
            first = next(count for count in counts if (name, count) in found)
            for count in counts:
                if count != first and (points := found.get((name, count))):
                    ours = [figure(point) for point in points]
                    theirs = [figure(point) for point in found[name, first]]
                    rows.append(
                        Row(
                            f"{label}: {count:,} workers",
                            f"{first} worker" + "s" * (first > 1),
                            "",
                            [one for one in ours if not np.isnan(one)],
                            [one for one in theirs if not np.isnan(one)],
                            unit,
                            False,
                            None,
                            _note(points),
                        )
                    )
    return rows


def _note(points: list[Point]) -> str:
    """Say what was not as it should be."""
    warnings = sum(point.warnings for point in points)
    expected = sum(point.versions * point.workers for point in points)
    applied = sum(len(point.milliseconds) for point in points)
    said = [f"{applied:,} of {expected:,} applied"] if applied < expected else []
    return "; ".join(said + ([f"{warnings:,} warnings"] if warnings else []))


def _figures(name: str) -> list[tuple[str, str, Callable[[Point], float]]]:
    """Give what is told of one kind of work: its label, its unit, and how it is computed."""
    if name == "idle":
        return [
            ("learner's CPU, all idle", "ms/s", lambda one: 1e3 * one.learner.cpu_seconds / one.seconds),
            ("server's CPU, all idle", "ms/s", lambda one: 1e3 * one.server.cpu_seconds / one.seconds),
            ("commands, all idle", "/s", lambda one: sum(one.server.commands.values()) / one.seconds),
            (
                "CPU of each idle worker",
                "ms/s",
                lambda one: 1e3 * one.crowd_cpu_seconds / one.seconds / one.workers,
            ),
            ("server's memory", "MB", lambda one: one.server.memory_bytes / 1e6),
            ("server's peak memory", "MB", lambda one: one.server.peak_memory_bytes / 1e6),
            ("connections, the learner's included", "", lambda one: one.server.connections),
        ]
    if name in ("one by one", "many at a time"):
        return [
            (
                f"learner's CPU per batch of 4 KB, {name}",
                "µs",
                lambda one: 1e6 * one.learner.cpu_seconds / one.batches,
            ),
            (
                f"server's CPU per batch of 4 KB, {name}",
                "µs",
                lambda one: 1e6 * one.server.cpu_seconds / one.batches,
            ),
            (f"batches collected, {name}", "/s", lambda one: one.batches_per_second),
        ]
    return [
        (f"{name}, publish to applied, p50", "ms", lambda one: _percentile(one, 50)),
        (f"{name}, publish to applied, p99", "ms", lambda one: _percentile(one, 99)),
        (f"{name}, server's CPU", "ms/s", lambda one: 1e3 * one.server.cpu_seconds / one.seconds),
        (f"{name}, from the server", "MB/s", lambda one: one.server.sent_bytes / one.seconds / 1e6),
    ]


def _percentile(point: Point, percent: float) -> float:
    return float(np.percentile(point.milliseconds, percent)) if point.milliseconds else float("nan")
