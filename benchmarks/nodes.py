"""Clusters of one and of three nodes, with and without replicas: the load of each node, and the time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.measure import Row, progress
from benchmarks.servers import Cluster, ServerMetrics, start_cluster
from benchmarks.simulated_run import Measurement, SimulatedRun, Workload, start_simulated_run

WORKERS, QUICK_WORKERS = 8, 2

ONE, THREE, REPLICAS, CACHE = "1 node", "3 nodes", "3 nodes, read from replicas", "3 nodes, host cache"


def run(url: str, *, quick: bool, repetitions: int) -> list[Row]:
    """Return the rows of Clusters. `url` is not used: the Clusters are started here."""
    megabytes = 12 if quick else 32
    workers = QUICK_WORKERS if quick else WORKERS
    seconds = 0.6 if quick else 6.0
    weights = Workload(seconds, 0.0, seconds / 2, megabytes << 20)
    batches = Workload(seconds, 50.0 if quick else 200.0)
    found: dict[tuple[str, str], list[Measurement]] = {}
    with contextlib.ExitStack() as stack:
        progress("nodes: starting Clusters")
        single = stack.enter_context(start_cluster(1))
        three = stack.enter_context(start_cluster(3))
        replicated = stack.enter_context(start_cluster(3, 1))
        runs = {
            ONE: _start_run(stack, single, workers),
            THREE: _start_run(stack, three, workers),
            REPLICAS: _start_run(stack, replicated, workers, read_from_replicas=True),
            CACHE: _start_run(stack, three, workers, host_cache=True),
        }
        for name, simulated in runs.items():
            progress(f"  warming up: {name}")
            simulated.measure(weights)
        for repetition in range(repetitions):
            for name, simulated in runs.items():
                found.setdefault((name, "weights"), []).append(simulated.measure(weights))
                if name in (ONE, THREE):
                    found.setdefault((name, "batches"), []).append(simulated.measure(batches))
            progress(f"  {repetition + 1} of {repetitions}")
    return _rows(found, f"{megabytes} MB to {workers} workers")


def _start_run(
    stack: contextlib.ExitStack, cluster: Cluster, workers: int, *, host_cache: bool = False, **settings: bool
) -> SimulatedRun:
    return stack.enter_context(
        start_simulated_run(cluster.url, workers, host_cache=host_cache, nodes=cluster.nodes, **settings)
    )


def _rows(found: dict[tuple[str, str], list[Measurement]], weights: str) -> list[Row]:
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
    found: dict[tuple[str, str], list[Measurement]],
    label: str,
    name: str,
    against: str,
    kind: str,
    metric: Callable[[Measurement], float],
    unit: str,
    target: float | None = None,
) -> Row:
    wanted = "" if target is None else f"≤ {target:g}×"
    ours, theirs = (
        [metric(measurement) for measurement in found[cluster, kind]] for cluster in (name, against)
    )
    return Row(f"{label}: {name}", against, wanted, ours, theirs, unit, False, target)


def _received(measurement: Measurement) -> float:
    return max(node.received_bytes for node in measurement.nodes) / measurement.versions / 1e6


def _sent(measurement: Measurement) -> float:
    return max(node.sent_bytes for node in measurement.nodes) / measurement.versions / 1e6


def _from_masters(measurement: Measurement) -> float:
    return sum(node.sent_bytes for node in _masters(measurement)) / measurement.versions / 1e6


def _replicated(measurement: Measurement) -> float:
    return sum(node.replicated_bytes for node in measurement.nodes) / measurement.versions / 1e6


def _masters(measurement: Measurement) -> Sequence[ServerMetrics]:
    return measurement.nodes[:3]


def _cpu(measurement: Measurement) -> float:
    return 1e3 * max(node.cpu_seconds for node in measurement.nodes) / measurement.versions


def _publishing(measurement: Measurement) -> float:
    return 1e3 * median(measurement.learner.publish_seconds)


def _applied(measurement: Measurement) -> float:
    return median(measurement.milliseconds)


def _batch_bytes(measurement: Measurement) -> float:
    return max(node.received_bytes for node in measurement.nodes) / measurement.batches / 1e3


def _batch_cpu(measurement: Measurement) -> float:
    return 1e6 * max(node.cpu_seconds for node in measurement.nodes) / measurement.batches


def _learner_cpu(measurement: Measurement) -> float:
    return 1e6 * measurement.learner.cpu_seconds / measurement.batches
