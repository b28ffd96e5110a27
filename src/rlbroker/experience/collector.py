"""The learner's half: one blocking read over every worker's stream, and acknowledge-and-delete in one step."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlbroker.config import Acknowledge
from rlbroker.connection import BLOCK_SECONDS, Connection, Script
from rlbroker.deadline import Deadline
from rlbroker.errors import ConnectionFailed, ServerFault, WireError
from rlbroker.keys import GROUP, Keys
from rlbroker.records import Batch
from rlbroker.replies import pending_count, stream_entries
from rlbroker.wire import Limits, decode

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

ACKNOWLEDGE = Script(
    "acknowledge",
    """
    -- KEYS: a worker's experiences, its counts
    -- ARGV: group, then for each entry: id, stored bytes, what became of it
    local removed = 0
    for i = 2, #ARGV, 3 do
      if redis.call('XACK', KEYS[1], ARGV[1], ARGV[i]) == 1 then
        redis.call('XDEL', KEYS[1], ARGV[i])
        redis.call('HINCRBY', KEYS[2], ARGV[i + 2], 1)
        redis.call('HINCRBY', KEYS[2], 'removed_bytes', ARGV[i + 1])
        removed = removed + 1
      end
    end
    return removed
    """,
)


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
    """What the collector knows of one worker's stream."""

    worker_id: int
    key: str
    counts_key: str
    position: str = _FROM_THE_START
    newest_read: tuple[int, int] = (0, 0)
    #: Entries read and not acknowledged, with their stored bytes.
    in_hand: dict[str, int] = field(default_factory=dict)


class Collector:
    """Gives a learner the batches of all workers. Safe to use from several threads."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        acknowledge: Acknowledge,
        max_staleness: int | None,
        workers: Callable[[], Iterable[int]],
        latest_version: Callable[[], int],
        limits: Limits | None = None,
    ) -> None:
        """Prepare a collector; nothing is read yet.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            acknowledge: `next` acknowledges what a call returned at the next call, `manual` when told.
            max_staleness: batches produced by older weights than this are counted and not given out.
            workers: gives every worker id that may have batches.
            latest_version: gives the version that staleness is measured from.
            limits: what a batch may ask for when it is decoded.
        """
        self._connection, self._keys = connection, keys
        self._acknowledge_mode, self._max_staleness = acknowledge, max_staleness
        self._workers, self._latest_version = workers, latest_version
        self._limits = limits or Limits()
        self._lock = threading.RLock()
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
        with self._lock:
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

    def acknowledge(self, pairs: Sequence[tuple[int, Batch]]) -> int:
        """Let the server forget batches that the learner is done with; give how many it still had.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        return self._settle([(worker, batch.entry_id, "delivered") for worker, batch in pairs])

    def acknowledge_returned(self) -> int:
        """Acknowledge what the last `collect` gave out."""
        with self._lock:
            done, self._returned = self._returned, []
            return self.acknowledge(done)

    def unacknowledged(self) -> dict[int, int]:
        """Give how many batches of each worker were read and not acknowledged."""
        with self._lock:
            return {worker: len(stream.in_hand) for worker, stream in self._streams.items()}

    # Reading

    def _gather(
        self, deadline: Deadline, max_batches: int | None, taken: list[_Entry]
    ) -> list[tuple[int, Batch]]:
        """Read and decode until there is enough or nothing more; note in `taken` what left the line."""
        found: list[tuple[int, Batch]] = []
        budget = COLLECT_BYTES
        while budget > 0 and (max_batches is None or len(found) < max_batches):
            if not self._read:
                wait = not found and not deadline.over
                missing = None if max_batches is None else max_batches - len(found)
                if not self._fill(missing, deadline if wait else None):
                    if not wait:
                        break
                    self._watch_new_workers()
                continue
            entry = self._read.popleft()
            taken.append(entry)
            budget -= entry.stored_bytes
            batch = self._open(entry)
            if batch is not None:
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
        share = COLLECT_BYTES / self._batch_bytes / len(streams)
        count = max(1, min(READ_COUNT, int(share), max_batches or READ_COUNT))
        command: list[str | int] = ["XREADGROUP", "GROUP", GROUP, CONSUMER, "COUNT", count]
        if deadline is not None and not again:
            wait_seconds = min(self._connection.block_seconds, deadline.remaining)
            command += ["BLOCK", max(1, int(wait_seconds * 1000))]
        command += ["STREAMS", *(stream.key for stream in streams), *(stream.position for stream in streams)]
        try:
            reply = self._connection.execute_once(*command)
        except ConnectionFailed as error:
            # The reply may be lost with entries in it: they are pending now, so look there first.
            self._read_pending_again()
            logger.warning("%s; reading what is pending once it is back", error)
            if deadline is None or deadline.over:
                raise
            time.sleep(min(BLOCK_SECONDS, deadline.remaining))
            return False
        except ServerFault as error:
            if not _lost_group(error):
                raise
            for stream in streams:
                self._make_group(stream)
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
            if entry_id in stream.in_hand:
                continue
            entry = _Entry(stream.worker_id, entry_id, fields)
            place = _place(entry_id)
            stream.in_hand[entry_id] = entry.stored_bytes
            if stream.position == _NEW and place <= stream.newest_read:
                logger.warning(
                    "worker %d sent batch %s twice; the copy is dropped", stream.worker_id, entry_id
                )
                self._settle([(stream.worker_id, entry_id, "duplicate")])
                continue
            stream.newest_read = max(stream.newest_read, place)
            self._batch_bytes += 0.1 * (entry.stored_bytes - self._batch_bytes)
            self._read.append(entry)

    def _hides_entries(self, stream: _Stream, entries: list[tuple[str, dict[bytes, bytes] | None]]) -> bool:
        """Whether the server thinks that we have read entries that never reached us.

        A client that repeats a read by itself after a lost reply skips what that reply held. It shows as a gap.
        """
        incarnation, sequence = stream.newest_read
        first = _place(entries[0][0])
        if first == (incarnation, sequence + 1) or (first[0] > incarnation and first[1] == 1):
            return False
        pending = pending_count(self._connection.execute("XPENDING", stream.key, GROUP))
        return pending > len(stream.in_hand) + len(entries)

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
        self._settle([(entry.worker_id, entry.entry_id, reason)])
        return None

    def _decode(self, entry: _Entry, fields: Mapping[bytes, bytes]) -> Batch:
        content = decode(fields[b"data"], limits=self._limits)
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

    # Acknowledging

    def _settle(self, entries: Sequence[tuple[int, str, str]]) -> int:
        """Acknowledge and delete entries, each with what became of it, in one step for each worker."""
        by_worker: dict[int, list[Any]] = {}
        with self._lock:
            for worker, entry_id, reason in entries:
                size = self._streams[worker].in_hand.get(entry_id)
                if size is not None:
                    by_worker.setdefault(worker, []).extend((entry_id, size, reason))
            calls = [
                (
                    ACKNOWLEDGE,
                    (self._streams[worker].key, self._streams[worker].counts_key),
                    (GROUP, *arguments),
                )
                for worker, arguments in by_worker.items()
            ]
            removed = sum(int(number) for number in self._connection.run_all(calls))
            for worker, arguments in by_worker.items():
                for entry_id in arguments[::3]:
                    self._streams[worker].in_hand.pop(entry_id, None)
            return removed

    # Streams

    def _watch_new_workers(self) -> None:
        if not self._look_again.over:
            return
        for worker in self._workers():
            if worker not in self._streams:
                stream = _Stream(worker, self._keys.experiences(worker), self._keys.counts(worker))
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
            if pending_count(reply) > len(stream.in_hand):
                stream.position = _FROM_THE_START

    def _make_group(self, stream: _Stream) -> None:
        try:
            self._connection.execute("XGROUP CREATE", stream.key, GROUP, "0", "MKSTREAM")
        except ServerFault as error:
            if "BUSYGROUP" not in str(error):
                raise

    def _read_pending_again(self) -> None:
        for stream in self._streams.values():
            stream.position = _FROM_THE_START


def _place(entry_id: str) -> tuple[int, int]:
    incarnation, _, sequence = entry_id.partition("-")
    return int(incarnation), int(sequence)


def _lost_group(error: ServerFault) -> bool:
    """Whether a stream or its group is gone: deleted, or the server came back empty."""
    return any(sign in str(error) for sign in ("NOGROUP", "UNBLOCKED", "requires the key to exist"))
