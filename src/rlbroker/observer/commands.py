"""Commands of a run: what was sent and what became of it, and sending one in the place of its learner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rlbroker.connection import Connection
from rlbroker.control.account import ANSWERS
from rlbroker.control.commander import Command as Command
from rlbroker.control.commander import Commander, outcome_of
from rlbroker.errors import Fenced, InvalidArgument
from rlbroker.keys import Keys
from rlbroker.observer.runs import learner_state
from rlbroker.records import Outcome, State
from rlbroker.replies import entry_place, server_seconds, text_fields

#: Entries of the control stream that are read at once; most of them are notices of versions.
PAGE = 1_000

#: Answers of one worker that are looked through for one that no learner has settled yet.
ANSWERS_READ = 1_000

#: Learners that may come in between while a command is sent.
_TRIES = 3


@dataclass(frozen=True)
class SentCommand:
    """A command on the control stream.

    Attributes:
        command_id: how it is called in Redis.
        name: what it asks for.
        arguments: what the handler gets, as people read it; cut at 200 characters.
        sent: when, by the server's clock, seconds since the epoch.
        age_seconds: how long ago that is.
        outcomes: by worker what became of it; empty once nobody remembers, a day later.
    """

    command_id: str
    name: str
    arguments: str
    sent: float
    age_seconds: float
    outcomes: Mapping[int, Outcome]


def list_commands(connection: Connection, keys: Keys, *, count: int) -> list[SentCommand]:
    """Give the newest commands, oldest first.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    found: dict[str, tuple[str, dict[str, str]]] = {}
    position = "+"
    while len(found) < count:
        entries = connection.execute("XREVRANGE", keys.control, position, "-", "COUNT", PAGE)
        for entry_id, fields in entries:
            said = text_fields({name: value for name, value in fields.items() if name != b"data"})
            known = said.get("command", "")
            # One that was sent again to a server that had lost it is known by its id.
            if said.get("event") == "command" and (known in found or len(found) < count):
                found[known] = entry_id.decode(), said
        if len(entries) < PAGE:
            break
        position = f"({entries[-1][0].decode()}"
    clock, *replies = connection.execute_all(
        [("TIME",), *(("HGETALL", keys.outcomes(command)) for command in found)]
    )
    now = server_seconds(clock)
    outcomes = {
        command: {int(worker): outcome_of(text) for worker, text in text_fields(reply).items()}
        for command, reply in zip(found, replies, strict=True)
    }
    _add_unsettled(connection, keys, outcomes)
    commands = []
    for command, (entry_id, said) in reversed(found.items()):
        sent = entry_place(entry_id)[0] / 1000
        commands.append(
            SentCommand(
                command_id=command,
                name=said.get("name", ""),
                arguments=said.get("arguments", ""),
                sent=sent,
                age_seconds=max(0.0, now - sent),
                outcomes=dict(sorted(outcomes[command].items())),
            )
        )
    return commands


def send_command(
    connection: Connection,
    keys: Keys,
    name: str,
    data: Any,
    worker_ids: Sequence[int] | None,
    *,
    expires_seconds: float | None,
    also_without_learner: bool = False,
) -> Command:
    """Send a command as the run's present learner would.

    That learner does not know of it: it settles the answers, but does not send the command again to a server that
    lost it.

    Args:
        connection: way to the server.
        keys: names of the run's keys.
        name: what is asked for.
        data: what the handler gets; anything that a batch may contain.
        worker_ids: whom to ask; None for all members.
        expires_seconds: a worker that reads it later than this does not do it.
        also_without_learner: whether to send it although nobody settles the answers: the learner has ended, or is
            away. Workers that live obey all the same.

    Raises:
        InvalidArgument: the name or the expiry cannot work, or there is no learner.
        UnknownWorker: one of the ids is not a member of the run.
        PeerError: the server refused, or could not be reached in time.
    """
    for tried in range(_TRIES):
        clock, fields = connection.execute_all([("TIME",), ("HGETALL", keys.meta)])
        meta = text_fields(fields)
        silent = (
            max(0.0, server_seconds(clock) - float(meta["learner_seen"])) if "learner_seen" in meta else None
        )
        state = learner_state(meta, silent)
        if state == "none" or int(meta.get("epoch", 0)) == 0:
            raise InvalidArgument(
                f"no learner has opened the run {keys.run!r} yet, and only then can its workers be sent commands"
            )
        if state != "alive" and not also_without_learner:
            why = "has ended" if state == "ended" else "is away: it died, or is cut off"
            raise InvalidArgument(
                f"the learner of {keys.run!r} {why}, and nobody would settle the workers' answers; --force sends the "
                "command all the same, and workers that live obey it"
            )
        commander = Commander(connection, keys, epoch=int(meta["epoch"]))
        try:
            return commander.send(name, data, worker_ids, expires_seconds=expires_seconds)
        except Fenced:  # another learner has come since we looked
            if tried == _TRIES - 1:
                raise
    raise AssertionError("each try returns or raises")


def look_at_command(connection: Connection, keys: Keys, command: Command) -> dict[int, Outcome]:
    """Give what became of a command at each worker: what is settled, and else what the worker answered.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    outcomes = {command.id: command.outcomes()}
    _add_unsettled(connection, keys, outcomes)
    return outcomes[command.id]


def _add_unsettled(connection: Connection, keys: Keys, outcomes: dict[str, dict[int, Outcome]]) -> None:
    """Fill in answers that no learner has settled yet: it may be away, or just not have come to it."""
    waiting = {
        worker for states in outcomes.values() for worker, one in states.items() if one.state == "waiting"
    }
    for worker, said in _answers(connection, keys, sorted(waiting)):
        states = outcomes.get(said.get("command", ""), {})
        if worker in states and states[worker].state == "waiting":
            states[worker] = Outcome(cast(State, said["outcome"]), said.get("detail", ""))


def _answers(connection: Connection, keys: Keys, workers: Iterable[int]) -> list[tuple[int, dict[str, str]]]:
    wanted = list(workers)
    replies = connection.execute_all(
        [("XRANGE", keys.acknowledgements(worker), "-", "+", "COUNT", ANSWERS_READ) for worker in wanted]
    )
    return [
        (worker, said)
        for worker, entries in zip(wanted, replies, strict=True)
        for _, fields in entries
        if (said := text_fields(fields)).get("event") == "command" and said.get("outcome") in ANSWERS
    ]
