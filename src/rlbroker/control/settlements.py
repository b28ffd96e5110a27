"""Waits for outcomes that acknowledgements settle, and what the calls that wait have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from rlbroker.backend.deadline import Deadline, within
from rlbroker.errors import UnknownWorker
from rlbroker.types import Outcome

#: Longest pause between two reads of the outcomes that a call waits for.
POLL_SECONDS: Final = 0.1

#: Pause between two looks whether the learner has settled acknowledgements meanwhile.
CHECK_SECONDS: Final = 0.005

#: The outcome at a worker without an acknowledgement.
WAITING: Final = Outcome("waiting")

#: The outcome at a worker that is not a member of the run.
UNKNOWN_WORKER: Final = Outcome("unknown", "unknown worker")


class Settlements:
    """Tells the calls that wait for outcomes when acknowledgements were settled."""

    def __init__(self) -> None:
        """Begin without settlements."""
        self._count = 0

    def notify(self) -> None:
        """Wake the calls that wait, because acknowledgements were settled."""
        self._count += 1

    def wait(self, read: Callable[[], dict[int, Outcome]], deadline: Deadline) -> dict[int, Outcome]:
        """Return outcomes by worker once none is `WAITING`, or as they are at the deadline.

        Args:
            read: returns the current outcomes. It is called after each settlement, and now and then.
        """
        while True:
            count = self._count
            with within(deadline):
                found = read()
            if deadline.over or WAITING not in found.values():
                return found
            next_read = Deadline(min(POLL_SECONDS, deadline.remaining))
            while count == self._count and not next_read.over:
                time.sleep(min(CHECK_SECONDS, next_read.remaining))


def unknown_workers(run: str, missing: Iterable[int], members: Mapping[int, object]) -> UnknownWorker:
    """Return the error for a call that names no member of the run."""
    names, known = ", ".join(map(str, missing)), ", ".join(map(str, members)) or "none"
    are_not = "are not members" if "," in names else "is not a member"
    return UnknownWorker(f"worker {names} {are_not} of the run {run!r}; members are: {known}")
