"""Collects the batches of all workers for a learner, once and in order, and acknowledges them.

A call of `collect` acknowledges what the previous call returned, searches for new streams (`StreamDiscovery`), reads
entries (`EntryReader`), and makes batches of them (`Unpacker`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlbroker.backend.connection import BLOCK_SECONDS, Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.threads import OutageLog
from rlbroker.config import Acknowledge
from rlbroker.errors import (
    ConnectionFailed,
    ServerFault,
    raise_again,
)
from rlbroker.experience.dead_letters import DeadLetters
from rlbroker.experience.entry_reader import EntryReader
from rlbroker.experience.pending import PendingEntries, Takeover
from rlbroker.experience.rate_limiter import RateLimiter
from rlbroker.experience.read_position import Entry, ReadPosition, Stream, covers
from rlbroker.experience.rejections import Unpacker
from rlbroker.experience.watched_streams import StreamDiscovery, WatchedStreams, is_stream_lost
from rlbroker.metrics.counters import Metrics
from rlbroker.types import Batch

#: The most bytes that one call of `collect` reads and decodes; the next call continues.
COLLECT_BYTES = 256 << 20


class Collector:
    """Collects the batches of all workers for one learner. Safe to use from several threads."""

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
        workers: Callable[[], Iterable[int]],
        latest_version: Callable[[], int],
        check: Callable[[], None],
    ) -> None:
        """Create a collector; nothing is read yet.

        Args:
            dead_letters: where corrupt and poison batches go.
            acknowledge: `next` acknowledges returned batches at the next call; with `manual`, the caller acknowledges.
            max_staleness: staler batches are counted and not delivered; None for no limit.
            max_deliveries: deliveries after which a batch is poison; None for no limit.
            workers: returns every worker id that may have batches.
            latest_version: returns the version that staleness is measured from.
            check: raises if the learner must not continue: it was closed, or replaced.
        """
        self._pending, self._rate_limiter, self._metrics = pending, rate_limiter, metrics
        self._acknowledges_next, self._check = acknowledge == "next", check
        self._streams = WatchedStreams(connection, keys, pending.name)
        self._discovery = StreamDiscovery(connection, self._streams, pending, takeover, workers=workers)
        self._reader = EntryReader(connection, self._streams, pending)
        self._unpacker = Unpacker(
            pending,
            dead_letters,
            takeover,
            max_staleness=max_staleness,
            max_deliveries=max_deliveries,
            latest_version=latest_version,
        )
        self._collecting = threading.Lock()
        self._began = False
        self._outage = OutageLog("collecting")
        self._retried = False  #: whether the present call has retried a read that may not wait
        self._wait_seconds = 0.0  #: seconds that the present call has waited for entries

    def collect(self, *, timeout_seconds: float, max_batches: int | None) -> list[tuple[int, Batch]]:
        """Return batches of all workers, in order for each worker; wait for a first one if there is none.

        Args:
            timeout_seconds: how long to wait for a first batch; 0 to return only what is there.
            max_batches: the most to return.
        """
        deadline = Deadline(timeout_seconds)
        if not self._collecting.acquire(timeout=deadline.remaining):
            return []  # another thread was waiting for a first batch all this time
        try:
            self._began, self._reader.drained = True, False
            self._unpacker.decode_seconds = self._wait_seconds = 0.0
            self._retried = False
            if self._reader.entries or self._rate_limiter.is_active:
                self._reader.acknowledge_returned()  # otherwise the first read acknowledges, in the same round trip
            room = self._rate_limiter.wait(deadline.remaining)
            if room is not None:
                max_batches = room if max_batches is None else min(room, max_batches)
            if max_batches == 0:
                return []
            self._find_streams(deadline)
            taken: list[Entry] = []
            found: list[tuple[int, Batch]] = []
            try:
                found = self._gather(deadline, max_batches, taken)
            except BaseException:  # Ctrl-C too: the next call must return what was taken
                self._reader.entries.extendleft(
                    entry for entry in reversed(taken) if entry.entry_id in self._pending.ids(entry.stream)
                )
                raise
            finally:
                self._count_collected(found)
            for entry in taken:
                position = self._streams.positions[entry.stream.name]
                position.last_collected = max(position.last_collected, entry.place)
            self._rate_limiter.insert(len(found))
            if self._acknowledges_next:
                self._reader.returned += self._delivered(found)
            return found
        finally:
            self._collecting.release()

    def acknowledge(self, pairs: Sequence[tuple[int, Batch]], deadline: Deadline | None = None) -> int:
        """Acknowledge batches, so that the server deletes them; return how many it still had."""
        return self._pending.acknowledge(self._delivered(pairs), deadline=deadline)

    def acknowledge_returned(self, deadline: Deadline) -> None:
        """Acknowledge the batches that the last `collect` returned, if the next one would do so."""
        if self._acknowledges_next and self._collecting.acquire(timeout=deadline.remaining):
            try:
                self._reader.acknowledge_returned(deadline)
            finally:
                self._collecting.release()

    @property
    def streams(self) -> list[Stream]:
        """The streams that are watched; also for other threads."""
        return [position.stream for position in list(self._streams.watched.values())]

    def marks(self) -> dict[str, Any]:
        """Return a mark for each stream of what was collected so far, by the stream's name."""
        with self._collecting:
            unreturned: dict[str, set[str]] = {}
            for entry in self._reader.entries:
                if not entry.repeat_reason:
                    unreturned.setdefault(entry.stream.name, set()).add(entry.entry_id)
            return {
                name: position.mark(unreturned.get(name, set()), self._pending.ids(position.stream))
                for name, position in self._streams.positions.items()
                if position.last_collected > (0, 0)
            }

    def restore(self, marks: Mapping[str, Any]) -> bool:
        """Continue from marks: skip what they cover. Return False, and do nothing, if `collect` was called before."""
        with self._collecting:
            if self._began:
                return False
            for name, mark in marks.items():
                self._streams.position(name).restore(mark)
            return True

    def acknowledge_marks(self, marks: Mapping[str, Any]) -> int:
        """Acknowledge the batches that these marks cover; return how many the server still had."""
        entries = []
        # A queued repeat was delivered before, and must not be counted as delivered again.
        repeats = {
            (entry.stream, entry.entry_id): entry.repeat_reason for entry in list(self._reader.entries)
        }
        for name, mark in marks.items():
            stream = self._streams.stream(name)
            known = name in self._streams.positions
            taken_over = self._streams.positions[name].taken_over if known else set()
            entries += [
                (stream, entry_id, repeats.get((stream, entry_id)) or "delivered")
                for entry_id in self._pending.ids(stream)
                if covers(mark, entry_id, taken_over=entry_id in taken_over)
            ]
        return self._pending.acknowledge(entries)

    def _delivered(self, pairs: Iterable[tuple[int, Batch]]) -> list[tuple[Stream, str, str]]:
        names = (batch.held_as for _, batch in pairs)
        return [(self._streams.stream(name), entry_id, "delivered") for name, entry_id in names]

    def _count_collected(self, found: Sequence[tuple[int, Batch]]) -> None:
        """Add what this call returns to the metrics."""
        batches = [batch for _, batch in found]
        self._metrics.add_all(
            [batch.staleness for batch in batches],
            collected=len(batches),
            rows=sum(batch.rows for batch in batches),
            collected_raw_bytes=sum(batch.raw_bytes for batch in batches),
            collected_stored_bytes=sum(batch.stored_bytes for batch in batches),
            decode_seconds=self._unpacker.decode_seconds,
            wait_seconds=self._wait_seconds,
        )

    def _find_streams(self, deadline: Deadline) -> None:
        """Search for new streams if it is time; until the deadline, an outage is only logged."""
        if not self._discovery.is_due:
            return
        try:
            self._discovery.find()
        except ConnectionFailed as error:
            if deadline.over:
                raise
            self._outage.report(error)
        else:
            if not self._streams.watched:  # otherwise the next read shows whether the outage is over
                self._outage.end()

    def _gather(
        self, deadline: Deadline, max_batches: int | None, taken: list[Entry]
    ) -> list[tuple[int, Batch]]:
        """Read and unpack until there is enough, or nothing more; add to `taken` each entry that leaves the queue."""
        found: list[tuple[int, Batch]] = []
        entries, budget_bytes = self._reader.entries, COLLECT_BYTES
        while budget_bytes > 0 and (max_batches is None or len(found) < max_batches):
            if not entries:
                if found and self._reader.drained:
                    break
                self._check()
                wait = not found and not deadline.over
                missing = None if max_batches is None else max_batches - len(found)
                began = time.perf_counter()
                try:
                    filled = self._fill(missing, deadline if wait else None)
                finally:
                    if wait:
                        self._wait_seconds += time.perf_counter() - began
                if not filled:
                    if not wait and self._outage.error and not found:
                        raise_again(self._outage.error)
                    if not wait:
                        break
                    self._find_streams(deadline)
                continue
            suspect = self._unpacker.is_suspect(entries[0])
            if suspect and found:
                break
            entry = entries.popleft()
            taken.append(entry)
            budget_bytes -= entry.stored_bytes
            batch = self._unpacker.unpack(entry)
            if batch is not None:
                budget_bytes -= batch.raw_bytes
                found.append((batch.worker_id, batch))
                if suspect:
                    break
        return found

    def _fill(self, max_batches: int | None, deadline: Deadline | None) -> bool:
        """Read entries once; wait for a first one if there is a deadline. Return whether to continue at once."""
        to_scan = self._streams.to_scan()
        if to_scan or not self._streams.watched:
            self._reader.acknowledge_returned()
        if not self._streams.watched:
            if deadline is not None:
                time.sleep(min(BLOCK_SECONDS, deadline.remaining))
            return False
        count = self._reader.count_per_stream(max_batches, COLLECT_BYTES)
        try:
            filled = self._read(to_scan, count, deadline)
        except BaseException as error:
            self._streams.rescan_all()
            if not isinstance(error, ConnectionFailed):
                raise
            if self._reader.returned:
                self._reader.acknowledge_returned()  # retries for as long as the connection's timeout
                return True
            if deadline is None or deadline.over:
                if self._retried:
                    raise
                self._retried = True  # the connection may have broken long ago, while no call used it
                return True
            self._outage.report(error)
            time.sleep(min(BLOCK_SECONDS, deadline.remaining))
            return False
        self._outage.end()
        return filled

    def _read(self, to_scan: Sequence[ReadPosition], count: int, deadline: Deadline | None) -> bool:
        """Read what is pending in these streams or, without any, what is new; search for streams that were lost."""
        try:
            if to_scan:
                self._reader.read_pending(to_scan, count)
                return True
            return self._reader.read_new(count, deadline) or bool(self._reader.entries)
        except ServerFault as error:
            if not is_stream_lost(error):
                raise
            self._discovery.watch_existing(list(self._streams.watched.values()))
            return False
