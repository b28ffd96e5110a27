"""Flow control: what is refused, and that inserting and sampling never both wait."""

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
def test_what_cannot_work_is_refused_at_construction(settings: Any, name: str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        SamplesPerInsert(*settings)


def test_sampling_begins_at_the_minimum_size_and_stops_when_it_is_ahead() -> None:
    flow = RateLimiter(SamplesPerInsert(ratio=2.0, min_size=3, error_buffer=2.0))
    flow.insert(2)
    assert not flow.may_sample(1)
    flow.insert(1)
    assert [flow.may_sample(1) for _ in range(3)] == [True, True, False]
    assert (flow.inserts, flow.samples) == (3, 2)


def test_inserting_stops_when_sampling_is_behind_and_goes_on_with_it() -> None:
    flow = RateLimiter(SamplesPerInsert(ratio=2.0, min_size=3, error_buffer=2.0))
    assert flow.wait(0) == 4
    flow.insert(4)
    assert flow.wait(0) == 0
    assert flow.may_sample(2)
    assert flow.wait(0) == 1


def test_without_a_rule_everything_is_allowed() -> None:
    flow = RateLimiter(None)
    assert flow.wait(0) is None
    assert flow.may_sample(10**6)


@pytest.mark.parametrize("count", [0, -1, True, 1.0, "1"])
def test_a_number_of_samples_is_a_positive_integer(count: Any) -> None:
    with pytest.raises(InvalidArgument, match="at least 1"):
        RateLimiter(None).may_sample(count)


@given(rules(), st.integers(1, 50), st.integers(1, 400))
def test_drawing_many_at_once_is_refused_or_comes_through_in_the_end(
    rule: SamplesPerInsert, count: int, rounds: int
) -> None:
    flow = RateLimiter(rule)
    for _ in range(rounds):
        room = flow.wait(0)
        assert room is not None
        flow.insert(room)  # as far as it may go
        assert _draw(flow, count) is not False


@given(rules(), steps)
def test_one_side_may_always_go_on_and_both_stay_within_the_error_buffer(
    rule: SamplesPerInsert, turns: list[tuple[bool, int]]
) -> None:
    flow = RateLimiter(rule)
    for inserts, count in turns:
        room = flow.wait(0)
        assert room is not None
        assert room > 0 or _could_sample(flow)
        if inserts:
            flow.insert(min(room, count))
        else:
            flow.may_sample(1)
        if flow.inserts > rule.min_size:
            off = flow.inserts * rule.ratio - flow.samples - rule.min_size * rule.ratio
            assert abs(off) <= rule.error_buffer + 1e-6


def _could_sample(flow: RateLimiter) -> bool:
    before = flow.samples
    possible = flow.may_sample(1)
    flow.samples = before
    return possible


def _draw(flow: RateLimiter, count: int) -> bool | None:
    """Give None where so many are refused."""
    try:
        return flow.may_sample(count)
    except InvalidArgument:
        return None
