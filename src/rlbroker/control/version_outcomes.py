"""What became of recent versions at each worker, in the memory of the learner that published them."""

from __future__ import annotations

from typing import Final, NamedTuple

from rlbroker.control.outcomes import REFUSED, Settled
from rlbroker.types import Outcome

#: How many ranges of versions with one outcome are remembered for each worker.
RANGES_KEPT: Final = 1_000

APPLIED: Final = Outcome("applied")

SUPERSEDED: Final = Outcome("missed", "superseded")

#: The outcome at a member that joined after the version was published, and left without having applied it.
LEFT: Final = Outcome("missed", "left")

#: The outcome of a version that is older than all that are remembered.
TOO_LONG_AGO: Final = Outcome("unknown", "too long ago")


class _Range(NamedTuple):
    """Versions in a row with the same outcome at a worker."""

    first: int
    last: int
    outcome: Outcome

    def extended(self, other: _Range) -> _Range | None:
        """Return one range for this one and a later one, if that is possible."""
        joins = self.first <= other.first <= self.last + 1 and self.outcome == other.outcome
        return self._replace(last=max(self.last, other.last)) if joins else None


class VersionOutcomes:
    """The outcomes of recent versions at each worker. The ledger writes them, under its lock; any thread may read."""

    def __init__(self) -> None:
        """Begin without outcomes."""
        self._ranges: dict[int, tuple[_Range, ...]] = {}

    def note(self, worker: int, settled: Settled) -> None:
        """Note what one event settled; noting it again changes nothing."""
        ranges = self._ranges.get(worker, ())
        for new in _ranges_of(settled):
            merged = ranges[-1].extended(new) if ranges else None
            ranges = (*ranges[:-1], merged) if merged else (*ranges, new)
        if ranges:
            self._ranges[worker] = ranges[-RANGES_KEPT:]

    def find(self, worker: int, version: int) -> Outcome | None:
        """Return the outcome that was noted last; None if there is none."""
        ranges = self._ranges.get(worker, ())
        for one in reversed(ranges):
            if one.first <= version <= one.last:
                return one.outcome
        is_old = len(ranges) == RANGES_KEPT and version < ranges[0].first
        return TOO_LONG_AGO if is_old else None

    def workers(self, version: int) -> list[int]:
        """Return the workers that have an outcome of this version."""
        return [worker for worker in list(self._ranges) if self.find(worker, version) is not None]


def _ranges_of(settled: Settled) -> list[_Range]:
    missed = [
        _Range(one.first, one.last, Outcome("missed", f"{one.why}: {one.detail}" if one.detail else one.why))
        for one in settled.missed
        if one.what == "weights" and one.why != REFUSED
    ]
    return [*missed, _Range(settled.applied, settled.applied, APPLIED)] if settled.applied else missed
