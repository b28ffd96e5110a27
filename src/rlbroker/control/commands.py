"""The learner's half: commands go onto the run's control stream, and their outcomes are waited for."""

from __future__ import annotations

import itertools
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rlbroker.backend.connection import Connection, flat
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import parsing, server_seconds, text_fields
from rlbroker.backend.scripts import Script
from rlbroker.codec.message import encode
from rlbroker.codec.signing import SigningKey
from rlbroker.config import positive_seconds, waiting_seconds, worker_number
from rlbroker.control.command_signature import SIGNED, signed
from rlbroker.control.ledger import OUTCOMES_KEPT_SECONDS
from rlbroker.errors import DeadlineExceeded, InvalidArgument, UnknownWorker
from rlbroker.membership.incarnations import read_incarnations
from rlbroker.types import Outcome

#: What is older than this on the control stream, and has been answered, may be trimmed; what has not been
#: answered stays as long as its outcomes do. Live workers have read it by then.
CONTROL_KEPT_SECONDS: Final = 3600

#: Longest pause between two looks at a command's outcomes.
LOOK_SECONDS: Final = 0.1

#: Commands whose outcomes are remembered, for a server that loses them.
REMEMBERED: Final = 1_000

#: And of so many workers, over all these commands; the newest command is remembered in any case.
REMEMBERED_ANSWERS: Final = 100_000

SEND = Script.load("control/lua/send_command.lua")

RESTORE_COMMAND = Script.load("control/lua/restore_command.lua")


@dataclass
class _Sent:
    """A command as the learner remembers it."""

    fields: Sequence[Any]
    incarnations: Mapping[int, int]  #: of those it is for; empty until that is known
    sent: float
    outcomes: dict[int, Outcome] = field(default_factory=dict)


class Command:
    """A command that was sent. True if any worker can get it.

    Attributes:
        id: how it is called in Redis.
        name: what it asks for.
        worker_ids: whom it was sent to.
    """

    def __init__(
        self,
        command_id: str,
        name: str,
        worker_ids: Sequence[int],
        look: Callable[[], dict[int, Outcome]],
        changed: threading.Condition,
        timeout_seconds: float,
    ) -> None:
        """Make a handle; only the commander does."""
        self.id, self.name, self.worker_ids = command_id, name, tuple(worker_ids)
        self._look, self._changed, self._timeout_seconds = look, changed, timeout_seconds

    def __bool__(self) -> bool:
        """Whether there was anybody to send it to."""
        return bool(self.worker_ids)

    def __repr__(self) -> str:
        """Show the name and whom it was sent to."""
        return f"<Command {self.id} {self.name!r} to workers {list(self.worker_ids)}>"

    def outcomes(self) -> dict[int, Outcome]:
        """Give the present state at each worker.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        return self._look()

    def wait(self, timeout: float | None = None) -> dict[int, Outcome]:
        """Wait until every worker has a final state, and give the states.

        A worker answers when it polls. One that waits for room in its queue does not: where queues are small,
        go on collecting, and look at `outcomes` meanwhile.

        Args:
            timeout: seconds to wait at most; the communicator's timeout by default. Workers that have not
                answered by then are `waiting`.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        deadline = Deadline(self._timeout_seconds if timeout is None else waiting_seconds("timeout", timeout))
        while True:
            with within(deadline):
                found = self.outcomes()
            if deadline.over or not any(outcome.state == "waiting" for outcome in found.values()):
                return found
            with self._changed:
                self._changed.wait(min(LOOK_SECONDS, deadline.remaining))


class CommandSender:
    """Sends the commands of one learner."""

    def __init__(
        self, connection: Connection, keys: Keys, *, epoch: int, key: SigningKey | None = None
    ) -> None:
        """Prepare a commander.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            epoch: the learner's epoch; a newer one fences this.
            key: signs commands; None for no signatures.
        """
        self._connection, self._keys, self._epoch, self._key = connection, keys, epoch, key
        self._changed = threading.Condition()
        self._sent: dict[str, _Sent] = {}

    def send(
        self, name: str, data: Any, worker_ids: Sequence[int] | None, *, expires_seconds: float | None
    ) -> Command:
        """Put a command on the control stream, for some workers or for all members.

        Args:
            name: what is asked for.
            data: what the handler gets; anything that a batch may contain.
            worker_ids: whom to ask; None for everyone.
            expires_seconds: a worker that reads it later than this does not do it.

        Raises:
            InvalidArgument: the name or the expiry cannot work.
            UnknownWorker: one of the ids is not a member of the run.
            UnsupportedType: something in the data cannot travel.
            Fenced: a newer learner has taken over the run.
            PeerError: the server refused, or could not be reached in time.
        """
        if not isinstance(name, str) or not name or len(name) > 200:
            raise InvalidArgument(f"a command is a name of 1 to 200 characters; got {name!r}")
        if expires_seconds is not None:
            expires_seconds = positive_seconds("expires", expires_seconds)
        if worker_ids is not None and not isinstance(worker_ids, Iterable):
            raise InvalidArgument(
                f"worker_ids must be a list of worker ids, or None for all; got {worker_ids!r}"
            )
        wanted = None if worker_ids is None else sorted({worker_number(one) for one in worker_ids})
        command_id = uuid.uuid4().hex[:12]
        fields = {
            "name": name,
            "arguments": _readable(data),
            "expires_seconds": expires_seconds or 0,
            "data": encode(data, compression=False),
        }
        targets = self._send(command_id, fields, wanted)
        workers = sorted(targets)
        return Command(
            command_id,
            name,
            workers,
            lambda: self._outcomes(command_id, workers),
            self._changed,
            self._connection.timeout_seconds,
        )

    def _send(
        self, command_id: str, fields: Mapping[str, Any], wanted: Sequence[int] | None
    ) -> dict[int, int]:
        """Put a command on the control stream; give the workers that it is for, each with its incarnation."""
        deadline = Deadline(self._connection.timeout_seconds)
        while True:
            lives = read_incarnations(self._connection.ask, self._keys)
            members = {worker: life.incarnation for worker, life in lives.members.items()}
            missing = [worker for worker in wanted or () if worker not in members]
            if wanted is not None and not missing:
                targets, others, ever = {worker: members[worker] for worker in wanted}, dict[int, int](), -1
            else:  # to all is also to who was there before, and comes back in between; who is missing may do so too
                targets = {} if missing else members
                others = {one: life.incarnation for one, life in lives.of.items() if not life.member}
                ever = lives.named
            pairs = flat(fields)
            if self._key:
                pairs += flat(signed(self._key, self._keys.run, command_id, fields, targets))
            # Before it is sent, as it may be answered before its reply is here.
            remembered = _Sent(pairs, {}, time.monotonic())
            self._remember(command_id, remembered)
            sent = self._connection.run(
                SEND,
                (
                    self._keys.meta,
                    self._keys.workers,
                    self._keys.control,
                    self._keys.pending,
                    self._keys.outcomes(command_id),
                    *map(self._keys.life, (*targets, *others)),
                ),
                (
                    self._epoch,
                    command_id,
                    OUTCOMES_KEPT_SECONDS,
                    ever,
                    ",".join(map(str, targets)),
                    ",".join(map(str, targets.values())),
                    ",".join(map(str, others.values())),
                    *pairs,
                ),
            )
            if sent == b"sent" and targets:
                remembered.incarnations = targets
                return targets
            if sent != b"sent" and not deadline.over:
                continue
            self._sent.pop(command_id, None)
            if sent != b"sent":
                raise DeadlineExceeded(f"workers of the run {self._keys.run!r} come and go; send it again")
            if missing:
                known = ", ".join(map(str, members)) or "none"
                raise UnknownWorker(
                    f"worker {missing[0]} is not a member of the run {self._keys.run!r}; members are: {known}"
                )
            return {}

    def remember(self) -> None:
        """Learn what earlier learners sent and what became of it, as the server may lose that.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        clock, pending, entries = self._connection.execute_all(
            [
                ("TIME",),
                ("HGETALL", self._keys.pending),
                ("XREVRANGE", self._keys.control, "+", "-", "COUNT", 10 * REMEMBERED),
            ]
        )
        names = ("name", "arguments", "expires_seconds", "data")
        whole = {b"command", *(name.encode() for name in names)}
        sent = [(entry, fields) for entry, fields in entries if whole <= fields.keys()]
        sent = list(reversed(_newest(sent)))
        replies = self._connection.execute_all(
            [("HGETALL", self._keys.outcomes(fields[b"command"].decode())) for _, fields in sent]
        )
        lives = text_fields(pending)
        for (entry, fields), reply in zip(sent, replies, strict=True):
            command = fields[b"command"].decode()
            outcomes = {int(worker): Outcome.from_text(text) for worker, text in text_fields(reply).items()}
            age_seconds = server_seconds(clock) - int(entry.partition(b"-")[0]) / 1000
            kept = {name: fields[name.encode()] for name in (*names, *SIGNED) if name.encode() in fields}
            self._remember(
                command,
                _Sent(
                    flat(kept),
                    {one: int(lives.get(f"{command}:{one}", "0").split()[0]) for one in outcomes},
                    time.monotonic() - age_seconds,
                    {one: outcome for one, outcome in outcomes.items() if outcome.state != "waiting"},
                ),
            )

    def waiting(self) -> dict[int, int]:
        """Give how many commands wait for an answer, by worker."""
        counts: dict[int, int] = {}
        pending = text_fields(self._connection.execute("HGETALL", self._keys.pending))
        with parsing(self._keys.pending):
            for name in pending:
                worker = int(name.rpartition(":")[2])
                counts[worker] = counts.get(worker, 0) + 1
        return counts

    def look_again(self) -> None:
        """Wake those who wait for a command: acknowledgements were settled."""
        with self._changed:
            self._changed.notify_all()

    def note(self, worker: int, outcomes: Mapping[str, Outcome]) -> None:
        """Remember what became of commands at one worker."""
        for command_id, outcome in outcomes.items():
            sent = self._sent.get(command_id)
            if sent is not None:
                sent.outcomes[worker] = outcome

    def restore(self) -> None:
        """Write back commands and outcomes that the server may have lost. Where it lost nothing, nothing changes.

        A command that waits for an answer is sent again under its id; workers do what they know only once.

        Raises:
            Fenced: a newer learner publishes in this run.
            PeerError: the server refused, or could not be reached in time.
        """
        calls = []
        for command_id, sent in list(self._sent.items()):
            left = int(OUTCOMES_KEPT_SECONDS - (time.monotonic() - sent.sent))
            if left <= 0 or not sent.incarnations:
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
            arguments = (self._epoch, command_id, left, len(sent.incarnations), *states, *sent.fields)
            calls.append((RESTORE_COMMAND, keys, arguments))
        self._connection.run_all(calls)

    def _remember(self, command_id: str, sent: _Sent) -> None:
        with self._changed:
            self._sent[command_id] = sent
            answers = sum(len(one.incarnations) for one in self._sent.values())
            while len(self._sent) > REMEMBERED or (answers > REMEMBERED_ANSWERS and len(self._sent) > 1):
                answers -= len(self._sent.pop(next(iter(self._sent))).incarnations)

    def trim(self) -> None:
        """Shorten the control stream to what is younger than an hour or not answered yet."""
        clock, pending = self._connection.execute_all([("TIME",), ("HGETALL", self._keys.pending)])
        with parsing(self._keys.pending):
            sent = [int(value.split()[1].partition("-")[0]) for value in text_fields(pending).values()]
        now = int(server_seconds(clock))
        keep_from = min([(now - CONTROL_KEPT_SECONDS) * 1000, *sent])
        keep_from = max(keep_from, (now - OUTCOMES_KEPT_SECONDS) * 1000)
        self._connection.execute("XTRIM", self._keys.control, "MINID", "~", keep_from)

    def _outcomes(self, command_id: str, workers: Sequence[int]) -> dict[int, Outcome]:
        found = text_fields(self._connection.execute("HGETALL", self._keys.outcomes(command_id)))
        sent = self._sent.get(command_id)
        known = sent.outcomes if sent else {}
        return {
            worker: known[worker] if worker in known else Outcome.from_text(found.get(str(worker), "waiting"))
            for worker in workers
        }


def _newest(
    sent: Sequence[tuple[bytes, Mapping[bytes, bytes]]],
) -> Sequence[tuple[bytes, Mapping[bytes, bytes]]]:
    """Give the entries of commands that are worth remembering, out of those that there are, newest first."""
    sums = itertools.accumulate(fields.get(b"workers", b"").count(b",") + 1 for _, fields in sent)
    number = sum(answers <= REMEMBERED_ANSWERS for answers in sums)
    return sent[: min(REMEMBERED, max(1, number))]


def _readable(data: Any) -> str:
    """Give what a person sees of the arguments with redis-cli."""
    try:
        text = json.dumps(data)
    except (TypeError, ValueError):
        text = repr(data)
    return text if len(text) <= 200 else text[:199] + "…"
