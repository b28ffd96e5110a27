"""Sends a worker's batches to its own queue, in order, once, and within the queue's bounds.

A batch costs one plain XADD (`StreamWriter`). The queue's size is read again only when the batches sent since the last
read could have filled it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, SupportsIndex

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection, flat
from rlbroker.backend.deadline import ONE_TRY, Backoff, Deadline, within
from rlbroker.backend.error_mapping import RequestTooLarge
from rlbroker.backend.keys import Keys
from rlbroker.backend.locks import CallLock
from rlbroker.backend.text import age, counted
from rlbroker.config import Level, RunSettings, WhenFull
from rlbroker.errors import BatchTooLarge, ConnectionFailed, Fenced, PeerError, QueueFull, Unconfirmed
from rlbroker.experience.levels import Confirmation
from rlbroker.experience.outgoing import Message, Packer, PendingBatch
from rlbroker.experience.stream_writer import StreamWriter
from rlbroker.types import Registration, SendReceipt

#: The longest pause between two reads of a full queue's size.
MAX_POLL_SECONDS = 0.05

#: How long a call that found no room may look for the reason.
REASON_SECONDS = 1.0


class Sender:
    """Sends the batches of one worker. Safe to use from several threads.

    A batch gets its number in one assignment, of `PendingBatches.newest`. From then on it is pending, whatever happens
    to the call, and this or a later call stores it; before, nothing of it remains. The methods raise `Fenced` once a
    newer process has this worker id.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        registration: Registration,
        *,
        settings: Callable[[Deadline], RunSettings],
        learner_silent_seconds: Callable[[], float],
        rejoin: Callable[[Channel], None],
        when_full: WhenFull | None,
        compression: bool,
        level: Level = "redis",
        shards_known: bool = True,
    ) -> None:
        """Open the worker's queue, and fence older incarnations of the worker.

        Args:
            settings: returns the run's settings, after waiting for the learner if necessary.
            learner_silent_seconds: returns how long all learners have been silent; 0 while one is alive.
            rejoin: registers the worker again if the server has lost its registration.
            when_full: what to do at a full queue; None for the run's setting.
            compression: whether to compress arrays where that makes them smaller.
            level: what a batch must have reached to be safe.
            shards_known: whether the run's shards are known; if not, the queue is opened with the first batch.

        Raises:
            Fenced: a newer process has this worker id.
            ServerUnsuitable: the server cannot give this level. A server that no longer can is treated as an outage.
        """
        self._settings, self._when_full = settings, when_full
        self._learner_silent_seconds = learner_silent_seconds
        self._registration, self.level = registration, level
        self._packer = Packer(compression=compression)
        self._calls = CallLock()
        self._fenced = False
        #: Seconds that were waited for room, and when the present wait began, if there is one.
        self._room: tuple[float, float | None] = (0.0, None)
        confirmation = Confirmation(connection, level)
        self.writer = StreamWriter(connection, keys, registration, confirmation, rejoin)
        if shards_known:
            self.writer.refresh()
        connection.retry(lambda: confirmation.check(self.writer.stream_key, shards_known=shards_known))

    @property
    def sent(self) -> int:
        """Batches that this incarnation of the worker has numbered."""
        return self.writer.pending.sequence

    @property
    def room_seconds(self) -> float:
        """Seconds that this incarnation has waited for room in a full queue, until now."""
        so_far, since = self._room
        return so_far + (time.monotonic() - since if since is not None else 0.0)

    @property
    def unsafe(self) -> int:
        """How many batches have not reached their level, and are kept until they do."""
        return len(self.writer.pending)

    @property
    def unconfirmed(self) -> str:
        """Why the last batch has not reached its level, if a wait for that failed; otherwise empty."""
        return self.writer.confirmation.missing if self.writer.pending.unconfirmed is not None else ""

    def send(
        self,
        batch: Mapping[str, Any],
        *,
        version: int,
        rows: SupportsIndex | None = None,
        timeout_seconds: float,
        stopped: Callable[[], bool] = lambda: False,
    ) -> SendReceipt:
        """Put one batch into the queue, and return its receipt.

        Args:
            batch: nested dictionary of tensors, arrays and plain values.
            version: the version that produced it.
            rows: its number of rows, if that is not its leading dimension.
            timeout_seconds: how long to wait for room, or for a server that is away.
            stopped: returns whether the worker was stopped, which ends a wait for room.

        Raises:
            UnsupportedType: something in the batch cannot travel; its path is named.
            BatchTooLarge: the batch alone exceeds the queue's byte bound, 1 GiB of arrays, or the server's own
                limit (`proto-max-bulk-len`).
            QueueFull: no room in time; nothing was stored and the caller still has the batch.
            Unconfirmed: the batch was accepted, and not confirmed in time; the sender keeps it.
            Fenced: a newer process has this worker id.
            PeerError: the server stayed away or refused; nothing was stored and the caller still has the batch.
        """
        message = self._packer.pack(batch, rows)
        deadline = Deadline(timeout_seconds)
        settings = self._settings(deadline)
        if message.stored_bytes > settings.max_queue_bytes:
            raise BatchTooLarge(
                f"the batch takes {message.stored_bytes:,} bytes and the queue {settings.max_queue_bytes:,} "
                "(max_queue_bytes); send smaller batches, or raise the bound on the learner"
            )
        arguments = message, version, settings, deadline, stopped
        receipt = self._calls.run_within(deadline.remaining, self._send, *arguments)
        if receipt is None:
            raise QueueFull(
                f"worker {self._registration.worker_id}'s queue is full, and another thread of the worker has "
                f"been waiting for room for {deadline.seconds:g} s"
            )
        return receipt

    def _send(
        self,
        message: Message,
        version: int,
        settings: RunSettings,
        deadline: Deadline,
        stopped: Callable[[], bool],
    ) -> SendReceipt:
        numbered = False
        try:
            if self.writer.pending.unconfirmed is not None:
                self.writer.confirm(deadline)
            refusal, dropped = self._make_room(message.stored_bytes, settings, deadline, stopped)
            if refusal:
                self.writer.count(refusal, deadline)
                return self._receipt(message, version, sequence=0, dropped=dropped)
            fields = {
                "version": version,
                "rows": message.rows,
                "raw_bytes": message.raw_bytes,
                "stored_bytes": message.stored_bytes,
                "sent_at": f"{time.time():.3f}",
                "data": message.pieces,
            }
            numbered = True
            receipt = self._receipt(message, version, sequence=self.sent + 1, dropped=dropped)
            self._store(PendingBatch(receipt.sequence, flat(fields), receipt), deadline)
            return receipt
        except BaseException as error:
            if (unconfirmed := self.writer.pending.unconfirmed) is not None:
                unconfirmed.copy_message()  # the caller may change the arrays from now on
            if isinstance(error, Fenced):
                self._count_fenced(refused=not numbered)
            raise

    def flush(self, timeout_seconds: float) -> int:
        """Wait until every batch has reached its level; return how many have not at the timeout."""
        deadline, backoff = Deadline(timeout_seconds), Backoff(first=0.001, longest=MAX_POLL_SECONDS)
        while True:
            self._calls.run_within(deadline.remaining, self.writer.advance, deadline)
            if not self.unsafe or deadline.over:
                return self.unsafe
            time.sleep(backoff.next(deadline))

    def confirm(self, timeout_seconds: float) -> None:
        """Wait until the last batch has reached its level, if it was not confirmed in time."""
        deadline = Deadline(timeout_seconds)
        self._calls.run_within(deadline.remaining, self._confirm_last, deadline)

    def _confirm_last(self, deadline: Deadline) -> None:
        if self.writer.pending.unconfirmed is not None:
            self.writer.confirm(deadline)

    def mark_stale(self) -> None:
        """Open the queue again before the next operation: the server may have lost something."""
        self.writer.stale = True

    def maintain(self) -> None:
        """Resend pending batches, release those that are safe, and write the counts.

        Do nothing while another thread is sending. For a batch that is still not confirmed, `unconfirmed` has the
        reason, and no error is raised. After a `PeerError`, call this again later.
        """
        is_unsafe = self.writer.must_open or self.unsafe > 0
        if is_unsafe or self.writer.has_unwritten_counts:
            self._calls.run_within(0, self._maintain, is_unsafe)

    def _maintain(self, is_unsafe: bool) -> None:
        try:
            if is_unsafe:
                self.writer.advance(ONE_TRY)
            if self.writer.has_unwritten_counts:
                self.writer.write_counts(ONE_TRY)
        except ConnectionFailed as error:
            if str(error) != self.writer.confirmation.missing:
                raise

    def close(self, deadline: Deadline) -> None:
        """Confirm the last batch, unless a wait for that has failed, and write the counts.

        Leave another thread that is sending: it gets an error when the worker closes the connections.
        """
        self._calls.run_within(deadline.remaining, self._close, deadline)

    def _close(self, deadline: Deadline) -> None:
        try:
            if self.writer.opened and not self._fenced:
                if self.writer.pending.unconfirmed is not None and not self.writer.confirmation.missing:
                    self.writer.confirm(deadline)
                self.writer.write_counts(deadline)
        except Fenced:
            self._count_fenced(refused=False)
            raise
        finally:
            self.writer.close()

    def _receipt(self, message: Message, version: int, *, sequence: int, dropped: int) -> SendReceipt:
        return SendReceipt(
            worker_id=self._registration.worker_id,
            incarnation=self._registration.incarnation,
            sequence=sequence,
            version=version,
            rows=message.rows,
            raw_bytes=message.raw_bytes,
            stored_bytes=message.stored_bytes,
            accepted=sequence > 0,
            dropped=dropped,
        )

    def _make_room(
        self, stored_bytes: int, settings: RunSettings, deadline: Deadline, stopped: Callable[[], bool]
    ) -> tuple[str, int]:
        """Make room for a batch according to `when_full`.

        Returns:
            The outcome to count if there is no room, empty otherwise; and how many batches were dropped for this one.
        """
        when_full = self._when_full or settings.when_full
        self._room = self._room[0], None  # an interrupted call may have left its wait
        if self._fits(stored_bytes, settings):
            return "", 0
        self.writer.refresh(deadline)
        if when_full == "drop_oldest" and not self._fits(stored_bytes, settings):
            dropped = self.writer.drop_oldest(stored_bytes, settings, deadline)
            self.writer.refresh(deadline)
            # Pending batches cannot be dropped, so there may still be no room.
            return "" if self._fits(stored_bytes, settings) else "dropped_newest", dropped
        if when_full == "drop_newest" and not self._fits(stored_bytes, settings):
            return "dropped_newest", 0
        self._room = self.room_seconds, time.monotonic()
        try:
            return self._wait_for_room(stored_bytes, settings, deadline, stopped), 0
        finally:
            self._room = self.room_seconds, None

    def _wait_for_room(
        self, stored_bytes: int, settings: RunSettings, deadline: Deadline, stopped: Callable[[], bool]
    ) -> str:
        backoff = Backoff(first=0.001, longest=MAX_POLL_SECONDS)
        while not self._fits(stored_bytes, settings):
            if stopped():
                return "stopped"
            if deadline.over:
                size = self.writer.size
                raise QueueFull(
                    f"worker {self._registration.worker_id}'s queue stayed full for {deadline.seconds:g} s: "
                    f"{counted(size.waiting, 'batch', 'batches')} waiting (max_queue_size "
                    f"{settings.max_queue_size}), {size.in_hand} in the learner's hands, "
                    f"{size.queued_bytes:,} bytes in all (max_queue_bytes {settings.max_queue_bytes:,}); "
                    f"{self._explain_full()}"
                )
            time.sleep(backoff.next(deadline))
            self.writer.refresh(deadline)
        return ""

    def _explain_full(self) -> str:
        """Return why the queue stays full, and what to do."""
        silent_seconds = 0.0
        with suppress(PeerError), within(Deadline(REASON_SECONDS)):
            silent_seconds = self._learner_silent_seconds()
        if silent_seconds:
            return f"the learner has been silent for {age(silent_seconds)}; start it again"
        return (
            "the learner collects or acknowledges too slowly. Raise timeout or the bounds, or choose another "
            "when_full"
        )

    def _fits(self, stored_bytes: int, settings: RunSettings) -> bool:
        size = self.writer.size
        queued_bytes = max(size.queued_bytes, self.writer.pending.kept_bytes)
        return (
            size.waiting < settings.max_queue_size and queued_bytes + stored_bytes <= settings.max_queue_bytes
        )

    def _store(self, batch: PendingBatch, deadline: Deadline) -> None:
        """Store a batch; if that fails and it is certain that it was not stored, release its number."""
        before, self.writer.pending.newest = self.writer.pending.newest, batch
        try:
            self.writer.confirm(deadline)
        except Fenced:
            raise
        except RequestTooLarge as error:
            self.writer.pending.newest = before
            raise BatchTooLarge(f"the batch cannot be stored: {error}") from error
        except PeerError as error:
            if batch.sequence > self.writer.size.through and not batch.uncertain:
                self.writer.pending.newest = before
                raise
            raise Unconfirmed(
                f"batch {batch.sequence} of worker {self._registration.worker_id} was not confirmed within "
                f"{deadline.seconds:g} s at level {self.level!r}: {error}. The worker keeps it and sends it again; "
                "do not send it again",
                batch.receipt,
            ) from error

    def _count_fenced(self, *, refused: bool) -> None:
        self._fenced = True
        self.writer.count_fenced(refused=refused)
