"""What one learner process has done since it began, in sums that only grow."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

#: Below this each staleness is counted by itself; from it on, those from one power of two to the next together.
EXACT_BELOW = 16


class Metrics:
    """Sums by name, and batches by staleness. Safe to use from several threads, and cheap."""

    def __init__(self) -> None:
        """Begin at zero."""
        self._lock = threading.Lock()
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._staleness: Counter[int] = Counter()

    def add(self, name: str, amount: float) -> None:
        """Add to one sum."""
        with self._lock:
            self._sums[name] += amount

    def add_all(self, staleness: Iterable[int] = (), /, **amounts: float) -> None:
        """Add to several sums in one step, and count batches by their staleness."""
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] += amount
            for number in staleness:
                self._staleness[staleness_bucket(number)] += 1

    def staleness(self, number: int) -> None:
        """Count one batch by its staleness."""
        self.add_all((number,))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds that a block takes, also where it fails."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def totals(self) -> dict[str, float]:
        """Give every sum that is not zero, by name."""
        with self._lock:
            return dict(self._sums)

    def staleness_counts(self) -> dict[int, int]:
        """Give how many batches were counted in each bucket of staleness, by its lower bound."""
        with self._lock:
            return dict(sorted(self._staleness.items()))


def staleness_bucket(staleness: int) -> int:
    """Give the lower bound of the bucket that a staleness belongs to.

    >>> [staleness_bucket(number) for number in (0, 1, 15, 16, 31, 32, 100)]
    [0, 1, 15, 16, 16, 32, 64]
    """
    return staleness if staleness < EXACT_BELOW else 1 << (staleness.bit_length() - 1)
