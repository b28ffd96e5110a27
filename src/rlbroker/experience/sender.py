"""The worker's half: batches go to its own stream, in order, once, and within the queue's bounds.

The fast path is one plain XADD. The worker is the only one that adds to its stream and the learner only
removes, so what was free at the last look can only have grown since: the sender looks again only when its own
sends since then could have filled the queue.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rlbroker.config import RunSettings, WhenFull
from rlbroker.connection import Connection, Script, flat
from rlbroker.deadline import Backoff, Deadline
from rlbroker.errors import BatchTooLarge, ConnectionFailed, Fenced, QueueFull, ServerOutOfMemory
from rlbroker.keys import GROUP, Keys
from rlbroker.records import Registration, SendReceipt
from rlbroker.replies import pending_count
from rlbroker.wire import Limits, encode

#: How long a sender at a full queue waits between two looks, at most.
LONGEST_LOOK_SECONDS = 0.05

OPEN_QUEUE = Script(
    "open_queue",
    """
    -- KEYS: the worker's experiences, its counts
    -- ARGV: incarnation, group
    local known = tonumber(redis.call('HGET', KEYS[2], 'incarnation') or '0')
    if known > tonumber(ARGV[1]) then
      return redis.error_reply('FENCED a newer process has this worker id')
    end
    if redis.call('EXISTS', KEYS[1]) == 0 or #redis.call('XINFO', 'GROUPS', KEYS[1]) == 0 then
      redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[2], '0', 'MKSTREAM')
    end
    -- Bytes that were ever sent: those that were removed, and those of what an earlier life left.
    local total = tonumber(redis.call('HGET', KEYS[2], 'removed_bytes') or '0') or 0
    local position = '-'
    while true do
      local entry = redis.call('XRANGE', KEYS[1], position, '+', 'COUNT', 1)[1]
      if not entry then break end
      for i = 1, #entry[2], 2 do
        if entry[2][i] == 'stored_bytes' then total = total + (tonumber(entry[2][i + 1]) or 0) end
      end
      position = '(' .. entry[1]
    end
    if known < tonumber(ARGV[1]) then
      redis.call('HSET', KEYS[2], 'incarnation', ARGV[1])
      -- What lives before the last one counted under their own names becomes one sum; the last may still count.
      local counts = redis.call('HGETALL', KEYS[2])
      for i = 1, #counts, 2 do
        local reason, life = string.match(counts[i], '^([%a_]+):(%d+)$')
        if reason and tonumber(life) < known then
          redis.call('HSET', KEYS[2], reason,
            (tonumber(redis.call('HGET', KEYS[2], reason) or '0') or 0) + (tonumber(counts[i + 1]) or 0))
          redis.call('HDEL', KEYS[2], counts[i])
        end
      end
      -- From here on every entry of an older incarnation has too small an id and is refused.
      redis.call('XDEL', KEYS[1], redis.call('XADD', KEYS[1], ARGV[1] .. '-0', 'incarnation', ARGV[1]))
    end
    return string.format('%.0f', total)
    """,
)

DROP_OLDEST = Script(
    "drop_oldest",
    """
    -- KEYS: the worker's experiences, its counts
    -- ARGV: group, entries that may stay waiting, bytes that may stay held, bytes that were ever sent, incarnation
    if redis.call('HGET', KEYS[2], 'incarnation') ~= ARGV[5] then
      return redis.error_reply('FENCED a newer process has this worker id')
    end
    local function waiting()
      local pending = redis.call('XPENDING', KEYS[1], ARGV[1])[1]
      return redis.call('XLEN', KEYS[1]) - pending
    end
    local last_read = '0-0'
    for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
      local fields = {}
      for i = 1, #group, 2 do fields[group[i]] = group[i + 1] end
      if fields['name'] == ARGV[1] then last_read = fields['last-delivered-id'] end
    end
    local removed = tonumber(redis.call('HGET', KEYS[2], 'removed_bytes') or '0') or 0
    local dropped = 0
    while waiting() > tonumber(ARGV[2]) or tonumber(ARGV[4]) - removed > tonumber(ARGV[3]) do
      -- What the learner has read is in its hands and cannot be taken back.
      local oldest = redis.call('XRANGE', KEYS[1], '(' .. last_read, '+', 'COUNT', 1)[1]
      if not oldest then break end
      for i = 1, #oldest[2], 2 do
        if oldest[2][i] == 'stored_bytes' then removed = removed + tonumber(oldest[2][i + 1]) end
      end
      redis.call('XDEL', KEYS[1], oldest[1])
      dropped = dropped + 1
    end
    redis.call('HINCRBY', KEYS[2], 'dropped_oldest', dropped)
    redis.call('HSET', KEYS[2], 'removed_bytes', string.format('%.0f', removed))
    return dropped
    """,
)


class Sender:
    """Sends the batches of one worker. Safe to use from several threads."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        place: Registration,
        *,
        settings: Callable[[Deadline], RunSettings],
        when_full: WhenFull | None,
        compression: bool,
    ) -> None:
        """Take over the worker's queue: from here on nothing of an older incarnation is accepted.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            place: whose queue, and in which life.
            settings: gives the run's settings, waiting for the learner where it has to.
            when_full: what to do at a full queue; None for what the run says.
            compression: whether arrays are compressed where that makes them smaller.

        Raises:
            Fenced: a newer process has this worker id.
        """
        self._connection, self._settings = connection, settings
        self._worker_id, self._incarnation = place.worker_id, place.incarnation
        self._when_full, self._compression = when_full, compression
        self._stream, self._counts = keys.experiences(place.worker_id), keys.counts(place.worker_id)
        self._lock = threading.Lock()
        self._sequence = 0
        self._refused = {"dropped_newest": 0, "fenced": 0, "stopped": 0}
        self._total_bytes = int(
            connection.run(OPEN_QUEUE, (self._stream, self._counts), (place.incarnation, GROUP))
        )
        # What was seen at the last look, plus everything sent since.
        self._waiting = self._in_hand = 0
        self._held_bytes = 0
        self._look()

    @property
    def sent(self) -> int:
        """Batches that entered the queue in this life of the worker."""
        return self._sequence

    def send(
        self,
        batch: dict[str, Any],
        *,
        version: int,
        timeout_seconds: float,
        stopped: Callable[[], bool] = lambda: False,
    ) -> SendReceipt:
        """Put one batch into the queue and give what happened to it.

        Args:
            batch: nested dictionary of tensors, arrays and plain values.
            version: the weights that produced it.
            timeout_seconds: how long to wait for room or for a server that is away.
            stopped: tells whether to give up waiting for room, as the worker was told to stop.

        Raises:
            UnsupportedType: something in the batch cannot travel; its path is named.
            BatchTooLarge: the batch alone exceeds the queue's byte bound, or 1 GiB of arrays.
            QueueFull: no room in time; nothing was stored and the caller still has the batch.
            Fenced: a newer process has this worker id.
            ConnectionFailed: the server stayed away; whether the batch was stored is unknown.
            PeerError: the server refused.
        """
        data = encode(batch, compression=self._compression)
        rows, raw_bytes = _shape_of(batch)
        if raw_bytes > Limits().max_raw_bytes:
            raise BatchTooLarge(
                f"the batch holds {raw_bytes:,} bytes; no more than {Limits().max_raw_bytes:,} may travel"
            )
        deadline = Deadline(timeout_seconds)
        settings = self._settings(deadline)
        if len(data) > settings.max_queue_bytes:
            raise BatchTooLarge(
                f"the batch takes {len(data):,} bytes and the queue {settings.max_queue_bytes:,} (max_queue_bytes); "
                "send smaller batches, or raise the bound on the learner"
            )
        if not self._lock.acquire(timeout=deadline.remaining):
            raise QueueFull(
                f"worker {self._worker_id}'s queue is full, and another thread of it has been waiting for room for "
                f"{deadline.seconds:g} s"
            )
        try:
            refusal, dropped = self._make_room(len(data), settings, deadline, stopped)
            if refusal:
                self._count(refusal, deadline)
            else:
                fields = {
                    "version": version,
                    "rows": rows,
                    "raw_bytes": raw_bytes,
                    "stored_bytes": len(data),
                    "sent_at": f"{time.time():.3f}",
                    "data": data,
                }
                self._store(fields, deadline)
            sequence = 0 if refusal else self._sequence
        except Fenced:
            self._count("fenced", deadline)
            raise
        finally:
            self._lock.release()
        return SendReceipt(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            sequence=sequence,
            version=version,
            rows=rows,
            raw_bytes=raw_bytes,
            stored_bytes=len(data),
            accepted=not refusal,
            dropped=dropped,
        )

    def _make_room(
        self, size: int, settings: RunSettings, deadline: Deadline, stopped: Callable[[], bool]
    ) -> tuple[str, int]:
        """Give why there is no room for a batch of this size ('' if there is), and how many were dropped for it."""
        when_full = self._when_full or settings.when_full
        if self._fits(size, settings):
            return "", 0
        self._look()
        if when_full == "drop_oldest" and not self._fits(size, settings):
            limits = (settings.max_queue_size - 1, settings.max_queue_bytes - size)
            facts = (GROUP, *limits, self._total_bytes, self._incarnation)
            keys = (self._stream, self._counts)
            dropped = int(self._connection.run(DROP_OLDEST, keys, facts, deadline=deadline))
            self._look()
            # What the learner has in its hands cannot be dropped, so there may still be no room.
            return "" if self._fits(size, settings) else "dropped_newest", dropped
        backoff = Backoff(first=0.001, longest=LONGEST_LOOK_SECONDS)
        while not self._fits(size, settings):
            if when_full == "drop_newest":
                return "dropped_newest", 0
            if stopped():
                return "stopped", 0
            if deadline.over:
                raise QueueFull(
                    f"worker {self._worker_id}'s queue stayed full for {deadline.seconds:g} s: {self._waiting} batches "
                    f"waiting (max_queue_size {settings.max_queue_size}), {self._in_hand} in the learner's hands, "
                    f"{self._held_bytes:,} bytes in all (max_queue_bytes {settings.max_queue_bytes:,}); the learner "
                    "collects or acknowledges too slowly. Raise timeout or the bounds, or choose another when_full"
                )
            time.sleep(backoff.next(deadline))
            self._look()
        return "", 0

    def _fits(self, size: int, settings: RunSettings) -> bool:
        return self._waiting < settings.max_queue_size and self._held_bytes + size <= settings.max_queue_bytes

    def _look(self) -> None:
        length, pending, (removed_bytes, newest) = self._connection.execute_all(
            [
                ("XLEN", self._stream),
                ("XPENDING", self._stream, GROUP),
                ("HMGET", self._counts, "removed_bytes", "incarnation"),
            ]
        )
        self._check_place(newest)
        self._in_hand = pending_count(pending)
        self._waiting = int(length) - self._in_hand
        if length == 0:  # corrects what a batch of unknown fate added
            self._total_bytes = int(removed_bytes or 0)
        self._held_bytes = self._total_bytes - int(removed_bytes or 0)

    def _store(self, fields: dict[str, Any], deadline: Deadline) -> None:
        # The number is spent even if this fails: a late copy of this batch must never pass for the next one.
        self._sequence += 1
        entry_id = f"{self._incarnation}-{self._sequence}"
        try:
            stored = self._append(entry_id, flat(fields), deadline)
        except ConnectionFailed:  # it may be stored, so it counts until the queue was seen empty
            self._note_stored(int(fields["stored_bytes"]))
            raise
        # An id that the stream has passed: our own entry, whose reply was lost, unless a newer process is there.
        if not stored:
            self._check_place(self._connection.execute("HGET", self._counts, "incarnation"))
        self._note_stored(int(fields["stored_bytes"]))

    def _append(self, entry_id: str, fields: list[Any], deadline: Deadline) -> bool:
        backoff = Backoff()
        while True:
            try:
                return self._connection.append(self._stream, entry_id, fields, deadline=deadline)
            except ServerOutOfMemory:  # as good as a full queue: the learner's reading makes room
                if deadline.over:
                    raise
                time.sleep(backoff.next(deadline))

    def _note_stored(self, size: int) -> None:
        self._total_bytes += size
        self._held_bytes += size
        self._waiting += 1

    def _check_place(self, newest: bytes | None) -> None:
        if newest is None or int(newest) != self._incarnation:
            raise Fenced(
                f"worker {self._worker_id} was replaced by a newer process; nothing of this one is accepted"
            )

    def _count(self, reason: str, deadline: Deadline) -> None:
        self._refused[reason] += 1
        # An absolute number under this incarnation's name: writing it twice does no harm.
        field = f"{reason}:{self._incarnation}"
        self._connection.execute("HSET", self._counts, field, self._refused[reason], deadline=deadline)


def _shape_of(batch: dict[str, Any]) -> tuple[int, int]:
    """Give the leading dimension of the first array or tensor, and the bytes of all of them."""
    rows, raw_bytes = 0, 0
    waiting: deque[Any] = deque([batch])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, dict):
            waiting.extend(node.values())
        elif isinstance(node, (list, tuple)):
            waiting.extend(node)
        elif hasattr(node, "nbytes") and hasattr(node, "shape"):
            raw_bytes += int(node.nbytes)
            rows = rows or (int(node.shape[0]) if len(node.shape) else 0)
    return rows, raw_bytes
