"""The learner's half: one blocking read over every worker's stream, and batches handed out once and in order.

On a Cluster it is one for each shard. They wait at the same time, each over a connection of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rlbroker.backend.connection import BLOCK_SECONDS, Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.error_mapping import SlotMigrating, script_is_unknown
from rlbroker.backend.keys import GROUP, Keys, shard_of
from rlbroker.backend.replies import (
    StreamEntries,
    consumer_pending,
    default_if_wrong_type,
    entry_place,
    pending_rows,
    raise_first_error,
    seconds_number,
    stream_entries,
    text_fields,
    whole_number,
)
from rlbroker.backend.threads import OutageLog
from rlbroker.codec.message import decode
from rlbroker.config import Acknowledge
from rlbroker.errors import (
    ConnectionFailed,
    PeerError,
    ServerFault,
    ServerOutOfMemory,
    WireError,
    WrongKeyType,
)
from rlbroker.experience.dead_letters import DeadLetters
from rlbroker.experience.outgoing import shape_of
from rlbroker.experience.pending import PendingEntries, Source
from rlbroker.experience.rate_limiter import RateLimiter
from rlbroker.experience.read_position import Entry, Place, Stream, covers
from rlbroker.experience.stream_reader import ShardReader, ready
from rlbroker.experience.takeover import Takeover
from rlbroker.metrics.counters import Metrics
from rlbroker.types import Batch

logger = logging.getLogger("rlbroker")

#: Stored bytes that one call of `collect` reads at most; the rest comes with the next call.
COLLECT_BYTES = 256 << 20

#: Stored bytes that one read asks for, as far as can be foreseen: memory that was just used is soon used again.
READ_BYTES = 8 << 20

#: Entries of one stream that one read asks for, at most.
READ_COUNT = 64

#: Size assumed for a batch before one was seen.
FIRST_GUESS_BYTES = 1 << 20

#: How often the server is asked whether it thinks that we hold more than we do, and for dead batches to try again.
RECHECK_SECONDS = 5.0

#: Of how many workers at once; the others follow in turn.
RECHECKED = 250

#: A shard whose server is away is left out for at least so long, and for so many times as long as a try took.
AWAY_SECONDS = 0.5
AWAY_TRIES = 2

#: While a Cluster moves streams, they are looked at so often.
MOVING_SECONDS = 0.02

#: A batch that was handed out this often, each time to a learner that died, is handed out alone: at the latest
#: when it is the last time, so that its neighbours are not blamed.
SUSPECT_AFTER = 2


class Collector:
    """Gives a learner the batches of all workers. Safe to use from several threads."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        holdings: PendingEntries,
        dead_letters: DeadLetters,
        ownership: Takeover,
        flow: RateLimiter,
        metrics: Metrics,
        *,
        acknowledge: Acknowledge,
        max_staleness: int | None,
        max_deliveries: int | None,
        workers: Callable[[], Iterable[int]],
        latest_version: Callable[[], int],
        check: Callable[[], None],
    ) -> None:
        """Prepare a collector; nothing is read yet.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            holdings: what the learner has read and not acknowledged.
            dead_letters: where batches go that cannot be used.
            ownership: what other learners gave up.
            flow: how many batches may be handed out.
            metrics: is told what was given out, and how long that took.
            acknowledge: `next` acknowledges what a call returned at the next call, `manual` when told.
            max_staleness: batches produced by older weights than this are counted and not given out.
            max_deliveries: how often a batch is handed out before it is called poison; None for ever.
            workers: gives every worker id that may have batches.
            latest_version: gives the version that staleness is measured from.
            check: raises if the learner must not go on: it was closed, or replaced.
        """
        self._connection, self._keys = connection, keys
        #: By shard.
        self._readers: dict[str, ShardReader] = {}
        self._acknowledge_mode, self._max_staleness = acknowledge, max_staleness
        self._max_deliveries = max_deliveries
        self._suspect_after = (
            SUSPECT_AFTER if max_deliveries is None else max(1, min(SUSPECT_AFTER, max_deliveries - 1))
        )
        self._workers, self._latest_version = workers, latest_version
        self._holdings, self._dead_letters, self._check = holdings, dead_letters, check
        self._ownership, self._flow, self._metrics = ownership, flow, metrics
        self._reading = threading.Lock()
        #: By name, which is how marks call them. Those that are not on the server now are not watched.
        self._streams: dict[str, Stream] = {}
        self._watched: dict[str, Stream] = {}
        self._reread: dict[str, Stream] = {}  #: of these, those with entries that may be pending
        self._read: deque[Entry] = deque()
        #: What the caller got and has not acknowledged; names only, so that the memory of the batches is the caller's.
        self._returned: list[tuple[str, str]] = []
        self._began = False
        self._look_again = Deadline(0)
        self._outage = OutageLog("collecting")
        self._mended = False  #: whether a connection was closed that may have been broken for long
        self._recheck = Deadline(0)
        self._rechecked = 0
        self._batch_bytes = float(FIRST_GUESS_BYTES)
        self._drained = False  #: whether the last read took all that was there
        #: Of the present call.
        self._decode_seconds = self._wait_seconds = 0.0
        self._busy = 1  #: streams that had something new at the last read

    def collect(self, *, timeout_seconds: float, max_batches: int | None) -> list[tuple[int, Batch]]:
        """Give batches of all workers, each worker's in order; wait for the first one if there is none.

        Args:
            timeout_seconds: how long to wait for a first batch; 0 to take only what is there.
            max_batches: how many to give at most.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        deadline = Deadline(timeout_seconds)
        if not self._reading.acquire(timeout=deadline.remaining):
            return []  # another thread waited all the time, and had the first claim
        try:
            self._began, self._drained = True, False
            self._decode_seconds = self._wait_seconds = 0.0
            if self._read or self._flow.limits:
                self._settle_returned()  # otherwise with the first read, in one round trip
            room = self._flow.wait(deadline.remaining)
            if room is not None:
                max_batches = room if max_batches is None else min(room, max_batches)
            if max_batches == 0:
                return []
            self._watch_streams(deadline)
            taken: list[Entry] = []
            found: list[tuple[int, Batch]] = []
            try:
                found = self._gather(deadline, max_batches, taken)
            except BaseException:  # Ctrl-C too: what was taken must come with the next call
                self._read.extendleft(entry for entry in reversed(taken) if self._is_held(entry))
                raise
            finally:
                self._note(found)
            for entry in taken:
                stream = self._streams[entry.source.name]
                stream.handed_out = max(stream.handed_out, entry.place)
            self._flow.insert(len(found))
            if self._acknowledge_mode == "next":
                self._returned += [batch.held_as for _, batch in found]
            return list(found)
        finally:
            self._reading.release()

    def _note(self, found: Sequence[tuple[int, Batch]]) -> None:
        """Tell in one go what this call gave out."""
        batches = [batch for _, batch in found]
        self._metrics.add_all(
            [batch.staleness for batch in batches],
            collected=len(batches),
            rows=sum(batch.rows for batch in batches),
            collected_raw_bytes=sum(batch.raw_bytes for batch in batches),
            collected_stored_bytes=sum(batch.stored_bytes for batch in batches),
            decode_seconds=self._decode_seconds,
            wait_seconds=self._wait_seconds,
        )

    def acknowledge(self, pairs: Sequence[tuple[int, Batch]], deadline: Deadline | None = None) -> int:
        """Let the server forget batches that the learner is done with; give how many it still had.

        Raises:
            Fenced: a newer learner of this name has taken over.
            PeerError: the server refused, or could not be reached in time.
        """
        return self._settle([batch.held_as for _, batch in pairs], deadline)

    def acknowledge_returned(self, deadline: Deadline) -> None:
        """Acknowledge what the last `collect` gave out, if a further one would have done so."""
        if self._acknowledge_mode == "next" and self._reading.acquire(timeout=deadline.remaining):
            try:
                self._settle_returned(deadline)
            finally:
                self._reading.release()

    def _settle_returned(self, deadline: Deadline | None = None) -> None:
        if self._returned:
            self._settle(self._returned, deadline)
            self._returned = []

    def _settle(self, held: Sequence[tuple[str, str]], deadline: Deadline | None) -> int:
        return self._holdings.settle(self._delivered(held), deadline=deadline)

    def _delivered(self, held: Sequence[tuple[str, str]]) -> list[tuple[Source, str, str]]:
        return [(self._known(name), entry_id, "delivered") for name, entry_id in held]

    @property
    def sources(self) -> list[Source]:
        """The streams that are watched."""
        return [stream.source for stream in list(self._watched.values())]

    # Marks

    def marks(self) -> dict[str, Any]:
        """Give what was handed out so far, by stream."""
        with self._reading:
            waiting: dict[str, set[str]] = {}
            for entry in self._read:
                if not entry.came_again:
                    waiting.setdefault(entry.source.name, set()).add(entry.entry_id)
            return {
                name: stream.mark(waiting.get(name, set()), self._holdings.held(stream.source))
                for name, stream in self._streams.items()
                if stream.handed_out > (0, 0)
            }

    def restore(self, marks: Mapping[str, Any]) -> bool:
        """Never hand out again what these marks cover; give False if something was handed out already."""
        with self._reading:
            if self._began:
                return False
            for name, mark in marks.items():
                self._streams.setdefault(name, Stream(self._source(name))).restore(mark)
            return True

    def acknowledge_marks(self, marks: Mapping[str, Any]) -> int:
        """Let the server forget the batches that these marks cover; give how many it still had.

        Raises:
            Fenced: a newer learner of this name has taken over.
            PeerError: the server refused, or could not be reached in time.
        """
        entries = []
        # What came again, and is not put away yet, was delivered once and is not to be counted so twice.
        again = {(entry.source, entry.entry_id): entry.came_again for entry in list(self._read)}
        for name, mark in marks.items():
            source = self._source(name)
            taken_over = self._streams[name].taken_over if name in self._streams else set()
            entries += [
                (source, entry_id, again.get((source, entry_id)) or "delivered")
                for entry_id in self._holdings.held(source)
                if covers(mark, entry_id, taken_over=entry_id in taken_over)
            ]
        return self._holdings.settle(entries)

    # Reading

    def _gather(
        self, deadline: Deadline, max_batches: int | None, taken: list[Entry]
    ) -> list[tuple[int, Batch]]:
        """Read and decode until there is enough or nothing more; note in `taken` what left the line."""
        found: list[tuple[int, Batch]] = []
        budget = COLLECT_BYTES
        while budget > 0 and (max_batches is None or len(found) < max_batches):
            if not self._read:
                if found and self._drained:
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
                        raise self._outage.error.with_traceback(None)
                    if not wait:
                        break
                    self._watch_streams(deadline)
                continue
            suspect = self._read[0].deliveries >= self._suspect_after
            if suspect and found:
                break
            entry = self._read.popleft()
            taken.append(entry)
            budget -= entry.stored_bytes
            batch = self._open(entry)
            if batch is not None:
                budget -= batch.raw_bytes
                found.append((batch.worker_id, batch))
                if suspect:
                    break
        return found

    def _fill(self, max_batches: int | None, deadline: Deadline | None) -> bool:
        """Read once from the server; wait for entries if there is a deadline. Give whether there were any."""
        again = [one for one in self._reread.values() if not self._reader_of(one.source.key).is_away]
        if again or not self._watched:
            self._settle_returned()
        if not self._watched:
            if deadline is not None:
                time.sleep(min(BLOCK_SECONDS, deadline.remaining))
            return False
        count = max(1, min(READ_COUNT, self._entries_of_each(len(self._watched)), max_batches or READ_COUNT))
        try:
            filled = self._read_some(again, count, deadline)
        except BaseException as error:
            # The reply may be lost with entries in it: they are pending now, so look there first.
            self._look_back(self._watched.values())
            for reader in self._readers.values():
                reader.close()
            if not isinstance(error, ConnectionFailed):
                raise
            if self._returned:
                self._settle_returned()  # is patient
                return True
            if deadline is None or deadline.over:
                raise
            self._outage.report(error)
            time.sleep(min(BLOCK_SECONDS, deadline.remaining))
            return False
        self._outage.end()
        return filled

    def _read_some(self, again: Sequence[Stream], count: int, deadline: Deadline | None) -> bool:
        """Read what is pending in these streams, or what is new; streams that are gone are looked for."""
        try:
            if again:
                self._read_pending(again, count)
                return True
            return self._read_new(count, deadline) or bool(self._read)
        except ServerFault as error:
            if not _lost_stream(error):
                raise
            self._look_at_streams(list(self._watched.values()))
            return False

    def _entries_of_each(self, streams: int) -> int:
        """Give how many entries of each stream to read, with the idle ones as idle as they were in the last read."""
        size = max(1.0, self._batch_bytes)
        return int(min(READ_BYTES / size / self._busy, COLLECT_BYTES / size / streams))

    def _read_new(self, count: int, deadline: Deadline | None) -> bool:
        """Read what is new; with a deadline, wait for the first entry of whichever stream.

        Returns:
            Whether to read once more, as a connection is new, or as some streams were left out and there is no time
            to wait for their turn.
        """
        wait_seconds = None if deadline is None else min(self._connection.block_seconds, deadline.remaining)
        readers = [reader for reader in self._readers.values() if reader.streams and not reader.is_away]
        self._mended = False
        if self._look_after_anew(readers):
            return True
        readers = [reader for reader in readers if not reader.is_away]
        if len(readers) == 1:
            replies = self._acknowledged_and(readers[0], count, wait_seconds)
        else:
            self._settle_returned()
            replies = self._read_shards(readers, count, wait_seconds)
        self._take_new(replies)
        self._drained = all(reader.drained or reader.waits for reader in readers)
        if self._mended:
            return True
        if self._read or deadline is not None or not any(reader.left_out for reader in readers):
            return False
        for reader in readers:
            reader.ask_all()
        return True

    def _look_after_anew(self, readers: Sequence[ShardReader]) -> bool:
        """Connect, and give whether there are servers that may know less now of what they gave us, and counted."""
        found = False
        for reader in readers:
            with self._unless_away(reader):
                if reader.begins_anew():
                    found = True
                    self._look_back(reader.streams.values())
                    workers = {stream.source.worker_id for stream in reader.streams.values()}
                    self._holdings.restore(workers, deadline=self._once)
        return found

    def _read_shards(
        self, readers: Sequence[ShardReader], count: int, wait_seconds: float | None
    ) -> list[StreamEntries]:
        """Read from all shards at once; where a read waits for something when another one has it, it goes on waiting.

        What comes while nobody collects is taken at the next call, or is pending for the next learner.
        """
        fresh = [reader for reader in readers if not reader.waits]
        for reader in fresh:
            with self._unless_away(reader):
                reader.ask(count, wait_seconds)
        at_once = [reader for reader in fresh if reader.waits and wait_seconds is None]
        waiting = [reader for reader in readers if reader.waits and reader not in at_once]
        found: list[StreamEntries] = []
        for reader in (*at_once, *ready(waiting, wait_seconds or 0.0)):
            with self._unless_away(reader):
                found += self._taken(reader, count)
        return found

    @contextmanager
    def _unless_away(self, reader: ShardReader) -> Iterator[None]:
        """Leave a shard out for a while if its server is away, as long as there are others; with `_once`.

        A connection that broke may have done so long ago: first it is only made anew.
        """
        began = time.monotonic()
        try:
            yield
        except ConnectionFailed as error:
            reader.failures += 1
            if reader.failures == 1 and self._once:
                reader.close()
                self._look_back(reader.streams.values())
                self._mended = True
                return
            others = [one for one in self._readers.values() if one.streams and one is not reader]
            if all(one.is_away for one in others):
                raise
            reader.outage.report(error, "the other shards go on")
            reader.leave_out(max(AWAY_SECONDS, AWAY_TRIES * (time.monotonic() - began)))
            self._look_back(reader.streams.values())

    @property
    def _once(self) -> Deadline | None:
        """Have one try where there are several shards: the others are not to wait for one."""
        return Deadline(0) if len(self._readers) > 1 else None

    def _by_reader(self, streams: Iterable[Stream]) -> Iterable[tuple[ShardReader, list[Stream]]]:
        found: dict[str, list[Stream]] = {}
        for stream in streams:
            found.setdefault(shard_of(stream.source.key), []).append(stream)
        return [(self._reader_of(some[0].source.key), some) for some in found.values()]

    def _taken(self, reader: ShardReader, count: int) -> list[StreamEntries]:
        """Take what was read; while a Cluster moves the streams, read each by itself: they may not be together now."""
        try:
            return reader.take()
        except SlotMigrating as moving:
            logger.info("%s; reading each stream by itself", moving)
        streams = list(reader.streams.values())
        self._look_back(streams)  # what was read may have got lost
        time.sleep(MOVING_SECONDS)
        command = ("XREADGROUP", "GROUP", GROUP, self._holdings.name, "COUNT", count, "STREAMS")
        replies = self._connection.execute_all([(*command, one.source.key, ">") for one in streams])
        return [one for reply in replies for one in stream_entries(reply)]

    def _take_new(self, replies: Sequence[StreamEntries]) -> None:
        self._busy = max(1, len(replies))
        for key, entries in replies:
            stream = self._reader_of(key).streams.get(key)
            if stream is None or not entries:
                continue
            if self._hides_entries(stream, entries):
                self._look_back([stream])
                continue
            life = entry_place(entries[0][0])[0]
            if life > stream.newest_read[0] and self._is_shared(stream):
                stream.newest_read = (life, 0)  # what comes before its first entry here is another learner's
            for entry_id, fields in entries:
                self._take(stream, Entry(stream.source, entry_id, fields))

    def _reader_of(self, key: str) -> ShardReader:
        shard = shard_of(key)
        if shard not in self._readers:
            self._readers[shard] = ShardReader(self._connection, self._holdings.name, shard)
        return self._readers[shard]

    def _look_back(self, streams: Iterable[Stream]) -> None:
        """Look first, from the beginning, for entries that the server has given to us and we do not hold."""
        for stream in streams:
            stream.pending_from = "-"
            if stream.source.name in self._watched:
                self._reread[stream.source.name] = stream

    def _acknowledged_and(
        self, reader: ShardReader, count: int, wait_seconds: float | None
    ) -> list[StreamEntries]:
        """Acknowledge what was returned and read, in one round trip."""
        try:
            with self._holdings.counting():
                fates = self._holdings.fates(self._delivered(self._returned))
                reader.ask(count, wait_seconds, after=self._holdings.commands(fates))
                replies = reader.channel.receive(len(fates))
                problem = next((one for one in replies if isinstance(one, PeerError)), None)
                if problem is None:
                    self._holdings.note_settled(fates, replies)
                elif not script_is_unknown(problem):
                    raise problem
            found = self._taken(reader, count)
        except BaseException:
            reader.close()  # the answers that are left are nobody's
            raise
        if problem is None:
            self._returned = []
        else:
            self._settle_returned()
        return found

    def _read_pending(self, streams: Sequence[Stream], count: int) -> None:
        """Read what the server has given to us and we do not hold, without counting it as one more delivery."""
        for reader, some in self._by_reader(streams):
            with self._unless_away(reader):
                if reader.waits:
                    self._take_new(self._taken(reader, count))  # or it would come twice
                self._read_pending_of(some, count)

    def _read_pending_of(self, streams: Sequence[Stream], count: int) -> None:
        read, taken_over = self._holdings.consumers
        replies = self._connection.execute_all(
            [
                ("XPENDING", one.source.key, GROUP, one.pending_from or "-", "+", count, consumer)
                for one in streams
                for consumer in (read, taken_over)
            ],
            deadline=self._once,
        )
        wanted: list[tuple[Stream, Entry]] = []
        after: list[tuple[Stream, str | None]] = []
        for stream, *both in zip(streams, replies[::2], replies[1::2], strict=True):
            rows = sorted((row for reply in both for row in pending_rows(reply)), key=_place_of)[:count]
            held = set(self._holdings.held(stream.source))
            for entry_id, consumer, _, deliveries in rows:
                if entry_id not in held:
                    entry = Entry(stream.source, entry_id, None, taken_over=consumer == taken_over)
                    entry.deliveries = deliveries if stream.fresh or entry.taken_over else 0
                    wanted.append((stream, entry))
            after.append((stream, f"({rows[-1][0]}" if rows else None))
        found = self._connection.execute_all(
            [("XRANGE", entry.source.key, entry.entry_id, entry.entry_id) for _, entry in wanted],
            deadline=self._once,
        )
        for (stream, entry), entries in zip(wanted, found, strict=True):
            entry.fields = dict(entries[0][1]) if entries else None
            self._take(stream, entry)
        for stream, position in after:
            stream.pending_from = position
            if position is None:
                self._reread.pop(stream.source.name, None)
            stream.fresh = stream.fresh and position is not None

    def _take(self, stream: Stream, entry: Entry) -> None:
        """Put an entry into the line of those to hand out, unless it was there before."""
        if not self._holdings.add(stream.source, entry.entry_id, entry.stored_bytes):
            return
        if stream.knows(entry):
            # The checkpoint holds what an earlier learner did not come to acknowledge: it is still pending.
            in_checkpoint = entry.taken_over or (stream.fresh and entry.place <= stream.restored)
            entry.came_again = "delivered" if in_checkpoint else "duplicate"
        else:
            stream.note(entry)
            self._batch_bytes += 0.1 * (entry.stored_bytes - self._batch_bytes)
        self._read.append(entry)

    def _hides_entries(self, stream: Stream, entries: list[tuple[str, dict[bytes, bytes] | None]]) -> bool:
        """Whether the server thinks that we have read entries that never reached us.

        A client that repeats a read by itself after a lost reply skips what that reply held. It shows as a gap.
        """
        incarnation, sequence = stream.newest_read
        if entry_place(entries[0][0]) == (incarnation, sequence + 1):
            return False
        reply = self._connection.execute("XPENDING", stream.source.key, GROUP)
        pending = consumer_pending(reply, self._holdings.consumers)
        return pending > len(self._holdings.held(stream.source)) + len(entries)

    def _is_shared(self, stream: Stream) -> bool:
        """Whether other learners have read this stream too."""
        consumers = self._connection.execute("XINFO", "CONSUMERS", stream.source.key, GROUP)
        return any(text_fields(one)["name"] not in self._holdings.consumers for one in consumers)

    def _is_held(self, entry: Entry) -> bool:
        return entry.entry_id in self._holdings.held(entry.source)

    def _open(self, entry: Entry) -> Batch | None:
        """Give the batch of an entry; None, and counted, if there is none to give out."""
        source, reason, detail = entry.source, entry.came_again or "trimmed", ""
        if entry.came_again:
            logger.info("worker %d: batch %s came again: %s", source.worker_id, entry.batch, reason)
        elif entry.fields is not None and self._is_poison(entry):
            reason, detail = "poison", "each learner that got it died before it was done"
        elif entry.fields is not None:
            try:
                batch = self._decode(entry, entry.fields) if entry.opened is None else entry.opened
            except (WireError, KeyError, ValueError) as error:
                reason, detail = "corrupt", f"{type(error).__name__}: {error}"
            else:
                if self._max_staleness is None or batch.staleness <= self._max_staleness:
                    return batch if self._counts_delivery(entry) else None
                reason = "stale"
        if reason in ("corrupt", "poison"):
            logger.warning("worker %d: batch %s is dead: %s", source.worker_id, entry.batch, detail)
            self._dead_letters.bury(
                source,
                entry.entry_id,
                entry.stored_bytes,
                reason=reason,
                detail=detail,
                deliveries=max(1, entry.deliveries),
                batch=entry.batch,
            )
        else:
            self._holdings.settle([(source, entry.entry_id, reason)])
        return None

    def _is_poison(self, entry: Entry) -> bool:
        return self._max_deliveries is not None and entry.deliveries >= self._max_deliveries

    def _counts_delivery(self, entry: Entry) -> bool:
        """Count once more a batch that a learner died over before; give False if it is another's by now."""
        consumer, deliveries = self._holdings.consumers[entry.taken_over], entry.deliveries + 1
        if deliveries == 1 or self._ownership.hand_out(entry.source, entry.entry_id, consumer, deliveries):
            return True
        self._holdings.gave_up(entry.source, [entry.entry_id], [])
        return False

    def _decode(self, entry: Entry, fields: Mapping[bytes, bytes]) -> Batch:
        began = time.perf_counter()
        try:
            content = decode(fields[b"data"])
        finally:
            self._decode_seconds += time.perf_counter() - began
        if not isinstance(content, dict):
            raise WireError("a batch must be a dictionary")
        batch = Batch(content)
        batch.worker_id = entry.source.worker_id
        batch.incarnation, batch.sequence = entry_place(entry.batch) if entry.source.retried else entry.place
        batch.version = _number(fields, b"version")
        batch.staleness = max(0, self._latest_version() - batch.version)
        batch.rows = _number(fields, b"rows")
        # Measured: what one call decodes is bounded by it, and a few thousand bytes can hold a gigabyte of zeros.
        batch.raw_bytes = shape_of(content)[1]
        batch.stored_bytes = entry.stored_bytes
        batch.sent_at = _seconds(fields, b"sent_at")
        batch.received_at = time.time()
        batch.held_as = (entry.source.name, entry.entry_id)
        entry.let_go_of_message(batch)
        return batch

    # Streams

    def _known(self, name: str) -> Source:
        stream = self._streams.get(name)
        return self._source(name) if stream is None else stream.source

    def _source(self, name: str) -> Source:
        before, _, worker = name.rpartition(":")
        number, retried = int(worker), before == "again"
        key = self._keys.again(number) if retried else self._keys.experiences(number)
        return Source(number, key, self._keys.counts(number), self._keys.epochs(number), retried)

    def _watch_streams(self, deadline: Deadline) -> None:
        """Find streams that have come; now and then, entries that nobody looks after. Until the deadline, try again."""
        if not self._look_again.over:
            return
        self._look_again = Deadline(BLOCK_SECONDS)
        try:
            self._find_streams()
        except ConnectionFailed as error:
            if deadline.over:
                raise
            self._outage.report(error)
        else:
            if not self._watched:  # otherwise reading will show it
                self._outage.end()

    def _find_streams(self) -> None:
        recheck = self._recheck.over
        workers = list(self._workers())
        names = [str(worker) for worker in workers]
        of_turn = set(self._of_turn(workers) if recheck else ())
        names += [f"again:{worker}" for worker in of_turn]  # dead batches are seldom tried again
        for name in names:
            if name not in self._streams:
                self._streams[name] = Stream(self._source(name))
        for reader, streams in self._by_reader(self._streams[name] for name in names):
            if reader.is_away:
                continue
            with self._unless_away(reader):
                self._holdings.take_over({one.source.worker_id for one in streams}, deadline=self._once)
                self._look_at_streams([one for one in streams if one.source.name not in self._watched])
                if recheck:
                    self._look_at_holdings([one for one in streams if one.source.worker_id in of_turn])
        if recheck:
            self._recheck = Deadline(RECHECK_SECONDS)

    def _of_turn(self, workers: Sequence[int]) -> Sequence[int]:
        if len(workers) <= RECHECKED:
            return workers
        first = self._rechecked % len(workers)
        self._rechecked = first + RECHECKED
        return workers[first : first + RECHECKED]

    def _look_at_streams(self, streams: Sequence[Stream]) -> None:
        """Watch those that are on the server. Only workers make them: see `Sender`."""
        kinds = self._connection.execute_all(
            [("TYPE", stream.source.key) for stream in streams], deadline=self._once
        )
        for stream, kind in zip(streams, kinds, strict=True):
            name = stream.source.name
            self._watched.pop(name, None)
            self._reread.pop(name, None)
            reader = self._reader_of(stream.source.key)
            reader.streams.pop(stream.source.key, None)
            reader.ask_all()
            if kind in (b"stream", "stream"):
                self._make_group(stream)
                self._watched[name] = reader.streams[stream.source.key] = stream
                self._look_back([stream])
            elif kind not in (b"none", "none"):
                logger.warning(
                    "worker %d wrote a %s where its batches belong; it is deleted",
                    stream.source.worker_id,
                    kind.decode(),
                )
                self._connection.execute("UNLINK", stream.source.key)

    def _look_at_holdings(self, streams: Iterable[Stream]) -> None:
        """Read again where the server thinks that we hold more than we do; take what other learners gave up."""
        streams = [stream for stream in streams if stream.source.name in self._watched]
        try:
            taken = self._ownership.take_abandoned([stream.source for stream in streams])
            for stream, some in zip(streams, taken, strict=True):
                if some:
                    self._look_back([stream])
            replies = self._connection.ask(
                [
                    command
                    for stream in streams
                    for command in (
                        ("XPENDING", stream.source.key, GROUP),
                        ("HEXISTS", stream.source.epochs_key, self._holdings.name),
                        ("HGETALL", stream.source.counts_key),
                    )
                ],
                deadline=self._once,
            )
            for stream, pending, known, counts in zip(
                streams,
                raise_first_error(replies[::3]),
                raise_first_error(replies[1::3]),
                replies[2::3],
                strict=True,
            ):
                if known:
                    self._holdings.remember(stream.source.worker_id, default_if_wrong_type(counts, {}))
                else:  # it has lost what it counted, and may have kept its connections
                    self._holdings.restore([stream.source.worker_id], deadline=self._once)
                held = len(self._holdings.held(stream.source))
                if consumer_pending(pending, self._holdings.consumers) > held:
                    self._look_back([stream])
        except ServerFault as error:
            if not _lost_stream(error):
                raise
            return  # the next read finds out

    def _make_group(self, stream: Stream) -> None:
        try:
            self._connection.execute("XGROUP CREATE", stream.source.key, GROUP, "0")
        except ServerOutOfMemory:
            pass  # the worker made it with its stream; and if not, the next read finds out
        except PeerError as error:
            if "BUSYGROUP" not in str(error):
                raise


def _place_of(row: tuple[str, str, int, int]) -> Place:
    return entry_place(row[0])


def _lost_stream(error: ServerFault) -> bool:
    """Whether a stream or its group is gone, or something else is in its place."""
    signs = ("NOGROUP", "UNBLOCKED", "requires the key to exist", "no such key")
    return isinstance(error, WrongKeyType) or any(sign in str(error) for sign in signs)


def _number(fields: Mapping[bytes, bytes], name: bytes) -> int:
    """Give a number that a worker wrote; WireError for one with which nobody can count."""
    number = whole_number(fields[name].decode("ascii", "replace"))
    if number is None:
        raise WireError(f"the batch's {name.decode()} is no number that can be")
    return number


def _seconds(fields: Mapping[bytes, bytes], name: bytes) -> float:
    seconds = seconds_number(fields[name].decode("ascii", "replace"))
    if seconds is None:
        raise WireError(f"the batch's {name.decode()} is no time")
    return seconds
