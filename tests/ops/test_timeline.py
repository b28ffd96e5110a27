"""The timeline of a run and its report: thinned history keeps totals, lanes show gaps, any run has a page."""

from __future__ import annotations

import base64
import re
import time
from dataclasses import fields, replace
from typing import Any

import pytest

from rlbroker.config import RunSettings
from rlbroker.metrics.history import Sample
from rlbroker.ops.inspect.bottleneck import Bottleneck
from rlbroker.ops.inspect.liveness import LearnerStatus
from rlbroker.ops.inspect.snapshot import ServerStatus, Snapshot, WorkerStatus
from rlbroker.ops.inspect.timeline import Timeline, VersionsBehind, build_lanes, thin_out
from rlbroker.ops.report.render import render
from rlbroker.types import Missed, MissedUpdates, WorkerInfo

pytestmark = pytest.mark.unit

#: When the runs of these tests begin.
BEGIN = 1_700_000_000.0

HOSTILE = "<script>alert('$x$')</script>"


def make_sample(seconds: float, **fields_set: Any) -> Sample:
    zeros: dict[str, Any] = {
        one.name: {"int": 0, "float": 0.0}.get(str(one.type), {}) for one in fields(Sample)
    }
    return Sample(**zeros | {"at": BEGIN + seconds, "epoch": 1, "alive": 2} | fields_set)


def make_worker(worker: int, host: str = "node") -> WorkerStatus:
    return WorkerStatus(
        info=WorkerInfo(worker, 1, "alive", host, 7, 1, 0, 0.1, 0, ""),
        counts=None,
        missed=MissedUpdates(worker, 0, {}, 0, 0, None, 0, None, ()),
        commands_waiting=0,
        command_seconds=0.0,
        dead_letters=0,
    )


def make_timeline(samples: list[Sample], records: tuple[Missed, ...] = (), host: str = "node") -> Timeline:
    workers = sorted({worker for one in samples for worker in one.running})
    snapshot = Snapshot(
        run="pong",
        at=BEGIN + 4000,
        server=ServerStatus("redis://host:6379/0", "Valkey 9", "noeviction", 1000, 0),
        settings=RunSettings(),
        expected_workers=0,
        learner=LearnerStatus(1, "alive", "learner", 1, 0.1),
        manifest=None,
        workers={worker: make_worker(worker, host) for worker in workers},
    )
    return Timeline(snapshot, samples, records)


def make_missed(worker: int, seconds: float, why: str, count: int = 1) -> Missed:
    return Missed(worker, 1, "weights", 1, count, "", why, "", BEGIN + seconds)


def pictures_of(page: str) -> list[str]:
    """Return the SVG images in a report."""
    return [
        base64.b64decode(one).decode() for one in re.findall(r"data:image/svg\+xml;base64,([^\"]*)", page)
    ]


def test_thinned_history_keeps_its_totals_and_the_changes_of_learner() -> None:
    first = [make_sample(number, collected=number**2) for number in range(1000)]
    second = [make_sample(1100 + number, epoch=2, collected=3 * number) for number in range(1000)]
    timeline = make_timeline([*first, *second])
    thinned = thin_out(timeline.samples, 100)
    assert len(thinned) <= 110
    assert timeline.total("collected") == 999**2 + 3 * 999
    points = timeline.points(100)
    assert sum((one.values["batches_per_second"] or 0) * one.seconds for one in points) == pytest.approx(
        999**2 + 3 * 999
    )
    assert [one.at - one.seconds for one in points if not one.continues] == [BEGIN, BEGIN + 1100]
    assert timeline.restarts == [BEGIN + 1100]


@pytest.mark.parametrize(
    ("shares", "which"),
    [
        ({"learner_waits": 0.6, "workers_wait": 0.2}, "workers"),
        ({"learner_waits": 0.3, "workers_wait": 0.5}, "learner"),
        ({"learner_waits": 0.1, "workers_wait": 0.1}, "learner"),
        ({"publishing": 0.5, "encoding": 0.3, "sending": 0.1}, "encoding"),
        ({"publishing": 0.5, "encoding": 0.1, "sending": 0.3}, "sending"),
        ({"learner_waits": 0.2, "workers_wait": 0.05, "publishing": 0.2}, "nothing"),
    ],
)
def test_the_bottleneck_is_judged_by_shares_of_time(shares: dict[str, float], which: str) -> None:
    no_shares = dict.fromkeys(("learner_waits", "workers_wait", "encoding", "sending", "publishing"), 0.0)
    assert Bottleneck(60.0, 1, **no_shares | shares).which == which
    assert Bottleneck(60.0, 0, **no_shares | shares).which == "unknown"
    assert Bottleneck(5.0, 1, **no_shares | shares).which == "unknown"


def test_waits_of_workers_are_shares_of_their_added_time() -> None:
    samples = [
        make_sample(number, alive=4, wait_seconds=0.5 * number, room_seconds=number) for number in range(20)
    ]
    bottleneck = make_timeline(samples).bottleneck
    assert (bottleneck.learner_waits, bottleneck.workers_wait) == (0.5, 0.25)


def test_versions_behind_are_weighted_by_time() -> None:
    near = [make_sample(number, version=9, running={3: 8, 4: 0}) for number in range(10)]
    far = [make_sample(9 + 100 * number, version=20, running={3: 3}) for number in range(1, 4)]
    assert make_timeline([*near, *far]).behind == {3: VersionsBehind(median=17, ninth=17, most=17)}


def test_lanes_are_empty_while_no_learner_wrote_and_while_a_worker_was_away() -> None:
    samples = [make_sample(number, running={3: 1, 8: 1}) for number in range(50)]
    samples += [
        make_sample(number, epoch=2, running={3: 2, 8: 0} if number < 90 else {3: 2})
        for number in range(80, 101)
    ]
    lanes = build_lanes(make_timeline(samples), 100)
    assert (list(lanes.workers), lanes.columns) == ([3, 8], 100)
    assert list(lanes.versions[0]) == [1] * 52 + [0] * 28 + [2] * 20
    assert list(lanes.versions[1]) == [1] * 52 + [0] * 48


def test_a_coarse_sample_fills_its_lane_until_the_next_one() -> None:
    coarse = [make_sample(30 * number, running={0: number + 1}) for number in range(10)]
    fine = [make_sample(270 + number, running={0: 10}) for number in range(1, 31)]
    lanes = build_lanes(make_timeline([*coarse, *fine]), 300)
    assert list(lanes.versions[0]) == [number for number in range(1, 11) for _ in range(30)]


def test_missed_versions_are_marked_by_time_and_reason() -> None:
    samples = [make_sample(number, running={3: 1, 8: 1}) for number in range(101)]
    records = (
        make_missed(8, 10.5, "failed", 3),
        make_missed(8, 10.7, "failed"),
        make_missed(3, 100.0, "away"),
        make_missed(3, 200.0, "away"),
        make_missed(9, 10.0, "failed"),
    )
    lanes = build_lanes(make_timeline(samples, records), 100)
    assert [(one.lane, one.column, one.why, one.count) for one in lanes.marks] == [
        (1, 10, "failed", 4),
        (0, 99, "away", 1),
    ]


def test_a_report_of_many_workers_stays_small() -> None:
    samples = [
        make_sample(
            30.0 * number, version=number, running={worker: number - worker % 7 for worker in range(256)}
        )
        for number in range(8, 200)
    ]
    records = tuple(make_missed(number % 256, 3.0 * number, "superseded") for number in range(2000))
    page = render(make_timeline(samples, records), complete_hint=str)
    assert len(pictures_of(page)) == 6 + 1
    assert len(page) < 600_000


def test_a_run_of_one_second_has_a_report() -> None:
    page = render(
        make_timeline([make_sample(number, running={0: 0}) for number in range(2)]), complete_hint=str
    )
    assert len(pictures_of(page)) == 6 + 1
    assert "the history is too short to tell" in page.lower()
    assert not re.search(r"\b(nan|inf)\b|>None<", page.partition("</style>")[2])


@pytest.mark.parametrize("count", [0, 1])
def test_the_report_of_a_run_without_history_says_so(count: int) -> None:
    page = render(
        make_timeline([make_sample(number, running={0: 0}) for number in range(count)]), complete_hint=str
    )
    assert pictures_of(page) == []
    assert "No history" in page
    assert not re.search(r"\b(nan|inf)\b|>None<", page.partition("</style>")[2])


@pytest.fixture(scope="module")
def page() -> str:
    """The report of a run whose learner was restarted, with workers on a hostile host name."""
    samples = [make_sample(number, running={0: 1, 1: 1}) for number in range(60)]
    return render(
        make_timeline([*samples, replace(samples[-1], at=BEGIN + 90, epoch=2)], host=HOSTILE),
        complete_hint=str,
    )


def test_text_from_workers_is_escaped_in_the_page_and_in_its_plots(page: str) -> None:
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;$x$&#39;)" in page  # in the table
    plot = "".join(pictures_of(page))
    assert "&lt;script&gt;alert('$x$…" in plot  # cut, and not a formula


def test_times_of_a_report_are_in_the_named_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        page = render(make_timeline([make_sample(900 * number) for number in range(9)]), complete_hint=str)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert ">15 Nov 2023, 04:50:00</time> (IST, UTC+05:30)" in page
    assert re.findall(r">(\d\d:\d\d)<", pictures_of(page)[0])[:3] == ["04:00", "04:30", "05:00"]
