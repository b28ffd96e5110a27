"""Tests of the cost model: the fit recovers known costs, and a run needs the sum of its parts."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from benchmarks.costs import (
    RESOURCES,
    PlannedRun,
    describe_needs,
    fit_rows,
    least_squares,
    predict_usage,
    read_model,
)
from benchmarks.servers import ServerMetrics
from benchmarks.simulated_run import Measurement, ProcessUsage, Workload

pytestmark = pytest.mark.unit


def make_measurement(workers: int, batches: int, versions: int = 0, *, hosts: int = 1) -> Measurement:
    """Return one second of a run with the costs that `test_the_fit_recovers_the_costs` expects."""
    size, published = 2_000_000, dict.fromkeys(range(1, versions + 1), 0.0)
    applied = [(version, 0.01) for version in published] * workers
    downloaded = versions * size * (hosts or workers)
    return Measurement(
        workers,
        hosts,
        Workload(1.0, batches, 1.0, size),
        seconds=1.0,
        learner=ProcessUsage(0.004 + 0.00002 * workers + 0.0001 * batches, 1, batches, published=published),
        worker_processes=[ProcessUsage(0.001 * workers, 1, batches, applied=applied)],
        nodes=[ServerMetrics(0.0003 * workers, 0, 1000 * workers + downloaded, 0, {}, 1, 1, 4 + 5 * workers)],
    )


MEASUREMENTS = [
    make_measurement(1, 0),
    make_measurement(100, 0),
    make_measurement(100, 500),
    make_measurement(10, 2000),
    make_measurement(10, 0, 4),
    make_measurement(20, 0, 2, hosts=0),
    make_measurement(40, 100, 1),
]


def fit_model() -> dict[tuple[str, str], float]:
    rows = json.loads(
        json.dumps([asdict(row) for row in fit_rows(MEASUREMENTS, RESOURCES)])
    )  # the round trip of a report
    return dict(read_model(rows))


def test_the_fit_recovers_the_costs() -> None:
    model = fit_model()
    assert model["learner's CPU", "run"] == pytest.approx(4)
    assert model["learner's CPU", "worker"] == pytest.approx(0.02)
    assert model["learner's CPU", "batch"] == pytest.approx(0.1)
    assert model["learner's CPU", "delivery"] == pytest.approx(0, abs=1e-6)
    assert model["bytes from the server", "MB downloaded"] == pytest.approx(1000)
    assert model["connections", "worker"] == pytest.approx(5)


def test_no_cost_is_negative() -> None:
    amounts = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    costs = least_squares(amounts, np.array([3.0, 2.0, 1.0]))
    assert costs.min() >= 0
    assert costs[1] == 0


def test_a_large_measurement_does_not_hide_the_small_ones() -> None:
    amounts = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 1e6]])
    assert least_squares(amounts, np.array([2.0, 2.0, 3e6]))[0] == pytest.approx(2.0)


def test_a_run_needs_the_sum_of_the_costs_of_its_parts() -> None:
    run = PlannedRun(
        1000,
        8,
        weights_bytes=2e6,
        versions_per_second=0.5,
        batches_per_second=100,
        batch_bytes=4096,
        reads_per_second=20,
    )
    model = fit_model()
    assert predict_usage(model, "learner's CPU", run) == pytest.approx(4 + 20 + 10)
    assert predict_usage(model, "bytes from the server", run) == pytest.approx(1000 + 125 * 1000)
    assert describe_needs(model, run)["downloads of each version"] == "125"
    assert describe_needs(model, run)["connections"] == "5,004"
