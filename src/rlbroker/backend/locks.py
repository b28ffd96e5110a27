"""A lock for whole calls, which an interrupt cannot leave behind."""

from __future__ import annotations

import threading


class CallLock:
    """A lock that one call of a client holds from beginning to end, used as `with lock.hold(seconds) as held:`.

    A signal handler may raise between any two steps, also between taking a lock and entering the block that would
    release it. No call runs inside another one of the same thread, so a lock that the thread already holds was left
    behind by an interrupted call: the next call of the thread gets it at once, and releases it completely. A call that
    other threads wait for also calls `release` when it ends with an error.
    """

    def __init__(self) -> None:
        """Create a lock that no thread holds."""
        self._lock = threading.RLock()

    def hold(self, seconds: float = -1) -> _Hold:
        """Return a block that holds the lock, and yields whether the thread got it in time.

        Args:
            seconds: how long to wait for another thread's call; 0 to not wait, -1 to wait until it ends.
        """
        return _Hold(self._lock, seconds)

    def release(self) -> None:
        """Release the lock if this thread holds it, however often calls of the thread have taken it."""
        _release(self._lock)


class _Hold:
    """The block of `CallLock.hold`. A class, because a generator would be slower."""

    __slots__ = ("_lock", "_seconds")

    def __init__(self, lock: threading.RLock, seconds: float) -> None:
        self._lock, self._seconds = lock, seconds

    def __enter__(self) -> bool:
        return self._lock.acquire(self._seconds != 0, self._seconds or -1)

    def __exit__(self, *error: object) -> None:
        _release(self._lock)


def _release(lock: threading.RLock) -> None:
    try:
        while True:
            lock.release()
    except RuntimeError:
        pass  # this thread does not hold it, or not any more
