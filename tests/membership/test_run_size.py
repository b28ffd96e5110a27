"""The jitter before a download, as a pure function of the size of a run."""

from __future__ import annotations

import pytest

from rlbroker.membership.run_size import AT_ONCE, LONGEST_SECONDS, RunSize

pytestmark = pytest.mark.unit


def _wait_seconds(
    run_size: RunSize, version: int = 5, stored_bytes: int = 1 << 20, *, name: str = "a", shared: bool = False
) -> float:
    return run_size.wait_seconds(version, stored_bytes, name=name, shared=shared)


@pytest.mark.parametrize("run_size", [RunSize(), RunSize(1, 1), RunSize(AT_ONCE, AT_ONCE)])
def test_few_workers_do_not_wait_for_each_other(run_size: RunSize) -> None:
    huge = 1 << 40
    assert _wait_seconds(run_size, stored_bytes=huge) == 0
    assert _wait_seconds(run_size, stored_bytes=huge, shared=True) == 0


def test_workers_that_share_a_download_wait_for_other_hosts_only() -> None:
    """A thousand workers of eight hosts are eight downloads."""
    run_size = RunSize(1000, AT_ONCE)
    assert _wait_seconds(run_size, shared=True) == 0
    assert _wait_seconds(run_size) > 0


def test_workers_of_one_host_wait_equally_long_and_hosts_do_not() -> None:
    """A worker that waits for the download of another must not see it begin later than its own would."""
    run_size = RunSize(1000, 100)
    waits = [_wait_seconds(run_size, name=name, shared=True) for name in ("a", "a", "b", "c")]
    assert waits[0] == waits[1]
    assert len(set(waits)) == 3


def test_no_worker_is_always_the_last() -> None:
    """The order of the downloads differs from version to version."""
    run_size = RunSize(1000, 100)
    first = [
        _wait_seconds(run_size, version) < _wait_seconds(run_size, version, name="b") for version in range(50)
    ]
    assert 5 < sum(first) < 45


def test_downloads_are_spread_evenly_over_the_time_that_they_take() -> None:
    """The server is neither idle nor asked by all workers at once."""
    waits = [_wait_seconds(RunSize(1000, 1000), name=f"host{number}") for number in range(1000)]
    longest = (1000 - AT_ONCE) * (0.0002 + (1 << 20) / 2e9)
    assert max(waits) < longest
    quarters = [sum(part <= 4 * wait / longest < part + 1 for wait in waits) for part in range(4)]
    assert min(quarters) > 150


def test_the_wait_is_bounded_whatever_the_learner_reports() -> None:
    run_size = RunSize(1 << 40, 1 << 40)
    waits = [_wait_seconds(run_size, stored_bytes=1 << 50, name=f"host{number}") for number in range(1000)]
    assert LONGEST_SECONDS * 0.9 < max(waits) < LONGEST_SECONDS
