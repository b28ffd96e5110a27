"""The worker's side of commands: read them in the background, return them in order, and acknowledge them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Final

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Argument, Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import seconds_number, text_fields, whole_number
from rlbroker.backend.text import readable
from rlbroker.backend.threads import BackgroundThread
from rlbroker.codec.limits import Limits
from rlbroker.codec.message import decode
from rlbroker.codec.signing import NotSigned, SigningKey
from rlbroker.control.acknowledgements import AcknowledgementSender
from rlbroker.control.command_signature import CommandVerifier
from rlbroker.control.control_reader import ControlReader
from rlbroker.errors import Fenced, PeerError, WireError
from rlbroker.types import Registration

logger = logging.getLogger("rlbroker")

#: Bounds on what a command's arguments may contain when they are decoded.
COMMAND_LIMITS: Final = Limits(max_raw_bytes=64 << 20)

#: The most commands whose ids and acknowledgements are remembered, so that a command that is sent again is done once.
REMEMBERED: Final = 10_000

#: Characters of a refused command's name and id that an acknowledgement carries.
NAME_LENGTH: Final = 200


@dataclass
class ReceivedCommand:
    """A command as a worker reads it.

    Attributes:
        begun: whether its effects have begun: after an interrupt it is done to its end, also by a worker that stops.
        result: its outcome and a detail, as they will be acknowledged; None until its handler is called.
    """

    command_id: str
    name: str
    data: Any
    sent_milliseconds: int
    expires_seconds: float
    begun: bool = False
    result: tuple[str, str] | None = None


class Inbox:
    """The commands that one worker has received and not done yet.

    A background thread reads the control stream: it queues the worker's commands and reports new versions. A command
    that is sent again, because the server had lost it, is done once; its acknowledgement is repeated.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        registration: Registration,
        *,
        key: SigningKey | None = None,
        notice_version: Callable[[int], None],
        rejoin: Callable[[Channel], None],
    ) -> None:
        """Prepare an inbox; nothing is read yet.

        Args:
            registration: the worker, its incarnation, and where its part of the control stream begins.
            key: the key that commands must be signed with; None to accept unsigned commands.
            notice_version: called with the number of each version that is published.
            rejoin: writes the worker's membership back if the server lost it.
        """
        self._connection, self._keys, self._notice_version = connection, keys, notice_version
        self._worker_id, self._incarnation = registration.worker_id, registration.incarnation
        self._verifier = CommandVerifier(key, keys.run, self._worker_id, self._incarnation) if key else None
        self._commands: deque[ReceivedCommand] = deque()
        self._arrived = SimpleQueue[None]()  #: one item for each command, to wait for
        #: By command id: the fields of its acknowledgement; None if it is not acknowledged yet.
        self._remembered: dict[str, dict[str, Argument] | None] = {}
        self._thread = BackgroundThread(f"inbox of worker {self._worker_id} in {keys.run!r}", self._step)
        self._reader = ControlReader(
            connection, keys, registration.control_position, wait_for=self._thread.wait_for
        )
        self.acknowledgements = AcknowledgementSender(
            connection,
            keys,
            registration,
            rejoin=rejoin,
            check_control=partial(_check_control, self._reader, self._thread),
        )

    def start(self) -> None:
        """Start the background thread, which reads the control stream."""
        self._thread.start()

    def request_stop(self) -> None:
        """Ask the background thread to stop, without waiting for it."""
        self._thread.request_stop()

    def stop(self, timeout_seconds: float) -> None:
        """Stop reading, and send the acknowledgements that are left."""
        deadline = Deadline(timeout_seconds)
        if self._thread.stop(timeout_seconds):
            self._reader.close()
        self.acknowledgements.close(deadline)

    def mark_stale(self) -> None:
        """Note that the server may have lost data; the background thread then sends acknowledgements again."""
        self.acknowledgements.mark_stale()
        self._thread.wake()

    @property
    def thread(self) -> BackgroundThread:
        """The background thread."""
        return self._thread

    # Commands

    @property
    def waiting(self) -> bool:
        """Whether there is a command to do."""
        return bool(self._commands)

    @property
    def begun(self) -> bool:
        """Whether an interrupt prevented the end of the next command."""
        return bool(self._commands) and self._commands[0].begun

    def contains(self, name: str) -> bool:
        """Return whether a command of this name has arrived and has not been done yet."""
        return any(command.name == name for command in self._commands.copy())

    def next(self, timeout_seconds: float = 0) -> ReceivedCommand | None:
        """Return the next command, waiting for one within the timeout; it stays in the inbox until `finish`."""
        if not self._commands and timeout_seconds > 0:
            with suppress(Empty):
                self._arrived.get(timeout=timeout_seconds)
        return self._commands[0] if self._commands else None

    def finish(self) -> None:
        """Acknowledge the result of the next command, and remove it. After an interrupt this may be repeated."""
        command = self._commands[0]
        assert command.result is not None
        self.acknowledge_command(command, *command.result)
        with suppress(Empty):
            self._arrived.get_nowait()
        self._commands.popleft()

    def finish_interrupted(self) -> None:
        """Acknowledge the next command if an interrupt prevented that; for a worker that leaves."""
        if self._commands and self._commands[0].result is not None:
            self.finish()

    def is_expired(self, command: ReceivedCommand) -> bool:
        """Return whether a command has expired, by the server's clock."""
        if not command.expires_seconds:
            return False
        now = self._connection.clock(self._keys.control)
        return now - command.sent_milliseconds / 1000 > command.expires_seconds

    # Acknowledgements

    def acknowledge_command(self, command: ReceivedCommand, outcome: str, detail: str = "") -> None:
        """Acknowledge a command as `done`, `failed`, `unknown` or `expired`.

        Raises:
            Fenced: a newer process has this worker id, or the run has forgotten this worker.
        """
        fields: dict[str, Argument] = {
            "event": "command",
            "command": command.command_id,
            "name": command.name,
            "outcome": outcome,
            "detail": readable(detail),
        }
        if command.command_id in self._remembered:
            self._remembered[command.command_id] = fields
        self._acknowledge(fields)

    def acknowledge_version(self, before: int, version: int, outcome: str, detail: str = "") -> None:
        """Acknowledge a version as `applied`, `failed` or `refused`.

        Raises:
            Fenced: a newer process has this worker id, or the run has forgotten this worker.
        """
        self._acknowledge(
            {
                "event": "version",
                "before": before,
                "version": version,
                "outcome": outcome,
                "detail": readable(detail),
            }
        )

    def _acknowledge(self, fields: Mapping[str, Argument]) -> None:
        """Send an acknowledgement now, or leave it to the background thread if the server cannot be reached."""
        self.acknowledgements.add(fields)
        self.send_unsent()

    def send_unsent(self) -> None:
        """Send acknowledgements that an interrupt of this thread kept from being sent, if there are any."""
        if not self.acknowledgements.unsent:
            return
        try:
            self.acknowledgements.send()
        except Fenced:
            raise
        except PeerError as error:
            logger.debug("an acknowledgement is sent later: %s", str(error))
            self._thread.wake()

    # In the background

    def _step(self) -> None:
        self.acknowledgements.drop_settled()
        self.acknowledgements.send()
        for entry_id, fields in self._reader.read():
            self._receive(entry_id, fields)
            self._reader.position = entry_id

    def _receive(self, entry_id: str, fields: Mapping[bytes, bytes]) -> None:
        texts = text_fields({name: value for name, value in fields.items() if name != b"data"})
        if texts.get("event") == "version":
            self._notice_version(whole_number(texts.get("version", "")) or 0)
        # The signature is checked before the command is remembered or decoded: a forged command must not use up the id
        # of a genuine one.
        elif (
            texts.get("event") == "command"
            and self._is_addressed(texts)
            and self._is_genuine(entry_id, texts, fields)
        ):
            self._receive_command(entry_id, texts, fields.get(b"data", b""))

    def _receive_command(self, entry_id: str, texts: Mapping[str, str], data: bytes) -> None:
        expires_seconds = seconds_number(texts.get("expires_seconds", "0"))
        command = ReceivedCommand(
            texts.get("command", ""),
            texts.get("name", ""),
            None,
            int(entry_id.partition("-")[0]),
            expires_seconds or 0.0,
        )
        if command.command_id in self._remembered:  # sent again, because the server had lost it
            acknowledgement = self._remembered[command.command_id]
            if acknowledgement is not None:  # the server may have lost it too
                self._acknowledge(acknowledgement)
            return
        self._remembered[command.command_id] = None
        if len(self._remembered) > REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        if expires_seconds is None:
            self.acknowledge_command(command, "failed", "invalid expires_seconds")
            return
        try:
            decoded = decode(data, limits=COMMAND_LIMITS)
        except WireError as error:
            self.acknowledge_command(command, "failed", f"its arguments cannot be decoded: {error}")
            return
        command.data = decoded
        self._commands.append(command)
        self._arrived.put(None)

    def _is_addressed(self, texts: Mapping[str, str]) -> bool:
        """Return whether a command was sent to this incarnation of this worker."""
        worker = str(self._worker_id)
        workers, incarnations = (texts.get(name, "").split(",") for name in ("workers", "incarnations"))
        incarnation = dict(zip(workers, incarnations, strict=False)).get(worker)
        return worker in workers and incarnation in (None, "", "0", str(self._incarnation))

    def _is_genuine(self, entry_id: str, texts: Mapping[str, str], fields: Mapping[bytes, bytes]) -> bool:
        """Return whether a command has a valid signature, if this worker has a key; report it as refused if not."""
        if self._verifier is None:
            return True
        command_id, name = texts.get("command", ""), texts.get("name", "")
        try:
            self._verifier.check(command_id, fields)
            return True
        except NotSigned as error:
            if self._verifier.should_report(entry_id):
                logger.warning(
                    "worker %d refuses the command %.100r %.40r: %s",
                    self._worker_id,
                    name,
                    command_id,
                    str(error),
                )
                self._acknowledge(
                    {
                        "event": "command",
                        "command": command_id[:NAME_LENGTH],
                        "name": name[:NAME_LENGTH],
                        "outcome": "refused",
                        "detail": readable(str(error)),
                    }
                )
            return False


def _check_control(reader: ControlReader, thread: BackgroundThread, channel: Channel) -> None:
    """Read the control stream from its start if the server lost it, or trimmed it.

    The clock of a new server may be behind, so that new entries have smaller ids than `position`. Commands that are
    remembered, or that are for an earlier incarnation, are not done again.
    """
    if not reader.has_position(channel):
        reader.restart()
        thread.wake()
