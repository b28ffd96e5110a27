"""Records of control: which commands were sent, what became of them, and which updates and commands were missed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import entry_place, parsing, server_seconds, text_fields
from rlbroker.control.ledger_reader import read_missed_records
from rlbroker.control.outcomes import ACKNOWLEDGED_STATES
from rlbroker.types import Missed, Outcome, State

#: Entries of the control stream per read; most of them are notices of versions.
ENTRIES_AT_ONCE = 1_000

#: Acknowledgements of one worker that are searched for those that no learner has settled yet.
ANSWERS_AT_ONCE = 1_000


@dataclass(frozen=True)
class SentCommand:
    """A command on the control stream.

    Attributes:
        command_id: its id in Redis.
        name: its name.
        arguments: its data as text, cut at 200 characters.
        sent: when it was sent, seconds since the epoch by the server's clock.
        age_seconds: how long ago that is.
        outcomes: its outcome by worker; empty once they are expired, a day later.
    """

    command_id: str
    name: str
    arguments: str
    sent: float
    age_seconds: float
    outcomes: Mapping[int, Outcome]


def list_commands(connection: Connection, keys: Keys, *, count: int) -> list[SentCommand]:
    """Return the newest commands, oldest first.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    found: dict[str, tuple[str, dict[str, str]]] = {}
    position = "+"
    while len(found) < count:
        entries = connection.execute("XREVRANGE", keys.control, position, "-", "COUNT", ENTRIES_AT_ONCE)
        for entry_id, fields in entries:
            header = text_fields({name: value for name, value in fields.items() if name != b"data"})
            command_id = header.get("command", "")
            # A command that was sent again, to a server that had lost it, has the same id in both entries.
            if header.get("event") == "command" and (command_id in found or len(found) < count):
                found[command_id] = entry_id.decode(), header
        if len(entries) < ENTRIES_AT_ONCE:
            break
        position = f"({entries[-1][0].decode()}"
    clock, *replies = connection.execute_all(
        [("TIME",), *(("HGETALL", keys.outcomes(command_id)) for command_id in found)]
    )
    now = server_seconds(clock)
    outcomes = {
        command_id: {int(worker): Outcome.from_text(text) for worker, text in text_fields(reply).items()}
        for command_id, reply in zip(found, replies, strict=True)
    }
    add_unsettled_answers(connection, keys, outcomes)
    commands = []
    for command_id, (entry_id, header) in reversed(found.items()):
        sent = entry_place(entry_id)[0] / 1000
        commands.append(
            SentCommand(
                command_id=command_id,
                name=header.get("name", ""),
                arguments=header.get("arguments", ""),
                sent=sent,
                age_seconds=max(0.0, now - sent),
                outcomes=dict(sorted(outcomes[command_id].items())),
            )
        )
    return commands


def add_unsettled_answers(
    connection: Connection, keys: Keys, outcomes: dict[str, dict[int, Outcome]]
) -> None:
    """Replace outcomes that wait by acknowledgements that no learner has settled yet: the learner may be away.

    Args:
        connection: the connection to the server.
        keys: the run's keys.
        outcomes: outcomes by command id and worker; changed in place.
    """
    waiting = {
        worker
        for by_worker in outcomes.values()
        for worker, outcome in by_worker.items()
        if outcome.state == "waiting"
    }
    for worker, answer in _read_answers(connection, keys, sorted(waiting)):
        by_worker = outcomes.get(answer.get("command", ""), {})
        if worker in by_worker and by_worker[worker].state == "waiting":
            by_worker[worker] = Outcome(cast(State, answer["outcome"]), answer.get("detail", ""))


def read_missed(
    connection: Connection,
    keys: Keys,
    *,
    last_seconds: float | None = None,
    worker: int | None = None,
    why: str | None = None,
) -> tuple[float, list[Missed]]:
    """Return the server's clock, seconds since the epoch, and the missed updates and commands, oldest first.

    Args:
        connection: the connection to the server.
        keys: the run's keys.
        last_seconds: only the records of the last seconds; None for every stored record.
        worker: only the records of this worker.
        why: only the records with this reason.

    Raises:
        WireError: the record holds what no learner writes.
        PeerError: the server refused, or could not be reached in time.
    """
    now = connection.clock(keys.meta)
    with parsing(keys.missed):
        records = read_missed_records(
            connection, keys, since=0.0 if last_seconds is None else now - last_seconds
        )
    return now, [
        record for record in records if worker in (None, record.worker_id) and why in (None, record.why)
    ]


def _read_answers(
    connection: Connection, keys: Keys, workers: Iterable[int]
) -> list[tuple[int, dict[str, str]]]:
    ids = list(workers)
    replies = connection.execute_all(
        [("XRANGE", keys.acknowledgements(worker), "-", "+", "COUNT", ANSWERS_AT_ONCE) for worker in ids]
    )
    return [
        (worker, answer)
        for worker, entries in zip(ids, replies, strict=True)
        for _, fields in entries
        if (answer := text_fields(fields)).get("event") == "command"
        and answer.get("outcome") in ACKNOWLEDGED_STATES
    ]
