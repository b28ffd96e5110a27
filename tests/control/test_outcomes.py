"""A worker's account, without Redis: every version has one final outcome for every member."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbroker.control.outcomes import Event, Settled, WorkerOutcomes
from rlbroker.control.outcomes import settle as settle_up_to
from rlbroker.types import Missed

pytestmark = pytest.mark.unit

numbers = itertools.count(1)


def event(kind: str, entry_id: str = "", at: float = 100.0, **fields: object) -> Event:
    entry_id = entry_id or f"1-{next(numbers)}"
    return Event(entry_id, 0, kind, {name: str(value) for name, value in fields.items()}, at)


def settle(account: WorkerOutcomes, happened: Event, pending: dict[str, int]) -> Settled:
    return settle_up_to(account, happened, pending, latest=1000)


def member(settled: int, **fields: object) -> WorkerOutcomes:
    return WorkerOutcomes(incarnation=1, member=True, settled=settled, applied=settled, **fields)  # type: ignore[arg-type]


def spans(missed: tuple[Missed, ...]) -> list[tuple[int, int, str]]:
    return [(record.first, record.last, record.why) for record in missed]


def test_a_worker_that_jumped_missed_what_it_jumped_over() -> None:
    done = settle(member(3), event("version", version=34, outcome="applied"), {})
    assert spans(done.missed) == [(4, 33, "superseded")]
    assert (done.account.applied, done.account.settled) == (34, 34)
    assert done.account.missed == {"superseded": 30}


def test_a_worker_that_follows_each_version_missed_nothing() -> None:
    done = settle(member(3), event("version", version=4, outcome="applied"), {})
    assert done.missed == ()
    assert done.account.applied_total == 1


def test_the_version_that_was_there_when_a_worker_joined_does_not_concern_it() -> None:
    joined = settle(WorkerOutcomes(), event("joined", "1-0", version=7), {})
    loaded = settle(joined.account, event("version", version=7, outcome="applied"), {})
    assert joined.missed == loaded.missed == ()
    assert (loaded.account.applied, loaded.account.applied_total) == (7, 0)


def test_a_version_that_failed_is_missed_with_its_reason() -> None:
    done = settle(member(3), event("version", version=5, outcome="failed", detail="digest"), {})
    assert spans(done.missed) == [(4, 4, "superseded"), (5, 5, "failed")]
    assert done.missed[1].detail == "digest"
    assert done.account.applied == 3


def test_versions_published_while_a_worker_was_gone_count_as_away_until_it_is_struck() -> None:
    done = settle(member(3), event("gone", "2-0", version=9), {})
    assert spans(done.missed) == [(4, 9, "away")]
    assert not done.account.member


def test_a_worker_that_left_misses_nothing_more() -> None:
    left = settle(member(3), event("left", "1-9", version=5), {})
    back = settle(left.account, event("joined", "2-0", version=90), {})
    assert spans(left.missed) == [(4, 5, "left")]
    assert back.missed == ()
    assert back.account.settled == 90


def test_a_newer_process_settles_what_the_older_one_left_open() -> None:
    done = settle(member(3), event("joined", "2-0", version=6), {"aaa": 1, "bbb": 2})
    assert spans(done.missed)[0] == (4, 6, "away")
    assert [record.command for record in done.missed if record.what == "command"] == ["aaa"]
    assert {command: str(outcome) for command, outcome in done.outcomes.items()} == {"aaa": "missed: away"}


def test_a_command_has_one_final_state() -> None:
    answer = event("command", command="aaa", name="reset", outcome="done")
    assert settle(member(1), answer, {"aaa": 1}).outcomes["aaa"].state == "done"
    assert settle(member(1), answer, {}).outcomes == {}


def test_skips_in_a_row_are_counted_until_an_update_skips_nothing() -> None:
    account = member(1)
    for version, at in ((3, 10.0), (6, 20.0), (9, 30.0)):
        account = settle(account, event("version", at=at, version=version, outcome="applied"), {}).account
    assert (account.skips_in_a_row, account.skipping_since) == (3, 10.0)
    account = settle(account, event("version", version=10, outcome="applied"), {}).account
    assert (account.skips_in_a_row, account.skipping_since) == (0, 0.0)


def test_an_account_survives_its_hash() -> None:
    account = member(7, missed={"away": 3, "superseded": 2}, commands_missed=1, skips_in_a_row=2)
    assert WorkerOutcomes.from_fields(account.to_fields()) == account


def test_an_event_of_an_unknown_kind_changes_nothing() -> None:
    happened = event("from the future")
    assert settle(member(3), happened, {}) == Settled(member(3, event=happened.entry_id))


def test_what_was_folded_before_is_not_folded_again() -> None:
    """A worker repeats its answers, and its joining, after the server lost them."""
    jumped = settle(member(3), event("version", "1-7", version=9, outcome="applied"), {}).account
    for again in (
        event("joined", "1-0", version=20),
        event("version", "1-6", version=8, outcome="failed"),
        event("version", "1-7", version=9, outcome="applied"),
    ):
        assert settle(jumped, again, {}) == Settled(jumped)


@pytest.mark.parametrize(
    "forged",
    [
        event("version", version=1001, outcome="applied"),
        event("version", version=-1, outcome="applied"),
        event("version", version="9" * 50, outcome="applied"),
        event("version", outcome="applied"),
        event("command", command="aaa", outcome="waiting"),
        event("command", outcome="done"),
        event("command", command="bbb", outcome="done"),
    ],
    ids=str,
)
def test_what_makes_no_sense_changes_nothing(forged: Event) -> None:
    done = settle(member(3), forged, {"aaa": 1})
    assert done == Settled(member(3, event=forged.entry_id))


steps = st.lists(
    st.tuples(st.sampled_from(["publish", "apply", "fail", "join", "leave", "gone"]), st.integers(1, 5))
)


@given(steps)
def test_each_version_has_exactly_one_outcome_for_a_member(story: list[tuple[str, int]]) -> None:
    """Whatever happens, the settled versions of each membership are either applied or missed, once."""
    account, latest, incarnation = WorkerOutcomes(), 0, 0
    concerned: set[int] = set()
    outcomes: Counter[int] = Counter()
    for what, count in story:
        if what == "publish":
            for _ in range(count):
                latest += 1
                if account.member:
                    concerned.add(latest)
            continue
        if what == "join":
            incarnation += 1
            happened = event("joined", f"{incarnation}-0", version=latest)
        elif not account.member or not latest:
            continue
        elif what in ("leave", "gone"):
            incarnation += what == "gone"
            number = 2**64 - 1 if what == "leave" else 0
            happened = event("left" if what == "leave" else "gone", f"{incarnation}-{number}", version=latest)
        else:
            # A worker may lag behind the latest version, and may load the same one again.
            version = max(1, latest - count + 1)
            outcome = "applied" if what == "apply" else "failed"
            if outcome == "applied" and version > account.settled:
                outcomes[version] += 1
            happened = event("version", f"{incarnation}-{next(numbers)}", version=version, outcome=outcome)
        done = settle(account, happened, {})
        account = done.account
        for record in done.missed:
            outcomes.update(range(record.first, record.last + 1))
    waiting = set(range(account.settled + 1, latest + 1)) if account.member else set()
    assert set(outcomes) == concerned - waiting
    assert set(outcomes.values()) <= {1}
