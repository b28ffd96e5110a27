"""When a supervised process is restarted after a failure, and when the supervisor gives up."""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass


def backoff_seconds(failures: int, *, first: float, longest: float, chance: float) -> float:
    """Return the pause before a restart: exponential back-off with jitter, after ``failures`` failures in a row.

    ``chance`` is a random number from 0 to 1, which spreads the pause over the upper half of its range. Without
    jitter, workers that fail together (the server went down) would all reconnect at the same moment.

    >>> [backoff_seconds(n, first=0.5, longest=3.0, chance=1.0) for n in (1, 2, 3, 4, 2000)]
    [0.5, 1.0, 2.0, 3.0, 3.0]
    >>> backoff_seconds(3, first=0.5, longest=3.0, chance=0.0)
    1.0
    """
    pause = min(longest, first * 2.0 ** min(failures - 1, 60))
    return pause * (0.5 + 0.5 * chance)


@dataclass(frozen=True)
class RestartPolicy:
    """When to restart a failed process, and when to give up."""

    first_backoff_seconds: float
    longest_backoff_seconds: float
    healthy_seconds: float
    max_restarts: int
    window_seconds: float


class RestartSchedule:
    """The failures and recent restarts of one process."""

    def __init__(self, policy: RestartPolicy) -> None:
        """Start without any failure."""
        self._policy = policy
        self._failures = 0  # in a row
        self.recent_restarts: deque[float] = deque()  # monotonic times within the policy's window

    def plan_restart(self, started: float) -> float | None:
        """Record that the run that began at ``started`` failed; return the restart's delay, or None to give up."""
        policy = self._policy
        now = time.monotonic()
        if now - started >= policy.healthy_seconds:
            self._failures = 0
        self._failures += 1
        while self.recent_restarts and self.recent_restarts[0] <= now - policy.window_seconds:
            self.recent_restarts.popleft()
        if len(self.recent_restarts) >= policy.max_restarts:
            return None
        self.recent_restarts.append(now)
        return backoff_seconds(
            self._failures,
            first=policy.first_backoff_seconds,
            longest=policy.longest_backoff_seconds,
            chance=random.SystemRandom().random(),
        )
