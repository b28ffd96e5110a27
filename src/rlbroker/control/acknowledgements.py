"""A worker's acknowledgements: sent once and in order, and sent again to a server that lost them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Argument, Connection, flat
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.error_mapping import id_was_passed
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import entry_place, parsing, stored_integer
from rlbroker.errors import Fenced, RunLost, ServerFault
from rlbroker.types import Registration

#: The most sent acknowledgements that are kept, in case the server loses them.
KEPT: Final = 10_000

#: Interval between two checks of which acknowledgements the ledger has settled; those are no longer kept.
SETTLED_SECONDS: Final = 5.0


@dataclass(frozen=True)
class _Acknowledgement:
    """An entry of the acknowledgement stream.

    Attributes:
        number: its number within the incarnation; the second part of its entry id.
        fields: names and values of its fields, one after the other.
    """

    number: int
    fields: list[Argument]


class AcknowledgementSender:
    """Sends the acknowledgements of one worker over one channel.

    An acknowledgement is kept until the ledger has settled it. When the server may have lost data, all that are kept
    are sent again, which is idempotent because their entry ids are explicit.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        registration: Registration,
        *,
        rejoin: Callable[[Channel], None],
        check_control: Callable[[Channel], None],
    ) -> None:
        """Prepare a sender; nothing is sent yet.

        Args:
            rejoin: writes the worker's membership back if the server lost it.
            check_control: checks whether the server lost the control stream; called after `rejoin`.
        """
        self._connection, self._keys = connection, keys
        self._worker_id, self._incarnation = registration.worker_id, registration.incarnation
        self._rejoin, self._check_control = rejoin, check_control
        self._adding = threading.Lock()
        self._unsent: deque[_Acknowledgement] = deque()
        self._unsettled: deque[_Acknowledgement] = deque()  #: sent, and not settled by the ledger yet
        self._last_number = 0
        self._sending = threading.Lock()
        self._channel = Channel(connection, keys.meta)
        self._stale = False  #: whether the server may have lost acknowledgements
        self._next_settled_check = Deadline(SETTLED_SECONDS)

    @property
    def count(self) -> int:
        """The number of acknowledgements of this incarnation."""
        return self._last_number

    @property
    def unsent(self) -> int:
        """The number of acknowledgements that could not be sent yet."""
        return len(self._unsent)

    @property
    def unsettled(self) -> int:
        """The number of acknowledgements that were sent and that the ledger has not settled."""
        return len(self._unsettled)

    @property
    def stale(self) -> bool:
        """Whether the server may have lost acknowledgements that were not sent again yet."""
        return self._stale

    def mark_stale(self) -> None:
        """Note that the server may have lost acknowledgements; the next `send` sends them again."""
        self._stale = True

    def add(self, fields: Mapping[str, Argument]) -> None:
        """Queue an acknowledgement; `send` sends it."""
        with self._adding:
            self._last_number += 1
            self._unsent.append(_Acknowledgement(self._last_number, flat(fields)))

    def send(self) -> None:
        """Send what is queued, in order and once. If another thread is sending, leave it to that thread.

        Raises:
            Fenced: a newer process has this worker id, or the run has forgotten this worker.
        """
        # Check again after each release of the lock: meanwhile another thread may have queued one and left it to this
        # thread.
        while self._unsent or self._stale:
            with self._exclusive() as exclusive:
                if not exclusive:
                    return
                self._send_again_if_stale()
                while self._unsent:
                    self._store(self._unsent[0])
                    self._unsettled.append(self._unsent.popleft())

    def drop_settled(self) -> None:
        """Drop the acknowledgements that the ledger has settled, at most once in SETTLED_SECONDS."""
        if self._unsettled and self._next_settled_check.over:
            with self._exclusive() as exclusive:
                if exclusive:
                    self._send_again_if_stale()
                    self._drop_settled()

    def close(self, deadline: Deadline) -> None:
        """Send what is left, and close the channel."""
        try:
            # The last chance to send unsettled acknowledgements again: a loss may have gone unnoticed.
            self._stale |= bool(self._unsettled)
            if self._unsent or self._stale:
                self._connection.retry(self.send, deadline)
        finally:
            with self._exclusive():
                self._channel.close()

    def _send_again_if_stale(self) -> None:
        if not (self._channel.connect() or self._stale):
            return
        self._stale = True
        self._rejoin(self._channel)
        self._drop_settled()
        self._check_control(self._channel)
        for acknowledgement in self._unsettled:
            self._store(acknowledgement)
        self._stale = False

    def _store(self, acknowledgement: _Acknowledgement) -> None:
        entry_id = f"{self._incarnation}-{acknowledgement.number}"
        try:
            # NOMKSTREAM: after a loss `rejoin` creates the stream, and then all acknowledgements must follow in order.
            stored = self._channel.execute(
                "XADD",
                self._keys.acknowledgements(self._worker_id),
                "NOMKSTREAM",
                entry_id,
                *acknowledgement.fields,
            )
        except ServerFault as error:
            if not id_was_passed(error):
                raise
            newest = self._channel.execute("HGET", self._keys.life(self._worker_id), "incarnation")
            with parsing(self._keys.life(self._worker_id)):
                number = stored_integer(newest, 0)
            if number > self._incarnation:
                raise Fenced(
                    f"worker {self._worker_id} was replaced by a newer process, or the run has forgotten it"
                ) from error
            return  # it was stored before, and the reply was lost
        if stored is None:
            self._stale = True
            raise RunLost(f"the server lost the acknowledgements of worker {self._worker_id}")

    def _drop_settled(self) -> None:
        self._next_settled_check = Deadline(SETTLED_SECONDS)
        last = self._channel.execute("HGET", self._keys.ledger(self._worker_id), "event")
        with parsing(self._keys.ledger(self._worker_id)):
            settled = entry_place(last) if last else (0, 0)
        while self._unsettled and (
            (self._incarnation, self._unsettled[0].number) <= settled or len(self._unsettled) > KEPT
        ):
            self._unsettled.popleft()

    @contextmanager
    def _exclusive(self) -> Iterator[bool]:
        """Try to reserve the channel for this thread, and yield whether that worked."""
        exclusive = self._sending.acquire(blocking=False)
        try:
            yield exclusive
        finally:
            if exclusive:
                self._sending.release()
