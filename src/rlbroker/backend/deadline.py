"""How long to wait: one deadline for all steps of an operation, and growing pauses between tries."""

from __future__ import annotations

import random
import threading
import time
from typing import Final

#: A try may always take this long, also where less is left: a server that is well answers within it.
SHORTEST_TRY_SECONDS: Final = 0.25

#: Not the generator that programs seed to get the same results again: these must not depend on the network.
_jitter: Final = random.SystemRandom()

_FIRST_PAUSE_SECONDS: Final = 0.02
_LONGEST_PAUSE_SECONDS: Final = 1.0


class Deadline:
    """A point in time that all steps of one operation share. One of 0 seconds asks for one try, however long."""

    def __init__(self, seconds: float) -> None:
        """Set the deadline this many seconds from now."""
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds that are left, never below zero."""
        return max(0.0, self._end - time.monotonic())

    @property
    def over(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self._end


class _Holding(threading.local):
    deadline: Deadline | None = None


_holding = _Holding()


class within:  # noqa: N801 # used as a function, and a class is faster than a generator
    """Have this thread keep a deadline in all that it does here; give the one that holds: an outer may be earlier."""

    __slots__ = ("_deadline", "_outer")

    def __init__(self, deadline: Deadline) -> None:
        """Prepare to keep this deadline."""
        self._deadline = deadline

    def __enter__(self) -> Deadline:
        """Give the deadline that holds."""
        outer = self._outer = _holding.deadline
        if not self._deadline.seconds:  # it says nothing of how long the one try may take
            return self._deadline
        if outer is not None and outer.remaining < self._deadline.remaining:
            return outer
        _holding.deadline = self._deadline
        return self._deadline

    def __exit__(self, *error: object) -> None:
        """Go on with what held before."""
        _holding.deadline = self._outer


def try_seconds(longest: float) -> float:
    """Give how long one try may take now: no longer than what is left of the deadline that holds."""
    deadline = _holding.deadline
    return longest if deadline is None else min(longest, max(SHORTEST_TRY_SECONDS, deadline.remaining))


class Backoff:
    """Growing pauses with jitter, for one series of tries."""

    def __init__(self, first: float = _FIRST_PAUSE_SECONDS, longest: float = _LONGEST_PAUSE_SECONDS) -> None:
        """Begin with pauses around `first` seconds, which double up to `longest`."""
        self._first, self._pause, self._longest = first, first, longest

    def next(self, deadline: Deadline | None = None) -> float:
        """Give the seconds to wait before the next try, not beyond the deadline."""
        pause = self._pause * _jitter.uniform(0.5, 1.0)
        self._pause = min(self._pause * 2, self._longest)
        return pause if deadline is None else min(pause, deadline.remaining)

    def reset(self) -> None:
        """Begin again with the shortest pause, after a success."""
        self._pause = self._first
