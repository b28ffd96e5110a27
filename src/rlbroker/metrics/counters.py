"""What one learner process has done since it started, as sums that only grow."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

#: Each staleness below this has a bucket of its own; from here on each power of two begins a bucket.
EXACT_BELOW = 16


class Metrics:
    """Sums by name, and numbers of batches by staleness. Cheap, and safe to use from several threads."""

    def __init__(self) -> None:
        """Start every sum at zero."""
        self._lock = threading.Lock()
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._staleness: Counter[int] = Counter()

    def add(self, name: str, amount: float) -> None:
        """Add an amount to one sum."""
        with self._lock:
            self._sums[name] += amount

    def add_all(self, staleness: Iterable[int] = (), /, **amounts: float) -> None:
        """Add to several sums, and count batches by their staleness, in one step."""
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] += amount
            for number in staleness:
                self._staleness[staleness_bucket(number)] += 1

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds that a block takes to one sum, even if the block raises."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def totals(self) -> dict[str, float]:
        """Return every sum that was added to, by name."""
        with self._lock:
            return dict(self._sums)

    def staleness_counts(self) -> dict[int, int]:
        """Return the number of batches in each staleness bucket, by the bucket's lower bound."""
        with self._lock:
            return dict(sorted(self._staleness.items()))


def staleness_bucket(staleness: int) -> int:
    """Return the lower bound of the bucket that a staleness belongs to.

    >>> [staleness_bucket(number) for number in (0, 1, 15, 16, 31, 32, 100)]
    [0, 1, 15, 16, 16, 32, 64]
    """
    return staleness if staleness < EXACT_BELOW else 1 << (staleness.bit_length() - 1)
