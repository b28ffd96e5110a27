"""The poll schedule: which streams a read polls."""

from __future__ import annotations

import pytest

from rlbroker.experience.stream_reader import FEW, MAX_SKIP_SECONDS, QUIET_SECONDS, PollSchedule

pytestmark = pytest.mark.unit


def _streams(number: int) -> dict[str, int]:
    return {str(one): one for one in range(number)}


def _after_a_full_poll(number: int, *found: str, at: float = 100.0) -> PollSchedule:
    schedule = PollSchedule()
    schedule.note(found, number, at, polled_all=True)
    return schedule


def test_few_streams_are_all_polled_each_time() -> None:
    """With few workers, skipping streams would save nothing."""
    schedule = _after_a_full_poll(FEW, "3")
    assert schedule.choose(_streams(FEW), 100.0) == (list(range(FEW)), None)


def test_of_many_streams_only_busy_ones_are_polled_until_the_next_full_poll() -> None:
    """A read costs what arrives, and a quiet worker is skipped only for a moment."""
    schedule = _after_a_full_poll(1000, "3", "7")
    polled, seconds = schedule.choose(_streams(1000), 100.0)
    assert polled == [3, 7]
    assert seconds is not None
    assert 0 < seconds <= MAX_SKIP_SECONDS
    assert schedule.choose(_streams(1000), 100.0 + MAX_SKIP_SECONDS) == (list(range(1000)), None)


def test_without_a_busy_stream_all_are_polled() -> None:
    """A read that polls no stream would never return."""
    assert _after_a_full_poll(1000).choose(_streams(1000), 100.0) == (list(range(1000)), None)


def test_a_stream_with_nothing_new_for_a_while_is_quiet_again() -> None:
    """Workers that were busy once do not make all later reads long."""
    schedule = _after_a_full_poll(1000, "3")
    later = 100.0 + QUIET_SECONDS
    schedule.note(["7"], 1000, later, polled_all=True)
    assert schedule.choose(_streams(1000), later)[0] == [7]


def test_poll_all_takes_effect_at_the_next_read() -> None:
    """A call that may not wait polls all streams before it returns nothing."""
    schedule = _after_a_full_poll(1000, "3")
    schedule.poll_all()
    assert schedule.choose(_streams(1000), 100.0) == (list(range(1000)), None)


def test_a_stream_that_is_no_longer_watched_is_not_polled() -> None:
    """The server may lose a busy worker's stream."""
    schedule = _after_a_full_poll(1000, "3", "7")
    streams = _streams(1000)
    del streams["3"]
    assert schedule.choose(streams, 100.0)[0] == [7]
