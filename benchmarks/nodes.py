"""A Cluster of one node and of three, with and without replicas: what each node carries, and how long it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.crowd import Crowd, Point, Work, crowd
from benchmarks.measure import Row, progress
from benchmarks.servers import Cluster, ServerFigures, cluster

WORKERS, QUICK_WORKERS = 8, 2

ONE, THREE, REPLICAS, CACHE = "1 node", "3 nodes", "3 nodes, read from replicas", "3 nodes, host cache"


def run(url: str, *, quick: bool, repetitions: int) -> list[Row]:
    """Give the rows of Clusters, which are started for it."""
    megabytes = 12 if quick else 32
    workers = QUICK_WORKERS if quick else WORKERS
    seconds = 0.6 if quick else 6.0
    weights = Work(seconds, 0.0, seconds / 2, megabytes << 20)
    batches = Work(seconds, 50.0 if quick else 200.0)
    found: dict[tuple[str, str], list[Point]] = {}
    with contextlib.ExitStack() as stack:
        progress("nodes: starting Clusters")
        single = stack.enter_context(cluster(1))
        three = stack.enter_context(cluster(3))
        replicated = stack.enter_context(cluster(3, 1))
        crowds = {
            ONE: _crowd(stack, single, workers),
            THREE: _crowd(stack, three, workers),
            REPLICAS: _crowd(stack, replicated, workers, read_from_replicas=True),
            CACHE: _crowd(stack, three, workers, host_cache=True),
        }
        for name, simulated in crowds.items():
            progress(f"  warming up: {name}")
            simulated.do(weights)
        for repetition in range(repetitions):
            for name, simulated in crowds.items():
                found.setdefault((name, "weights"), []).append(simulated.do(weights))
                if name in (ONE, THREE):
                    found.setdefault((name, "batches"), []).append(simulated.do(batches))
            progress(f"  {repetition + 1} of {repetitions}")
    return _rows(found, f"{megabytes} MB to {workers} workers")


def _crowd(
    stack: contextlib.ExitStack, place: Cluster, workers: int, *, host_cache: bool = False, **settings: bool
) -> Crowd:
    return stack.enter_context(
        crowd(place.url, workers, host_cache=host_cache, nodes=place.nodes, **settings)
    )


def _rows(found: dict[tuple[str, str], list[Point]], weights: str) -> list[Row]:
    return [
        _row(
            found, f"{weights}: to the busiest node, per version", THREE, ONE, "weights", _received, "MB", 0.4
        ),
        _row(
            found, f"{weights}: from the busiest node, per version", THREE, ONE, "weights", _sent, "MB", 0.4
        ),
        _row(found, f"{weights}: CPU of the busiest node, per version", THREE, ONE, "weights", _cpu, "ms"),
        _row(found, f"{weights}: publishing", THREE, ONE, "weights", _publishing, "ms"),
        _row(found, f"{weights}: publish to applied, p50", THREE, ONE, "weights", _applied, "ms"),
        _row(
            found,
            f"{weights}: from the masters, per version",
            REPLICAS,
            THREE,
            "weights",
            _from_masters,
            "MB",
            0.1,
        ),
        _row(
            found,
            f"{weights}: from masters to replicas, per version",
            REPLICAS,
            THREE,
            "weights",
            _replicated,
            "MB",
        ),
        _row(found, f"{weights}: publish to applied, p50", REPLICAS, THREE, "weights", _applied, "ms"),
        _row(found, f"{weights}: from the busiest node, per version", CACHE, THREE, "weights", _sent, "MB"),
        _row(found, f"{weights}: publish to applied, p50", CACHE, THREE, "weights", _applied, "ms"),
        _row(found, "batches of 4 KB: to the busiest node, each", THREE, ONE, "batches", _batch_bytes, "KB"),
        _row(
            found, "batches of 4 KB: CPU of the busiest node, each", THREE, ONE, "batches", _batch_cpu, "µs"
        ),
        _row(found, "batches of 4 KB: learner's CPU, each", THREE, ONE, "batches", _learner_cpu, "µs"),
    ]


def _row(
    found: dict[tuple[str, str], list[Point]],
    label: str,
    name: str,
    against: str,
    kind: str,
    figure: Callable[[Point], float],
    unit: str,
    target: float | None = None,
) -> Row:
    wanted = "" if target is None else f"≤ {target:g}×"
    ours, theirs = ([figure(point) for point in found[one, kind]] for one in (name, against))
    return Row(f"{label}: {name}", against, wanted, ours, theirs, unit, False, target)


def _received(point: Point) -> float:
    return max(node.received_bytes for node in point.nodes) / point.versions / 1e6


def _sent(point: Point) -> float:
    return max(node.sent_bytes for node in point.nodes) / point.versions / 1e6


def _from_masters(point: Point) -> float:
    return sum(node.sent_bytes for node in _masters(point)) / point.versions / 1e6


def _replicated(point: Point) -> float:
    return sum(node.replicated_bytes for node in point.nodes) / point.versions / 1e6


def _masters(point: Point) -> Sequence[ServerFigures]:
    return point.nodes[:3]


def _cpu(point: Point) -> float:
    return 1e3 * max(node.cpu_seconds for node in point.nodes) / point.versions


def _publishing(point: Point) -> float:
    return 1e3 * median(point.learner.publish_seconds)


def _applied(point: Point) -> float:
    return median(point.milliseconds)


def _batch_bytes(point: Point) -> float:
    return max(node.received_bytes for node in point.nodes) / point.batches / 1e3


def _batch_cpu(point: Point) -> float:
    return 1e6 * max(node.cpu_seconds for node in point.nodes) / point.batches


def _learner_cpu(point: Point) -> float:
    return 1e6 * point.learner.cpu_seconds / point.batches
