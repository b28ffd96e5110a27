"""The metrics that the exporter makes of one snapshot, without a server."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import fakeredis
import pytest
from test_findings import COUNTS, MISSED, RUN, STATUS, WELL, worker

from rlbroker import DeadlineExceeded
from rlbroker.backend.connection import Connection
from rlbroker.metrics.history import Sample
from rlbroker.ops.exporter.metrics import WORKERS_LISTED
from rlbroker.ops.exporter.prometheus_collector import (
    MetricsCollector,
    RunReading,
    build_families,
    staleness_buckets,
)
from rlbroker.ops.inspect.snapshot import Snapshot

pytestmark = pytest.mark.unit


def metrics_of(snapshot: Snapshot, sample: Sample | None = None) -> dict[tuple[str, ...], float]:
    """Return values by name and labels, without the run."""
    return {
        (one.name, *(text for label, text in one.labels.items() if label != "run")): one.value
        for family in build_families([RunReading("pong", snapshot, sample)])
        for one in family.samples
    }


def test_only_a_limited_number_of_workers_have_own_metrics_and_all_are_counted() -> None:
    ids = range(WORKERS_LISTED + 3)
    crowded = replace(RUN, workers={one: replace(STATUS, info=replace(WELL, worker_id=one)) for one in ids})
    metrics = metrics_of(crowded)
    assert sum(name == "rlbroker_worker_up" for name, *_ in metrics) == WORKERS_LISTED
    assert ("rlbroker_worker_up", "0") in metrics
    assert metrics["rlbroker_workers_alive",] == WORKERS_LISTED + 3
    assert metrics["rlbroker_workers_unlisted",] == 3
    assert metrics["rlbroker_batches_delivered_total",] == WORKERS_LISTED + 3


def test_unknown_reasons_in_redis_add_no_labels() -> None:
    metrics = metrics_of(
        worker(
            missed=replace(MISSED, by_reason={"superseded": 2, "because": 7}),
            counts=replace(COUNTS, lost={"stale": 4, "poison": 1, "magic": 9}),
        )
    )
    with_reasons = ("_versions_missed_total", "_batches_lost_total", "_batches_missing")
    reasons = {labels[-1] for name, *labels in metrics if name.endswith(with_reasons)}
    assert reasons == {
        *("stale", "trimmed", "dropped_oldest", "dropped_newest", "stopped", "fenced"),
        *("corrupt", "poison", "vanished"),
        *("superseded", "failed", "away", "left"),
    }
    assert metrics["rlbroker_batches_lost_total", "stale"] == 4
    assert metrics["rlbroker_batches_missing", "poison"] == 1
    assert metrics["rlbroker_versions_missed_total", "superseded"] == 2


def test_retried_dead_letters_make_no_counter_fall() -> None:
    dead, retried = replace(COUNTS, lost={"corrupt": 2}), replace(COUNTS, waiting=COUNTS.waiting + 2)
    before, after = (metrics_of(worker(counts=counts)) for counts in (dead, retried))
    fallen = {name for name, value in before.items() if name[0].endswith("_total") and after[name] < value}
    assert not fallen
    assert before["rlbroker_batches_missing", "corrupt"] == 2


def test_a_fenced_process_and_a_problem_of_a_worker_are_reported() -> None:
    metrics = metrics_of(worker(info=replace(WELL, fenced_seconds=12.5, problem="no such layer")))
    assert metrics["rlbroker_worker_fenced_seconds", "0"] == 12.5
    assert metrics["rlbroker_worker_problem", "0"] == 1
    assert ("rlbroker_worker_fenced_seconds", "0") not in metrics_of(RUN)


@pytest.mark.parametrize("counts", [{}, {0: 3}, {15: 1, 16: 1, 32: 2, 4096: 1}])
def test_histogram_buckets_never_fall_and_the_last_one_has_all(counts: dict[int, int]) -> None:
    buckets, _ = staleness_buckets(counts)
    values = [value for _, value in buckets]
    assert values == sorted(values)
    assert buckets[-1] == ("+Inf", sum(counts.values()))
    assert dict(buckets)["31.0"] == sum(value for low, value in counts.items() if low <= 16)


def test_a_scrape_waits_for_an_earlier_one_no_longer_than_its_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collector = MetricsCollector(Connection(client=fakeredis.FakeRedis()), version="1", timeout_seconds=0.05)
    reading, release = threading.Event(), threading.Event()
    execute = Connection.execute

    def blocked(self: Connection, *command: Any, **options: Any) -> Any:
        reading.set()
        release.wait(10.0)
        return execute(self, *command, **options)

    monkeypatch.setattr(Connection, "execute", blocked)
    earlier = threading.Thread(target=lambda: list(collector.collect()))
    earlier.start()
    try:
        assert reading.wait(10.0)
        with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s"):
            list(collector.collect())
    finally:
        release.set()
        earlier.join(10.0)
    monkeypatch.undo()
    collected = {family.name for family in collector.collect()}
    assert collected == {family.name for family in collector.describe()}
