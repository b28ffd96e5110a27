"""A learner's pending entries, and those that it takes over from other learners."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rlbroker.backend.connection import Argument, Connection, flat
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.backend.locks import Arguments, CallLock, Result
from rlbroker.backend.replies import pending_rows, text_fields, whole_number
from rlbroker.backend.scripts import Script
from rlbroker.backend.text import counted
from rlbroker.errors import ConnectionFailed
from rlbroker.experience.counts import LOST_AT_LEARNERS, LOST_AT_WORKERS
from rlbroker.experience.read_position import Entry, Stream

logger = logging.getLogger("rlbroker")

#: Outcomes that learners count. They survive the loss of the server, because each learner remembers them.
COUNTED = ("delivered", *LOST_AT_LEARNERS, "duplicate", "retried_corrupt", "retried_poison")

#: Outcomes of entries that become dead letters: they are asked for by another script than the others.
BURIED = ("corrupt", "poison")

#: Fields of a worker's counts that do not count batches.
NOT_BATCHES = ("removed_bytes", "incarnation", "dead_bytes")

#: The most entries of one stream that are taken over at once.
TAKE_COUNT = 100

FENCE_LEARNER = Script.load("experience/lua/fence_learner.lua")
ACKNOWLEDGE = Script.load("experience/lua/acknowledge.lua")
RESTORE_COUNTS = Script.load("experience/lua/restore_counts.lua")
TAKE_ABANDONED = Script.load("experience/lua/take_abandoned.lua")
COUNT_DELIVERY = Script.load("experience/lua/count_delivery.lua")
RENEW = Script.load("experience/lua/renew.lua")

#: For each stream, the entries that the server is asked to acknowledge.
Acknowledgements = dict[Stream, list[Entry]]


class PendingEntries:
    """The pending entries of one learner, and the counts of their outcomes. Safe to use from several threads.

    An entry is pending until the server has answered its acknowledgement. Until then the acknowledgement is only asked
    for: the server may or may not have counted it, so it is not counted here, whatever the server's counts say,
    and each further acknowledgement repeats it. The counts are remembered to restore them on a server that lost them.
    Writing to the server raises `Fenced` once a newer learner of this name has taken over.
    """

    def __init__(self, connection: Connection, keys: Keys, *, name: str, epoch: int) -> None:
        """Begin without pending entries.

        Args:
            name: the learner's name; its consumer in the group.
            epoch: the learner's epoch; the server refuses acknowledgements of older epochs of this name.
        """
        self._connection, self._keys = connection, keys
        self.name, self.epoch = name, epoch
        #: Acquired while counts are written to the server and noted here.
        self._writing_counts = CallLock()
        #: By the stream's key and by id, in the order in which they were read.
        self._entries: dict[str, dict[str, Entry]] = {}
        #: Entries that the server was asked to acknowledge. Those that are still pending are unanswered.
        self._asked: list[Entry] = []
        self._counted: dict[int, Counter[str]] = {}
        #: What workers count, by worker, as of the last `remember_counts`.
        self._counted_by_workers: dict[int, dict[str, int]] = {}

    @property
    def consumers(self) -> tuple[str, str]:
        """The consumers of this learner in the group: one for entries it read, one for entries it took over.

        They differ because a mark covers all entries that were read up to some entry, but of the entries that were
        taken over, which come in any order, only those that it names. No learner's name ends like the second.
        """
        return self.name, f"{self.name}+"

    @property
    def identity(self) -> tuple[str, str, int]:
        """The first arguments of each script: group, name, epoch."""
        return GROUP, self.name, self.epoch

    def fence_older(self, workers: Iterable[int], *, deadline: Deadline | None = None) -> None:
        """Fence older epochs of this learner: from now on the server refuses their acknowledgements."""
        new = [one for one in workers if one not in self._counted]
        calls = [FENCE_LEARNER.call(self._keys_of(one), (self.name, self.epoch)) for one in new]
        for worker, counts in zip(new, self._connection.execute_all(calls, deadline=deadline), strict=True):
            self.remember_counts(worker, counts)

    def remember_counts(self, worker: int, counts: Any) -> None:
        """Remember a worker's counts on the server, from HGETALL, without what was only asked for.

        Once there are acknowledgements, call this within `write_counts`.
        """
        numbers = {name: whole_number(value) for name, value in text_fields(counts).items()}
        found = {name: number for name, number in numbers.items() if number is not None}
        asked = Counter(one.outcome for one in self._unanswered if one.stream.worker_id == worker)
        by_learners = Counter({name: found[name] - asked[name] for name in COUNTED if name in found})
        self._counted_by_workers[worker] = {
            name: value for name, value in found.items() if name not in COUNTED and name not in NOT_BATCHES
        }
        self._counted[worker] = self._counted.get(worker, Counter()) | by_learners

    def add(self, entry: Entry) -> None:
        """Add an entry that was read."""
        self._entries.setdefault(entry.stream.key, {})[entry.entry_id] = entry

    def get(self, stream: Stream, entry_id: str) -> Entry | None:
        """Return the pending entry with this id; None if it is not pending."""
        return self._entries.get(stream.key, {}).get(entry_id)

    def holds(self, entry: Entry) -> bool:
        """Return whether an entry is pending."""
        return self.get(entry.stream, entry.entry_id) is entry

    def of_stream(self, stream: Stream) -> list[Entry]:
        """Return a stream's pending entries."""
        return list(self._entries.get(stream.key, {}).values())

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over all pending entries, those of each stream in the order in which they were read."""
        for of_stream in list(self._entries.values()):
            yield from list(of_stream.values())

    def count_by_worker(self) -> dict[int, int]:
        """Return the number of pending batches of each worker."""
        found = dict.fromkeys(self._counted, 0)
        for entry in self:
            found[entry.stream.worker_id] = found.get(entry.stream.worker_id, 0) + 1
        return found

    def totals(self) -> tuple[int, int]:
        """Return how many batches of the run were delivered, and how many were lost, as far as this learner knows.

        The counts of workers and other learners are as of the last `remember_counts`.
        """
        delivered = lost = 0
        for counts in list(self._counted.values()):
            delivered += counts["delivered"]
            lost += sum(counts[reason] for reason in LOST_AT_LEARNERS)
            for reason in BURIED:  # a retried batch is no longer lost
                lost -= min(counts[reason], counts[f"retried_{reason}"])
        for by_worker in list(self._counted_by_workers.values()):
            lost += sum(
                number for name, number in by_worker.items() if name.partition(":")[0] in LOST_AT_WORKERS
            )
        return delivered, lost

    def acknowledge(self, entries: Iterable[Entry], *, deadline: Deadline | None = None) -> int:
        """Acknowledge, count and delete entries, in one step for each stream; return how many the server still had.

        Entries without an outcome are counted as delivered. Entries that are not pending are skipped.
        """
        return self.write_counts(self._acknowledge, entries, deadline, deadline=deadline)

    def _acknowledge(self, entries: Iterable[Entry], deadline: Deadline | None) -> int:
        asked = self.ask(entries)
        replies = self._connection.execute_all(self.commands(asked), deadline=deadline)
        return self.note(asked, replies, deadline=deadline)

    def ask(self, entries: Iterable[Entry]) -> Acknowledgements:
        """Note that the server is asked to acknowledge entries; return these and the unanswered ones before.

        Entries that are not pending are skipped. Call this within `write_counts`.
        """
        new = [entry for entry in entries if self.holds(entry)]
        for entry in new:
            entry.outcome = entry.outcome or "delivered"
        self._asked = [*self._unanswered, *new]
        found: Acknowledgements = {}
        for entry in dict.fromkeys(self._asked):
            if entry.outcome not in BURIED:
                found.setdefault(entry.stream, []).append(entry)
        return found

    def commands(self, asked: Acknowledgements) -> list[tuple[Argument, ...]]:
        """Return the commands of acknowledgements, to be sent with other commands within `write_counts`."""
        commands = []
        for stream, entries in asked.items():
            # The queue was credited the bytes of a retried batch when the batch became a dead letter.
            parts = [
                part
                for one in entries
                for part in (one.entry_id, 0 if stream.retried else one.stored_bytes, one.outcome)
            ]
            commands.append(ACKNOWLEDGE.call(stream.keys, (*self.identity, *parts)))
        return commands

    def note(
        self, asked: Acknowledgements, replies: Sequence[list[Any]], *, deadline: Deadline | None = None
    ) -> int:
        """Apply the server's replies to acknowledgements; return how many entries the server still had."""
        removed, incomplete = 0, []
        for (stream, entries), (gone, *others) in zip(asked.items(), replies, strict=True):
            removed += gone
            lost = {entry_id.decode() for entry_id in others}
            self.remove(entries, Counter(one.outcome for one in entries if one.entry_id not in lost))
            if lost:
                worker = stream.worker_id
                what = counted(len(lost), f"batch of worker {worker} was", f"batches of worker {worker} were")
                logger.warning("%s pending for too long; another learner took over", what)
            if gone + len(lost) < len(entries):
                incomplete.append(stream.worker_id)
        if incomplete:
            # Acknowledged before, and the reply was lost; or the server lost entries, and counts with them.
            self.restore(incomplete, deadline=deadline)
        return removed

    def remove(self, entries: Sequence[Entry], outcomes: Mapping[str, int]) -> None:
        """Remove entries of one worker that are no longer pending, and count their outcomes.

        In this order: what an interrupt leaves uncounted is found in the server's counts, by `remember_counts`.
        """
        for entry in entries:
            self._entries[entry.stream.key].pop(entry.entry_id, None)
        for outcome, number in outcomes.items():
            self._counted[entries[0].stream.worker_id][outcome] += number

    @property
    def _unanswered(self) -> list[Entry]:
        """The entries that the server was asked to acknowledge, and has not answered yet."""
        return [entry for entry in self._asked if self.holds(entry)]

    def write_counts(
        self,
        call: Callable[[*Arguments], Result],
        *arguments: *Arguments,
        deadline: Deadline | None = None,
    ) -> Result:
        """Return what a function returns, which writes counts to the server and notes them here.

        Meanwhile no other thread does, so that the server's counts and those noted here agree.

        Raises:
            ConnectionFailed: another thread was waiting for the server until the deadline.
        """
        limit = deadline or Deadline(self._connection.timeout_seconds)
        results = self._writing_counts.run_within(limit.remaining, _results, call, *arguments)
        if results is None:
            raise ConnectionFailed(
                f"{self._connection.address} has not answered another thread for {limit.seconds:g} s"
            )
        return results[0]

    def restore(self, workers: Iterable[int] | None = None, *, deadline: Deadline | None = None) -> None:
        """Write back the counts that the server may have lost. Harmless where it lost none.

        By default write those of all workers, on a Cluster without the workers whose server is away.
        """
        self.write_counts(self._restore, workers, deadline, deadline=deadline)

    def _restore(self, workers: Iterable[int] | None, deadline: Deadline | None) -> None:
        calls = [self._restore_call(one) for one in list(self._counted if workers is None else workers)]
        if workers is None:
            self._connection.execute_where_reachable(calls, deadline=deadline)
        else:
            self._connection.execute_all(calls, deadline=deadline)

    def _restore_call(self, worker: int) -> tuple[Argument, ...]:
        counted, by_workers = self._counted[worker], self._counted_by_workers.get(worker, {})
        arguments = (self.name, self.epoch, len(counted), *flat(counted), *flat(by_workers))
        return RESTORE_COUNTS.call(self._keys_of(worker), arguments)

    def _keys_of(self, worker: int) -> tuple[str, str]:
        return self._keys.epochs(worker), self._keys.counts(worker)


def _results(call: Callable[[*Arguments], Result], *arguments: *Arguments) -> tuple[Result]:
    """Return what a function returns, in a tuple: it may be None."""
    return (call(*arguments),)


class Takeover:
    """The takeover of entries that other learners abandoned, and the renewal of this learner's own claims."""

    def __init__(self, connection: Connection, pending: PendingEntries, *, take_over_seconds: float) -> None:
        """Treat entries that their learner did not renew for `take_over_seconds` as abandoned."""
        self._connection, self._pending = connection, pending
        self._seconds = take_over_seconds
        self._next_renewal = Deadline(take_over_seconds / 3)

    def take_abandoned(self, streams: Sequence[Stream]) -> list[bool]:
        """Take over abandoned entries; return for each stream whether some may belong to this learner now.

        True wherever a takeover was tried: if the reply is lost, entries belong to this learner without its knowledge.
        """
        own, idle_milliseconds = self._pending.consumers, int(self._seconds * 1000)
        replies = self._connection.execute_all(
            [("XPENDING", one.key, GROUP, "IDLE", idle_milliseconds, "-", "+", TAKE_COUNT) for one in streams]
        )
        abandoned = [[row[0] for row in pending_rows(reply) if row[1] not in own] for reply in replies]
        calls = [
            TAKE_ABANDONED.call(stream.keys, (*self._pending.identity, idle_milliseconds, *ids))
            for stream, ids in zip(streams, abandoned, strict=True)
            if ids
        ]
        taken = sum(bool(one) for ids in self._connection.execute_all(calls) for one in ids)
        if taken:
            what = counted(taken, "batch was", "batches were")
            logger.warning("%s taken over from a learner that stopped renewing them", what)
        return [bool(ids) for ids in abandoned]

    def count_delivery(self, stream: Stream, entry_id: str, consumer: str, deliveries: int) -> bool:
        """Record one more delivery of an entry on the server; return False if another learner has taken it over."""
        arguments = (*self._pending.identity, entry_id, consumer, deliveries)
        return bool(self._connection.run(COUNT_DELIVERY, stream.keys, arguments) == 1)

    def renew(self, streams: Sequence[Stream]) -> None:
        """Renew this learner's claim on its pending entries when a third of `take_over_seconds` has passed."""
        if self._next_renewal.over:
            calls = [
                RENEW.call((one.key,), (GROUP, name)) for one in streams for name in self._pending.consumers
            ]
            self._connection.execute_where_reachable(calls)
            self._next_renewal = Deadline(self._seconds / 3)
