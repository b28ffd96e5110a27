"""The worker's half: commands and notices of versions are read in the background and answered in order."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Argument, Connection, flat
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import (
    entry_place,
    parsing,
    seconds_number,
    stream_entries,
    text_fields,
    whole_number,
)
from rlbroker.backend.threads import BackgroundThread
from rlbroker.codec.limits import Limits
from rlbroker.codec.message import decode
from rlbroker.codec.signing import NotSigned, SigningKey
from rlbroker.control.command_signature import check
from rlbroker.errors import Fenced, PeerError, RunLost, ServerFault, WireError
from rlbroker.types import Registration

logger = logging.getLogger("rlbroker")

#: What a command's arguments may ask for when they are decoded.
COMMAND_LIMITS: Final = Limits(max_raw_bytes=64 << 20)

#: Answers that are kept until the ledger has settled them, and ids of commands that are remembered, at most.
KEPT: Final = 10_000

#: Longest that one read of the control stream waits on the server: most workers hardly ever get anything.
READ_SECONDS: Final = 2.0

#: How often the ledger is asked which answers it has settled, at most: until then they only take memory.
SETTLED_SECONDS: Final = 5.0

#: Of the commands that are refused within so many seconds, so many are answered: anybody may write more of them.
REFUSALS_SECONDS: Final = 10.0
REFUSALS_SAID: Final = 50

#: Characters of a refused command's name and id that an acknowledgement carries.
NAME_LENGTH: Final = 200

#: Characters of an error's text that an acknowledgement carries.
DETAIL_LENGTH: Final = 500


@dataclass(frozen=True)
class _Answer:
    """An acknowledgement and its number in this life of the worker."""

    number: int
    fields: list[Argument]


@dataclass(frozen=True)
class ReceivedCommand:
    """A command as a worker gets it."""

    command_id: str
    name: str
    data: Any
    sent_milliseconds: int
    expires_seconds: float


class Inbox:
    """Reads one worker's share of the control stream and sends its acknowledgements.

    Answers go over one channel, in order, and are kept until the ledger has settled them: a server that comes
    back without them gets them again. A command that comes twice is done once.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        place: Registration,
        *,
        key: SigningKey | None = None,
        noticed: Callable[[int], None],
        rejoin: Callable[[Channel], None],
    ) -> None:
        """Prepare an inbox.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            place: whose commands, and from where on.
            key: which signs commands; None to obey them unsigned.
            noticed: is told each version that was published.
            rejoin: makes sure that the server knows this worker, after it may have lost it.
        """
        self._connection, self._keys, self._key = connection, keys, key
        self._refused: dict[str, None] = {}  #: entries that were refused: the stream may be read again
        self._refusals, self._refusals_until = 0, Deadline(REFUSALS_SECONDS)
        self._noticed, self._rejoin = noticed, rejoin
        self._worker_id, self._incarnation = place.worker_id, place.incarnation
        self._position = place.control_position
        self._begin_again = False  #: whether to read the control stream from its first entry on
        self._acknowledgements = keys.acknowledgements(place.worker_id)
        self._arrived = threading.Condition()
        self._orders: deque[ReceivedCommand] = deque()
        #: By id of a command: its answer, None until it has one.
        self._received: dict[str, dict[str, Argument] | None] = {}
        self._unsent: deque[_Answer] = deque()
        self._sent: deque[_Answer] = deque()  #: and not settled yet
        self._answer_number = 0
        self._sending = threading.Lock()
        self._channel = Channel(connection, keys.meta)
        self._reader = Channel(connection, keys.control)
        self._answer_due: Deadline | None = None  #: when the server has answered what was asked over it
        self._doubt = False  #: whether the server may have lost answers
        self._next_look = Deadline(SETTLED_SECONDS)
        self._thread = BackgroundThread(f"inbox of worker {place.worker_id} in {keys.run!r}", self._step)

    def start(self) -> None:
        """Begin to read in the background."""
        self._thread.start()

    def request_stop(self) -> None:
        """Have the background thread end soon; does not wait."""
        self._thread.request_stop()

    def stop(self, timeout_seconds: float) -> None:
        """Stop reading, and send the answers that are left."""
        deadline = Deadline(timeout_seconds)
        if self._thread.stop(timeout_seconds):
            self._reader.close()
        try:
            # What is not settled may have been lost unnoticed, and this is the last chance.
            self._doubt |= bool(self._sent)
            if self._unsent or self._doubt:
                self._connection.retry(self._send, deadline)
        finally:
            with self._alone():
                self._channel.close()

    def mark_stale(self) -> None:
        """Be told that the server may have lost something."""
        self._doubt = True
        self._thread.wake()

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

    def next(self, timeout_seconds: float = 0) -> ReceivedCommand | None:
        """Give the next order, waiting for one if there is a timeout; it stays until `remove`."""
        with self._arrived:
            if not self._orders and timeout_seconds > 0:
                self._arrived.wait(timeout_seconds)
            return self._orders[0] if self._orders else None

    def remove(self) -> None:
        """Remove the next order, as it is being done: it is done once, whatever comes of it."""
        with self._arrived:
            self._orders.popleft()

    def expired(self, order: ReceivedCommand) -> bool:
        """Whether an order came too late, by the server's clock."""
        if not order.expires_seconds:
            return False
        now = self._connection.clock(self._keys.control)
        return now - order.sent_milliseconds / 1000 > order.expires_seconds

    def acknowledge_command(self, order: ReceivedCommand, outcome: str, detail: str = "") -> None:
        """Say what became of a command: done, failed, unknown or expired."""
        answer: dict[str, Argument] = {
            "event": "command",
            "command": order.command_id,
            "name": order.name,
            "outcome": outcome,
            "detail": detail[:DETAIL_LENGTH],
        }
        if order.command_id in self._received:
            self._received[order.command_id] = answer
        self._answer(**answer)

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
            self._unsent.append(_Answer(self._answer_number, flat(fields)))
        try:
            self._send()
        except Fenced:
            raise
        except PeerError as error:
            logger.debug("an acknowledgement waits: %s", error)
            self._thread.wake()

    def _send(self) -> None:
        """Send what is unsent, in order, once; if another thread is at it, that one sends these too.

        The explicit ids make sending twice harmless.
        """
        while self._unsent or self._doubt:  # again, as there may be more since that thread has looked last
            with self._alone() as alone:
                if not alone:
                    return
                self._be_known()
                while self._unsent:
                    self._store(self._unsent[0])
                    self._sent.append(self._unsent.popleft())

    def _be_known(self) -> None:
        """Send again what the server may have lost, if it may have lost anything."""
        if not (self._channel.connect() or self._doubt):
            return
        self._doubt = True
        self._rejoin(self._channel)
        self._forget_settled()
        if not self._channel.execute("XRANGE", self._keys.control, self._position, self._position):
            # The stream is another one, or was trimmed. The new server's clock may be behind: then what comes now
            # has lower ids than what came before. What is known already, or for an earlier life, is not done.
            self._begin_again = True
            self._thread.wake()
        for answer in self._sent:
            self._store(answer)
        self._doubt = False

    def _store(self, answer: _Answer) -> None:
        entry_id = f"{self._incarnation}-{answer.number}"
        try:
            # Only joining makes the stream, so that a server that lost it gets every answer, and in order.
            stored = self._channel.execute(
                "XADD", self._acknowledgements, "NOMKSTREAM", entry_id, *answer.fields
            )
        except ServerFault as error:
            if "equal or smaller" not in str(error):
                raise
            newest = self._channel.execute("HGET", self._keys.life(self._worker_id), "incarnation")
            if int(newest or 0) > self._incarnation:
                raise Fenced(
                    f"worker {self._worker_id} was replaced by a newer process, or declared gone"
                ) from error
            return  # it is there: its reply was lost
        if stored is None:
            self._doubt = True
            raise RunLost(f"the server lost the acknowledgements of worker {self._worker_id}")

    def _forget_settled(self) -> None:
        """Let go of the answers that the ledger has settled."""
        self._next_look = Deadline(SETTLED_SECONDS)
        last = self._channel.execute("HGET", self._keys.ledger(self._worker_id), "event")
        with parsing(self._keys.ledger(self._worker_id)):
            settled = entry_place(last) if last else (0, 0)
        while self._sent and ((self._incarnation, self._sent[0].number) <= settled or len(self._sent) > KEPT):
            self._sent.popleft()

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Give whether this thread is the one that may use the channel."""
        alone = self._sending.acquire(blocking=False)
        try:
            yield alone
        finally:
            if alone:
                self._sending.release()

    def _step(self) -> None:
        if self._sent and self._next_look.over:
            with self._alone() as alone:
                if alone:
                    self._be_known()
                    self._forget_settled()
        self._send()  # what others left to us meanwhile, too
        if self._begin_again:
            self._begin_again, self._position, self._answer_due = False, "0-0", None
            self._reader.close()
        for _, entries in stream_entries(self._read()):
            for entry_id, fields in entries:
                self._receive(entry_id, fields or {})
                self._position = entry_id

    def _read(self) -> Any:
        """Wait for what is new on the control stream; give nothing after a while, or where there is more to do."""
        if self._reader.connect():
            self._answer_due = None
        sock = self._reader.raw_socket
        connection = self._connection
        if self._answer_due is None:
            seconds = min(READ_SECONDS, connection.timeout_seconds / 4, connection.socket_seconds / 2)
            if sock is None:  # then nobody can look up meanwhile
                seconds = connection.block_seconds
            block = "BLOCK", max(1, int(seconds * 1000))
            self._reader.send(
                [("XREAD", "COUNT", 100, *block, "STREAMS", self._keys.control, self._position)]
            )
            self._answer_due = Deadline(seconds + connection.socket_seconds)
        due = self._answer_due
        if sock is not None and not self._thread.wait_for(sock, due.remaining) and not due.over:
            return None
        self._answer_due = None
        with within(due):
            (reply,) = self._reader.receive(1)
        if isinstance(reply, PeerError):
            raise reply
        return reply

    def _receive(self, entry_id: str, fields: dict[bytes, bytes]) -> None:
        said = text_fields({name: value for name, value in fields.items() if name != b"data"})
        if said.get("event") == "version":
            self._noticed(whole_number(said.get("version", "")) or 0)
        elif (
            said.get("event") == "command"
            and self._is_for_me(said)
            and self._is_genuine(entry_id, said, fields)
        ):
            order = ReceivedCommand(
                said.get("command", ""),
                said.get("name", ""),
                None,
                int(entry_id.partition("-")[0]),
                seconds_number(said.get("expires_seconds", "0")) or 0.0,
            )
            if order.command_id in self._received:  # sent again, as the server had lost it
                answer = self._received[order.command_id]
                if answer is not None:  # and it may have lost the answer too
                    self._answer(**answer)
                return
            self._received[order.command_id] = None
            if len(self._received) > KEPT:
                del self._received[next(iter(self._received))]
            if seconds_number(said.get("expires_seconds", "0")) is None:
                self.acknowledge_command(order, "failed", "nobody can say when it expires")
                return
            try:
                data = decode(fields.get(b"data", b""), limits=COMMAND_LIMITS)
            except WireError as error:
                self.acknowledge_command(order, "failed", f"its arguments cannot be read: {error}")
                return
            with self._arrived:
                self._orders.append(replace(order, data=data))
                self._arrived.notify_all()

    def _is_genuine(self, entry_id: str, said: dict[str, str], fields: dict[bytes, bytes]) -> bool:
        """Whether a command was made by who has our key, if we have one; refuse it if not.

        It comes before anything of the command is noted or decoded: what is refused must not take the id of another.
        """
        if self._key is None:
            return True
        command_id, name = said.get("command", ""), said.get("name", "")
        try:
            check(self._key, self._keys.run, command_id, fields, self._worker_id, self._incarnation)
            return True
        except NotSigned as error:
            if entry_id in self._refused:
                return False
            self._refused[entry_id] = None
            if len(self._refused) > KEPT:
                del self._refused[next(iter(self._refused))]
            if self._refusals_until.over:
                self._refusals, self._refusals_until = 0, Deadline(REFUSALS_SECONDS)
            self._refusals += 1
            if self._refusals <= REFUSALS_SAID:
                logger.warning(
                    "worker %d refuses the command %.100r %.40r: %s", self._worker_id, name, command_id, error
                )
                self._answer(
                    event="command",
                    command=command_id[:NAME_LENGTH],
                    name=name[:NAME_LENGTH],
                    outcome="refused",
                    detail=str(error)[:DETAIL_LENGTH],
                )
            return False

    def _is_for_me(self, said: dict[str, str]) -> bool:
        """Whether a command was sent to this life of this worker."""
        workers, lives = (said.get(name, "").split(",") for name in ("workers", "incarnations"))
        life = dict(zip(workers, lives, strict=False)).get(str(self._worker_id))
        return str(self._worker_id) in workers and life in (None, "", "0", str(self._incarnation))
