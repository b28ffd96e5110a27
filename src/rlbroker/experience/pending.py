"""What the learner holds: batches it has read and not acknowledged, and how it gives them up."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlbroker.backend.connection import Argument, Connection, flat
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.backend.replies import text_fields, whole_number
from rlbroker.backend.scripts import Script
from rlbroker.backend.text import counted
from rlbroker.errors import ConnectionFailed

logger = logging.getLogger("rlbroker")

#: Reasons that learners count; they survive the loss of the server, as each learner remembers them.
COUNTED = (
    "delivered",
    "stale",
    "corrupt",
    "poison",
    "trimmed",
    "duplicate",
    "retried_corrupt",
    "retried_poison",
)

#: Of these, and of what workers count, the reasons why a batch is not delivered.
LOST_HERE = ("stale", "corrupt", "poison", "trimmed")
LOST_AT_WORKERS = ("dropped_oldest", "dropped_newest", "stopped", "fenced")


TAKE_OVER = Script.load("experience/lua/take_over.lua")


ACKNOWLEDGE = Script.load("experience/lua/acknowledge.lua")

RESTORE_COUNTS = Script.load("experience/lua/restore_counts.lua")


@dataclass(frozen=True)
class Source:
    """A stream of batches of one worker: what it sends, or what is to be tried again.

    Attributes:
        retried: whether it holds dead batches that are tried again.
    """

    worker_id: int
    key: str
    counts_key: str
    epochs_key: str
    retried: bool = False

    def __hash__(self) -> int:
        """Give what finds it in a dictionary: one of the names of which there are no two."""
        return hash(self.key)

    @property
    def keys(self) -> tuple[str, str, str]:
        """The keys that scripts touch to give an entry up."""
        return self.key, self.counts_key, self.epochs_key

    @property
    def name(self) -> str:
        """How marks call it."""
        return f"again:{self.worker_id}" if self.retried else str(self.worker_id)


#: For each stream its entries by id: bytes that leave the queue's books, and what became of it.
Settlement = dict[Source, dict[str, tuple[int, str]]]


class PendingEntries:
    """The batches in one learner's hands. Safe to use from several threads.

    It also remembers what was counted, so that the counts can be restored on a server that lost them.
    """

    def __init__(self, connection: Connection, keys: Keys, *, name: str, epoch: int) -> None:
        """Begin with empty hands.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            name: the learner's name; its consumer in the group.
            epoch: the learner's epoch; acknowledgements of older ones of this name are refused.
        """
        self._connection, self._keys = connection, keys
        self.name, self.epoch = name, epoch
        self._lock = threading.Lock()
        self._turn = threading.RLock()
        self._held: dict[Source, dict[str, int]] = {}
        self._counted: dict[int, Counter[str]] = {}
        self._others: dict[int, dict[str, int]] = {}

    def take_over(self, workers: Iterable[int], *, deadline: Deadline | None = None) -> None:
        """Become the only learner of this name whose acknowledgements for these workers are accepted.

        Args:
            workers: which ones.
            deadline: the connection's timeout by default.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        with self._lock:
            new = [one for one in workers if one not in self._counted]
        calls = [(TAKE_OVER, self._keys_of(one), (self.name, self.epoch)) for one in new]
        for worker, counts in zip(new, self._connection.run_all(calls, deadline=deadline), strict=True):
            self.remember(worker, counts)

    def remember(self, worker: int, counts: Any) -> None:
        """Note what the server has counted for a worker, from HGETALL."""
        numbers = {name: whole_number(value) for name, value in text_fields(counts).items()}
        found = {name: number for name, number in numbers.items() if number is not None}
        with self._lock:
            counted = self._counted.setdefault(worker, Counter())
            counted |= Counter({name: found[name] for name in COUNTED if name in found})
            self._counted[worker] = counted
            self._others[worker] = {
                name: value
                for name, value in found.items()
                if name not in COUNTED and name not in ("removed_bytes", "incarnation", "dead_bytes")
            }

    def add(self, source: Source, entry_id: str, stored_bytes: int) -> bool:
        """Note an entry that was read; give False if it is held already."""
        with self._lock:
            entries = self._held.setdefault(source, {})
            if entry_id in entries:
                return False
            entries[entry_id] = stored_bytes
            return True

    def counts(self) -> dict[int, int]:
        """Give how many batches of each worker are held."""
        found = dict.fromkeys(self._counted, 0)
        with self._lock:
            for source, entries in self._held.items():
                found[source.worker_id] = found.get(source.worker_id, 0) + len(entries)
        return found

    def totals(self) -> tuple[int, int]:
        """Give how many batches of the run were delivered, and how many were lost, as far as is known here.

        What workers and other learners count is as old as the last `remember`.
        """
        delivered = lost = 0
        with self._lock:
            for counted in self._counted.values():
                delivered += counted["delivered"]
                lost += sum(counted[reason] for reason in LOST_HERE)
                for reason in ("corrupt", "poison"):  # what was tried again is no longer lost
                    lost -= min(counted[reason], counted[f"retried_{reason}"])
            for others in self._others.values():
                lost += sum(
                    number for name, number in others.items() if name.partition(":")[0] in LOST_AT_WORKERS
                )
        return delivered, lost

    def held(self, source: Source) -> list[str]:
        """Give the ids of the entries of one stream that are held."""
        with self._lock:
            return list(self._held.get(source, ()))

    def settle(self, entries: Sequence[tuple[Source, str, str]], *, deadline: Deadline | None = None) -> int:
        """Acknowledge, count and delete entries, in one step for each stream; give how many were there.

        Args:
            entries: stream, entry id, and what became of it. What is not held is passed over.
            deadline: the connection's timeout by default.

        Raises:
            Fenced: a newer learner of this name has taken over.
            PeerError: the server refused, or could not be reached in time.
        """
        with self.counting(deadline):
            fates = self.fates(entries)
            replies = self._connection.run_all(self._acknowledgements(fates), deadline=deadline)
            return self.note_settled(fates, replies, deadline=deadline)

    def fates(self, entries: Sequence[tuple[Source, str, str]]) -> Settlement:
        """Give what the server is to be told of entries, without those that are not held."""
        found: Settlement = {}
        with self._lock:
            for source, entry_id, reason in entries:
                size = self._held.get(source, {}).get(entry_id)
                if size is not None:
                    # What is tried again was taken out of the queue's books when it died.
                    found.setdefault(source, {})[entry_id] = 0 if source.retried else size, reason
        return found

    def commands(self, fates: Settlement) -> list[tuple[Argument, ...]]:
        """Give the commands that acknowledge, for who sends them along with others while `counting`."""
        return [script.call(keys, arguments) for script, keys, arguments in self._acknowledgements(fates)]

    def _acknowledgements(
        self, fates: Settlement
    ) -> list[tuple[Script, tuple[str, ...], tuple[Argument, ...]]]:
        return [
            (
                ACKNOWLEDGE,
                source.keys,
                (*self.signature, *(part for entry_id, fate in ids.items() for part in (entry_id, *fate))),
            )
            for source, ids in fates.items()
        ]

    def note_settled(
        self, fates: Settlement, replies: Sequence[list[Any]], *, deadline: Deadline | None = None
    ) -> int:
        """Note what the server answered to the acknowledgements; give how many entries were there."""
        removed = 0
        for (source, ids), (gone, *others) in zip(fates.items(), replies, strict=True):
            removed += gone
            taken = {entry_id.decode() for entry_id in others}
            self.gave_up(source, ids, (why for one, (_, why) in ids.items() if one not in taken))
            if taken:
                worker = source.worker_id
                what = counted(
                    len(taken), f"batch of worker {worker} was", f"batches of worker {worker} were"
                )
                logger.warning("%s held for too long; another learner took over", what)
            if gone + len(taken) < len(ids):  # done before, and the reply was lost; or the server lost them
                self.restore([source.worker_id], deadline=deadline)
        return removed

    @contextmanager
    def counting(self, deadline: Deadline | None = None) -> Iterator[None]:
        """Let no other thread write counts to the server meanwhile: what it holds and what we know must agree.

        Args:
            deadline: the connection's timeout by default.

        Raises:
            ConnectionFailed: another thread waits for the server all the time.
        """
        limit = deadline or Deadline(self._connection.timeout_seconds)
        if not self._turn.acquire(timeout=limit.remaining):
            raise ConnectionFailed(
                f"{self._connection.address} has not answered another thread for {limit.seconds:g} s"
            )
        try:
            yield
        finally:
            self._turn.release()

    def _keys_of(self, worker: int) -> tuple[str, str]:
        return self._keys.epochs(worker), self._keys.counts(worker)

    @property
    def consumers(self) -> tuple[str, str]:
        """Under which names the group keeps what is ours: what we read, and what we took over from others.

        No learner's name ends like the second. A mark covers what was read up to it, but of what was taken over
        only what it names: that may come at any time, and from anywhere in the stream.
        """
        return self.name, f"{self.name}+"

    @property
    def signature(self) -> tuple[str, str, int]:
        """Give what each script wants to know first: group, name, epoch."""
        return GROUP, self.name, self.epoch

    def gave_up(self, source: Source, entry_ids: Iterable[str], reasons: Iterable[str]) -> None:
        """Note that entries are not held any more, and what was counted for them."""
        with self._lock:
            for entry_id in entry_ids:
                self._held[source].pop(entry_id, None)
            self._counted[source.worker_id].update(reasons)

    def restore(self, workers: Iterable[int] | None = None, *, deadline: Deadline | None = None) -> None:
        """Write back what the server may have lost of the counts. Harmless where it lost nothing.

        Args:
            workers: of which ones; by default of all, but on a Cluster not where a server is away.
            deadline: the connection's timeout by default.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        with self.counting(deadline):
            with self._lock:
                wanted = list(self._counted) if workers is None else list(workers)
                calls = [
                    (
                        RESTORE_COUNTS,
                        self._keys_of(one),
                        (
                            self.name,
                            self.epoch,
                            len(self._counted[one]),
                            *flat(self._counted[one]),
                            *flat(self._others.get(one, {})),
                        ),
                    )
                    for one in wanted
                ]
            if workers is None:
                self._connection.run_where_there(calls, deadline=deadline)
            else:
                self._connection.run_all(calls, deadline=deadline)
