"""The rate limiter: which settings it refuses, and that inserting and sampling never both wait."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbroker import InvalidArgument, SamplesPerInsert
from rlbroker.experience.rate_limiter import RateLimiter

pytestmark = pytest.mark.unit

ratios = st.floats(0.05, 20.0)
steps = st.lists(st.tuples(st.booleans(), st.integers(1, 8)), max_size=60)


@st.composite
def rules(draw: st.DrawFn) -> SamplesPerInsert:
    ratio = draw(ratios)
    buffer = max(1.0, ratio) * draw(st.floats(1.0, 5.0))
    return SamplesPerInsert(ratio, draw(st.integers(1, 20)), buffer)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ((0, 1, 1), "ratio"),
        ((-1.0, 1, 1), "ratio"),
        ((math.nan, 1, 1), "ratio"),
        ((math.inf, 1, 1), "ratio"),
        ((True, 1, 1), "ratio"),
        (("1", 1, 1), "ratio"),
        ((1.0, 0, 1), "min_size"),
        ((1.0, 1.5, 1), "min_size"),
        ((1.0, True, 1), "min_size"),
        ((1.0, 1, 0), "error_buffer"),
        ((1.0, 1, math.inf), "error_buffer"),
        ((1.0, 1, 0.5), "would wait for each other"),
        ((4.0, 1, 3.9), "would wait for each other"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_construction(settings: Any, name: str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        SamplesPerInsert(*settings)


def test_sampling_starts_at_min_size_and_stops_when_it_is_ahead() -> None:
    limiter = RateLimiter(SamplesPerInsert(ratio=2.0, min_size=3, error_buffer=2.0))
    limiter.inserts += 2
    assert not limiter.may_sample(1)
    limiter.inserts += 1
    assert [limiter.may_sample(1) for _ in range(3)] == [True, True, False]
    assert (limiter.inserts, limiter.samples) == (3, 2)


def test_inserting_stops_while_sampling_is_behind() -> None:
    limiter = RateLimiter(SamplesPerInsert(ratio=2.0, min_size=3, error_buffer=2.0))
    assert limiter.wait(0) == 4
    limiter.inserts += 4
    assert limiter.wait(0) == 0
    assert limiter.may_sample(2)
    assert limiter.wait(0) == 1


def test_without_settings_nothing_is_limited() -> None:
    limiter = RateLimiter(None)
    assert limiter.wait(0) is None
    assert limiter.may_sample(10**6)


@pytest.mark.parametrize("count", [0, -1, True, 1.0, "1"])
def test_a_number_of_samples_is_a_positive_integer(count: Any) -> None:
    with pytest.raises(InvalidArgument, match="at least 1"):
        RateLimiter(None).may_sample(count)


@given(rules(), st.integers(1, 50), st.integers(1, 400))
def test_drawing_many_samples_is_refused_or_succeeds_in_the_end(
    rule: SamplesPerInsert, count: int, rounds: int
) -> None:
    limiter = RateLimiter(rule)
    for _ in range(rounds):
        room = limiter.wait(0)
        assert room is not None
        limiter.inserts += room  # as many as allowed
        assert _draw(limiter, count) is not False


@given(rules(), steps)
def test_one_side_may_always_continue_within_the_error_buffer(
    rule: SamplesPerInsert, actions: list[tuple[bool, int]]
) -> None:
    limiter = RateLimiter(rule)
    for inserts, count in actions:
        room = limiter.wait(0)
        assert room is not None
        assert room > 0 or _could_sample(limiter)
        if inserts:
            limiter.inserts += min(room, count)
        else:
            limiter.may_sample(1)
        if limiter.inserts > rule.min_size:
            difference = limiter.inserts * rule.ratio - limiter.samples - rule.min_size * rule.ratio
            assert abs(difference) <= rule.error_buffer + 1e-6


def _could_sample(limiter: RateLimiter) -> bool:
    before = limiter.samples
    possible = limiter.may_sample(1)
    limiter.samples = before
    return possible


def _draw(limiter: RateLimiter, count: int) -> bool | None:
    """Return None if this many samples are refused."""
    try:
        return limiter.may_sample(count)
    except InvalidArgument:
        return None
