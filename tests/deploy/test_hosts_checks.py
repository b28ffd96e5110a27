"""What `deploy/test-hosts` says of a run on several hosts: each check passes where all is well, and only there."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.hosts import checks
from deploy.hosts.training import Course
from rlbroker.demo.training_progress import DemoWorkerStatus, Progress

pytestmark = pytest.mark.unit

STAYING, LEAVING = [0, 1], [2, 3]

#: Cut off at 100, back at 120, while the versions went from 10 to 14.
CUT = checks.Cut(100.0, 120.0, 10, 14)


def course(batches: dict[int, list[float]], state: str = "alive", version: int = 15) -> Course:
    """A course that ends with a report at 130, in which those of the cut host are in this state."""
    roster = tuple(
        DemoWorkerStatus(worker, "host", 1, state if worker in LEAVING else "alive", version, 0)
        for worker in STAYING + LEAVING
    )
    last = Progress(130.0, 0.0, 1000, 15, 1, None, None, workers=roster)
    return Course([(at, worker) for worker, times in batches.items() for at in times], [(130.0, last)])


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
def test_training_went_on_only_if_versions_grew_and_every_other_worker_was_heard(
    batches: dict[int, list[float]], cut: checks.Cut, passes: bool
) -> None:
    assert checks.training_went_on(course(batches), cut, STAYING).passed is passes


@pytest.mark.parametrize(
    ("batches", "states", "passes"),
    [
        ({2: [99.0, 101.0]}, ["away", "away"], True),
        ({2: [112.0]}, ["away", "away"], False),
        ({}, ["away", "alive"], False),
    ],
)
def test_a_host_was_away_only_if_nothing_came_from_it_and_its_workers_were_away(
    batches: dict[int, list[float]], states: list[str], passes: bool
) -> None:
    assert checks.host_was_away(course(batches), CUT, LEAVING, states).passed is passes


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
def test_missed_versions_are_recorded_only_if_no_worker_lacks_one(
    records: list[dict[str, Any]], passes: bool
) -> None:
    assert checks.missed_versions_are_recorded(records, CUT, LEAVING).passed is passes


@pytest.mark.parametrize(
    ("batches", "state", "version", "passes"),
    [
        ({2: [121.0], 3: [122.0]}, "alive", 15, True),
        ({2: [121.0], 3: [99.0]}, "alive", 15, False),
        ({2: [121.0], 3: [122.0]}, "away", 15, False),
        ({2: [121.0], 3: [122.0]}, "alive", 10, False),
    ],
)
def test_a_host_is_back_only_if_its_workers_live_send_and_run_what_is_new(
    batches: dict[int, list[float]], state: str, version: int, passes: bool
) -> None:
    assert checks.host_came_back(course(batches, state, version), CUT, LEAVING).passed is passes


def test_a_host_that_is_away_again_is_not_back() -> None:
    seen = course({2: [121.0], 3: [122.0]})
    seen.reports += course({}, state="away").reports
    assert not checks.host_came_back(seen, CUT, LEAVING).passed


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
def test_a_batch_that_is_neither_delivered_nor_counted_fails_the_account(
    changes: dict[str, Any], sent: int, passes: bool
) -> None:
    counts = {"produced": 7, "delivered": 7, "lost": {}, "waiting": 0, "in_hand": 0} | changes
    assert checks.nothing_is_lost_without_a_trace({"0": {"batches": counts}}, {0: sent}).passed is passes


@pytest.mark.parametrize(
    ("received", "stored", "passes"), [(130, 100, True), (310, 100, False), (130, 0, False)]
)
def test_weights_cross_once_only_if_far_less_than_a_copy_for_each_worker_came(
    received: int, stored: int, passes: bool
) -> None:
    assert checks.weights_cross_once("host", received, stored, 3).passed is passes


@pytest.mark.parametrize(("said", "passes"), [("NOPERM no", True), ("OK", False), ("", False)])
def test_only_an_answer_that_says_so_is_a_refusal(said: str, passes: bool) -> None:
    assert checks.is_refused("it", said, "NOPERM").passed is passes
