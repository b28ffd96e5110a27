"""Which streams a read asks, with nothing but numbers."""

from __future__ import annotations

import pytest

from rlbroker.experience.stream_reader import FEW, MAX_SKIP_SECONDS, QUIET_SECONDS, PollSchedule

pytestmark = pytest.mark.unit


def _watched(number: int) -> dict[str, int]:
    return {str(one): one for one in range(number)}


def _after_all_were_asked(number: int, *found: str, at: float = 100.0) -> PollSchedule:
    turns = PollSchedule()
    turns.note(found, number, at, polled_all=True)
    return turns


def test_a_small_run_asks_all_each_time() -> None:
    """Where there are few workers nothing is saved, and nobody waits for a turn."""
    turns = _after_all_were_asked(FEW, "3")
    assert turns.choose(_watched(FEW), 100.0) == (list(range(FEW)), None)


def test_among_many_only_the_busy_are_asked_until_it_is_everybodys_turn() -> None:
    """A read costs what arrives; and a quiet worker is never left out for longer than a moment."""
    turns = _after_all_were_asked(1000, "3", "7")
    asked, seconds = turns.choose(_watched(1000), 100.0)
    assert asked == [3, 7]
    assert seconds is not None
    assert 0 < seconds <= MAX_SKIP_SECONDS
    assert turns.choose(_watched(1000), 100.0 + MAX_SKIP_SECONDS) == (list(range(1000)), None)


def test_where_nobody_is_busy_all_are_asked() -> None:
    """A read that waits on nobody would hear nothing."""
    assert _after_all_were_asked(1000).choose(_watched(1000), 100.0) == (list(range(1000)), None)


def test_who_had_nothing_for_a_while_is_quiet_again() -> None:
    """Workers that were busy once do not make reads long for ever."""
    turns = _after_all_were_asked(1000, "3")
    later = 100.0 + QUIET_SECONDS
    turns.note(["7"], 1000, later, polled_all=True)
    assert turns.choose(_watched(1000), later)[0] == [7]


def test_who_is_told_to_ask_all_does_so_at_once() -> None:
    """A call that may not wait looks at everybody before it says that there is nothing."""
    turns = _after_all_were_asked(1000, "3")
    turns.poll_all()
    assert turns.choose(_watched(1000), 100.0) == (list(range(1000)), None)


def test_who_is_not_watched_any_more_is_not_asked() -> None:
    """A busy worker's stream may be lost."""
    turns = _after_all_were_asked(1000, "3", "7")
    watched = _watched(1000)
    del watched["3"]
    assert turns.choose(watched, 100.0)[0] == [7]
