"""Updates on their way from a worker's background thread to the calls that load them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rlbroker.weights.download import DecodedVersion

#: Refused versions are not added when this many updates wait: any client with write access can name new ones.
REFUSED_KEPT: Final = 100


@dataclass(frozen=True)
class WeightsUpdate:
    """A decoded version that waits to be loaded, or one that could not be read, with the reason."""

    version: int
    decoded: DecodedVersion | None
    problem: str = ""
    refused: bool = False  #: whether the problem is the signature


def drop_superseded(updates: Sequence[WeightsUpdate]) -> list[WeightsUpdate]:
    """Return the failed updates, and the newest of the others: only that one is worth loading."""
    decoded = [one for one in updates if not one.problem]
    return [one for one in updates if one.problem] + decoded[-1:]


class UpdateQueue:
    """Updates that wait to be taken, and which version was the newest. Safe to use from several threads.

    Attributes:
        newest: the newest version that was decoded or given up; 0 before the first, and after `forget_newest`.
        newest_seen: the same with the name of its upload, since the worker started; 0 and "" before the first.
    """

    def __init__(self) -> None:
        """Begin without updates."""
        self.newest = 0
        self.newest_seen = (0, "")
        self._updates: list[WeightsUpdate] = []
        self._arrived = threading.Condition()

    @property
    def ready(self) -> bool:
        """Whether there is an update to take."""
        return bool(self._updates)

    def was_taken(self, version: int) -> bool:
        """Return whether this version or a newer one was taken or given up."""
        with self._arrived:
            return self.newest >= version and not self._updates

    def put(self, update: WeightsUpdate, upload: str) -> None:
        """Add a version that was decoded or given up."""
        with self._arrived:
            self.newest = update.version
            self.newest_seen = max(self.newest_seen, (update.version, upload), key=lambda one: one[0])
            self._updates = drop_superseded([*self._updates, update])
            self._arrived.notify_all()

    def put_refused(self, update: WeightsUpdate) -> None:
        """Add a version that was refused. The learner's next version may have a lower number."""
        with self._arrived:
            if len(self._updates) < REFUSED_KEPT:
                self._updates = drop_superseded([*self._updates, update])
            self._arrived.notify_all()

    def take(self, timeout_seconds: float = 0) -> list[WeightsUpdate]:
        """Return what is ready, failed versions first; wait for an update if there is a timeout."""
        with self._arrived:
            if not self._updates and timeout_seconds > 0:
                self._arrived.wait(timeout_seconds)
            found, self._updates = self._updates, []
            return found

    def forget_newest(self) -> None:
        """Forget which version was the newest, so that the latest is fetched again."""
        self.newest = 0

    def clear(self) -> None:
        """Drop all updates."""
        self._updates = []
