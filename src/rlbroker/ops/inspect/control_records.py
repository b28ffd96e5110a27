"""Commands of a run: what was sent, and what became of it; reading changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import entry_place, server_seconds, text_fields
from rlbroker.backend.unreadable import legible
from rlbroker.control.ledger import Ledger
from rlbroker.control.outcomes import ANSWERS
from rlbroker.types import Missed, Outcome, State

#: Entries of the control stream that are read at once; most of them are notices of versions.
PAGE = 1_000

#: Answers of one worker that are looked through for one that no learner has settled yet.
ANSWERS_READ = 1_000


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
        command: {int(worker): Outcome.from_text(text) for worker, text in text_fields(reply).items()}
        for command, reply in zip(found, replies, strict=True)
    }
    add_unsettled(connection, keys, outcomes)
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


def add_unsettled(connection: Connection, keys: Keys, outcomes: dict[str, dict[int, Outcome]]) -> None:
    """Fill in, by command and worker, what was answered and is not settled yet: the learner may be away."""
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


def read_missed(
    connection: Connection,
    keys: Keys,
    *,
    last_seconds: float | None = None,
    worker: int | None = None,
    why: str | None = None,
) -> tuple[float, list[Missed]]:
    """Give the server's clock, seconds since the epoch, and what was missed, oldest first.

    Args:
        connection: way to the server.
        keys: names of the run's keys.
        last_seconds: only what was recorded within so many seconds; None for all that is kept.
        worker: only what this worker missed.
        why: only what was missed for this reason.

    Raises:
        WireError: the record holds what no learner writes.
        PeerError: the server refused, or could not be reached in time.
    """
    now = connection.clock(keys.meta)
    with legible(keys.missed):
        records = Ledger(connection, keys).records(since=0.0 if last_seconds is None else now - last_seconds)
    return now, [one for one in records if worker in (None, one.worker_id) and why in (None, one.why)]
