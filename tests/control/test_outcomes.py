"""Folding events into a worker's outcomes: every version has one final outcome for every member."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbroker.control.outcomes import Event, Settled, WorkerOutcomes
from rlbroker.control.outcomes import settle as settle_up_to
from rlbroker.types import Missed

pytestmark = pytest.mark.unit

numbers = itertools.count(1)


def make_event(kind: str, entry_id: str = "", at: float = 100.0, **fields: object) -> Event:
    entry_id = entry_id or f"1-{next(numbers)}"
    return Event(entry_id, 0, kind, {name: str(value) for name, value in fields.items()}, at)


def settle(outcomes: WorkerOutcomes, event: Event, pending: dict[str, int]) -> Settled:
    return settle_up_to(outcomes, event, pending, latest=1000)


def member(settled: int, **fields: object) -> WorkerOutcomes:
    return WorkerOutcomes(incarnation=1, member=True, settled=settled, applied=settled, **fields)  # type: ignore[arg-type]


def spans(missed: tuple[Missed, ...]) -> list[tuple[int, int, str]]:
    return [(record.first, record.last, record.why) for record in missed]


def test_a_worker_missed_the_versions_that_it_jumped_over() -> None:
    settled = settle(member(3), make_event("version", version=34, outcome="applied"), {})
    outcomes = settled.worker_outcomes
    assert spans(settled.missed) == [(4, 33, "superseded")]
    assert (outcomes.applied, outcomes.settled) == (34, 34)
    assert outcomes.missed == {"superseded": 30}


def test_a_worker_that_follows_each_version_missed_nothing() -> None:
    settled = settle(member(3), make_event("version", version=4, outcome="applied"), {})
    assert settled.missed == ()
    assert settled.worker_outcomes.applied_total == 1


def test_versions_from_before_a_worker_joined_do_not_concern_it() -> None:
    joined = settle(WorkerOutcomes(), make_event("joined", "1-0", version=7), {})
    loaded = settle(joined.worker_outcomes, make_event("version", version=7, outcome="applied"), {})
    assert joined.missed == loaded.missed == ()
    assert (loaded.worker_outcomes.applied, loaded.worker_outcomes.applied_total) == (7, 0)


def test_a_version_from_before_a_worker_joined_counts_once_if_it_fails() -> None:
    joined = settle(WorkerOutcomes(), make_event("joined", "1-0", version=7), {}).worker_outcomes
    failure: dict[str, Any] = {"version": 7, "outcome": "failed", "detail": "digest"}
    failed = settle(joined, make_event("version", **failure), {})
    assert spans(failed.missed) == [(7, 7, "failed")]
    assert (failed.worker_outcomes.settled, failed.worker_outcomes.missed) == (7, {"failed": 1})
    assert settle(failed.worker_outcomes, make_event("version", **failure), {}).missed == ()
    applied = settle(joined, make_event("version", version=7, outcome="applied"), {}).worker_outcomes
    assert settle(applied, make_event("version", **failure), {}).missed == ()


def test_a_version_that_failed_is_missed_with_its_reason() -> None:
    settled = settle(member(3), make_event("version", version=5, outcome="failed", detail="digest"), {})
    assert spans(settled.missed) == [(4, 4, "superseded"), (5, 5, "failed")]
    assert settled.missed[1].detail == "digest"
    assert settled.worker_outcomes.applied == 3


def test_versions_published_while_a_worker_was_silent_are_missed_as_away_when_it_is_forgotten() -> None:
    settled = settle(member(3), make_event("gone", "2-0", version=9), {})
    assert spans(settled.missed) == [(4, 9, "away")]
    assert not settled.worker_outcomes.member


def test_a_worker_that_left_misses_nothing_more() -> None:
    left = settle(member(3), make_event("left", "1-9", version=5), {})
    back = settle(left.worker_outcomes, make_event("joined", "2-0", version=90), {})
    assert spans(left.missed) == [(4, 5, "left")]
    assert back.missed == ()
    assert back.worker_outcomes.settled == 90


def test_a_newer_process_settles_what_the_older_one_left_open() -> None:
    settled = settle(member(3), make_event("joined", "2-0", version=6), {"aaa": 1, "bbb": 2})
    assert spans(settled.missed)[0] == (4, 6, "away")
    assert [record.command for record in settled.missed if record.what == "command"] == ["aaa"]
    states = {command: str(outcome) for command, outcome in settled.command_outcomes.items()}
    assert states == {"aaa": "missed: away"}


def test_a_command_has_one_final_outcome() -> None:
    event = make_event("command", command="aaa", name="reset", outcome="done")
    assert settle(member(1), event, {"aaa": 1}).command_outcomes["aaa"].state == "done"
    assert settle(member(1), event, {}).command_outcomes == {}


def test_skips_in_a_row_are_counted_until_an_update_skips_nothing() -> None:
    outcomes = member(1)
    for version, at in ((3, 10.0), (6, 20.0), (9, 30.0)):
        event = make_event("version", at=at, version=version, outcome="applied")
        outcomes = settle(outcomes, event, {}).worker_outcomes
    assert (outcomes.skips_in_a_row, outcomes.skipping_since) == (3, 10.0)
    event = make_event("version", version=10, outcome="applied")
    outcomes = settle(outcomes, event, {}).worker_outcomes
    assert (outcomes.skips_in_a_row, outcomes.skipping_since) == (0, 0.0)


def test_outcomes_are_the_same_after_writing_and_reading_their_hash() -> None:
    outcomes = member(
        7, missed={"away": 3, "superseded": 2}, commands_missed=1, skips_in_a_row=2, joined_version=7
    )
    assert WorkerOutcomes.from_fields(outcomes.to_fields()) == outcomes


def test_an_event_of_an_unknown_kind_changes_nothing() -> None:
    event = make_event("from the future")
    assert settle(member(3), event, {}) == Settled(member(3, event=event.entry_id))


def test_an_event_is_folded_in_once() -> None:
    """A worker repeats its acknowledgements, and its joining, after the server lost them."""
    jumped = settle(member(3), make_event("version", "1-7", version=9, outcome="applied"), {}).worker_outcomes
    for again in (
        make_event("joined", "1-0", version=20),
        make_event("version", "1-6", version=8, outcome="failed"),
        make_event("version", "1-7", version=9, outcome="applied"),
    ):
        assert settle(jumped, again, {}) == Settled(jumped)


@pytest.mark.parametrize(
    "forged",
    [
        make_event("version", version=1001, outcome="applied"),
        make_event("version", version=-1, outcome="applied"),
        make_event("version", version="9" * 50, outcome="applied"),
        make_event("version", outcome="applied"),
        make_event("command", command="aaa", outcome="waiting"),
        make_event("command", outcome="done"),
        make_event("command", command="bbb", outcome="done"),
    ],
    ids=str,
)
def test_an_invalid_event_changes_nothing(forged: Event) -> None:
    settled = settle(member(3), forged, {"aaa": 1})
    assert settled == Settled(member(3, event=forged.entry_id))


steps = st.lists(
    st.tuples(st.sampled_from(["publish", "apply", "fail", "join", "leave", "gone"]), st.integers(1, 5))
)


@given(steps)
def test_each_version_has_exactly_one_outcome_for_a_member(history: list[tuple[str, int]]) -> None:
    """Whatever happens, each settled version of a membership is either applied or missed, once."""
    outcomes, latest, incarnation = WorkerOutcomes(), 0, 0
    concerned: set[int] = set()
    # The version at joining, whose failure counts until the worker has loaded anything; versions that no longer count.
    opened, loaded = 0, set[int]()
    found: Counter[int] = Counter()
    for step, count in history:
        if step == "publish":
            for _ in range(count):
                latest += 1
                if outcomes.member:
                    concerned.add(latest)
            continue
        if step == "join":
            incarnation += 1
            event = make_event("joined", f"{incarnation}-0", version=latest)
            opened = 0 if latest in concerned | loaded else latest
        elif not outcomes.member or not latest:
            continue
        elif step in ("leave", "gone"):
            incarnation += step == "gone"
            number = 2**64 - 1 if step == "leave" else 0
            kind = "left" if step == "leave" else "gone"
            event = make_event(kind, f"{incarnation}-{number}", version=latest)
        else:
            # A worker may lag behind the latest version, and may load the same one again.
            version = max(1, latest - count + 1)
            outcome = "applied" if step == "apply" else "failed"
            if outcome == "applied" and version > outcomes.settled:
                found[version] += 1
            if outcome == "failed" and version == opened == outcomes.settled:
                concerned.add(version)
            loaded |= {version, opened}
            opened = 0
            event = make_event("version", f"{incarnation}-{next(numbers)}", version=version, outcome=outcome)
        settled = settle(outcomes, event, {})
        outcomes = settled.worker_outcomes
        for record in settled.missed:
            found.update(range(record.first, record.last + 1))
    waiting = set(range(outcomes.settled + 1, latest + 1)) if outcomes.member else set()
    assert set(found) == concerned - waiting
    assert set(found.values()) <= {1}
