"""The findings of a snapshot: what is reported as wrong, and what is not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlbroker import MissedUpdates, QueueCounts, WorkerInfo
from rlbroker.config import RunSettings
from rlbroker.ops.inspect.findings import FindingLimits, list_findings
from rlbroker.ops.inspect.liveness import LearnerStatus
from rlbroker.ops.inspect.snapshot import ServerStatus, Snapshot, WorkerStatus
from rlbroker.weights.manifest import Manifest, StoredForm

pytestmark = pytest.mark.unit

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"

WELL = WorkerInfo(
    worker_id=0,
    incarnation=1,
    state="alive",
    host="node-1",
    pid=7,
    version=20,
    staleness=0,
    last_seen_seconds=0.5,
    sent=3,
    problem="",
)
COUNTS = QueueCounts(waiting=1, in_hand=1, delivered=1, lost={}, duplicates=0)
MISSED = MissedUpdates(
    worker_id=0,
    total=2,
    by_reason={"superseded": 2},
    commands=0,
    behind=0,
    behind_since=None,
    skips_in_a_row=0,
    skipping_since=None,
    records=(),
)
STATUS = WorkerStatus(WELL, COUNTS, MISSED, commands_waiting=0, command_seconds=0.0, dead_letters=0)
RUN = Snapshot(
    run="pong",
    at=1000.0,
    server=ServerStatus("redis://host:6379/0", "Valkey 9", "noeviction", 100, 1000),
    settings=RunSettings(max_queue_size=10),
    expected_workers=1,
    learner=LearnerStatus(epoch=1, state="alive", host="node-0", pid=1, last_seen_seconds=0.1),
    manifest=Manifest(StoredForm(20, 0, "20-1-1", 1, 10, "c0ffee"), (), 10, 1 << 20, "blosc2", 999.0),
    workers={0: STATUS},
)


def member(**changes: Any) -> Snapshot:
    return worker(info=replace(WELL, **changes))


def worker(**changes: Any) -> Snapshot:
    return replace(RUN, workers={0: replace(STATUS, **changes)})


def server(**changes: Any) -> Snapshot:
    return replace(RUN, server=replace(RUN.server, **changes))


def learner(**changes: Any) -> Snapshot:
    assert RUN.learner
    return replace(RUN, learner=replace(RUN.learner, **changes))


#: By code, a run with only this fault, the severity, and a part of the sentence.
FAULTS: dict[str, tuple[Snapshot, str, str]] = {
    "server_evicts": (server(maxmemory_policy="allkeys-lru"), "critical", "allkeys-lru"),
    "server_full": (server(used_bytes=950), "warning", "95%"),
    "learner_missing": (replace(RUN, learner=None), "warning", "no learner"),
    "learner_away": (
        learner(state="away", last_seen_seconds=42.0),
        "critical",
        "last seen 42 s ago; start it again",
    ),
    "learner_ended": (
        learner(state="ended", last_seen_seconds=42.0),
        "warning",
        "last seen 42 s ago, and 1 worker has not stopped",
    ),
    "run_ended": (learner(run_ended=True), "critical", "a command has ended the run while its learner"),
    "no_weights": (
        replace(RUN, manifest=None, workers={0: replace(STATUS, info=replace(WELL, version=0))}),
        "warning",
        "not published",
    ),
    "too_few_workers": (replace(RUN, expected_workers=4), "warning", "1 worker is alive; 4 are expected"),
    "worker_away": (
        replace(member(state="away", last_seen_seconds=42.0), expected_workers=0),
        "warning",
        "node-1 pid 7",
    ),
    "worker_behind": (
        member(version=3, staleness=17, unpolled_seconds=60.0),
        "warning",
        "17 versions behind: it runs 3 of 20, and has not called poll for 60 s",
    ),
    "worker_skips": (worker(missed=replace(MISSED, skips_in_a_row=12)), "warning", "last 12 updates"),
    "worker_cannot_load": (member(problem="wrong shape"), "critical", "wrong shape"),
    "worker_unconfirmed": (
        member(unconfirmed="no replica of b:1 has confirmed batch 7 yet", staleness=17),
        "warning",
        "worker 0 waits: no replica of b:1 has",
    ),
    "worker_fenced": (member(fenced_process="node-9:8", fenced_seconds=5.0), "warning", "node-9:8"),
    "updates_failed": (worker(missed=replace(MISSED, by_reason={"failed": 1})), "warning", "1 version"),
    "signatures_refused": (worker(missed=replace(MISSED, refused=2)), "warning", "2 versions or commands"),
    "commands_unanswered": (
        worker(commands_waiting=2, command_seconds=90.0),
        "warning",
        "2 commands, the oldest for 90 s",
    ),
    "queue_full": (worker(counts=replace(COUNTS, waiting=9)), "warning", "is 90% full"),
    "batches_lost": (
        worker(counts=replace(COUNTS, lost={"vanished": 2, "stale": 9})),
        "warning",
        "2 vanished",
    ),
    "dead_letters": (
        worker(dead_letters=1),
        "warning",
        "1 batch of worker 0 could not be used and is kept as a dead letter",
    ),
    "keys_spoiled": (
        worker(spoiled=("rlb:{pong}:x:0",)),
        "warning",
        "rlb:{pong}:x:0 of worker 0 is not what",
    ),
}


def test_a_healthy_run_has_no_findings() -> None:
    assert list_findings(RUN) == []


@pytest.mark.parametrize("code", FAULTS)
def test_each_fault_is_one_finding_with_a_command_and_advice(code: str) -> None:
    snapshot, severity, text = FAULTS[code]
    (finding,) = list_findings(snapshot)
    assert (finding.code, finding.severity) == (code, severity)
    assert text in finding.what
    assert finding.hint.startswith(("rlbroker ", "redis-cli "))
    assert finding.advice


def test_the_commands_page_lists_every_finding() -> None:
    section = PAGE.read_text().partition("\n## Finding\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == [*FAULTS]


@pytest.mark.parametrize("state", ["away", "ended", "none"])
def test_a_full_queue_is_not_blamed_on_the_speed_of_a_learner_that_is_gone(state: Any) -> None:
    full = {0: replace(STATUS, counts=replace(COUNTS, waiting=10))}
    gone = replace(RUN, learner=None) if state == "none" else learner(state=state, last_seen_seconds=42.0)
    (finding,) = list_findings(replace(gone, workers=full))
    assert finding.code == {"none": "learner_missing"}.get(state, f"learner_{state}")
    others = learner(state=state, others=1)  # another learner collects, too slowly
    if state != "none":
        assert "queue_full" in {one.code for one in list_findings(replace(others, workers=full))}


def test_a_run_without_workers_leads_to_those_with_a_mistyped_name() -> None:
    (finding,) = list_findings(replace(RUN, workers={}))
    assert finding.what == "0 workers are alive; 1 is expected"
    assert finding.hint == "rlbroker runs"
    assert "`rlbroker runs`" in finding.advice


def test_critical_findings_come_first() -> None:
    both = replace(server(maxmemory_policy="allkeys-lru"), expected_workers=4)
    assert [finding.severity for finding in list_findings(both)] == ["critical", "warning"]


@pytest.mark.parametrize(
    "snapshot",
    [
        replace(learner(state="ended", last_seen_seconds=900.0), workers={0: replace(STATUS, info=None)}),
        learner(state="ended", last_seen_seconds=8.0),
        replace(learner(state="ended", last_seen_seconds=42.0), settings=RunSettings(lease_seconds=60.0)),
        learner(state="ended", last_seen_seconds=900.0, others=1),
        worker(info=None),
        worker(counts=replace(COUNTS, lost={"stale": 9, "dropped_oldest": 3})),
        member(version=11, staleness=9),
        member(version=0, staleness=20),
        member(fenced_process="node-9:8", fenced_seconds=5000.0),
        server(maxmemory_policy="", used_bytes=None, maxmemory_bytes=None),
    ],
    ids=[
        "the run is over",
        "just ended",
        "ended within a long lease",
        "another learner collects",
        "worker left",
        "losses by the settings",
        "a little behind",
        "just joined",
        "fenced long ago",
        "server without INFO",
    ],
)
def test_a_normal_state_is_not_a_finding(snapshot: Snapshot) -> None:
    assert list_findings(replace(snapshot, expected_workers=0)) == []


def test_limits_can_be_changed() -> None:
    assert (
        list_findings(member(version=15, staleness=5), FindingLimits(staleness=5))[0].code == "worker_behind"
    )
    (behind,) = list_findings(member(version=19, staleness=1), FindingLimits(staleness=1))
    assert behind.what.startswith("worker 0 is 1 version behind: ")
    assert list_findings(RUN, FindingLimits(min_workers=2))[0].what == "1 worker is alive; 2 are required"
    assert list_findings(RUN, FindingLimits(waiting_share=0.1))[0].code == "queue_full"


def test_a_worker_without_a_known_process_is_reported_without_it() -> None:
    known, unknown = (
        {finding.code: finding.what for finding in list_findings(member(state="away", **changes))}
        for changes in ({}, {"host": "", "pid": 0})
    )
    assert known["worker_away"].startswith("worker 0 (node-1 pid 7) is away: ")
    assert unknown["worker_away"].startswith("worker 0 is away: ")
