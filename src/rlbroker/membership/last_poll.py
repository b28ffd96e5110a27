"""Whether a worker still polls: one that does not obeys nobody and runs old weights, though it is alive."""

from __future__ import annotations

import threading
import time


class LastPoll:
    """A block that threads enter to look at what came; it knows how long nobody has been in it."""

    def __init__(self) -> None:
        """Begin with nobody inside."""
        self._lock = threading.Lock()
        self._inside = 0
        self._left = time.monotonic()

    @property
    def absent_seconds(self) -> float:
        """Seconds since the last thread left, or since the beginning; 0 while one is inside."""
        with self._lock:
            return 0.0 if self._inside else time.monotonic() - self._left

    def __enter__(self) -> None:
        """Come in."""
        with self._lock:
            self._inside += 1

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Leave."""
        with self._lock:
            self._inside -= 1
            self._left = time.monotonic()
