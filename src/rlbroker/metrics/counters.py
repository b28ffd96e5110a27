"""What one learner process has done since it started, as sums that only grow."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

#: Each staleness below this has a bucket of its own; from here on each power of two begins a bucket.
EXACT_BELOW = 16


class Metrics:
    """Sums by name, and numbers of batches by staleness. Cheap, and safe to use from several threads.

    Each thread adds to sums of its own, which are replaced in one assignment. So there is no lock, and what is added in
    one call is added whole or not at all, also when the call is interrupted.
    """

    def __init__(self) -> None:
        """Start every sum at zero."""
        #: For each thread its sums, and its numbers by staleness bucket.
        self._by_thread: dict[int, tuple[dict[str, float], dict[int, int]]] = {}

    def add(self, name: str, amount: float) -> None:
        """Add an amount to one sum."""
        self.add_all(**{name: amount})

    def add_all(self, staleness: Iterable[int] = (), /, **amounts: float) -> None:
        """Add to several sums, and count batches by their staleness, in one step."""
        thread = threading.get_ident()
        found = self._by_thread.get(thread, ({}, {}))
        sums, buckets = dict(found[0]), dict(found[1])
        for name, amount in amounts.items():
            sums[name] = sums.get(name, 0.0) + amount
        for number in staleness:
            bucket = staleness_bucket(number)
            buckets[bucket] = buckets.get(bucket, 0) + 1
        self._by_thread[thread] = sums, buckets

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
        return sum(sums.get(name, 0.0) for sums, _ in list(self._by_thread.values()))

    def totals(self) -> dict[str, float]:
        """Return every sum that was added to, by name."""
        found: dict[str, float] = {}
        for sums, _ in list(self._by_thread.values()):
            for name, amount in sums.items():
                found[name] = found.get(name, 0.0) + amount
        return found

    def staleness_counts(self) -> dict[int, int]:
        """Return the number of batches in each staleness bucket, by the bucket's lower bound."""
        found = Counter[int]()
        for _, buckets in list(self._by_thread.values()):
            found.update(buckets)
        return dict(sorted(found.items()))


def staleness_bucket(staleness: int) -> int:
    """Return the lower bound of the bucket that a staleness belongs to.

    >>> [staleness_bucket(number) for number in (0, 1, 15, 16, 31, 32, 100)]
    [0, 1, 15, 16, 16, 32, 64]
    """
    return staleness if staleness < EXACT_BELOW else 1 << (staleness.bit_length() - 1)
