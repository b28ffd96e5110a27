"""What one learner process has done since it started, as sums that only grow."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rlbroker.backend.locks import CallLock

#: Each staleness below this has a bucket of its own; from here on each power of two begins a bucket.
EXACT_BELOW = 16


class Metrics:
    """Sums by name, and numbers of batches by staleness. Cheap, and safe to use from several threads."""

    def __init__(self) -> None:
        """Start every sum at zero."""
        self._adding = CallLock()
        #: All sums, and the numbers by staleness bucket. Replaced in one assignment.
        self._state: tuple[dict[str, float], dict[int, int]] = ({}, {})

    def add(self, name: str, amount: float) -> None:
        """Add an amount to one sum."""
        self.add_all(**{name: amount})

    def add_all(self, staleness: Iterable[int] = (), /, **amounts: float) -> None:
        """Add to several sums, and count batches by their staleness, in one step."""
        with self._adding.hold():
            sums, buckets = dict(self._state[0]), dict(self._state[1])
            for name, amount in amounts.items():
                sums[name] = sums.get(name, 0.0) + amount
            for number in staleness:
                bucket = staleness_bucket(number)
                buckets[bucket] = buckets.get(bucket, 0) + 1
            self._state = sums, buckets

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds that a block takes to one sum, even if the block raises."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def total(self, name: str) -> float:
        """Return one sum."""
        return self._state[0].get(name, 0.0)

    def totals(self) -> dict[str, float]:
        """Return every sum that was added to, by name."""
        return dict(self._state[0])

    def staleness_counts(self) -> dict[int, int]:
        """Return the number of batches in each staleness bucket, by the bucket's lower bound."""
        return dict(sorted(self._state[1].items()))


def staleness_bucket(staleness: int) -> int:
    """Return the lower bound of the bucket that a staleness belongs to.

    >>> [staleness_bucket(number) for number in (0, 1, 15, 16, 31, 32, 100)]
    [0, 1, 15, 16, 16, 32, 64]
    """
    return staleness if staleness < EXACT_BELOW else 1 << (staleness.bit_length() - 1)
