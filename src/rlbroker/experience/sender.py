"""The worker's half: batches go to its own stream, in order, once, and within the queue's bounds.

The fast path is one plain XADD. The worker is the only one that adds to its stream and the learner only
removes, so what was free at the last look can only have grown since: the sender looks again only when its own
sends since then could have filled the queue.

All of it goes over one channel. Whenever that had to be connected anew, the server may have lost what it had
acknowledged: the queue is then opened again, and what the level promises is sent again before anything new.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection, flat
from rlbroker.backend.deadline import Backoff, Deadline, try_seconds
from rlbroker.backend.error_mapping import SlotMigrating
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.backend.replies import entry_place, group_position, newest_place, pending_summary
from rlbroker.backend.scripts import Script
from rlbroker.backend.text import counted
from rlbroker.backend.topology import Server
from rlbroker.config import Level, RunSettings, WhenFull
from rlbroker.errors import (
    BatchTooLarge,
    ConnectionFailed,
    Fenced,
    PeerError,
    QueueFull,
    RunLost,
    ServerFault,
    ServerOutOfMemory,
    ServerUnsuitable,
    Unconfirmed,
)
from rlbroker.experience.outgoing import Packer, PendingBatch
from rlbroker.types import Registration, SendReceipt

logger = logging.getLogger("rlbroker")

OPEN_QUEUE = Script.load("experience/lua/open_queue.lua")
STATE = Script.load("experience/lua/state.lua")
DROP_OLDEST = Script.load("experience/lua/drop_oldest.lua")

#: How long a sender at a full queue waits between two looks, at most.
LONGEST_LOOK_SECONDS = 0.05

#: Bytes that are sent again in one go.
REPLAY_BYTES = 8 << 20

Result = TypeVar("Result")


class Sender:
    """Sends the batches of one worker. Safe to use from several threads."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        place: Registration,
        *,
        settings: Callable[[Deadline], RunSettings],
        rejoin: Callable[[Channel], None],
        when_full: WhenFull | None,
        compression: bool,
        level: Level = "redis",
        known: bool = True,
    ) -> None:
        """Take over the worker's queue: from here on nothing of an older incarnation is accepted.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            place: whose queue, and in which life.
            settings: gives the run's settings, waiting for the learner where it has to.
            rejoin: makes sure that the server knows this worker, after it may have lost it.
            when_full: what to do at a full queue; None for what the run says.
            compression: whether arrays are compressed where that makes them smaller.
            level: what a batch must have reached to be safe.
            known: whether it is known where the queue is; else it is opened before the first batch.

        Raises:
            Fenced: a newer process has this worker id.
            ServerUnsuitable: the server cannot give this level. Later, what it lacks for that is an outage.
        """
        self._connection, self._keys = connection, keys
        self._settings, self._rejoin = settings, rejoin
        self._worker_id, self._incarnation = place.worker_id, place.incarnation
        self._when_full, self.level = when_full, level
        self._packer = Packer(compression=compression)
        self._lock = threading.Lock()
        self._find_queue()
        self._doubt = False  #: whether the server may have lost something since the last look
        self._fenced = False
        self._sequence = self._stated = 0
        self._outbox: PendingBatch | None = None
        self._unreached = ""  #: why that has not reached its level, if a wait for it was in vain
        self._kept: deque[PendingBatch] = deque()
        self._kept_bytes = 0
        #: What this life counted; absolute numbers, so that writing them again does no harm.
        self._tally = {"dropped_newest": 0, "fenced": 0, "stopped": 0, "dropped_oldest": 0}
        # What was seen at the last look, plus everything sent since.
        self._total_bytes = self._held_bytes = 0
        self._waiting = self._in_hand = 0
        self._room_seconds = 0.0
        self._room_wanted: float | None = None  #: since when it waits for room, if it does
        self._opened = False
        if known:
            self._do(self._look)
        connection.retry(lambda: self._check_level(known=known))

    @property
    def sent(self) -> int:
        """Batches that this life of the worker has numbered."""
        return self._sequence

    @property
    def room_seconds(self) -> float:
        """Seconds in which this life has waited for room in a full queue, until now."""
        so_far, since = self._room_seconds, self._room_wanted  # in this order it is never too much
        return so_far + (time.monotonic() - since if since is not None else 0.0)

    @property
    def unsafe(self) -> int:
        """Batches that have not reached their level yet, and are kept for that."""
        return len(self._kept) + (self._outbox is not None)

    @property
    def unconfirmed(self) -> str:
        """What keeps the last batch from its level, if it has waited for that in vain."""
        return self._unreached if self._outbox is not None else ""

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
            Unconfirmed: the batch was taken, and nobody could say in time that it arrived; it is kept.
            Fenced: a newer process has this worker id.
            PeerError: the server stayed away or refused; nothing was stored and the caller still has the batch.
        """
        message = self._packer.pack(batch)
        size = message.stored_bytes
        deadline = Deadline(timeout_seconds)
        settings = self._settings(deadline)
        if size > settings.max_queue_bytes:
            raise BatchTooLarge(
                f"the batch takes {size:,} bytes and the queue {settings.max_queue_bytes:,} (max_queue_bytes); "
                "send smaller batches, or raise the bound on the learner"
            )

        def receipt(sequence: int, dropped: int) -> SendReceipt:
            return SendReceipt(
                worker_id=self._worker_id,
                incarnation=self._incarnation,
                sequence=sequence,
                version=version,
                rows=message.rows,
                raw_bytes=message.raw_bytes,
                stored_bytes=size,
                accepted=sequence > 0,
                dropped=dropped,
            )

        self._claim(deadline)
        try:
            taken: SendReceipt | None = None
            try:
                if self._outbox is not None:
                    self._do(self._confirm, deadline)
                refusal, dropped = self._make_room(size, settings, deadline, stopped)
                if refusal:
                    self._count(refusal, deadline)
                    return receipt(0, dropped)
                fields = {
                    "version": version,
                    "rows": message.rows,
                    "raw_bytes": message.raw_bytes,
                    "stored_bytes": size,
                    "sent_at": f"{time.time():.3f}",
                    "data": message.pieces,
                }
                taken = receipt(self._sequence + 1, dropped)
                parcel = PendingBatch(taken.sequence, flat(fields), taken)
                try:
                    self._store(parcel, deadline)
                finally:
                    if self._outbox is parcel:
                        parcel.keep()
                return taken
            except Fenced:
                self._count_fenced(refused=taken is None)
                raise
        finally:
            self._lock.release()

    def flush(self, timeout_seconds: float) -> int:
        """Wait until every batch has reached its level; give how many have not when the time is over.

        Raises:
            Fenced: a newer process has this worker id.
            PeerError: the server refused, or could not be reached in time.
        """
        deadline, backoff = Deadline(timeout_seconds), Backoff(first=0.001, longest=LONGEST_LOOK_SECONDS)
        while True:
            if not self._lock.acquire(timeout=deadline.remaining):
                return self.unsafe  # another thread is at it
            try:
                self._do(self._confirm if self._outbox else self._look, deadline)
            finally:
                self._lock.release()
            if not self.unsafe or deadline.over:
                return self.unsafe
            time.sleep(backoff.next(deadline))

    def confirm(self, timeout_seconds: float) -> None:
        """Bring a batch to its level that was not confirmed in time, if there is one.

        Raises:
            Fenced: a newer process has this worker id.
            PeerError: the server refused, or it did not happen in time.
        """
        deadline = Deadline(timeout_seconds)
        if self._lock.acquire(timeout=deadline.remaining):
            try:
                if self._outbox is not None:
                    self._do(self._confirm, deadline)
            finally:
                self._lock.release()

    def mark_stale(self) -> None:
        """Be told that the server may have lost something."""
        self._doubt = True

    def maintain(self) -> None:
        """Send again what has to be, let go of what is safe, and say how much was sent.

        Unless a thread is sending anyway. What is still not confirmed is no fault here: `unconfirmed` says why.

        Raises:
            PeerError: the server refused or could not be reached; call it again later.
        """
        restless = self._doubt or self.unsafe
        if not (restless or self._stated < self._sequence) or not self._lock.acquire(blocking=False):
            return
        try:
            if restless:
                self._do(self._confirm if self._outbox else self._look, Deadline(0))
            if self._stated < self._sequence:
                self._do(self._state, Deadline(0))
        except ConnectionFailed as error:
            if str(error) != self._unreached:
                raise
        finally:
            self._lock.release()

    def close(self, deadline: Deadline) -> None:
        """Confirm what is unconfirmed, unless that was in vain, and state how many batches this life has sent.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        if not self._lock.acquire(timeout=deadline.remaining):
            return  # a thread is in the middle of sending, and the worker is leaving: it gets the error
        try:
            if self._opened and not self._fenced:
                if self._outbox is not None and not self._unreached:
                    self._do(self._confirm, deadline)
                self._do(self._state, deadline)
        except Fenced:
            self._count_fenced(refused=False)
            raise
        finally:
            self._channel.close()
            self._lock.release()

    def _find_queue(self) -> None:
        """Begin with the queue where it is now: a run that was opened anew may have other shards."""
        self._stream = self._keys.experiences(self._worker_id)
        self._counts = self._keys.counts(self._worker_id)
        self._channel = Channel(self._connection, self._stream)

    # Over the channel. Each of these can be done again.

    def _do(self, operation: Callable[[], Result], deadline: Deadline | None = None) -> Result:
        """Do something with the queue, opening it first where the server may have lost it."""

        def attempt() -> Result:
            if self._stream != self._keys.experiences(self._worker_id):
                self._channel.close()
                self._find_queue()
            fresh, self._channel.redirected = self._channel.connect(), False
            if fresh or self._doubt:
                self._open()
                self._opened = True
            try:
                return operation()
            finally:
                # What the other node loses, of what `_open` sent too, does not show in this connection.
                self._doubt |= self._channel.redirected

        return self._connection.retry(attempt, deadline)

    def _open(self) -> None:
        """Open the queue, and send again what the level promises and the server does not have."""
        self._doubt = True
        # The queue alone does not tell that a newer process was here before the loss.
        if self._keys.shards:
            home = Channel(self._connection, self._keys.meta)
            try:
                self._rejoin(home)
                home.give_back()
            finally:
                home.close()
        else:
            self._rejoin(self._channel)
        arguments = (self._incarnation, GROUP, self._sequence)
        last, total_bytes = map(int, self._run(OPEN_QUEUE, arguments))
        if total_bytes >= 0:
            self._total_bytes = total_bytes
        unconfirmed = () if self._outbox is None else (self._outbox,)
        missing = []
        for parcel in (*self._kept, *unconfirmed):
            parcel.stored = parcel.sequence <= last
            if not parcel.stored:
                parcel.charged = parcel.charged and total_bytes < 0
                missing.append(parcel)
        if last < self._sequence - len(unconfirmed):
            logger.warning(
                "the server lost what worker %d sent after batch %d; %d %s sent again",
                self._worker_id,
                last,
                len(missing),
                "is" if len(missing) == 1 else "are",
            )
        for some in _slices(missing):
            self._add_all(some)
        self._state()
        self._doubt = False

    def _add_all(self, parcels: Sequence[PendingBatch], *further: tuple[Any, ...]) -> list[Any]:
        """Add batches to the stream in one round trip; give the replies to what is sent after them."""
        try:
            replies = self._channel.execute_all([*map(self._add, parcels), *further])
        except BaseException:  # Ctrl-C too: what was sent may arrive even later than the next look
            for parcel in parcels:
                parcel.uncertain = True
            raise
        for parcel, reply in zip(parcels, replies, strict=False):
            self._note_stored(parcel, reply)
        return replies[len(parcels) :]

    def _add(self, parcel: PendingBatch) -> tuple[Any, ...]:
        entry_id = f"{self._incarnation}-{parcel.sequence}"
        # Only OPEN_QUEUE makes the stream: a server that lost it must not take a batch before it was opened.
        return ("XADD", self._stream, "NOMKSTREAM", entry_id, *parcel.fields)

    def _note_stored(self, parcel: PendingBatch, reply: Any) -> None:
        if reply is None:
            self._doubt = True
            raise RunLost(f"the server lost the queue of worker {self._worker_id}")
        if isinstance(reply, ServerFault) and "equal or smaller" in str(reply):
            self._check_stored(parcel)
        elif isinstance(reply, PeerError):
            raise reply
        parcel.stored = True
        if not parcel.charged:
            parcel.charged = True
            self._total_bytes += parcel.size
            self._held_bytes += parcel.size
            self._waiting += 1

    def _check_stored(self, parcel: PendingBatch) -> None:
        """Find out whether an id was refused because the batch is there already; raise if not."""
        newest, about = self._replies(
            [("HGET", self._counts, "incarnation"), ("XINFO", "STREAM", self._stream)]
        )
        self._check_place(newest)
        life, number = newest_place(about)
        if life != self._incarnation or number < parcel.sequence:
            raise ServerFault(
                f"something that is no worker wrote the entry {life}-{number} to {self._stream}, and so the server "
                f"takes no more batches of worker {self._worker_id}; start this worker again"
            )

    def _confirm(self) -> None:
        """Bring the batch in the outbox to its level, or raise."""
        parcel = self._outbox
        assert parcel is not None
        further: list[tuple[Any, ...]] = []
        if self.level in ("replica", "fsync"):
            # Waiting concerns what this connection wrote last, so it writes something each time.
            wait = ("WAIT", 1) if self.level == "replica" else ("WAITAOF", 1, 0)
            # Well within what is left, too: a wait that the socket breaks off tells nothing of why.
            milliseconds = max(1, int(try_seconds(2 * self._connection.block_seconds) * 500))
            further = [("HSET", self._counts, *self._statement()), (*wait, milliseconds)]
        replies = self._add_all([] if parcel.stored else [parcel], *further)
        if further:
            if self._channel.redirected:  # and what was waited for is something else
                parcel.uncertain = True
                raise SlotMigrating(
                    f"the queue of worker {self._worker_id} is just being moved to another node"
                )
            self._check_reached(parcel, replies[-1])
        if self.level == "learner":
            parcel.keep()
            self._kept.append(parcel)
            self._kept_bytes += parcel.size
        self._outbox = None

    def _check_reached(self, parcel: PendingBatch, reply: Any) -> None:
        """Raise if a batch has not reached its level; what the server lacks for that may be there again soon."""
        no_file = isinstance(reply, ServerFault) and "appendonly" in str(reply)
        if isinstance(reply, PeerError) and not no_file:
            raise reply
        if not no_file and (reply if isinstance(reply, int) else reply[0]):
            self._unreached = ""
            return
        assert self._channel.server is not None
        parcel.uncertain, node, batch = True, self._name(self._channel.server), f"batch {parcel.sequence}"
        if no_file:
            why = (
                f"{node} has no append-only file for {batch}; CONFIG SET appendonly yes there, and it goes on"
            )
        elif self.level == "replica":
            why = f"no replica of {node} has confirmed {batch} yet; bring one back or add one, and it goes on"
        else:
            why = f"the disk of {node} has not confirmed {batch} yet"
        self._unreached = why
        raise ConnectionFailed(why)

    def _state(self) -> None:
        """Write what this life says of itself."""
        self._channel.run(STATE, (self._counts,), (self._incarnation, *self._statement()))
        self._stated = self._stored

    @property
    def _stored(self) -> int:
        return self._sequence - (self._outbox is not None and not self._outbox.stored)

    def _statement(self) -> list[Any]:
        said = {"sent": self._stored} | {reason: number for reason, number in self._tally.items() if number}
        return flat({f"{name}:{self._incarnation}": number for name, number in said.items()})

    def _look(self) -> None:
        """See how full the queue is, and which batches are safe."""
        # What was delivered is asked before what is pending: what is read in between must not seem done with.
        length, groups, pending, (removed_bytes, newest) = self._replies(
            [
                ("XLEN", self._stream),
                ("XINFO", "GROUPS", self._stream),
                ("XPENDING", self._stream, GROUP),
                ("HMGET", self._counts, "removed_bytes", "incarnation"),
            ]
        )
        self._check_place(newest)
        self._in_hand, first_pending = pending_summary(pending)
        self._waiting = int(length) - self._in_hand
        if length == 0:
            self._total_bytes = int(removed_bytes or 0)  # corrects what a fault left in the books
        self._held_bytes = self._total_bytes - int(removed_bytes or 0)
        # The learner is done with what was delivered and is not pending.
        delivered = group_position(groups, GROUP)
        while self._kept:
            place = (self._incarnation, self._kept[0].sequence)
            if place > delivered or (self._in_hand and place >= first_pending):
                break
            self._kept_bytes -= self._kept.popleft().size

    def _drop_oldest(self, size: int, settings: RunSettings) -> int:
        """Drop waiting batches until this one fits, as far as that is possible; give how many."""
        limits = (settings.max_queue_size - 1, settings.max_queue_bytes - size)
        arguments = (GROUP, *limits, self._total_bytes, self._incarnation)
        reply = self._run(DROP_OLDEST, arguments)
        before, self._tally["dropped_oldest"] = self._tally["dropped_oldest"], int(reply[0])
        delivered, first_waiting = entry_place(reply[1]), entry_place(reply[2])
        self._keep(
            parcel
            for parcel in self._kept
            if not delivered < (self._incarnation, parcel.sequence) < first_waiting
        )
        return self._tally["dropped_oldest"] - before

    def _keep(self, parcels: Iterable[PendingBatch]) -> None:
        self._kept = deque(parcels)
        self._kept_bytes = sum(parcel.size for parcel in self._kept)

    def _run(self, script: Any, arguments: Sequence[Any]) -> Any:
        return self._channel.run(script, (self._stream, self._counts), arguments)

    def _replies(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        replies = self._channel.execute_all(commands)
        for reply in replies:
            if isinstance(reply, PeerError):
                if "NOGROUP" in str(reply) or "no such key" in str(reply).lower():
                    self._doubt = True
                    raise RunLost(f"the server lost the queue of worker {self._worker_id}") from reply
                raise reply
        return replies

    # Deciding

    def _make_room(
        self, size: int, settings: RunSettings, deadline: Deadline, stopped: Callable[[], bool]
    ) -> tuple[str, int]:
        """Give why there is no room for a batch of this size ('' if there is), and how many were dropped for it."""
        when_full = self._when_full or settings.when_full
        if self._fits(size, settings):
            return "", 0
        self._do(self._look, deadline)
        if when_full == "drop_oldest" and not self._fits(size, settings):
            dropped = self._do(lambda: self._drop_oldest(size, settings), deadline)
            self._do(self._look, deadline)
            # What the learner has in its hands cannot be dropped, so there may still be no room.
            return "" if self._fits(size, settings) else "dropped_newest", dropped
        if when_full == "drop_newest" and not self._fits(size, settings):
            return "dropped_newest", 0
        self._room_wanted = time.monotonic()
        try:
            return self._wait_for_room(size, settings, deadline, stopped)
        finally:
            waited, self._room_wanted = self.room_seconds, None
            self._room_seconds = waited

    def _wait_for_room(
        self, size: int, settings: RunSettings, deadline: Deadline, stopped: Callable[[], bool]
    ) -> tuple[str, int]:
        backoff = Backoff(first=0.001, longest=LONGEST_LOOK_SECONDS)
        while not self._fits(size, settings):
            if stopped():
                return "stopped", 0
            if deadline.over:
                raise QueueFull(
                    f"worker {self._worker_id}'s queue stayed full for {deadline.seconds:g} s: "
                    f"{counted(self._waiting, 'batch', 'batches')} waiting (max_queue_size "
                    f"{settings.max_queue_size}), {self._in_hand} in the learner's hands, "
                    f"{self._held_bytes:,} bytes in all (max_queue_bytes {settings.max_queue_bytes:,}); the learner "
                    "collects or acknowledges too slowly. Raise timeout or the bounds, or choose another when_full"
                )
            time.sleep(backoff.next(deadline))
            self._do(self._look, deadline)
        return "", 0

    def _fits(self, size: int, settings: RunSettings) -> bool:
        held_bytes = max(self._held_bytes, self._kept_bytes)
        return self._waiting < settings.max_queue_size and held_bytes + size <= settings.max_queue_bytes

    def _store(self, parcel: PendingBatch, deadline: Deadline) -> None:
        """Store a batch, or make sure that it is not: then its number is free again."""
        self._sequence, self._outbox = parcel.sequence, parcel
        backoff = Backoff()
        while True:
            try:
                return self._do(self._confirm, deadline)
            except Fenced:
                raise
            except PeerError as error:
                # A full server is as good as a full queue: the learner's reading makes room.
                if isinstance(error, ServerOutOfMemory) and not deadline.over:
                    time.sleep(backoff.next(deadline))
                    continue
                if not parcel.stored and not parcel.uncertain:
                    self._sequence, self._outbox = parcel.sequence - 1, None
                    raise
                raise Unconfirmed(
                    f"batch {parcel.sequence} of worker {self._worker_id} was not confirmed within "
                    f"{deadline.seconds:g} s at level {self.level!r}: {error}. It is kept and sent again by "
                    "itself; do not send it again",
                    parcel.receipt,
                ) from error

    def _check_place(self, newest: bytes | None) -> None:
        found = int(newest or 0)
        if found > self._incarnation:
            raise Fenced(
                f"worker {self._worker_id} was replaced by a newer process; nothing of this one is accepted"
            )
        if found < self._incarnation:
            self._doubt = True
            raise RunLost(f"the server lost the queue of worker {self._worker_id}")

    def _check_level(self, *, known: bool) -> None:
        """Refuse a level that the queue's master cannot give; while nobody knows which that is, that no master can."""
        if self.level not in ("replica", "fsync"):
            return
        lacks = ""
        for master in [self._connection.master_for(self._stream)] if known else self._connection.masters():
            try:
                lacks = self._lacking(master)
            except ConnectionFailed:
                if known:
                    raise
                return  # it may be well when the run is opened
            if not lacks:
                return
        raise ServerUnsuitable(f"level {self.level!r} needs {lacks}")

    def _lacking(self, master: Server) -> str:
        """Give what a master needs for the level; empty if it can give that."""
        replica, node = self.level == "replica", self._name(master)
        look = [("WAIT", 0, 1), ("INFO", "replication")] if replica else [("WAITAOF", 1, 0, 1)]
        replies = self._connection.ask_at(master, look)
        refusal = next((reply for reply in replies if isinstance(reply, PeerError)), None)
        if refusal is None:
            if "connected_slaves:0" not in str(replies):
                return ""
            joins = f"`redis-cli --cluster add-node HOST:PORT {node} --cluster-slave`"
            way = joins if self._connection.servers.several else "REPLICAOF"
            return f"a replica, and {node} has none now; add one ({way}), or choose another level"
        if not isinstance(refusal, ServerFault):
            raise refusal
        if "appendonly" in str(refusal):
            return f"an append-only file, and {node} has none; `redis-cli CONFIG SET appendonly yes` there"
        version = "Redis or Valkey" if replica else "Redis 7.2 or newer, or Valkey"
        found = self._connection.server_version(self._connection.server_info(master))
        return f"{version}; this is {found or 'another server'}"

    def _name(self, server: Server) -> str:
        return server.name if server.address else self._connection.address

    def _count(self, reason: str, deadline: Deadline, by: int = 1) -> None:
        # Under this incarnation's name also where a newer one is there already.
        said = (f"{reason}:{self._incarnation}", self._tally[reason] + by)
        self._connection.run(STATE, (self._counts,), (self._incarnation, *said), deadline=deadline)
        self._tally[reason] += by

    def _count_fenced(self, *, refused: bool) -> None:
        """Count what is not accepted: what is kept and is not on the server, and a batch that got no number."""
        self._fenced = True
        taken = [parcel.sequence for parcel in (*self._kept, self._outbox) if parcel is not None]
        try:
            stated = self._connection.execute("HGET", self._counts, f"sent:{self._incarnation}")
            lost = sum(sequence > int(stated or 0) for sequence in taken)
            self._count("fenced", Deadline(self._connection.timeout_seconds), by=lost + refused)
        except PeerError as error:
            logger.warning("worker %d was replaced, and cannot count it: %s", self._worker_id, error)
        self._keep(())
        self._outbox = None

    def _claim(self, deadline: Deadline) -> None:
        """Take the lock."""
        if not self._lock.acquire(timeout=deadline.remaining):
            raise QueueFull(
                f"worker {self._worker_id}'s queue is full, and another thread of it has been waiting for room for "
                f"{deadline.seconds:g} s"
            )


def _slices(parcels: Sequence[PendingBatch]) -> Iterator[list[PendingBatch]]:
    """Cut what is to be sent again into pieces of some megabytes."""
    some: list[PendingBatch] = []
    for parcel in parcels:
        some.append(parcel)
        if sum(one.size for one in some) >= REPLAY_BYTES:
            yield some
            some = []
    if some:
        yield some
