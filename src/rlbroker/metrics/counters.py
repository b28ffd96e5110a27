"""What one learner process has done since it started, as sums that only grow."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

#: Each staleness below this has a bucket of its own; from here on each power of two begins a bucket.
EXACT_BELOW = 16


class Metrics:
    """Sums by name, and numbers of batches by staleness. Cheap, and safe to use from several threads.

    There is no lock that an interrupt could leave behind: each thread has sums of its own, and replaces them in one
    assignment.
    """

    def __init__(self) -> None:
        """Start every sum at zero."""
        #: By thread: the sums by name, and the numbers of batches by staleness bucket.
        self._by_thread: dict[int, tuple[dict[str, float], dict[int, int]]] = {}

    def add(self, name: str, amount: float) -> None:
        """Add an amount to one sum."""
        self.add_all(**{name: amount})

    def add_all(self, staleness: Iterable[int] = (), /, **amounts: float) -> None:
        """Add to several sums, and count batches by their staleness, in one step."""
        thread = threading.get_ident()
        before = self._by_thread.get(thread, ({}, {}))
        sums, counts = dict(before[0]), dict(before[1])
        _add(sums, amounts)
        for number in staleness:
            bucket = staleness_bucket(number)
            counts[bucket] = counts.get(bucket, 0) + 1
        self._by_thread[thread] = sums, counts

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
        return self.totals().get(name, 0.0)

    def totals(self) -> dict[str, float]:
        """Return every sum that was added to, by name."""
        totals: dict[str, float] = {}
        for sums, _ in list(self._by_thread.values()):
            _add(totals, sums)
        return totals

    def staleness_counts(self) -> dict[int, int]:
        """Return the number of batches in each staleness bucket, by the bucket's lower bound."""
        totals: dict[int, int] = {}
        for _, counts in list(self._by_thread.values()):
            _add(totals, counts)
        return dict(sorted(totals.items()))


def _add(sums: dict[Any, Any], amounts: Mapping[Any, Any]) -> None:
    for name, amount in amounts.items():
        sums[name] = sums.get(name, 0) + amount


def staleness_bucket(staleness: int) -> int:
    """Return the lower bound of the bucket that a staleness belongs to.

    >>> [staleness_bucket(number) for number in (0, 1, 15, 16, 31, 32, 100)]
    [0, 1, 15, 16, 16, 32, 64]
    """
    return staleness if staleness < EXACT_BELOW else 1 << (staleness.bit_length() - 1)
