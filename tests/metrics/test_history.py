"""Samples of the history survive writing and reading, and intervals between them are computed right."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbroker.metrics.counters import EXACT_BELOW, Metrics, staleness_bucket
from rlbroker.metrics.history import Interval, Sample, intervals, merge_samples

pytestmark = pytest.mark.unit

_counts = st.integers(0, 10**18)
_seconds = st.floats(0, 1e9).map(lambda number: round(number, 4))
_pairs = st.dictionaries(st.integers(0, 10**6), st.integers(1, 10**9), max_size=5)
_kinds = {"int": _counts, "float": _seconds}
_any_sample = st.builds(
    Sample,
    **{
        one.name: _kinds.get(str(one.type), _pairs) if one.name != "at" else st.just(5.25)
        for one in fields(Sample)
    },
)


def a_sample(at: float = 0.0, **values: Any) -> Sample:
    zeros: dict[str, Any] = {
        one.name: {"int": 0, "float": 0.0}.get(str(one.type), {}) for one in fields(Sample)
    }
    return Sample(**zeros | {"at": at} | values)


@given(_any_sample)
def test_a_sample_is_read_as_it_was_written(sample: Sample) -> None:
    assert Sample.from_fields("5250-3", sample.to_fields()) == sample


@settings(max_examples=40)
@given(st.sampled_from(sorted(a_sample().to_fields())), st.text(max_size=12))
def test_any_text_in_a_field_gives_a_sample_or_none(name: str, text: str) -> None:
    written = a_sample().to_fields()
    found = Sample.from_fields("5250-0", written | {name: text})
    assert found is None or found.to_fields() == found.to_fields()
    del written[name]
    assert Sample.from_fields("5250-0", written) is None


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "1e400", "0x1", "1:", "1:2 x"])
def test_an_invalid_number_makes_no_sample(text: str) -> None:
    written = a_sample().to_fields()
    assert Sample.from_fields("5250-0", written | {"rows": text, "wait_seconds": text}) is None
    if text:
        assert Sample.from_fields("5250-0", written | {"staleness": text}) is None


def test_fields_of_a_later_release_are_ignored() -> None:
    assert Sample.from_fields("5250-0", a_sample().to_fields() | {"mood": "good"}) == a_sample(5.25)


@given(
    st.lists(st.integers(0, EXACT_BELOW - 1), min_size=1),
    st.lists(st.integers(0, 200)),
    st.floats(0.01, 1.0),
)
def test_quantiles_are_those_of_the_batches_of_the_interval(
    between: list[int], earlier: list[int], q: float
) -> None:
    metrics = Metrics()
    metrics.add_all(earlier)
    before = a_sample(1.0, staleness=metrics.staleness_counts())
    metrics.add_all(between)
    found = Interval(before, a_sample(2.0, staleness=metrics.staleness_counts()))
    quantile = found.staleness_quantile(q)
    assert quantile is not None
    share = sum(number <= quantile for number in between) / len(between)
    less = sum(number < quantile for number in between) / len(between)
    assert less < q <= share + 1e-9
    assert found.mean_staleness == pytest.approx(sum(between) / len(between))
    assert found.staleness == Counter(between)


def test_the_median_of_two_batches_is_the_lower_staleness() -> None:
    found = Interval(a_sample(1.0), a_sample(2.0, staleness={0: 1, 7: 1}))
    assert (found.staleness_quantile(0.5), found.staleness_quantile(0.51)) == (0.0, 7.0)


def test_an_interval_without_batches_has_no_staleness() -> None:
    same = a_sample(1.0, staleness={0: 5})
    found = Interval(same, replace(same, at=2.0))
    assert (found.staleness_quantile(0.5), found.mean_staleness) == (None, None)


@given(st.integers(0, 10**6))
def test_a_staleness_is_counted_in_the_bucket_below_it(staleness: int) -> None:
    bound = staleness_bucket(staleness)
    assert bound <= staleness
    assert (
        staleness == bound
        if staleness < EXACT_BELOW
        else staleness < 2 * bound == 2 * staleness_bucket(bound)
    )


def test_rates_are_growth_per_second_and_never_negative() -> None:
    found = Interval(a_sample(10.0, rows=5, lost=3), a_sample(14.0, rows=25, lost=1, wait_seconds=1.0))
    assert (found.seconds, found.rate("rows"), found.share("wait_seconds")) == (4.0, 5.0, 0.25)
    assert found.rate("lost") == 0.0  # retried dead letters are subtracted


def test_samples_of_different_learners_make_no_interval() -> None:
    first, second, third = a_sample(1.0, epoch=1), a_sample(2.0, epoch=1), a_sample(3.0, epoch=2)
    assert intervals([first, second, third, replace(third, at=4.0)]) == [
        Interval(first, second),
        Interval(third, replace(third, at=4.0)),
    ]


@given(st.sets(st.integers(0, 100)), st.sets(st.integers(0, 100)))
def test_coarser_samples_are_used_only_before_the_finer_ones(coarse: set[int], fine: set[int]) -> None:
    found = [
        one.at
        for one in merge_samples(
            [a_sample(float(at)) for at in sorted(coarse)], [a_sample(float(at)) for at in sorted(fine)]
        )
    ]
    assert found == sorted(set(found))
    assert fine <= set(found)
    assert set(found) - fine == {at for at in coarse if not fine or at < min(fine)}


def test_a_timed_block_that_raises_is_counted() -> None:
    metrics = Metrics()
    with pytest.raises(ValueError, match="no"), metrics.timed("seconds"):
        raise ValueError("no")
    assert metrics.totals()["seconds"] > 0
