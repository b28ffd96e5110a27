"""The cost model of the benchmarks: what was put in is found again, and a run needs the sum of its parts."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from benchmarks.costs import FIGURES, Run, fit, least_squares, model_of, needed, needs
from benchmarks.crowd import Effort, Point, Work
from benchmarks.servers import ServerFigures

pytestmark = pytest.mark.unit


def point(workers: int, batches: int, versions: int = 0, *, hosts: int = 1) -> Point:
    """Give a second of a crowd whose learner and server cost what `test_…_are_found_again` says."""
    size, began = 2_000_000, dict.fromkeys(range(1, versions + 1), 0.0)
    applied = [(version, 0.01) for version in began] * workers
    downloaded = versions * size * (hosts or workers)
    return Point(
        workers,
        hosts,
        Work(1.0, batches, 1.0, size),
        seconds=1.0,
        learner=Effort(0.004 + 0.00002 * workers + 0.0001 * batches, 1, batches, published=began),
        crowd=[Effort(0.001 * workers, 1, batches, applied=applied)],
        nodes=[ServerFigures(0.0003 * workers, 0, 1000 * workers + downloaded, 0, {}, 1, 1, 4 + 5 * workers)],
    )


POINTS = [
    point(1, 0),
    point(100, 0),
    point(100, 500),
    point(10, 2000),
    point(10, 0, 4),
    point(20, 0, 2, hosts=0),
    point(40, 100, 1),
]


def fitted() -> dict[tuple[str, str], float]:
    rows = json.loads(json.dumps([asdict(row) for row in fit(POINTS, FIGURES)]))  # as a report has them
    return dict(model_of(rows))


def test_the_costs_that_made_the_measurements_are_found_again() -> None:
    model = fitted()
    assert model["learner's CPU", "run"] == pytest.approx(4)
    assert model["learner's CPU", "worker"] == pytest.approx(0.02)
    assert model["learner's CPU", "batch"] == pytest.approx(0.1)
    assert model["learner's CPU", "delivery"] == pytest.approx(0, abs=1e-6)
    assert model["bytes from the server", "MB downloaded"] == pytest.approx(1000)
    assert model["connections", "worker"] == pytest.approx(5)


def test_nothing_costs_less_than_nothing() -> None:
    amounts = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    costs = least_squares(amounts, np.array([3.0, 2.0, 1.0]))
    assert costs.min() >= 0
    assert costs[1] == 0


def test_one_large_measurement_does_not_drown_the_small_ones() -> None:
    amounts = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 1e6]])
    assert least_squares(amounts, np.array([2.0, 2.0, 3e6]))[0] == pytest.approx(2.0)


def test_a_run_needs_the_sum_of_what_its_parts_cost() -> None:
    run = Run(
        1000,
        8,
        weights_bytes=2e6,
        versions_per_second=0.5,
        batches_per_second=100,
        batch_bytes=4096,
        reads_per_second=20,
    )
    model = fitted()
    assert needed(model, "learner's CPU", run) == pytest.approx(4 + 20 + 10)
    assert needed(model, "bytes from the server", run) == pytest.approx(1000 + 125 * 1000)
    assert needs(model, run)["downloads of each version"] == "125"
    assert needs(model, run)["connections"] == "5,004"
