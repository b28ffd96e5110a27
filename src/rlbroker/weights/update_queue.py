"""Updates on their way from a worker's background thread to the calls that load them."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from rlbroker.weights.download import DecodedVersion

#: Refused versions are not added when this many updates wait: any client with write access can name new ones.
REFUSED_KEPT: Final = 100


@dataclass(eq=False)
class WeightsUpdate:
    """A decoded version that waits to be loaded, or one that could not be read, with the reason."""

    version: int
    decoded: DecodedVersion | None
    problem: str = ""
    refused: bool = False  #: whether the problem is the signature
    taken: bool = False  #: whether its outcome was acknowledged

    def take(self) -> None:
        """Note that the outcome was acknowledged, and release the weights."""
        self.taken = True
        self.decoded = None


class UpdateQueue:
    """Updates that wait to be loaded, and which version was the newest.

    One thread puts updates, and the calls that load them mark them as taken. An update stays until then, so that an
    interrupted call leaves it for the next one. There is no lock that an interrupt could leave behind: each attribute
    is written by one side.

    Attributes:
        newest: the newest version that was decoded or given up; 0 before the first, and after `forget_newest`.
        newest_seen: the same with the name of its upload, since the worker started; 0 and "" before the first.
    """

    def __init__(self) -> None:
        """Begin without updates."""
        self.newest = 0
        self.newest_seen = (0, "")
        self._updates: Sequence[WeightsUpdate] = ()
        self._arrivals: queue.SimpleQueue[None] = queue.SimpleQueue()

    @property
    def ready(self) -> bool:
        """Whether there is an update to load."""
        for one in self._updates:  # noqa: SIM110 # `poll` asks at each step, and a generator is slower
            if not one.taken:
                return True
        return False

    def contains_newer(self, version: int) -> bool:
        """Return whether a decoded version above this one waits to be loaded."""
        return bool([one for one in self.updates if not one.problem and one.version > version])

    @property
    def updates(self) -> list[WeightsUpdate]:
        """What is ready: the failed versions, then the newest of the others, as only that one is worth loading."""
        return [one for one in self._updates if not one.taken]

    def put(self, update: WeightsUpdate, upload: str) -> None:
        """Add a version that was decoded or given up."""
        self._add(update)
        self.newest_seen = max(self.newest_seen, (update.version, upload), key=lambda one: one[0])
        self.newest = update.version  # last: a call that reads it finds the update
        self._announce()

    def put_refused(self, update: WeightsUpdate) -> None:
        """Add a version that was refused. The learner's next version may have a lower number."""
        if len(self.updates) < REFUSED_KEPT:
            self._add(update)
        self._announce()

    def wait(self, timeout_seconds: float) -> None:
        """Wait until an update is put; may return earlier."""
        with suppress(queue.Empty):
            self._arrivals.get(timeout=timeout_seconds)

    def forget_newest(self) -> None:
        """Forget which version was the newest, so that the latest is fetched again."""
        self.newest = 0

    def clear(self) -> None:
        """Drop all updates."""
        self._updates = ()

    def _add(self, update: WeightsUpdate) -> None:
        waiting = [*self.updates, update]
        decoded = [one for one in waiting if not one.problem]
        self._updates = [one for one in waiting if one.problem] + decoded[-1:]

    def _announce(self) -> None:
        if self._arrivals.empty():
            self._arrivals.put(None)
