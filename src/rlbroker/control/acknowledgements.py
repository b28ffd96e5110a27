"""A worker's acknowledgements: sent once and in order, and sent again to a server that lost them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Argument, Connection, flat
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.locks import CallLock
from rlbroker.backend.replies import entry_place, parsing
from rlbroker.backend.scripts import Script
from rlbroker.errors import RunLost
from rlbroker.types import Registration

#: The most sent acknowledgements that are kept, in case the server loses them.
KEPT: Final = 10_000

#: Interval between two checks of which acknowledgements the ledger has settled; those are no longer kept.
SETTLED_SECONDS: Final = 5.0

ACKNOWLEDGE = Script.load("control/lua/acknowledge.lua")


@dataclass
class _Acknowledgement:
    """An entry of the acknowledgement stream.

    Attributes:
        fields: its fields.
        number: its number within the incarnation; the second part of its entry id. 0 until it is sent.
    """

    fields: Mapping[str, Argument]
    number: int = 0


class AcknowledgementSender:
    """Sends the acknowledgements of one worker over one channel.

    An acknowledgement is kept until the ledger has settled it. When the server may have lost data, all that are kept
    are sent again, which is idempotent because their entry ids are explicit.

    The server adds one only if it follows the one before. Otherwise, after a loss, one could be stored before those
    that were lost; these then had too small an id, and the ledger recorded versions as missed that the worker had run.
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
        self._unsent: deque[_Acknowledgement] = deque()
        self._unsettled: deque[_Acknowledgement] = deque()  #: sent, and not settled by the ledger yet
        self._last_number = 0  #: of the acknowledgements that were sent
        self._end = (0, 0)  #: the place of the last entry of the stream
        #: Every version up to this one is settled, or was published before this worker joined.
        self._settled_version = registration.latest_version
        self._sending = CallLock()
        self._channel = Channel(connection, keys.meta)
        self._closed = False
        self._stale = False  #: whether the server may have lost acknowledgements
        self._next_settled_check = Deadline(SETTLED_SECONDS)

    @property
    def count(self) -> int:
        """The number of acknowledgements of this incarnation."""
        return self._last_number + len(self._unsent)

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
        self._unsent.append(_Acknowledgement(dict(fields)))

    def send(self) -> None:
        """Send what is queued, in order and once. If another thread is sending, leave it to that thread.

        Raises:
            Fenced: a newer process has this worker id, or the run has forgotten this worker.
        """
        # Check again after each release of the lock: meanwhile another thread may have queued one and left it to this
        # thread.
        while (self._unsent or self._stale) and not self._closed:
            if not self._sending.run_within(0, self._send_unsent):
                return

    def drop_settled(self) -> None:
        """Drop the acknowledgements that the ledger has settled, at most once in SETTLED_SECONDS."""
        if self._unsettled and self._next_settled_check.over:
            self._sending.run_within(0, self._read_settled)

    def close(self, deadline: Deadline) -> None:
        """Send what is left, and close the channel."""
        try:
            # The last chance to send unsettled acknowledgements again: a loss may have gone unnoticed.
            self._stale |= bool(self._unsettled)
            if self._unsent or self._stale:
                self._connection.retry(self.send, deadline)
        finally:
            self._closed = (
                True  # a handler may have closed the client; its command cannot be acknowledged then
            )
            if self._sending.run_within(0, self._close_channel) is None:
                self._close_channel()  # another thread waits for a reply over it

    def _close_channel(self) -> bool:
        self._channel.close()
        return True

    def _send_unsent(self) -> bool:
        self._send_again_if_stale()
        while self._unsent:
            self._send_next(self._unsent[0])
        return True

    def _read_settled(self) -> None:
        self._send_again_if_stale()
        self._drop_settled()

    def _send_next(self, acknowledgement: _Acknowledgement) -> None:
        """Send the first unsent acknowledgement. After an interrupt at any point this is done once more."""
        acknowledgement.number = acknowledgement.number or self._last_number + 1
        self._last_number = acknowledgement.number
        self._store(acknowledgement.number, acknowledgement.fields)
        if not self._unsettled or self._unsettled[-1] is not acknowledgement:
            self._unsettled.append(acknowledgement)
        self._unsent.popleft()

    def _send_again_if_stale(self) -> None:
        if not (self._channel.connect() or self._stale):
            return
        self._stale = True
        self._rejoin(self._channel)
        self._drop_settled()
        self._check_control(self._channel)
        self._store(0, {"event": "joined", "version": self._settled_version, "again": 1})
        for acknowledgement in self._unsettled:
            self._store(acknowledgement.number, acknowledgement.fields)
        self._stale = False

    def _store(self, number: int, fields: Mapping[str, Argument]) -> None:
        """Add one to the stream; number 0 creates the stream if there is none."""
        if number and (self._incarnation, number) <= self._end:
            return  # it was stored before
        expected = "{}-{}".format(*self._end) if number else ""
        arguments = expected, f"{self._incarnation}-{number}", *flat(fields)
        try:
            last = self._channel.run(ACKNOWLEDGE, (self._keys.acknowledgements(self._worker_id),), arguments)
        except RunLost:
            self._stale = True
            raise
        self._end = entry_place(last)

    def _drop_settled(self) -> None:
        self._next_settled_check = Deadline(SETTLED_SECONDS)
        last = self._channel.execute("HGET", self._keys.ledger(self._worker_id), "event")
        with parsing(self._keys.ledger(self._worker_id)):
            settled = entry_place(last) if last else (0, 0)
        while self._unsettled and (
            (self._incarnation, self._unsettled[0].number) <= settled or len(self._unsettled) > KEPT
        ):
            fields = self._unsettled[0].fields
            if fields.get("outcome") == "applied":
                self._settled_version = max(self._settled_version, int(fields.get("version", 0)))
            self._unsettled.popleft()
