"""What Prometheus is given of one look at a run, without a server."""

from __future__ import annotations

from dataclasses import replace

import fakeredis
import pytest
from test_findings import COUNTS, MISSED, RUN, STATUS, WELL, worker

from rlbroker import DeadlineExceeded
from rlbroker.backend.connection import Connection
from rlbroker.metrics.history import Sample
from rlbroker.ops.exporter.collector import MetricsCollector, Reading, _families, staleness_buckets
from rlbroker.ops.exporter.metrics import WORKERS_LISTED
from rlbroker.ops.inspect.snapshot import Snapshot

pytestmark = pytest.mark.unit


def figures(snapshot: Snapshot, sample: Sample | None = None) -> dict[tuple[str, ...], float]:
    """Numbers by name, and the labels that are not the run."""
    return {
        (one.name, *(text for label, text in one.labels.items() if label != "run")): one.value
        for family in _families([Reading("pong", snapshot, sample)])
        for one in family.samples
    }


def test_at_most_so_many_workers_have_figures_of_their_own_and_all_are_counted() -> None:
    everyone = range(WORKERS_LISTED + 3)
    there = replace(
        RUN, workers={one: replace(STATUS, info=replace(WELL, worker_id=one)) for one in everyone}
    )
    seen = figures(there)
    assert sum(name == "rlbroker_worker_up" for name, *_ in seen) == WORKERS_LISTED
    assert ("rlbroker_worker_up", "0") in seen
    assert seen["rlbroker_workers_alive",] == WORKERS_LISTED + 3
    assert seen["rlbroker_workers_unlisted",] == 3
    assert seen["rlbroker_batches_delivered_total",] == WORKERS_LISTED + 3


def test_reasons_are_the_known_ones_whatever_is_stored() -> None:
    seen = figures(
        worker(
            missed=replace(MISSED, by_reason={"superseded": 2, "because": 7}),
            counts=replace(COUNTS, lost={"stale": 4, "poison": 1, "magic": 9}),
        )
    )
    spoken_of = ("_versions_missed_total", "_batches_lost_total", "_batches_missing")
    reasons = {labels[-1] for name, *labels in seen if name.endswith(spoken_of)}
    assert reasons == {
        *("stale", "trimmed", "dropped_oldest", "dropped_newest", "stopped", "fenced"),
        *("corrupt", "poison", "vanished"),
        *("superseded", "failed", "away", "left"),
    }
    assert seen["rlbroker_batches_lost_total", "stale"] == 4
    assert seen["rlbroker_batches_missing", "poison"] == 1
    assert seen["rlbroker_versions_missed_total", "superseded"] == 2


def test_dead_letters_that_are_tried_again_make_no_counter_fall() -> None:
    letters, again = replace(COUNTS, lost={"corrupt": 2}), replace(COUNTS, waiting=COUNTS.waiting + 2)
    before, after = (figures(worker(counts=counts)) for counts in (letters, again))
    assert not {
        name for name, number in before.items() if name[0].endswith("_total") and after[name] < number
    }
    assert before["rlbroker_batches_missing", "corrupt"] == 2


def test_a_worker_that_was_fenced_and_one_with_a_problem_are_told() -> None:
    seen = figures(worker(info=replace(WELL, fenced_seconds=12.5, problem="no such layer")))
    assert seen["rlbroker_worker_fenced_seconds", "0"] == 12.5
    assert seen["rlbroker_worker_problem", "0"] == 1
    assert ("rlbroker_worker_fenced_seconds", "0") not in figures(RUN)


@pytest.mark.parametrize("counts", [{}, {0: 3}, {15: 1, 16: 1, 32: 2, 4096: 1}])
def test_buckets_only_grow_and_end_with_all(counts: dict[int, int]) -> None:
    buckets, _ = staleness_buckets(counts)
    numbers = [number for _, number in buckets]
    assert numbers == sorted(numbers)
    assert buckets[-1] == ("+Inf", sum(counts.values()))
    assert dict(buckets)["31.0"] == sum(number for low, number in counts.items() if low <= 16)


def test_who_has_to_wait_for_others_waits_no_longer_than_the_timeout() -> None:
    exposition = MetricsCollector(Connection(client=fakeredis.FakeRedis()), version="1", timeout_seconds=0.05)
    with exposition._reading, pytest.raises(DeadlineExceeded, match=r"within 0\.05 s"):
        list(exposition.collect())
    assert {family.name for family in exposition.collect()} == {
        family.name for family in exposition.describe()
    }
