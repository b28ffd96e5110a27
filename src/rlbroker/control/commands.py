"""The learner's side of commands: put them onto the run's control stream, and wait for their outcomes."""

from __future__ import annotations

import itertools
import json
import logging
import reprlib
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self, SupportsIndex

from rlbroker.backend.connection import Connection, flat
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import (
    default_if_wrong_type,
    entry_place,
    parsing,
    server_seconds,
    stored_integer,
    text_fields,
)
from rlbroker.backend.scripts import Script
from rlbroker.backend.text import readable
from rlbroker.codec.message import decode, encode
from rlbroker.codec.signing import SigningKey
from rlbroker.config import check_positive_seconds, check_timeout_seconds, check_worker_ids, shown
from rlbroker.control.command_signature import SIGNATURE_FIELDS, sign_command
from rlbroker.control.ledger import OUTCOMES_KEPT_SECONDS
from rlbroker.control.settlements import UNKNOWN_WORKER, Settlements, unknown_workers
from rlbroker.errors import DeadlineExceeded, InvalidArgument
from rlbroker.membership.incarnations import Incarnations, read_incarnations
from rlbroker.types import Outcome

logger = logging.getLogger("rlbroker")

#: Age from which settled commands are trimmed from the control stream: live workers have read them by then. Pending
#: commands stay as long as their outcomes.
CONTROL_KEPT_SECONDS: Final = 3600

#: The most commands that the learner remembers, to send them again to a server that lost them.
REMEMBERED_COMMANDS: Final = 1_000

#: Bound on the outcomes of all remembered commands together. The newest command is remembered in any case.
REMEMBERED_OUTCOMES: Final = 100_000

#: Length of the longest command name.
NAME_LENGTH: Final = 200

#: Characters that are kept of the readable form of a command's arguments.
ARGUMENTS_LENGTH: Final = 200

SEND = Script.load("control/lua/send_command.lua")

RESTORE_COMMAND = Script.load("control/lua/restore_command.lua")

#: Fields of a command that the learner remembers, besides its signature.
_FIELDS: Final = ("name", "arguments", "expires_seconds", "data")

logger = logging.getLogger("rlbroker")

#: Entries of the control stream: ids and fields.
_Entries = Sequence[tuple[bytes, Mapping[bytes, bytes]]]


def ends_run(name: str, worker_ids: object, expires_seconds: float | None) -> bool:
    """Return whether a command ends the run: a `stop` to all workers, which is also for those that join later."""
    return name == "stop" and worker_ids is None and expires_seconds is None


class Command:
    """A command that was sent. True if it was sent to any worker.

    Attributes:
        id: its id in Redis.
        name: the name that a worker's handler is registered under.
        worker_ids: the workers that it was sent to.

    The outcomes also name those of the wanted workers that are not members of the run, as `unknown`.
    """

    def __init__(
        self,
        command_id: str,
        name: str,
        worker_ids: Sequence[int],
        read_outcomes: Callable[[], dict[int, Outcome]],
        settlements: Settlements,
        timeout_seconds: float,
    ) -> None:
        """Make a handle; called by `CommandSender` only."""
        self.id, self.name, self.worker_ids = command_id, name, tuple(worker_ids)
        self._read_outcomes, self._settlements = read_outcomes, settlements
        self._timeout_seconds = timeout_seconds

    def __bool__(self) -> bool:
        """Return whether it was sent to any worker."""
        return bool(self.worker_ids)

    def __repr__(self) -> str:
        """Show the name and the workers."""
        return f"<Command {self.id} {self.name!r} to workers {list(self.worker_ids)}>"

    def outcomes(self) -> dict[int, Outcome]:
        """Return the current outcome at each worker, by worker id.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        return self._read_outcomes()

    def wait(self, timeout: float | None = None) -> dict[int, Outcome]:
        """Wait until every worker has a final outcome, and return the outcomes.

        A worker does commands when it polls. A worker that waits for room in its queue does not poll: with small
        queues, keep collecting and read `outcomes` in between.

        Args:
            timeout: seconds to wait at most; the communicator's timeout by default. Workers that have not acknowledged
                the command by then are `waiting`.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        deadline = Deadline(
            self._timeout_seconds if timeout is None else check_timeout_seconds("timeout", timeout)
        )
        return self._settlements.wait(self.outcomes, deadline)


@dataclass
class _SentCommand:
    """A command as the learner remembers it.

    Attributes:
        fields: names and values of its fields, one after the other.
        incarnations: the incarnation of each worker that it was sent to; empty until the server has confirmed it.
        sent_at: when it was sent, by the monotonic clock.
        outcomes: final outcomes by worker.
    """

    fields: Sequence[Any]
    incarnations: Mapping[int, int]
    sent_at: float
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    @classmethod
    def from_entry(
        cls,
        command_id: str,
        entry_id: bytes,
        fields: Mapping[bytes, bytes],
        outcomes: Mapping[str, str],
        pending: Mapping[str, str],
        now: float,
    ) -> Self:
        """Parse an entry of the control stream; raise ValueError or LookupError if no learner wrote it.

        Args:
            outcomes: the command's outcomes by worker.
            pending: the fields of the hash `pending`.
            now: the server's clock, seconds since the epoch.
        """
        found = {int(worker): Outcome.from_text(text) for worker, text in outcomes.items()}
        incarnations = {
            worker: int(pending.get(f"{command_id}:{worker}", "0").split()[0]) for worker in found
        }
        names = [name for name in (*_FIELDS, *SIGNATURE_FIELDS) if name.encode() in fields]
        age_seconds = now - entry_place(entry_id)[0] / 1000
        return cls(
            flat({name: fields[name.encode()] for name in names}),
            incarnations,
            time.monotonic() - age_seconds,
            {worker: outcome for worker, outcome in found.items() if outcome.state != "waiting"},
        )


@dataclass(frozen=True)
class _Recipients:
    """The workers that a command is for, and what must still hold when the script runs.

    Attributes:
        targets: the workers, each with its incarnation; they must still be members.
        former: workers that must not have joined again, each with its last incarnation.
        names_count: the size that the set `workers` must have; -1 for any.
        missing: wanted workers that are not members.
    """

    targets: Mapping[int, int]
    former: Mapping[int, int]
    names_count: int
    missing: Sequence[int] = ()

    @classmethod
    def choose(cls, workers: Incarnations, wanted: Sequence[int] | None) -> Self:
        """Choose the recipients of a command to the wanted workers, or to all members."""
        members = {worker: one.number for worker, one in workers.members.items()}
        if wanted is not None:
            members = {worker: members[worker] for worker in wanted if worker in members}
        missing = [worker for worker in wanted or () if worker not in members]
        if wanted is not None and not missing:
            return cls(members, {}, -1)
        # A former or new worker may join before the script runs. A command to all members is for it too, and a wanted
        # worker must then not be reported as unknown.
        former = {worker: one.number for worker, one in workers.by_worker.items() if not one.member}
        return cls(members, former, workers.names_count, missing)


class CommandSender:
    """Sends the commands of one learner, and remembers them in case the server loses them."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        epoch: int,
        key: SigningKey | None = None,
        settlements: Settlements | None = None,
    ) -> None:
        """Prepare a sender; nothing is sent yet.

        Args:
            epoch: the learner's epoch; a newer one fences this learner.
            key: the key that signs commands; None to send them unsigned.
            settlements: wakes `Command.wait`; None if another process settles the acknowledgements.
        """
        self._connection, self._keys, self._epoch, self._key = connection, keys, epoch, key
        self._settlements = settlements or Settlements()
        self._sent: dict[str, _SentCommand] = {}

    def send(
        self,
        name: str,
        data: Any,
        worker_ids: Iterable[SupportsIndex] | None,
        *,
        expires_seconds: float | None,
    ) -> Command:
        """Send a command to some workers, or to all members of the run.

        Args:
            data: the argument of the handler; anything that a batch may contain.
            worker_ids: the workers to send it to; None for all members. Those that are not members get the outcome
                `unknown`.
            expires_seconds: a worker that reads the command later than this does not do it; None for no limit.

        Raises:
            InvalidArgument: the name, the worker ids or the expiry are invalid.
            UnknownWorker: none of the ids is a member of the run.
            UnsupportedType: the data contains a value that cannot be encoded.
            Fenced: a newer learner has taken over the run.
            DeadlineExceeded: the members of the run kept changing.
        """
        if not issubclass(type(name), str) or not name or len(name) > NAME_LENGTH:
            raise InvalidArgument(f"a command is a name of 1 to {NAME_LENGTH} characters; got {shown(name)}")
        if readable(name) != name:
            raise InvalidArgument(f"the name of a command must be valid text; got {shown(name)}")
        if expires_seconds is not None:
            expires_seconds = check_positive_seconds("expires", expires_seconds)
        wanted = None if worker_ids is None else check_worker_ids("worker_ids", worker_ids)
        command_id = uuid.uuid4().hex[:12]
        encoded = encode(data, compression=False)  # first, because it refuses what cannot be described
        fields = {
            "name": name,
            "arguments": _describe_arguments(decode(encoded)),  # runs no code of other libraries
            "expires_seconds": expires_seconds or 0,
            "data": encoded,
        }
        recipients = self._send(command_id, fields, wanted)
        asked = sorted([*recipients.targets, *recipients.missing])
        return Command(
            command_id,
            name,
            sorted(recipients.targets),
            lambda: self._read_outcomes(command_id, asked),
            self._settlements,
            self._connection.timeout_seconds,
        )

    def count_pending(self) -> dict[int, int]:
        """Return the number of commands that have not been acknowledged, by worker."""
        counts: dict[int, int] = {}
        pending = text_fields(self._connection.execute("HGETALL", self._keys.pending))
        with parsing(self._keys.pending):
            for name in pending:
                worker = stored_integer(name.rpartition(":")[2])
                counts[worker] = counts.get(worker, 0) + 1
        return counts

    def trim(self) -> None:
        """Trim the control stream to entries that are younger than an hour or still pending."""
        clock, pending = self._connection.execute_all([("TIME",), ("HGETALL", self._keys.pending)])
        with parsing(self._keys.pending):
            sent = [
                stored_integer(value.split()[1].partition("-")[0]) for value in text_fields(pending).values()
            ]
        now = int(server_seconds(clock))
        keep_from = min([(now - CONTROL_KEPT_SECONDS) * 1000, *sent])
        keep_from = max(keep_from, (now - OUTCOMES_KEPT_SECONDS) * 1000)
        self._connection.execute("XTRIM", self._keys.control, "MINID", "~", keep_from)

    # Sending

    def _send(self, command_id: str, fields: Mapping[str, Any], wanted: Sequence[int] | None) -> _Recipients:
        """Put a command on the control stream, and return its workers.

        Retry if the members changed between reading them and running the script.
        """
        deadline = Deadline(self._connection.timeout_seconds)
        while True:
            workers = read_incarnations(self._connection, self._keys)
            recipients = _Recipients.choose(workers, wanted)
            pairs = flat(fields)
            if self._key:
                pairs += flat(sign_command(self._key, self._keys.run, command_id, fields, recipients.targets))
            # Remember it first: a worker may acknowledge it before the reply of the script arrives.
            remembered = _SentCommand(pairs, {}, time.monotonic())
            self._remember(command_id, remembered)
            if self._try_to_send(command_id, pairs, recipients):
                break
            if deadline.over:
                self._sent.pop(command_id, None)
                raise DeadlineExceeded(
                    f"the members of the run {self._keys.run!r} kept changing, so the command was not sent; "
                    "send it again"
                )
        if recipients.targets:
            remembered.outcomes |= dict.fromkeys(recipients.missing, UNKNOWN_WORKER)
            remembered.incarnations = {**recipients.targets, **dict.fromkeys(recipients.missing, 0)}
            return recipients
        self._sent.pop(command_id, None)
        if recipients.missing:
            raise unknown_workers(self._keys.run, recipients.missing, workers.members)
        return recipients

    def _try_to_send(self, command_id: str, pairs: Sequence[Any], recipients: _Recipients) -> bool:
        """Run the script, and return whether the recipients were still valid, so that the command was sent."""
        targets, former = recipients.targets, recipients.former
        reply = self._connection.run(
            SEND,
            (
                self._keys.meta,
                self._keys.workers,
                self._keys.control,
                self._keys.pending,
                self._keys.outcomes(command_id),
                *map(self._keys.life, (*targets, *former)),
            ),
            (
                self._epoch,
                command_id,
                OUTCOMES_KEPT_SECONDS,
                recipients.names_count,
                ",".join(map(str, targets)),
                ",".join(map(str, targets.values())),
                ",".join(map(str, former.values())),
                ",".join(map(str, recipients.missing)),
                str(UNKNOWN_WORKER),
                *pairs,
            ),
        )
        return bool(reply == b"sent")

    def _read_outcomes(self, command_id: str, workers: Sequence[int]) -> dict[int, Outcome]:
        """Read a command's outcomes. Those that the learner remembers take precedence: the server may lose some."""
        found = text_fields(self._connection.execute("HGETALL", self._keys.outcomes(command_id)))
        sent = self._sent.get(command_id)
        known = sent.outcomes if sent else {}
        with parsing(self._keys.outcomes(command_id)):
            return {
                worker: known[worker]
                if worker in known
                else Outcome.from_text(found.get(str(worker), "waiting"))
                for worker in workers
            }

    # Remembering

    def remember(self) -> None:
        """Remember the commands of earlier learners and their outcomes, because the server may lose them."""
        clock, pending, entries = self._connection.execute_all(
            [
                ("TIME",),
                ("HGETALL", self._keys.pending),
                ("XREVRANGE", self._keys.control, "+", "-", "COUNT", 10 * REMEMBERED_COMMANDS),
            ]
        )
        required = {b"command", *(name.encode() for name in _FIELDS)}
        complete = [(entry_id, fields) for entry_id, fields in entries if required <= fields.keys()]
        oldest_first = list(reversed(_keep_within_bounds(complete)))
        ids = [fields[b"command"].decode(errors="replace") for _, fields in oldest_first]
        replies = self._connection.execute_all(
            [("HGETALL", self._keys.outcomes(command_id)) for command_id in ids], strict=False
        )
        incarnations, now = text_fields(pending), server_seconds(clock)
        for command_id, (entry_id, fields), reply in zip(ids, oldest_first, replies, strict=True):
            outcomes = text_fields(default_if_wrong_type(reply, {}))
            try:
                sent = _SentCommand.from_entry(command_id, entry_id, fields, outcomes, incarnations, now)
            except (ValueError, LookupError):
                logger.warning("%s has an entry that no learner wrote; it is ignored", self._keys.control)
            else:
                self._remember(command_id, sent)

    def note_outcomes(self, worker: int, outcomes: Mapping[str, Outcome]) -> None:
        """Remember final outcomes at one worker, by command id."""
        for command_id, outcome in outcomes.items():
            sent = self._sent.get(command_id)
            if sent is not None:
                sent.outcomes[worker] = outcome

    def restore(self) -> None:
        """Write back commands and outcomes that the server may have lost. Changes nothing if it lost nothing.

        A pending command is sent again under its id; a worker does each id only once.

        Raises:
            Fenced: a newer learner publishes in this run.
        """
        calls = []
        for command_id, sent in list(self._sent.items()):
            remaining_seconds = int(OUTCOMES_KEPT_SECONDS - (time.monotonic() - sent.sent_at))
            if remaining_seconds <= 0 or not sent.incarnations:
                continue
            states: list[Any] = []
            for worker, incarnation in sent.incarnations.items():
                states += [worker, incarnation, str(sent.outcomes.get(worker, "waiting"))]
            keys = (
                self._keys.meta,
                self._keys.control,
                self._keys.pending,
                self._keys.outcomes(command_id),
            )
            arguments = (
                self._epoch,
                command_id,
                remaining_seconds,
                len(sent.incarnations),
                *states,
                *sent.fields,
            )
            calls.append(RESTORE_COMMAND.call(keys, arguments))
        self._connection.execute_all(calls)

    def _remember(self, command_id: str, sent: _SentCommand) -> None:
        """Remember a command, and forget the oldest ones beyond the bounds."""
        self._sent[command_id] = sent
        remembered = list(self._sent.items())  # other threads send commands too
        number, total = len(remembered), sum(len(one.incarnations) for _, one in remembered)
        for oldest, one in remembered[:-1]:
            if number <= REMEMBERED_COMMANDS and total <= REMEMBERED_OUTCOMES:
                return
            self._sent.pop(oldest, None)
            number, total = number - 1, total - len(one.incarnations)


def _keep_within_bounds(commands: _Entries) -> _Entries:
    """Return the newest commands, as many as may be remembered; both sequences begin with the newest one."""
    totals = itertools.accumulate(fields.get(b"workers", b"").count(b",") + 1 for _, fields in commands)
    within_bound = sum(total <= REMEMBERED_OUTCOMES for total in totals)
    return commands[: min(REMEMBERED_COMMANDS, max(1, within_bound))]


#: Bounds the depth and the length of what it shows, and survives values that cannot be shown.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = ARGUMENTS_LENGTH


def _describe_arguments(data: Any) -> str:
    """Return a command's arguments as short text, for people who read them with redis-cli."""
    try:
        text = json.dumps(data)
    except (TypeError, ValueError, RecursionError):
        text = readable(_SHORT.repr(data), ARGUMENTS_LENGTH + 1)
    return text if len(text) <= ARGUMENTS_LENGTH else text[: ARGUMENTS_LENGTH - 1] + "…"
