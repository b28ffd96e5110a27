"""Collects the batches of all workers for a learner, once and in order, and acknowledges them.

A call of `collect` acknowledges what the previous call returned, searches for new streams (`StreamDiscovery`), reads
entries (`EntryReader`), and makes batches of them (`Unpacker`).
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rlbroker.backend.connection import BLOCK_SECONDS, Connection
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.keys import Keys
from rlbroker.backend.locks import CallLock
from rlbroker.backend.threads import OutageLog
from rlbroker.config import Acknowledge
from rlbroker.errors import ConnectionFailed, RoundIncomplete, ServerFault
from rlbroker.experience.dead_letters import DeadLetters
from rlbroker.experience.entry_reader import EntryReader
from rlbroker.experience.pending import PendingEntries, Takeover
from rlbroker.experience.rate_limiter import RateLimiter
from rlbroker.experience.read_position import Entry, Stream, covers
from rlbroker.experience.rejections import Unpacker
from rlbroker.experience.rounds import Progress, Round, names_of
from rlbroker.experience.watched_streams import StreamDiscovery, WatchedStreams, is_stream_lost
from rlbroker.membership.roster import Roster
from rlbroker.metrics.counters import Metrics
from rlbroker.types import Batch

logger = logging.getLogger("rlbroker")

#: The most bytes that one call of `collect` reads and decodes; the next call continues.
COLLECT_BYTES = 256 << 20

#: How much longer than a call's own timeout its requests may take: a busy server may answer late.
ANSWER_SECONDS = 1.0

#: How long a round that is incomplete may look for the reasons.
REASONS_SECONDS = 1.0


@dataclass(frozen=True)
class Handover:
    """What is between `collect` and its caller. It is replaced in one assignment, so it is always whole.

    Attributes:
        found: entries with their batches that the caller does not have yet.
        returned: the entries whose batches the last call returned, and earlier ones that the next call acknowledges.
        total: how many batches all calls have returned.
    """

    found: list[tuple[Entry, Batch]]
    returned: Sequence[Entry] = ()
    total: int = 0


@dataclass(frozen=True)
class Need:
    """What a call still needs.

    Attributes:
        batches: the most batches to read at once.
        waits: whether to wait for them if there are none.
        workers: the workers whose batches are needed; None for all.
    """

    batches: int
    waits: bool
    workers: Collection[int] | None = None


class Collector:
    """Collects the batches of all workers for one learner. Safe to use from several threads.

    An entry is read into the queue of `EntryReader`, moves to `Handover.found` together with its batch, and from there
    to the caller. A call that ends with an error or an interrupt before that leaves both as they are, and the next one
    continues. Every entry is in `PendingEntries` until it is acknowledged.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        pending: PendingEntries,
        dead_letters: DeadLetters,
        takeover: Takeover,
        rate_limiter: RateLimiter,
        metrics: Metrics,
        *,
        acknowledge: Acknowledge,
        max_staleness: int | None,
        max_deliveries: int | None,
        roster: Roster,
        latest_version: Callable[[], int],
        check: Callable[[], None],
    ) -> None:
        """Create a collector; nothing is read yet.

        Args:
            dead_letters: where corrupt and poison batches go.
            acknowledge: `next` acknowledges returned batches at the next call; with `manual`, the caller acknowledges.
            max_staleness: staler batches are counted and not delivered; None for no limit.
            max_deliveries: deliveries after which a batch is poison; None for no limit.
            roster: knows which workers may have batches, and which are alive.
            latest_version: returns the version that staleness is measured from.
            check: raises if the learner must not continue: it was closed, or replaced.
        """
        self._pending, self._rate_limiter, self._metrics = pending, rate_limiter, metrics
        self._roster, self._joined = roster, frozenset[int]()
        self._acknowledges_next, self._check = acknowledge == "next", check
        self._streams = WatchedStreams(connection, keys, pending.name)
        self._discovery = StreamDiscovery(connection, self._streams, pending, takeover, workers=roster.ids)
        self._reader = EntryReader(connection, self._streams, pending)
        self._unpacker = Unpacker(
            pending,
            dead_letters,
            takeover,
            max_staleness=max_staleness,
            max_deliveries=max_deliveries,
            latest_version=latest_version,
        )
        self._calls = CallLock()
        self._handover = Handover([])
        #: What interrupted calls have chosen and did not return, until it is taken back.
        self._unreturned = deque[list[tuple[Entry, Batch]]]()
        self._began = False  #: whether there was a call
        self._unfinished = False  #: whether the last call ended with an error or an interrupt
        #: Entries that the present round has found too old; they are acknowledged with its next read, or at its end.
        self._stale: list[Entry] = []
        self._budget_bytes = COLLECT_BYTES  #: how much more the present call may read and decode
        self._wait_seconds = 0.0  #: seconds that were waited for entries, until they are added to the metrics
        self._outage = OutageLog("collecting")

    def collect(self, *, timeout_seconds: float, max_batches: int | None) -> list[tuple[int, Batch]]:
        """Return batches of all workers, in order for each worker; wait for a first one if there is none.

        Args:
            timeout_seconds: how long to wait for a first batch; 0 to return only what is there.
            max_batches: the most to return.
        """
        deadline = Deadline(timeout_seconds)
        return self._hand_over(deadline, partial(self._gather, deadline, max_batches), list)

    def collect_round(self, asked: Round, deadline: Deadline) -> list[tuple[int, Batch]]:
        """Return the batches of a round, by worker id and in order for each worker; wait until it is complete.

        Raises:
            RoundIncomplete: batches are missing at the deadline, or can no longer come, and the round is not `partial`.
        """
        return self._hand_over(
            deadline, partial(self._gather_round, deadline, asked), partial(_busy, deadline, asked)
        )

    def _hand_over(
        self,
        deadline: Deadline,
        gather: Callable[[], list[tuple[Entry, Batch]]],
        while_busy: Callable[[], list[tuple[int, Batch]]],
    ) -> list[tuple[int, Batch]]:
        """Return batches to the caller.

        Args:
            deadline: until when to wait for another thread's call.
            gather: chooses among the batches that were found.
            while_busy: called instead if another thread was collecting all this time.
        """
        chosen: list[list[tuple[Entry, Batch]]] = []
        try:
            pairs = self._calls.run_within(deadline.remaining, self._choose, deadline, gather, chosen)
            return while_busy() if pairs is None else pairs
        except BaseException:
            self._unreturned += chosen
            self._calls.run_within(0, self._take_back)  # while another thread collects, the next call does it
            raise

    def _take_back(self) -> None:
        """Put what interrupted calls have chosen, and not returned, in front of what was found. May be repeated."""
        while self._unreturned:
            handover = self._handover
            found = {entry for entry, _ in handover.found}
            back = [one for one in self._unreturned[0] if one[0] not in found]
            entries = {entry for entry, _ in back}
            if back:
                after = Handover(
                    [*back, *handover.found],
                    [entry for entry in handover.returned if entry not in entries],
                    handover.total - len(back),
                )
                self._handover, self._rate_limiter.inserts = after, self._rate_limiter.inserts - len(back)
            self._unreturned.popleft()

    def _choose(
        self,
        deadline: Deadline,
        gather: Callable[[], list[tuple[Entry, Batch]]],
        unreturned: list[list[tuple[Entry, Batch]]],
    ) -> list[tuple[int, Batch]]:
        """Return batches; note in `unreturned` what to take back if they do not reach the caller."""
        if deadline.seconds:
            with within(Deadline(deadline.seconds + ANSWER_SECONDS)):
                found = gather()
        else:
            found = gather()
        handover, inserts = self._handover, self._rate_limiter.inserts
        pairs = [(batch.worker_id, batch) for _, batch in found]
        returned = [entry for entry in self._done if self._pending.holds(entry)]
        returned += [entry for entry, _ in found]
        chosen = {entry for entry, _ in found}
        rest = [one for one in handover.found if one[0] not in chosen]
        after = Handover(rest, returned, handover.total + len(found))
        unreturned.append(list(found))
        # From here on the batches are the caller's. Only an interrupt may still prevent that.
        self._handover, self._rate_limiter.inserts = after, inserts + len(pairs)
        return pairs

    def read_ahead(self) -> None:
        """Read what has arrived, up to `COLLECT_BYTES`, for the next `collect`. Acknowledge nothing.

        Do nothing while another thread collects.
        """
        self._calls.run_within(0, self._read_ahead)

    def _read_ahead(self) -> None:
        self._recover()
        self._began = self._unfinished = True
        found = self._handover.found
        self._budget_bytes = COLLECT_BYTES - sum(batch.raw_bytes for _, batch in found)
        self._find_streams(Deadline(0))
        more = bool(self._streams.watched)
        while (need := self._take(sys.maxsize)) and more:
            more = self._read(need, None, ())
        self._count_found()
        self._unfinished = False

    def acknowledge(self, pairs: Sequence[tuple[int, Batch]]) -> int:
        """Acknowledge batches, so that the server deletes them; return how many it still had."""
        names = (batch.held_as for _, batch in pairs)
        entries = (self._pending.get(self._streams.stream(name), entry_id) for name, entry_id in names)
        return self._pending.acknowledge([entry for entry in entries if entry is not None])

    def acknowledge_returned(self, deadline: Deadline | None = None) -> bool:
        """Acknowledge what the last call returned, if the next one would do so; return whether there was anything."""
        done = [entry for entry in self._done if self._pending.holds(entry)]
        self._pending.acknowledge(done, deadline=deadline)
        return bool(done)

    @property
    def streams(self) -> list[Stream]:
        """The streams that are watched; also for other threads."""
        return [position.stream for position in list(self._streams.watched.values())]

    def marks(self) -> dict[str, Any]:
        """Return a mark for each stream of what was collected so far, by the stream's name."""
        return self._calls.run(self._marks)

    def _marks(self) -> dict[str, Any]:
        self._recover()
        waiting = [*self._reader.entries, *(entry for entry, _ in self._handover.found)]
        unreturned = _ids_by_stream(entry for entry in waiting if not entry.is_repeat)
        taken_over = _ids_by_stream(entry for entry in self._pending if entry.taken_over)
        return {
            name: position.mark(unreturned.get(name, set()), taken_over.get(name, set()))
            for name, position in self._streams.positions.items()
            if position.newest_read > (0, 0)
        }

    def restore(self, marks: Mapping[str, Any]) -> bool:
        """Continue from marks: skip what they cover. Return False, and do nothing, if `collect` was called before."""
        if self._began:
            return False
        for name, mark in marks.items():
            self._streams.position(name).restore(mark)
        return True

    def acknowledge_marks(self, marks: Mapping[str, Any]) -> int:
        """Acknowledge the batches that these marks cover; return how many the server still had."""
        return self._pending.acknowledge(
            [
                entry
                for name, mark in marks.items()
                for entry in self._pending.of_stream(self._streams.stream(name))
                if covers(mark, entry.entry_id, taken_over=entry.taken_over)
            ]
        )

    @property
    def _done(self) -> Sequence[Entry]:
        """The entries to be acknowledged before more is collected."""
        returned = self._handover.returned if self._acknowledges_next else ()
        return [*returned, *self._stale] if self._stale else returned

    def _recover(self) -> None:
        """Continue after a call that did not end: it may have noted entries in part, and lost replies on their way."""
        self._take_back()
        if self._unfinished:
            for entry, _ in self._handover.found:
                entry.collected = True
                if entry.outcome == "stale":  # a round was about to set it aside
                    entry.outcome = ""
            self._stale = []  # they are pending, so the reader finds them again
            self._reader.recover()
            self._unfinished = False

    def _gather(self, deadline: Deadline, max_batches: int | None) -> list[tuple[Entry, Batch]]:
        """Read, and add to what was found until there is enough, or nothing more; return what the caller gets."""
        after_interrupt, found = self._unfinished, self._handover.found
        self._recover()
        self._began = self._unfinished = True
        self._budget_bytes = COLLECT_BYTES
        # What an interrupted call has found is returned first: frequent interrupts must not end each call before that.
        at_once = after_interrupt and bool(found)
        if not at_once and (found or self._reader.entries or self._rate_limiter.is_active):
            self.acknowledge_returned()  # otherwise the first read acknowledges, in the same round trip
        room = self._rate_limiter.wait(deadline.remaining)
        limit = min(sys.maxsize if one is None else one for one in (max_batches, room))
        if at_once:
            self._count_found()
            self._unfinished = False
            return found[:limit]
        if limit:
            self._find_streams(deadline)
        self._read_while(deadline, partial(self._take, limit))
        self._count_found()
        self._unfinished = False
        return self._handover.found[:limit]

    def _gather_round(self, deadline: Deadline, asked: Round) -> list[tuple[Entry, Batch]]:
        """Read until a round is complete, or cannot be completed; return its batches.

        They are found here like any others, so an error loses none of them. What does not belong to the round stays
        where it is: a batch that was found, or an entry that is queued.
        """
        self._recover()
        self._began = self._unfinished = True
        progress = Progress(asked)
        self._find_streams(deadline, members=asked.workers is None)
        self._read_while(deadline, partial(self._take_of_round, progress), asked)
        self._take_of_round(progress)  # what the last read has found
        self.acknowledge_returned()
        self._stale = []
        if not (asked.partial or progress.is_complete):
            self._unfinished = False
            raise self._describe(progress, deadline)
        if progress.lost and progress.is_over:
            logger.warning(
                "the round of version %d goes on without workers %s",
                asked.version,
                names_of(progress.lost, self._roster.away),
            )
        self._count_found()
        self._unfinished = False
        found = self._handover.found
        return [found[index] for index in progress.choose(_versions(found))]

    def _read_while(
        self, deadline: Deadline, take: Callable[[], Need | None], asked: Round | None = None
    ) -> None:
        """Read as long as more is needed, until there is nothing more at the deadline.

        Args:
            take: takes queued entries, and returns what to read; None if there is enough.
            asked: the round that is gathered; None if any batches are.
        """
        more, retries = True, 1  # a connection may have broken long ago, while no call used it
        while (need := take()) and (more or need.waits):
            self._check()
            wait = need.waits and not deadline.over
            began, queued = time.perf_counter(), len(self._reader.entries)
            try:
                more = self._read(need, deadline if wait else None, self._done)
            except ConnectionFailed as error:
                self._check()  # the learner was closed: no outage
                self._reader.recover()
                more = self.acknowledge_returned()  # retries for as long as the connection's timeout
                if wait and not (more or deadline.over):
                    self._outage.report(error)
                    time.sleep(min(BLOCK_SECONDS, deadline.remaining))
                elif not more:
                    if not retries:
                        raise
                    more, retries = True, retries - 1
            if wait:
                self._wait_seconds += time.perf_counter() - began
            # A worker that keeps sending what a round cannot use must not keep it from ending.
            if more or (len(self._reader.entries) > queued and (wait or asked is None)):
                continue
            if not wait:
                if self._outage.error and need.waits:
                    raise self._outage.error.with_traceback(None)
                break
            self._find_streams(deadline, members=asked is not None and asked.workers is None)

    def _take(self, limit: int) -> Need | None:
        """Add the batches of queued entries to what was found; return how much more there is room for."""
        found, entries = self._handover.found, self._reader.entries
        if found and self._unpacker.is_suspect(found[-1][0]):
            return None
        while entries and self._budget_bytes > 0 and len(found) < limit:
            entry = entries[0]
            suspect = self._unpacker.is_suspect(entry)
            if suspect and found:
                return None
            self._budget_bytes -= entry.stored_bytes
            batch = self._unpacker.unpack(entry) if self._pending.holds(entry) else None
            if batch is not None:
                found.append((entry, batch))
                entry.collected = True
                self._budget_bytes -= batch.raw_bytes
            entries.popleft()
            entry.fields = None  # only the message or the batch is kept in memory
            if suspect and found:
                return None
        has_room = self._budget_bytes > 0 and len(found) < limit
        return Need(limit - len(found), waits=not found) if has_room else None

    def _take_of_round(self, progress: Progress) -> Need | None:
        """Add the batches of queued entries that belong to a round to what was found; return what else it needs."""
        self._set_aside(progress)
        found = self._handover.found
        progress.begin(self._joined | self._roster.alive, _versions(found))
        kept = deque[Entry]()
        for entry in list(self._reader.entries):
            if not self._pending.holds(entry):
                continue
            decided = entry.outcome == "stale"  # by an earlier look, whose acknowledgement is not answered
            verdict = "stale" if decided else progress.judge(entry.stream.worker_id, entry.version)
            if verdict == "keep":
                kept.append(entry)
            elif verdict == "stale":
                entry.outcome, entry.fields = "stale", None
                self._stale.append(entry)
            else:
                batch = self._unpacker.unpack(entry, of_a_round=True)
                if batch is not None:
                    found.append((entry, batch))
                    entry.collected = True
                    progress.counts[batch.worker_id] += 1
                entry.fields = None
        self._reader.entries = kept
        if progress.is_over:
            return None
        return Need(progress.most + len(self._stale), waits=True, workers=progress.possible)

    def _set_aside(self, progress: Progress) -> None:
        """Remove batches that an earlier call has found, and that are too old now; they are counted as stale."""
        handover = self._handover
        older = [
            entry
            for entry, batch in handover.found
            if progress.judge(batch.worker_id, batch.version) == "stale"
        ]
        if not older:
            return
        counted = int(self._metrics.total("collected")) - handover.total
        removing = set(older)  # entries compare by identity
        removed = sum([entry in removing for entry, _ in handover.found[:counted]])
        rest = [one for one in handover.found if one[0] not in removing]
        for entry in older:
            entry.collected, entry.outcome = False, "stale"
        # From here on they are pending and nothing else; after an interrupt they are queued again, as stale ones.
        self._handover = replace(handover, found=rest, total=handover.total + removed)
        self._stale += older

    def _describe(self, progress: Progress, deadline: Deadline) -> RoundIncomplete:
        """Return the error that says which batches of a round are missing, and why."""
        unreachable = [one.worker_id for one in self.streams if self._streams.reader_of(one.key).is_away]
        with within(Deadline(REASONS_SECONDS)):
            roster, everyone = self._roster.workers(), self._roster.ids()
        return progress.incomplete(
            deadline.seconds,
            roster=roster,
            everyone=everyone,
            unreachable=unreachable,
            ended=self._roster.ended_by_command,
        )

    def _count_found(self) -> None:
        """Add what was found to the metrics, without what a call that did not return has added."""
        handover = self._handover
        counted = int(self._metrics.total("collected")) - handover.total
        batches = [batch for _, batch in handover.found[counted:]]
        self._metrics.add_all(
            [batch.staleness for batch in batches],
            collected=len(batches),
            rows=sum(batch.rows for batch in batches),
            collected_raw_bytes=sum(batch.raw_bytes for batch in batches),
            collected_stored_bytes=sum(batch.stored_bytes for batch in batches),
            decode_seconds=self._unpacker.decode_seconds,
            wait_seconds=self._wait_seconds,
        )
        self._unpacker.decode_seconds = self._wait_seconds = 0.0

    def _find_streams(self, deadline: Deadline, *, members: bool = False) -> None:
        """Search for new streams if it is time; until the deadline, an outage is only logged.

        Args:
            members: whether to read which workers are alive, too.
        """
        if not self._discovery.is_due:
            return
        try:
            # A call that does not need them forgets the members: those of the last round may have left since.
            self._joined = self._roster.read_alive() if members else frozenset()
            self._discovery.find()
        except ConnectionFailed as error:
            if deadline.over:
                raise
            self._check()
            self._outage.report(error)
        else:
            if not self._streams.watched:  # otherwise the next read shows whether the outage is over
                self._outage.end()

    def _read(self, need: Need, deadline: Deadline | None, done: Sequence[Entry]) -> bool:
        """Read once, and acknowledge entries; wait for a first one if there is a deadline.

        Return whether another read may find more.
        """
        if not self._streams.watched or (
            need.workers is not None and not self._streams.readers(need.workers)
        ):
            self.acknowledge_returned()
            if deadline is not None:
                time.sleep(min(BLOCK_SECONDS, deadline.remaining))
            return False
        count = self._reader.count_per_stream(need.batches, COLLECT_BYTES)
        try:
            more = self._reader.read(done, count, deadline, need.workers)
        except ServerFault as error:
            if not is_stream_lost(error):
                raise
            self._discovery.watch_existing(list(self._streams.watched.values()))
            more = False
        self._outage.end()
        return more


def _busy(deadline: Deadline, asked: Round) -> list[tuple[int, Batch]]:
    if asked.partial:
        return []
    raise RoundIncomplete(
        f"another thread was collecting for {deadline.seconds:g} s; gather rounds in one thread only"
    )


def _versions(found: Iterable[tuple[Entry, Batch]]) -> list[tuple[int, int]]:
    return [(batch.worker_id, batch.version) for _, batch in found]


def _ids_by_stream(entries: Iterable[Entry]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for entry in entries:
        found.setdefault(entry.stream.name, set()).add(entry.entry_id)
    return found
