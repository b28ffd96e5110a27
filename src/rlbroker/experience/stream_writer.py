"""Writes one worker's batches to its stream, once and in order, even if the server loses data.

Only the worker adds to its stream, and learners only remove. So since the last `refresh` the queue can only have become
emptier, apart from what was sent since.

All commands go over one channel. When it has to reconnect, the server may have lost acknowledged writes: the queue is
then opened again, and pending batches are sent again before any new one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection, flat
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.error_mapping import RequestTooLarge, SlotMigrating, id_was_passed
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.backend.replies import (
    entry_place,
    group_position,
    newest_place,
    parsing,
    pending_summary,
    stored_integer,
)
from rlbroker.backend.scripts import Script
from rlbroker.config import RunSettings
from rlbroker.errors import ConnectionFailed, Fenced, PeerError, RunLost, ServerFault, raise_again
from rlbroker.experience.levels import Confirmation
from rlbroker.experience.outgoing import PendingBatch, PendingBatches
from rlbroker.types import Registration

logger = logging.getLogger("rlbroker")

OPEN_QUEUE = Script.load("experience/lua/open_queue.lua")
WRITE_COUNTS = Script.load("experience/lua/write_counts.lua")
DROP_OLDEST = Script.load("experience/lua/drop_oldest.lua")

#: Bytes that are sent again in one round trip.
RESEND_BYTES = 8 << 20

#: A number that no batch has, so that the queue counts its bytes anew.
NO_SEQUENCE = (1 << 53) - 1

T = TypeVar("T")


class QueueSize(NamedTuple):
    """How full a queue was at the last `refresh`, plus what was sent since.

    Attributes:
        through: the number of the last batch that the server is known to have, or to have had.
        sent_bytes: bytes of all batches that were ever sent, up to that one.
        queued_bytes: bytes of the batches that wait or are in the learner's hands.
        waiting: batches that no learner has read.
        in_hand: batches that are pending: read and not acknowledged.
    """

    through: int = 0
    sent_bytes: int = 0
    queued_bytes: int = 0
    waiting: int = 0
    in_hand: int = 0

    def add(self, batch: PendingBatch) -> QueueSize:
        """Return the size with a batch that was stored, unless that is counted already."""
        if batch.sequence <= self.through:
            return self
        return QueueSize(
            batch.sequence,
            self.sent_bytes + batch.stored_bytes,
            self.queued_bytes + batch.stored_bytes,
            self.waiting + 1,
            self.in_hand,
        )

    def update(self, length: int, in_hand: int, removed_bytes: int) -> QueueSize:
        """Return the size with the server's numbers.

        Args:
            length: batches in the stream.
            in_hand: pending batches among them.
            removed_bytes: bytes of all batches that were ever removed from the queue.
        """
        # With an empty queue, this corrects a difference that a fault left.
        sent_bytes = self.sent_bytes if length else removed_bytes
        return QueueSize(self.through, sent_bytes, sent_bytes - removed_bytes, length - in_hand, in_hand)


class StreamWriter:
    """Writes the batches of one worker, and keeps those that have not reached their level. Not thread-safe.

    Every operation is repeated until its deadline while the connection is broken. It raises `Fenced` if a newer process
    has this worker id.

    Attributes:
        channel: the connection to the stream's server.
        pending: batches that have not reached their level, and the number of the last one.
        confirmation: how they are confirmed.
        size: how full the queue is, and which batches it has.
        stale: whether the server may have lost something since the queue was opened.
        opened: whether this incarnation has opened the queue.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        registration: Registration,
        confirmation: Confirmation,
        rejoin: Callable[[Channel], None],
    ) -> None:
        """Create a writer; the first operation opens the queue, and fences older incarnations of the worker.

        Args:
            confirmation: how batches are confirmed.
            rejoin: registers the worker again if the server has lost its registration.
        """
        self._connection, self._keys, self._rejoin = connection, keys, rejoin
        self._worker_id, self._incarnation = registration.worker_id, registration.incarnation
        self.confirmation, self.pending, self.size = confirmation, PendingBatches(), QueueSize()
        self._written_sequence = 0
        self.stale = self.opened = False
        self._opening = False  #: whether the queue is being opened; still true after an attempt that failed
        #: What this incarnation counted, in absolute numbers, so that writing them again does no harm.
        self._counted = {"dropped_newest": 0, "fenced": 0, "stopped": 0, "dropped_oldest": 0}
        self._locate()

    def _locate(self) -> None:
        """Use the keys that the queue has now: a run that was opened again may have other shards."""
        self.stream_key = self._keys.experiences(self._worker_id)
        self._counts_key = self._keys.counts(self._worker_id)
        self.channel = Channel(self._connection, self.stream_key)

    @property
    def has_unwritten_counts(self) -> bool:
        """Whether batches were sent since the counts were written."""
        return self._written_sequence < self.pending.sequence

    @property
    def must_open(self) -> bool:
        """Whether the next operation opens the queue again."""
        return self.stale or self._opening

    def refresh(self, deadline: Deadline | None = None) -> None:
        """Read how full the queue is, and release the batches that the learner has acknowledged."""
        self._repeat(self._refresh, deadline)

    def confirm(self, deadline: Deadline) -> None:
        """Store the unconfirmed batch if it is not stored, and wait until it has reached its level."""
        self._repeat(self._confirm, deadline)

    def advance(self, deadline: Deadline) -> None:
        """Confirm the unconfirmed batch if there is one; otherwise refresh."""
        self._repeat(self._confirm if self.pending.unconfirmed else self._refresh, deadline)

    def drop_oldest(self, stored_bytes: int, settings: RunSettings, deadline: Deadline) -> int:
        """Drop waiting batches until one of this size fits, as far as possible; return how many were dropped."""
        return self._repeat(lambda: self._drop_oldest(stored_bytes, settings), deadline)

    def write_counts(self, deadline: Deadline) -> None:
        """Write the counts of this incarnation."""
        self._repeat(self._write_counts, deadline)

    def count(self, outcome: str, deadline: Deadline, by: int = 1) -> None:
        """Count batches that are not accepted, for this incarnation even after a newer one has joined."""
        counted = (f"{outcome}:{self._incarnation}", self._counted[outcome] + by)
        self._connection.run(
            WRITE_COUNTS, (self._counts_key,), (self._incarnation, *counted), deadline=deadline
        )
        self._counted[outcome] += by

    def count_fenced(self, *, refused: bool) -> None:
        """Count and release the pending batches that are not on the server, after this worker was fenced.

        With `refused`, a batch without a number is lost too.
        """
        sequences = [batch.sequence for batch in self.pending]
        try:
            # In this order: a newer process writes the worker's number there before it adds to the stream.
            info = self._connection.execute("XINFO", "STREAM", self.stream_key)
            written = self._connection.execute("HGET", self._counts_key, f"sent:{self._incarnation}")
            newest = newest_place(info)
            with parsing(self._counts_key):
                stored = max(stored_integer(written, 0), newest[1] if newest[0] == self._incarnation else 0)
            lost = sum(sequence > stored for sequence in sequences)
            self.count("fenced", Deadline(self._connection.timeout_seconds), by=lost + refused)
        except PeerError as error:
            logger.warning(
                "worker %d was replaced, and cannot count its batches: %s", self._worker_id, str(error)
            )
        self.pending.clear()

    def close(self) -> None:
        """Close the connection."""
        self.channel.close()

    def _repeat(self, operation: Callable[[], T], deadline: Deadline | None) -> T:
        """Run an operation that is harmless to repeat, after opening the queue if the server may have lost it."""

        def attempt() -> T:
            if self.stream_key != self._keys.experiences(self._worker_id):
                self.channel.close()
                self._locate()
            self.channel.redirected = False
            interrupted, self._opening = self._opening, True
            if self.channel.connect() or interrupted or self.stale:
                self._open()
            self._opening = False
            try:
                return operation()
            finally:
                # If another node answered, also within `_open`, its losses do not break this connection.
                self.stale |= self.channel.redirected

        return self._connection.retry(attempt, deadline)

    def _open(self) -> None:
        """Open the queue, and send the pending batches again that the server does not have."""
        self.stale = False
        # Rejoin first: the queue alone does not show that a newer process had joined before the loss.
        if self._keys.shards:
            home = Channel(self._connection, self._keys.meta)
            try:
                self._rejoin(home)
                home.give_back()
            finally:
                home.close()
        else:
            self._rejoin(self.channel)
        # Without the reply to an earlier attempt, this worker does not know how many bytes the queue has.
        sequence = self.pending.sequence if self.opened else NO_SEQUENCE
        last, sent_bytes = map(int, self._run(OPEN_QUEUE, (self._incarnation, GROUP, sequence)))
        if sent_bytes >= 0:
            self.size = self.size._replace(through=min(last, self.pending.sequence), sent_bytes=sent_bytes)
        else:
            for batch in self.pending:  # all are stored, perhaps without an answer
                self.size = self.size.add(batch)
        self.opened = True
        missing = [batch for batch in self.pending if not self._is_stored(batch)]
        if last < self.pending.sequence - (self.pending.unconfirmed is not None):
            logger.warning(
                "the server lost what worker %d sent after batch %d; %d %s sent again",
                self._worker_id,
                last,
                len(missing),
                "is" if len(missing) == 1 else "are",
            )
        for some in _in_slices(missing):
            self._add_all(some)
        self._write_counts()

    def _add_all(self, batches: Sequence[PendingBatch], *further: tuple[Any, ...]) -> list[Any]:
        """Add batches to the stream and run further commands, in one round trip; return the replies to the latter."""
        before = {batch.sequence for batch in batches if batch.uncertain}
        for batch in batches:  # until there is an answer, as it may arrive after the next command
            batch.uncertain = True
        try:
            replies = self.channel.execute_all([*map(self._add_command, batches), *further])
        except RequestTooLarge as error:
            self._give_up(max(batches, key=lambda batch: batch.stored_bytes), error)
        for batch, reply in zip(batches, replies, strict=False):
            batch.uncertain = batch.sequence in before
            self._note_stored(batch, reply)
        return replies[len(batches) :]

    def _give_up(self, batch: PendingBatch, error: RequestTooLarge) -> NoReturn:
        """Release a batch that the server never takes, as those behind it would wait for ever."""
        if not batch.accepted:
            raise error  # its caller still has it
        self.pending.discard(batch)
        logger.error("batch %d of worker %d is lost: %s", batch.sequence, self._worker_id, error)
        raise ConnectionFailed(str(error)) from error  # the server has closed the connection

    def _is_stored(self, batch: PendingBatch) -> bool:
        return batch.sequence <= self.size.through

    def _add_command(self, batch: PendingBatch) -> tuple[Any, ...]:
        entry_id = f"{self._incarnation}-{batch.sequence}"
        # NOMKSTREAM: a server that lost the stream must not accept a batch before OPEN_QUEUE has created it again.
        return ("XADD", self.stream_key, "NOMKSTREAM", entry_id, *batch.fields)

    def _note_stored(self, batch: PendingBatch, reply: Any) -> None:
        if reply is None:
            self.stale = True
            raise RunLost(f"the server lost the queue of worker {self._worker_id}")
        if isinstance(reply, ServerFault) and id_was_passed(reply):
            self._check_stored(batch)
        elif isinstance(reply, PeerError):
            raise_again(reply)
        self.size = self.size.add(batch)

    def _check_stored(self, batch: PendingBatch) -> None:
        """Raise unless an id was refused because the batch is stored already."""
        newest, info = self._replies(
            [("HGET", self._counts_key, "incarnation"), ("XINFO", "STREAM", self.stream_key)]
        )
        self._check_incarnation(newest)
        incarnation, number = newest_place(info)
        if incarnation != self._incarnation or number < batch.sequence:
            raise ServerFault(
                f"another program wrote the entry {incarnation}-{number} to {self.stream_key}, so the server accepts "
                f"no more batches of worker {self._worker_id}; start this worker again"
            )

    def _confirm(self) -> None:
        batch = self.pending.unconfirmed
        if batch is None:  # given up while the queue was opened
            return
        further: list[tuple[Any, ...]] = []
        if self.confirmation.waits:
            # WAIT waits for what this connection wrote last, so each attempt must write something.
            counts = ("HSET", self._counts_key, *self._count_fields())
            further = [counts, self.confirmation.wait_command()]
        replies = self._add_all([] if self._is_stored(batch) else [batch], *further)
        if further:
            if self.channel.redirected:  # the batch was written over another connection than the WAIT's
                batch.uncertain = True
                raise SlotMigrating(f"the queue of worker {self._worker_id} is being moved to another node")
            if not self.confirmation.accept(replies[-1]):
                assert self.channel.server is not None
                batch.uncertain = True
                self.confirmation.fail(replies[-1], self.channel.server, f"batch {batch.sequence}")
        self.pending.confirm(batch, keep=self.confirmation.level == "learner")

    def _write_counts(self) -> None:
        self.channel.run(WRITE_COUNTS, (self._counts_key,), (self._incarnation, *self._count_fields()))
        self._written_sequence = self._stored_sequence

    @property
    def _stored_sequence(self) -> int:
        unconfirmed = self.pending.unconfirmed
        return self.pending.sequence - (unconfirmed is not None and not self._is_stored(unconfirmed))

    def _count_fields(self) -> list[Any]:
        counted = {"sent": self._stored_sequence}
        counted |= {outcome: number for outcome, number in self._counted.items() if number}
        return flat({f"{name}:{self._incarnation}": number for name, number in counted.items()})

    def _refresh(self) -> None:
        # The group's position before its pending entries: an entry read in between must not seem acknowledged.
        length, groups, summary, (removed_bytes, newest) = self._replies(
            [
                ("XLEN", self.stream_key),
                ("XINFO", "GROUPS", self.stream_key),
                ("XPENDING", self.stream_key, GROUP),
                ("HMGET", self._counts_key, "removed_bytes", "incarnation"),
            ]
        )
        self._check_incarnation(newest)
        in_hand, first_pending = pending_summary(summary)
        with parsing(self._counts_key):
            self.size = self.size.update(int(length), in_hand, stored_integer(removed_bytes, 0))
        delivered = group_position(groups, GROUP)

        def is_acknowledged(batch: PendingBatch) -> bool:
            place = (self._incarnation, batch.sequence)
            return place <= delivered and not (in_hand and place >= first_pending)

        self.pending.release_oldest(is_acknowledged)

    def _drop_oldest(self, stored_bytes: int, settings: RunSettings) -> int:
        limits = (settings.max_queue_size - 1, settings.max_queue_bytes - stored_bytes)
        reply = self._run(DROP_OLDEST, (GROUP, *limits, self.size.sent_bytes, self._incarnation))
        before, self._counted["dropped_oldest"] = self._counted["dropped_oldest"], int(reply[0])
        delivered, first_waiting = entry_place(reply[1]), entry_place(reply[2])
        self.pending.release_all(
            lambda batch: delivered < (self._incarnation, batch.sequence) < first_waiting
        )
        return self._counted["dropped_oldest"] - before

    def _run(self, script: Script, arguments: Sequence[Any]) -> Any:
        return self.channel.run(script, (self.stream_key, self._counts_key), arguments)

    def _replies(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        replies = self.channel.execute_all(commands)
        for reply in replies:
            if isinstance(reply, PeerError):
                if "NOGROUP" in str(reply) or "no such key" in str(reply).lower():
                    self.stale = True
                    raise RunLost(f"the server lost the queue of worker {self._worker_id}") from reply
                raise_again(reply)
        return replies

    def _check_incarnation(self, newest: bytes | None) -> None:
        with parsing(self._counts_key):
            found = stored_integer(newest, 0)
        if found > self._incarnation:
            raise Fenced(
                f"worker {self._worker_id} was replaced by a newer process; the server accepts nothing more of this one"
            )
        if found < self._incarnation:
            self.stale = True
            raise RunLost(f"the server lost the queue of worker {self._worker_id}")


def _in_slices(batches: Sequence[PendingBatch]) -> Iterator[list[PendingBatch]]:
    """Split batches into slices of about `RESEND_BYTES`."""
    some: list[PendingBatch] = []
    for batch in batches:
        some.append(batch)
        if sum(one.stored_bytes for one in some) >= RESEND_BYTES:
            yield some
            some = []
    if some:
        yield some
