"""Tests of the checks of `deploy/test-hosts`: each check passes and fails as it should."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.hosts import checks
from deploy.hosts.training import LearnerReports
from rlbroker.demo.training_progress import DemoWorkerStatus, Progress

pytestmark = pytest.mark.unit

STAYING, LEAVING = [0, 1], [2, 3]

#: Cut off at 100, back at 120, while the versions went from 10 to 14.
CUT = checks.Cut(100.0, 120.0, 10, 14)


def make_reports(batches: dict[int, list[float]], state: str = "alive", version: int = 15) -> LearnerReports:
    """Return reports, the last at 130, in which the workers of the cut host have this state and version."""
    roster = tuple(
        DemoWorkerStatus(worker, "host", 1, state if worker in LEAVING else "alive", version, 0)
        for worker in STAYING + LEAVING
    )
    last = Progress(130.0, 0.0, 1000, 15, 1, None, None, workers=roster)
    return LearnerReports(
        [(at, worker) for worker, times in batches.items() for at in times], [(130.0, last)]
    )


def missed(worker: int, first: int, last: int, what: str = "weights") -> dict[str, Any]:
    return {"worker_id": worker, "what": what, "first": first, "last": last, "why": "superseded"}


@pytest.mark.parametrize(
    ("batches", "cut", "passes"),
    [
        ({0: [112.0], 1: [113.0]}, CUT, True),
        ({0: [112.0], 1: [101.0]}, CUT, False),
        ({0: [112.0], 1: [113.0]}, checks.Cut(100.0, 120.0, 10, 11), False),
    ],
)
def test_training_continued_only_with_new_versions_and_batches_of_every_other_worker(
    batches: dict[int, list[float]], cut: checks.Cut, passes: bool
) -> None:
    assert checks.check_training_continued(make_reports(batches), cut, STAYING).passed is passes


@pytest.mark.parametrize(
    ("batches", "states", "passes"),
    [
        ({2: [99.0, 101.0]}, ["away", "away"], True),
        ({2: [112.0]}, ["away", "away"], False),
        ({}, ["away", "alive"], False),
    ],
)
def test_a_host_was_away_only_without_batches_and_with_its_workers_away(
    batches: dict[int, list[float]], states: list[str], passes: bool
) -> None:
    assert checks.check_host_was_away(make_reports(batches), CUT, LEAVING, states).passed is passes


@pytest.mark.parametrize(
    ("records", "passes"),
    [
        ([missed(2, 11, 13), missed(3, 9, 14)], True),
        ([missed(2, 11, 12), missed(2, 13, 13), missed(3, 11, 13)], True),
        ([missed(2, 11, 13)], False),
        ([missed(2, 11, 13), missed(3, 11, 12)], False),
        ([missed(2, 11, 13), missed(3, 11, 13, what="command")], False),
    ],
)
def test_missed_versions_are_recorded_only_if_every_worker_has_all_of_them(
    records: list[dict[str, Any]], passes: bool
) -> None:
    assert checks.check_missed_versions_are_recorded(records, CUT, LEAVING).passed is passes


@pytest.mark.parametrize(
    ("batches", "state", "version", "passes"),
    [
        ({2: [121.0], 3: [122.0]}, "alive", 15, True),
        ({2: [121.0], 3: [99.0]}, "alive", 15, False),
        ({2: [121.0], 3: [122.0]}, "away", 15, False),
        ({2: [121.0], 3: [122.0]}, "alive", 10, False),
    ],
)
def test_a_host_is_back_only_if_its_workers_are_alive_send_batches_and_run_new_versions(
    batches: dict[int, list[float]], state: str, version: int, passes: bool
) -> None:
    assert checks.check_host_came_back(make_reports(batches, state, version), CUT, LEAVING).passed is passes


def test_a_host_that_is_away_again_is_not_back() -> None:
    reports = make_reports({2: [121.0], 3: [122.0]})
    reports.reports += make_reports({}, state="away").reports
    assert not checks.check_host_came_back(reports, CUT, LEAVING).passed


@pytest.mark.parametrize(
    ("changes", "sent", "passes"),
    [
        ({}, 7, True),
        ({"produced": 8, "lost": {"stopped": 1}}, 7, True),
        ({"produced": 8, "lost": {"vanished": 1}}, 8, True),
        ({}, 8, False),
        ({"produced": 8}, 8, False),
        ({"delivered": 6, "waiting": 1}, 7, False),
    ],
)
def test_a_batch_that_is_neither_delivered_nor_counted_as_lost_fails_the_check(
    changes: dict[str, Any], sent: int, passes: bool
) -> None:
    counts = {"produced": 7, "delivered": 7, "lost": {}, "waiting": 0, "in_hand": 0} | changes
    assert checks.check_every_batch_is_counted({"0": {"batches": counts}}, {0: sent}).passed is passes


@pytest.mark.parametrize(
    ("received", "stored", "passes"), [(130, 100, True), (310, 100, False), (130, 0, False)]
)
def test_weights_cross_once_only_with_far_fewer_bytes_than_a_copy_for_each_worker(
    received: int, stored: int, passes: bool
) -> None:
    assert checks.check_weights_cross_once("host", received, stored, 3).passed is passes


@pytest.mark.parametrize(("answer", "passes"), [("NOPERM no", True), ("OK", False), ("", False)])
def test_only_the_expected_error_is_a_refusal(answer: str, passes: bool) -> None:
    assert checks.check_refused("it", answer, "NOPERM").passed is passes
