"""Deadlines that all steps of an operation share, and exponential back-off between attempts."""

from __future__ import annotations

import random
import threading
import time
import weakref
from typing import Any, Final

#: An attempt may always take this long, even if less time is left: a healthy server answers within it.
SHORTEST_TRY_SECONDS: Final = 0.25

#: Not Python's global generator, which programs seed for repeatable results: those must not depend on the network.
_jitter: Final = random.SystemRandom()

_FIRST_PAUSE_SECONDS: Final = 0.02
_LONGEST_PAUSE_SECONDS: Final = 1.0


class Deadline:
    """A point in time that all steps of one operation share; one that is over allows one short attempt."""

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


#: In place of a deadline: one attempt, which ends with the connection's own timeout or with an outer deadline.
ONE_TRY: Final = Deadline(0)


class _Blocks(threading.local):
    """The innermost `within` block of a thread that sets a deadline, and those around it, as a linked list.

    The blocks are referred to weakly: one that an interrupt ended before its `__exit__` no longer exists, and must not
    limit later calls.
    """

    innermost: tuple[weakref.ref[within], Any] | None = None


_blocks = _Blocks()


class within:  # noqa: N801 # used like a function, and a class is faster than a generator
    """A block in which this thread observes a deadline; an earlier one from an outer block stays in force."""

    __slots__ = ("__weakref__", "_outer", "deadline")

    def __init__(self, deadline: Deadline) -> None:
        """Set the deadline of the block."""
        self.deadline = deadline

    def __enter__(self) -> Deadline:
        """Return the deadline in force: this one or the outer one."""
        self._outer = _innermost()
        outer = _in_force()
        if outer is not None and outer.remaining < self.deadline.remaining:
            return outer
        _blocks.innermost = weakref.ref(self), self._outer
        return self.deadline

    def __exit__(self, *error: object) -> None:
        """Restore the outer deadline."""
        _blocks.innermost = self._outer


def _in_force() -> Deadline | None:
    """Return the deadline of the thread."""
    one = _innermost()
    block = one[0]() if one is not None else None
    return block.deadline if block is not None else None


def _innermost() -> tuple[weakref.ref[within], Any] | None:
    one = _blocks.innermost
    while one is not None and one[0]() is None:
        _blocks.innermost = one = one[1]
    return one


def try_seconds(longest: float) -> float:
    """Return how long one attempt may take: `longest`, or the rest of the thread's deadline if that is less."""
    deadline = _in_force()
    return longest if deadline is None else min(longest, max(SHORTEST_TRY_SECONDS, deadline.remaining))


class Backoff:
    """Exponential back-off with jitter, for one series of attempts."""

    def __init__(self, first: float = _FIRST_PAUSE_SECONDS, longest: float = _LONGEST_PAUSE_SECONDS) -> None:
        """Start with pauses of about `first` seconds, which double up to `longest`."""
        self._first, self._pause, self._longest = first, first, longest

    def next(self, deadline: Deadline | None = None) -> float:
        """Return the seconds to wait before the next attempt, at most until the deadline."""
        pause = self._pause * _jitter.uniform(0.5, 1.0)
        self._pause = min(self._pause * 2, self._longest)
        return pause if deadline is None else min(pause, deadline.remaining)

    def reset(self) -> None:
        """Start again with the shortest pause, after a success."""
        self._pause = self._first
