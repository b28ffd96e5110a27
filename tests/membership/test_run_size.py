"""How many ask for each version, and how long each of them waits, with nothing but numbers."""

from __future__ import annotations

import pytest

from rlbroker.membership.run_size import AT_ONCE, LONGEST_SECONDS, RunSize

pytestmark = pytest.mark.unit


def _wait(
    crowd: RunSize, version: int = 5, size: int = 1 << 20, *, name: str = "a", shared: bool = False
) -> float:
    return crowd.wait_seconds(version, size, name=name, shared=shared)


@pytest.mark.parametrize("crowd", [RunSize(), RunSize(1, 1), RunSize(AT_ONCE, AT_ONCE)])
def test_a_few_do_not_wait_for_each_other(crowd: RunSize) -> None:
    assert _wait(crowd, size=1 << 40) == _wait(crowd, size=1 << 40, shared=True) == 0


def test_workers_that_share_a_download_wait_for_other_hosts_only() -> None:
    """A thousand workers of eight hosts are eight downloads."""
    crowd = RunSize(1000, AT_ONCE)
    assert _wait(crowd, shared=True) == 0
    assert _wait(crowd) > 0


def test_all_of_a_host_wait_equally_long_and_hosts_do_not() -> None:
    """Who waits for a download of another must not have it begin later than its own."""
    crowd = RunSize(1000, 100)
    waits = [_wait(crowd, name=name, shared=True) for name in ("a", "a", "b", "c")]
    assert waits[0] == waits[1]
    assert len(set(waits)) == 3


def test_nobody_is_always_the_last() -> None:
    """The order of a crowd is another one with each version."""
    crowd = RunSize(1000, 100)
    first = [_wait(crowd, version) < _wait(crowd, version, name="b") for version in range(50)]
    assert 5 < sum(first) < 45


def test_a_crowd_is_spread_over_the_time_that_its_downloads_take() -> None:
    """Evenly, so that the server is neither idle nor asked by all at once."""
    waits = [_wait(RunSize(1000, 1000), name=f"host{number}") for number in range(1000)]
    longest = (1000 - AT_ONCE) * (0.0002 + (1 << 20) / 2e9)
    assert max(waits) < longest
    quarters = [sum(part <= 4 * wait / longest < part + 1 for wait in waits) for part in range(4)]
    assert min(quarters) > 150


def test_nobody_waits_for_long_whatever_the_learner_says() -> None:
    waits = [_wait(RunSize(1 << 40, 1 << 40), size=1 << 50, name=f"host{number}") for number in range(1000)]
    assert LONGEST_SECONDS * 0.9 < max(waits) < LONGEST_SECONDS
