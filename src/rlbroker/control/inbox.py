"""The worker's half: commands and notices of versions are read in the background and answered in order."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from rlbroker.background import Background
from rlbroker.connection import Argument, Connection, flat
from rlbroker.deadline import Deadline
from rlbroker.errors import ConnectionFailed, Fenced, ServerOutOfMemory, WireError
from rlbroker.keys import Keys
from rlbroker.records import Registration
from rlbroker.replies import server_seconds, stream_entries, text_fields
from rlbroker.wire import Limits, decode

logger = logging.getLogger("rlbroker")

#: What a command's arguments may ask for when they are decoded.
COMMAND_LIMITS: Final = Limits(max_raw_bytes=64 << 20)

#: How long `poll` may spend on sending an answer; the background sends what it could not.
ANSWER_SECONDS: Final = 0.05

#: Characters of an error's text that an acknowledgement carries.
DETAIL_LENGTH: Final = 500


@dataclass(frozen=True)
class Order:
    """A command as a worker gets it."""

    command_id: str
    name: str
    data: Any
    sent_milliseconds: int
    expires_seconds: float


class Inbox:
    """Reads one worker's share of the control stream and sends its acknowledgements."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        place: Registration,
        *,
        noticed: Callable[[int], None],
    ) -> None:
        """Prepare an inbox.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            place: whose commands, and from where on.
            noticed: is told each version that was published.
        """
        self._connection, self._keys, self._noticed = connection, keys, noticed
        self._worker_id, self._incarnation = place.worker_id, place.incarnation
        self._position = place.control_position
        self._acknowledgements = keys.acknowledgements(place.worker_id)
        self._arrived = threading.Condition()
        self._orders: deque[Order] = deque()
        self._answers: deque[tuple[str, list[Argument]]] = deque()
        self._answer_number = 0
        self._sending = threading.Lock()
        self._thread = Background("inbox", self._step)

    def start(self) -> None:
        """Begin to read in the background."""
        self._thread.start()

    def request_stop(self) -> None:
        """Have the background thread end soon; does not wait."""
        self._thread.request_stop()

    def stop(self, timeout_seconds: float) -> None:
        """Stop reading, and send the answers that are left."""
        deadline = Deadline(timeout_seconds)
        self._thread.stop(timeout_seconds)
        if self._answers and not deadline.over:
            self._send_answers(deadline)

    def check(self) -> None:
        """Raise what ended the reading, if anything did."""
        self._thread.check()

    @property
    def waiting(self) -> bool:
        """Whether there is an order to take."""
        return bool(self._orders)

    def holds(self, name: str) -> bool:
        """Whether an order of this name has arrived and was not taken yet."""
        with self._arrived:
            return any(order.name == name for order in self._orders)

    def next(self, timeout_seconds: float = 0) -> Order | None:
        """Give the next order, waiting for one if there is a timeout; it stays until `remove`."""
        with self._arrived:
            if not self._orders and timeout_seconds > 0:
                self._arrived.wait(timeout_seconds)
            return self._orders[0] if self._orders else None

    def remove(self) -> None:
        """Remove the next order, as it is being done: it is done once, whatever comes of it."""
        with self._arrived:
            self._orders.popleft()

    def expired(self, order: Order) -> bool:
        """Whether an order came too late, by the server's clock."""
        if not order.expires_seconds:
            return False
        now = server_seconds(self._connection.execute("TIME"))
        return now - order.sent_milliseconds / 1000 > order.expires_seconds

    def acknowledge_command(self, order: Order, outcome: str, detail: str = "") -> None:
        """Say what became of a command: done, failed, unknown or expired."""
        self._answer(
            event="command",
            command=order.command_id,
            name=order.name,
            outcome=outcome,
            detail=detail[:DETAIL_LENGTH],
        )

    def acknowledge_version(self, before: int, version: int, outcome: str, detail: str = "") -> None:
        """Say that the worker went from one version to another, or why it could not."""
        self._answer(
            event="version",
            before=before,
            version=version,
            outcome=outcome,
            detail=detail[:DETAIL_LENGTH],
        )

    def _answer(self, **fields: Argument) -> None:
        with self._arrived:
            self._answer_number += 1
            entry_id = f"{self._incarnation}-{self._answer_number}"
            self._answers.append((entry_id, flat(fields)))
        try:
            self._send_answers(Deadline(ANSWER_SECONDS))
        except (ConnectionFailed, ServerOutOfMemory) as error:
            logger.debug("an acknowledgement waits: %s", error)

    def _send_answers(self, deadline: Deadline) -> None:
        """Send what is unsent, in order. The explicit ids make sending twice harmless."""
        if not self._sending.acquire(timeout=deadline.remaining):
            return  # another thread is sending, and will send these too
        try:
            while self._answers:
                entry_id, fields = self._answers[0]
                stored = self._connection.append(self._acknowledgements, entry_id, fields, deadline=deadline)
                if not stored and self._replaced():
                    raise Fenced(f"worker {self._worker_id} was replaced by a newer process or declared gone")
                self._answers.popleft()
        finally:
            self._sending.release()

    def _replaced(self) -> bool:
        newest = self._connection.execute("HGET", self._keys.incarnations, self._worker_id)
        return newest is None or int(newest) != self._incarnation

    def _step(self) -> None:
        if self._answers:
            self._send_answers(Deadline(self._connection.timeout_seconds))
        block_milliseconds = max(1, int(self._connection.block_seconds * 1000))
        reply = self._connection.execute_once(
            "XREAD", "COUNT", 100, "BLOCK", block_milliseconds, "STREAMS", self._keys.control, self._position
        )
        for _, entries in stream_entries(reply):
            for entry_id, fields in entries:
                self._receive(entry_id, fields or {})
                self._position = entry_id

    def _receive(self, entry_id: str, fields: dict[bytes, bytes]) -> None:
        said = text_fields({name: value for name, value in fields.items() if name != b"data"})
        if said.get("event") == "version":
            self._noticed(int(said["version"]))
        elif said.get("event") == "command" and str(self._worker_id) in said.get("workers", "").split(","):
            order = Order(
                said.get("command", ""),
                said.get("name", ""),
                None,
                int(entry_id.partition("-")[0]),
                float(said.get("expires_seconds", 0)),
            )
            try:
                data = decode(fields.get(b"data", b""), limits=COMMAND_LIMITS)
            except WireError as error:
                self.acknowledge_command(order, "failed", f"its arguments cannot be read: {error}")
                return
            with self._arrived:
                self._orders.append(replace(order, data=data))
                self._arrived.notify_all()
