"""Reads entries from all watched streams: pending ones first, then new ones, each once and in order."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Sequence

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.error_mapping import SlotMigrating, script_is_unknown
from rlbroker.backend.keys import GROUP
from rlbroker.backend.replies import (
    StreamEntries,
    entry_place,
    first_error,
    pending_rows,
    stream_entries,
    text_fields,
)
from rlbroker.errors import PeerError
from rlbroker.experience.pending import PendingEntries
from rlbroker.experience.read_position import Entry, ReadPosition, Stream
from rlbroker.experience.stream_reader import ShardReader, wait_for_replies
from rlbroker.experience.watched_streams import WatchedStreams

logger = logging.getLogger("rlbroker")

#: Stored bytes that one read asks for, by estimate. Small reads reuse memory that is still in the CPU's cache.
READ_BYTES = 8 << 20

#: The most entries of one stream that one read asks for.
READ_COUNT = 64

#: Size assumed for a batch before one was read.
FIRST_BATCH_BYTES = 1 << 20

#: How long to wait before streams are read again while a Cluster moves them.
MOVING_SECONDS = 0.02


class EntryReader:
    """Reads entries into a queue in memory, and acknowledges in the same round trip. Not thread-safe.

    After a call that did not end, `recover` must come first: entries may be noted in part, or be on their way.
    """

    def __init__(self, connection: Connection, streams: WatchedStreams, pending: PendingEntries) -> None:
        """Create a reader; nothing is read yet."""
        self._connection, self._streams, self._pending = connection, streams, pending
        #: Pending entries that are not collected, in the order in which to collect them.
        self.entries: deque[Entry] = deque()
        self._average_bytes = float(FIRST_BATCH_BYTES)
        self._busy_streams = 1  #: streams that had something new at the last read

    def recover(self) -> None:
        """Cancel all reads, note again what was noted in part, and scan for pending entries that never arrived."""
        self._streams.rescan_all()
        waiting = deque[Entry]()
        for entry in self._pending:
            if not entry.collected:
                waiting.append(entry)
            if not entry.is_repeat:
                self._streams.position(entry.stream.name).note_read(entry)
        self.entries = waiting

    def count_per_stream(self, max_batches: int | None, max_bytes: int) -> int:
        """Return how many entries of each stream to read.

        Args:
            max_batches: the most entries to read from all streams together.
            max_bytes: the most stored bytes that one read may return if every stream is full.
        """
        size = max(1.0, self._average_bytes)
        # As many streams as at the last read are expected to have something.
        fitting = int(
            min(READ_BYTES / size / self._busy_streams, max_bytes / size / len(self._streams.watched))
        )
        return max(1, min(READ_COUNT, fitting, max_batches or READ_COUNT))

    def read(
        self,
        done: Sequence[Entry],
        count: int,
        deadline: Deadline | None,
        workers: Collection[int] | None = None,
    ) -> bool:
        """Acknowledge entries, and read once: what is pending and unknown, or else what is new.

        Args:
            done: entries to acknowledge first; those that are not pending are skipped.
            count: the most entries of each stream.
            deadline: until when to wait for a first new entry; None not to wait.
            workers: the workers whose streams are read, at least one of which has a stream; None for all.

        Returns:
            Whether another read may find more at once.
        """
        if to_scan := self._streams.to_scan(workers):
            self._pending.acknowledge(done)
            self._read_pending(to_scan, count)
            return True
        return self._read_new(done, count, deadline, workers)

    # New entries

    def _read_new(
        self,
        done: Sequence[Entry],
        count: int,
        deadline: Deadline | None,
        workers: Collection[int] | None,
    ) -> bool:
        wait_seconds = None if deadline is None else min(self._connection.block_seconds, deadline.remaining)
        readers = self._streams.readers(workers)
        self._streams.dropped_connection = False
        if self._reconnect(readers):
            return True
        readers = [reader for reader in readers if not reader.is_away]
        if not self._streams.several_shards:
            replies = self._acknowledge_and_read(readers[0], done, count, wait_seconds, workers)
        else:
            self._pending.acknowledge(done)
            replies = self._read_shards(readers, count, wait_seconds, workers)
        self._add_new(replies)
        if self._streams.dropped_connection:
            return True
        if self.entries:
            return not all(reader.drained or reader.is_reading for reader in readers)
        if deadline is not None or not any(reader.skipped_some for reader in readers):
            return False
        for reader in readers:  # a read that may not wait skipped quiet streams
            reader.poll_all()
        return True

    def _reconnect(self, readers: Sequence[ShardReader]) -> bool:
        """Connect; where a connection was replaced, restore what the server may have lost, and return True."""
        replaced = False
        for reader in readers:
            with self._streams.skip_if_away(reader):
                if reader.reconnect():
                    replaced = True
                    self._streams.rescan(reader.streams.values())
                    workers = {position.stream.worker_id for position in reader.streams.values()}
                    self._pending.restore(workers, deadline=self._streams.deadline)
        return replaced

    def _acknowledge_and_read(
        self,
        reader: ShardReader,
        done: Sequence[Entry],
        count: int,
        wait_seconds: float | None,
        workers: Collection[int] | None,
    ) -> list[StreamEntries]:
        """Acknowledge entries and read new ones, in one round trip."""
        refusal = self._pending.write_counts(
            self._acknowledge_and_ask, reader, done, count, wait_seconds, workers
        )
        if refusal is not None and not script_is_unknown(refusal):
            raise refusal
        found = self._finish_read(reader, count)
        if refusal is not None:
            self._pending.acknowledge(done)
        return found

    def _acknowledge_and_ask(
        self,
        reader: ShardReader,
        done: Sequence[Entry],
        count: int,
        wait_seconds: float | None,
        workers: Collection[int] | None,
    ) -> PeerError | None:
        """Acknowledge entries and ask for new ones; return the refusal of an acknowledgement, if there is one."""
        asked = self._pending.ask(done)
        reader.start_read(count, wait_seconds, workers=workers, after=self._pending.commands(asked))
        replies = reader.channel.receive(len(asked))
        refusal = first_error(replies)
        if refusal is None:
            self._pending.note(asked, replies)
        return refusal

    def _read_shards(
        self,
        readers: Sequence[ShardReader],
        count: int,
        wait_seconds: float | None,
        workers: Collection[int] | None,
    ) -> list[StreamEntries]:
        """Read from all shards at once. A blocked read stays blocked when another shard replies.

        Its reply is taken by the next call; if there is none, its entries stay pending for the next learner.
        """
        idle = [reader for reader in readers if not reader.is_reading]
        for reader in idle:
            with self._streams.skip_if_away(reader):
                reader.start_read(count, wait_seconds, workers=workers)
        at_once = [reader for reader in idle if reader.is_reading and wait_seconds is None]
        blocking = [reader for reader in readers if reader.is_reading and reader not in at_once]
        found: list[StreamEntries] = []
        for reader in (*at_once, *wait_for_replies(blocking, wait_seconds or 0.0)):
            with self._streams.skip_if_away(reader):
                found += self._finish_read(reader, count)
        return found

    def _finish_read(self, reader: ShardReader, count: int) -> list[StreamEntries]:
        """Return what a reader read. While a Cluster moves streams between nodes, read each stream by itself."""
        try:
            return reader.finish_read()
        except SlotMigrating as moving:
            logger.info("%s; reading each stream by itself", str(moving))
        positions = list(reader.streams.values())
        self._streams.rescan(positions)  # entries of the failed read may be pending
        time.sleep(MOVING_SECONDS)
        command = ("XREADGROUP", "GROUP", GROUP, self._pending.name, "COUNT", count, "STREAMS")
        replies = self._connection.execute_all([(*command, one.stream.key, ">") for one in positions])
        return [one for reply in replies for one in stream_entries(reply)]

    def _add_new(self, replies: Sequence[StreamEntries]) -> None:
        self._busy_streams = max(1, len(replies))
        for key, entries in replies:
            position = self._streams.reader_of(key).streams.get(key)
            if position is None or not entries:
                continue
            if self._missed_entries(position, entries):
                self._streams.rescan([position])
                continue
            incarnation = entry_place(entries[0][0])[0]
            if incarnation > position.newest_read[0] and self._is_shared(position.stream):
                # The entries of this incarnation before the first one here went to other learners.
                position.newest_read = (incarnation, 0)
            for entry_id, fields in entries:
                self._add(position, Entry(position.stream, entry_id, fields))

    def _missed_entries(
        self, position: ReadPosition, entries: list[tuple[str, dict[bytes, bytes] | None]]
    ) -> bool:
        """Return whether the server delivered earlier entries to this learner that never arrived.

        That happens if a read that was given up is answered after all, once the server has more to return.
        """
        (incarnation, sequence), first = position.newest_read, entries[0][0]
        if entry_place(first) == (incarnation, sequence + 1):
            return False
        after = f"({incarnation}-{sequence}" if incarnation else "-"
        skipped = self._connection.execute_all(
            [
                ("XPENDING", position.stream.key, GROUP, after, f"({first}", 1, name)
                for name in self._pending.consumers
            ],
            strict=True,
        )
        return any(map(pending_rows, skipped))

    def _is_shared(self, stream: Stream) -> bool:
        """Return whether other learners have read this stream too."""
        consumers = self._connection.execute("XINFO", "CONSUMERS", stream.key, GROUP)
        return any(text_fields(one)["name"] not in self._pending.consumers for one in consumers)

    # Pending entries

    def _read_pending(self, positions: Sequence[ReadPosition], count: int) -> None:
        """Read entries that the server delivered to this learner and that are unknown here; no delivery is counted.

        Args:
            positions: the streams to scan; each continues where its last scan ended.
            count: the most entries of each stream.
        """
        for reader, some in self._streams.by_reader(positions):
            with self._streams.skip_if_away(reader):
                if reader.is_reading:
                    self._add_new(self._finish_read(reader, count))  # or its entries would be read twice
                self._scan(some, count)

    def _scan(self, positions: Sequence[ReadPosition], count: int) -> None:
        read, taken_over = self._pending.consumers
        replies = self._connection.execute_all(
            [
                ("XPENDING", one.stream.key, GROUP, one.scan_from or "-", "+", count, consumer)
                for one in positions
                for consumer in (read, taken_over)
            ],
            deadline=self._streams.deadline,
        )
        unknown: list[tuple[ReadPosition, str, bool, int]] = []
        ends: list[str | None] = []
        for position, *both in zip(positions, replies[::2], replies[1::2], strict=True):
            both_rows = (row for reply in both for row in pending_rows(reply))
            rows = sorted(both_rows, key=lambda row: entry_place(row[0]))[:count]
            for entry_id, consumer, _, deliveries in rows:
                if self._pending.get(position.stream, entry_id) is None:
                    again = position.first_scan or consumer == taken_over
                    unknown.append((position, entry_id, consumer == taken_over, deliveries if again else 0))
            ends.append(f"({rows[-1][0]}" if rows else None)
        found = self._connection.execute_all(
            [("XRANGE", position.stream.key, entry_id, entry_id) for position, entry_id, _, _ in unknown],
            deadline=self._streams.deadline,
        )
        for (position, entry_id, was_taken, deliveries), entries in zip(unknown, found, strict=True):
            fields = dict(entries[0][1]) if entries else None
            self._add(position, Entry(position.stream, entry_id, fields, was_taken, deliveries))
        for position, end in zip(positions, ends, strict=True):
            self._streams.note_scan(position, end)

    # New and pending entries

    def _add(self, position: ReadPosition, entry: Entry) -> None:
        """Queue an entry, unless it is pending already."""
        if self._pending.get(position.stream, entry.entry_id) is not None:
            return
        if position.has_read(entry):
            # The checkpoint covers it, so it was delivered; an earlier learner died before acknowledging it.
            entry.outcome = "delivered" if position.is_in_checkpoint(entry) else "duplicate"
            self._pending.add(entry)
        else:
            self._pending.add(entry)
            position.note_read(entry)
            self._average_bytes += 0.1 * (entry.stored_bytes - self._average_bytes)
        self.entries.append(entry)
