"""A lock for whole calls, which an interrupt cannot leave behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple, cast

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


class CallLock:
    """A lock that one call of a client holds from beginning to end. It runs a function, and is held no longer.

    A signal handler may raise between any two steps, also between taking a lock and entering the block that would
    release it, or while it is released. So what releases it stands twice, one around the other: one interrupt ends one
    of the two. No call runs inside another one of the same thread, so a lock that the thread already holds belongs to
    an outer step of the same call: the inner one gets it at once, and releases it completely.
    """

    def __init__(self) -> None:
        """Create a lock that no thread holds."""
        self._lock: Any = threading.RLock()

    def run(self, call: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Return what a function returns, which is called once no other thread holds the lock."""
        return cast(Result, self.run_within(-1, call, *arguments))

    def run_within(
        self, seconds: float, call: Callable[[*Arguments], Result], *arguments: *Arguments
    ) -> Result | None:
        """Return what a function returns; None, without calling it, if another thread holds the lock all this time.

        Args:
            seconds: how long to wait for another thread; 0 to not wait, -1 to wait until it is done.
        """
        result = None
        try:
            try:
                if self._lock.acquire(seconds != 0, seconds or -1):
                    result = call(*arguments)
            finally:
                self._release()
        except BaseException:
            self._release()
            raise
        return result

    def _release(self) -> None:
        """Release the lock if this thread holds it, however often it has taken it."""
        while self._lock._is_owned():  # as `threading.Condition` asks; an error would hide an interrupt
            self._lock.release()
