"""The learner's half: one blocking read over every worker's stream, and acknowledge-and-delete in one step."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rlbroker.config import Acknowledge
from rlbroker.connection import BLOCK_SECONDS, Connection
from rlbroker.deadline import Deadline
from rlbroker.errors import ConnectionFailed, ServerFault, ServerOutOfMemory, WireError
from rlbroker.experience.holdings import Holdings
from rlbroker.keys import GROUP, Keys
from rlbroker.records import Batch
from rlbroker.replies import pending_count, stream_entries
from rlbroker.wire import decode

logger = logging.getLogger("rlbroker")

#: The consumer's name is always the same, so that a restarted learner finds what it had read.
CONSUMER = "learner"

#: Stored bytes that one call of `collect` reads at most; the rest comes with the next call.
COLLECT_BYTES = 256 << 20

#: Entries of one stream that one read asks for, at most.
READ_COUNT = 64

#: Size assumed for a batch before one was seen.
FIRST_GUESS_BYTES = 1 << 20

#: How often the server is asked whether it thinks that we hold more than we do.
RECHECK_SECONDS = 5.0

#: A read from this id gives what the learner had read and not acknowledged; from `>`, what nobody has read.
_FROM_THE_START, _NEW = "0", ">"


@dataclass
class _Entry:
    """One entry as it was read, before it is decoded."""

    worker_id: int
    entry_id: str
    fields: Mapping[bytes, bytes] | None

    @property
    def stored_bytes(self) -> int:
        return len(self.fields.get(b"data", b"")) if self.fields else 0


@dataclass
class _Stream:
    """How far the collector has read one worker's stream."""

    worker_id: int
    key: str
    position: str = _FROM_THE_START
    newest_read: tuple[int, int] = (0, 0)


class Collector:
    """Gives a learner the batches of all workers. Safe to use from several threads."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        holdings: Holdings,
        *,
        acknowledge: Acknowledge,
        max_staleness: int | None,
        workers: Callable[[], Iterable[int]],
        latest_version: Callable[[], int],
        check: Callable[[], None],
    ) -> None:
        """Prepare a collector; nothing is read yet.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            holdings: what the learner has read and not acknowledged.
            acknowledge: `next` acknowledges what a call returned at the next call, `manual` when told.
            max_staleness: batches produced by older weights than this are counted and not given out.
            workers: gives every worker id that may have batches.
            latest_version: gives the version that staleness is measured from.
            check: raises if the learner must not go on: it was closed, or replaced.
        """
        self._connection, self._keys = connection, keys
        self._acknowledge_mode, self._max_staleness = acknowledge, max_staleness
        self._workers, self._latest_version = workers, latest_version
        self._holdings, self._check = holdings, check
        self._reading = threading.Lock()
        self._streams: dict[int, _Stream] = {}
        self._read: deque[_Entry] = deque()
        self._returned: list[tuple[int, Batch]] = []
        self._look_again = Deadline(0)
        self._recheck = Deadline(RECHECK_SECONDS)
        self._batch_bytes = float(FIRST_GUESS_BYTES)

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
            if self._acknowledge_mode == "next":
                self.acknowledge(self._returned)
            self._watch_new_workers()
            taken: list[_Entry] = []
            try:
                self._returned = self._gather(deadline, max_batches, taken)
            except BaseException:  # Ctrl-C too: what was taken must come with the next call
                self._read.extendleft(reversed(taken))
                self._returned = []
                raise
            return list(self._returned)
        finally:
            self._reading.release()

    def acknowledge(self, pairs: Sequence[tuple[int, Batch]], deadline: Deadline | None = None) -> int:
        """Let the server forget batches that the learner is done with; give how many it still had.

        Raises:
            Fenced: a newer learner has taken over the run.
            PeerError: the server refused, or could not be reached in time.
        """
        entries = [(worker, batch.entry_id, "delivered") for worker, batch in pairs]
        return self._holdings.settle(entries, deadline=deadline)

    def acknowledge_returned(self, deadline: Deadline) -> None:
        """Acknowledge what the last `collect` gave out, if a further one would have done so."""
        if self._acknowledge_mode == "next" and self._reading.acquire(timeout=deadline.remaining):
            try:
                self.acknowledge(self._returned, deadline)
                self._returned = []
            finally:
                self._reading.release()

    # Reading

    def _gather(
        self, deadline: Deadline, max_batches: int | None, taken: list[_Entry]
    ) -> list[tuple[int, Batch]]:
        """Read and decode until there is enough or nothing more; note in `taken` what left the line."""
        found: list[tuple[int, Batch]] = []
        budget = COLLECT_BYTES
        while budget > 0 and (max_batches is None or len(found) < max_batches):
            if not self._read:
                self._check()
                wait = not found and not deadline.over
                missing = None if max_batches is None else max_batches - len(found)
                if not self._fill(missing, deadline if wait else None):
                    if not wait:
                        break
                    self._watch_new_workers()
                continue
            entry = self._read.popleft()
            taken.append(entry)
            batch = self._open(entry)
            if batch is not None:
                budget -= batch.raw_bytes + entry.stored_bytes
                found.append((entry.worker_id, batch))
        return found

    def _fill(self, max_batches: int | None, deadline: Deadline | None) -> bool:
        """Read once from the server; wait for entries if there is a deadline. Give whether there were any."""
        again = [stream for stream in self._streams.values() if stream.position != _NEW]
        streams = again or list(self._streams.values())
        if not streams:
            if deadline is not None:
                time.sleep(min(BLOCK_SECONDS, deadline.remaining))
            return False
        share = COLLECT_BYTES / max(1.0, self._batch_bytes) / len(streams)
        count = max(1, min(READ_COUNT, int(share), max_batches or READ_COUNT))
        command: list[str | int] = ["XREADGROUP", "GROUP", GROUP, CONSUMER, "COUNT", count]
        if deadline is not None and not again:
            wait_seconds = min(self._connection.block_seconds, deadline.remaining)
            command += ["BLOCK", max(1, int(wait_seconds * 1000))]
        command += ["STREAMS", *(stream.key for stream in streams), *(stream.position for stream in streams)]
        try:
            reply = self._connection.execute_once(*command)
        except ServerFault as error:
            if not _lost_group(error):
                raise
            for stream in streams:
                self._make_group(stream)
            return False
        except BaseException as error:
            # The reply may be lost with entries in it: they are pending now, so look there first.
            for stream in self._streams.values():
                stream.position = _FROM_THE_START
            if not isinstance(error, ConnectionFailed):
                raise
            logger.warning("%s; reading what is pending once it is back", error)
            if deadline is None or deadline.over:
                raise
            time.sleep(min(BLOCK_SECONDS, deadline.remaining))
            return False
        found = dict(stream_entries(reply))
        for stream in streams:
            self._take(stream, found.get(stream.key, []))
        return bool(self._read) or bool(again)

    def _take(self, stream: _Stream, entries: list[tuple[str, dict[bytes, bytes] | None]]) -> None:
        """Put what one stream gave into the line of entries to hand out."""
        if stream.position != _NEW:
            stream.position = entries[-1][0] if entries else _NEW
        elif entries and self._hides_entries(stream, entries):
            stream.position = _FROM_THE_START
            return
        for entry_id, fields in entries:
            entry = _Entry(stream.worker_id, entry_id, fields)
            if not self._holdings.add(stream.worker_id, entry_id, entry.stored_bytes):
                continue
            place = _place(entry_id)
            if stream.position == _NEW and place <= stream.newest_read:
                logger.warning(
                    "worker %d sent batch %s twice; the copy is dropped", stream.worker_id, entry_id
                )
                self._holdings.settle([(stream.worker_id, entry_id, "duplicate")])
                continue
            stream.newest_read = max(stream.newest_read, place)
            self._batch_bytes += 0.1 * (entry.stored_bytes - self._batch_bytes)
            self._read.append(entry)

    def _hides_entries(self, stream: _Stream, entries: list[tuple[str, dict[bytes, bytes] | None]]) -> bool:
        """Whether the server thinks that we have read entries that never reached us.

        A client that repeats a read by itself after a lost reply skips what that reply held. It shows as a gap.
        """
        incarnation, sequence = stream.newest_read
        if _place(entries[0][0]) == (incarnation, sequence + 1):
            return False
        pending = pending_count(self._connection.execute("XPENDING", stream.key, GROUP))
        return pending > self._holdings.count(stream.worker_id) + len(entries)

    def _open(self, entry: _Entry) -> Batch | None:
        """Give the batch of an entry; None, and counted, if there is none to give out."""
        reason = "trimmed"
        if entry.fields is not None:
            try:
                batch = self._decode(entry, entry.fields)
            except (WireError, KeyError, ValueError) as error:
                logger.warning(
                    "worker %d: batch %s cannot be read: %s", entry.worker_id, entry.entry_id, error
                )
                reason = "corrupt"
            else:
                if self._max_staleness is None or batch.staleness <= self._max_staleness:
                    return batch
                reason = "stale"
        self._holdings.settle([(entry.worker_id, entry.entry_id, reason)])
        return None

    def _decode(self, entry: _Entry, fields: Mapping[bytes, bytes]) -> Batch:
        content = decode(fields[b"data"])
        if not isinstance(content, dict):
            raise WireError("a batch must be a dictionary")
        batch = Batch(content)
        batch.worker_id = entry.worker_id
        batch.incarnation, batch.sequence = _place(entry.entry_id)
        batch.version = int(fields[b"version"])
        batch.staleness = max(0, self._latest_version() - batch.version)
        batch.rows = int(fields[b"rows"])
        batch.raw_bytes = int(fields[b"raw_bytes"])
        batch.stored_bytes = int(fields[b"stored_bytes"])
        batch.sent_at = float(fields[b"sent_at"])
        batch.received_at = time.time()
        return batch

    # Streams

    def _watch_new_workers(self) -> None:
        if not self._look_again.over:
            return
        new = [worker for worker in self._workers() if worker not in self._streams]
        self._holdings.take_over(new)
        for worker in new:
            stream = _Stream(worker, self._keys.experiences(worker))
            self._make_group(stream)
            self._streams[worker] = stream
        self._look_again = Deadline(BLOCK_SECONDS)
        if self._recheck.over:
            self._recheck = Deadline(RECHECK_SECONDS)
            self._find_hidden_entries()

    def _find_hidden_entries(self) -> None:
        """Read pending entries again where there are some that we do not hold: another learner read them."""
        streams = list(self._streams.values())
        try:
            replies = self._connection.execute_all([("XPENDING", stream.key, GROUP) for stream in streams])
        except ServerFault as error:
            if not _lost_group(error):
                raise
            return  # the next read finds out, and makes the group again
        for stream, reply in zip(streams, replies, strict=True):
            if pending_count(reply) > self._holdings.count(stream.worker_id):
                stream.position = _FROM_THE_START

    def _make_group(self, stream: _Stream) -> None:
        try:
            self._connection.execute("XGROUP CREATE", stream.key, GROUP, "0", "MKSTREAM")
        except ServerOutOfMemory:
            pass  # the worker made it with its stream; and if not, the next read finds out
        except ServerFault as error:
            if "BUSYGROUP" not in str(error):
                raise


def _place(entry_id: str) -> tuple[int, int]:
    incarnation, _, sequence = entry_id.partition("-")
    return int(incarnation), int(sequence)


def _lost_group(error: ServerFault) -> bool:
    """Whether a stream or its group is gone: deleted, or the server came back empty."""
    return any(sign in str(error) for sign in ("NOGROUP", "UNBLOCKED", "requires the key to exist"))
