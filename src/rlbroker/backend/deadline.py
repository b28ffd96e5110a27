"""Deadlines that all steps of an operation share, and exponential back-off between attempts."""

from __future__ import annotations

import random
import threading
import time
import weakref
from typing import Final

#: An attempt may always take this long, even if less time is left: a healthy server answers within it.
SHORTEST_TRY_SECONDS: Final = 0.25

#: Not Python's global generator, which programs seed for repeatable results: those must not depend on the network.
_jitter: Final = random.SystemRandom()

_FIRST_PAUSE_SECONDS: Final = 0.02
_LONGEST_PAUSE_SECONDS: Final = 1.0


class Deadline:
    """A point in time that all steps of one operation share. 0 seconds mean one attempt, however long it takes."""

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


class _ThreadState(threading.local):
    """The innermost block of each thread that observes a deadline."""

    #: Referred to weakly: a block that an interrupt kept from ending is gone with its frame, and its deadline with it.
    block: weakref.ref[within] | None = None


_thread_state = _ThreadState()


def _in_force() -> Deadline | None:
    """Return this thread's deadline."""
    block = _thread_state.block and _thread_state.block()
    return block._in_force if block else None


class within:  # noqa: N801 # used like a function, and a class is faster than a generator
    """A block in which this thread observes a deadline; an earlier one from an outer block stays in force."""

    __slots__ = ("__weakref__", "_in_force", "_outer")

    def __init__(self, deadline: Deadline) -> None:
        """Set the deadline of the block."""
        self._in_force = deadline

    def __enter__(self) -> Deadline:
        """Return the deadline in force: this one or the outer one."""
        self._outer, deadline = _thread_state.block, self._in_force
        if not deadline.seconds:  # one attempt: no limit on how long it may take
            return deadline
        outer = _in_force()
        if outer is not None and outer.remaining < deadline.remaining:
            return outer
        _thread_state.block = weakref.ref(self)
        return deadline

    def __exit__(self, *error: object) -> None:
        """Restore the outer deadline."""
        _thread_state.block = self._outer


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
