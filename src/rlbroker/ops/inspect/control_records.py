"""Records of control: the commands sent, their outcomes, and the updates and commands that workers missed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import (
    default_if_wrong_type,
    entry_place,
    parsing,
    server_seconds,
    text_fields,
    whole_number,
)
from rlbroker.control.ledger_reader import read_missed_records
from rlbroker.control.outcomes import ACKNOWLEDGED_STATES
from rlbroker.types import Missed, Outcome, State

#: Entries of the control stream per read; most of them announce versions.
ENTRIES_AT_ONCE = 1_000

#: Acknowledgements read from one worker's stream.
ACKNOWLEDGEMENTS_AT_ONCE = 1_000


@dataclass(frozen=True)
class SentCommand:
    """A command on the control stream.

    Attributes:
        arguments: its data as text, cut at 200 characters.
        sent: when it was sent, seconds since 1970 by the server's clock.
        age_seconds: the time since then.
        outcomes: its outcome by worker; empty once they have expired, after a day.
    """

    command_id: str
    name: str
    arguments: str
    sent: float
    age_seconds: float
    outcomes: Mapping[int, Outcome]


def list_commands(connection: Connection, keys: Keys, *, count: int) -> list[SentCommand]:
    """Return the newest commands, oldest first."""
    found: dict[str, tuple[str, dict[str, str]]] = {}
    position = "+"
    while len(found) < count:
        entries = connection.execute("XREVRANGE", keys.control, position, "-", "COUNT", ENTRIES_AT_ONCE)
        for entry_id, fields in entries:
            header = text_fields({name: value for name, value in fields.items() if name != b"data"})
            command_id = header.get("command", "")
            # The stream may hold a command twice: the learner sends it again if the server may have lost it.
            if header.get("event") == "command" and (command_id in found or len(found) < count):
                found[command_id] = entry_id.decode(), header
        if len(entries) < ENTRIES_AT_ONCE:
            break
        position = f"({entries[-1][0].decode()}"
    clock, *replies = connection.execute_all(
        [("TIME",), *(("HGETALL", keys.outcomes(command_id)) for command_id in found)], strict=False
    )
    now = server_seconds(clock)
    outcomes = {
        command_id: {
            worker: Outcome.from_text(text)
            for name, text in text_fields(default_if_wrong_type(reply, {})).items()
            if (worker := whole_number(name)) is not None
        }
        for command_id, reply in zip(found, replies, strict=True)
    }
    add_unsettled_acknowledgements(connection, keys, outcomes)
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


def add_unsettled_acknowledgements(
    connection: Connection, keys: Keys, outcomes: dict[str, dict[int, Outcome]]
) -> None:
    """Add the acknowledgements that the ledger has not settled yet; without a learner it settles none.

    Args:
        outcomes: outcomes by command id and worker; those in the state `waiting` are replaced in place.
    """
    waiting = {
        worker
        for by_worker in outcomes.values()
        for worker, outcome in by_worker.items()
        if outcome.state == "waiting"
    }
    for worker, acknowledgement in _read_acknowledgements(connection, keys, sorted(waiting)):
        by_worker = outcomes.get(acknowledgement.get("command", ""), {})
        if worker in by_worker and by_worker[worker].state == "waiting":
            by_worker[worker] = Outcome(
                cast(State, acknowledgement["outcome"]), acknowledgement.get("detail", "")
            )


def read_missed(
    connection: Connection,
    keys: Keys,
    *,
    last_seconds: float | None = None,
    worker: int | None = None,
    why: str | None = None,
) -> tuple[float, list[Missed]]:
    """Return the server's time, seconds since 1970, and the missed updates and commands, oldest first.

    Args:
        last_seconds: only the records of this span; None for all.
        worker: only the records of this worker.
        why: only the records with this reason.

    Raises:
        WireError: the record holds what no learner writes.
    """
    now = connection.clock(keys.meta)
    with parsing(keys.missed):
        records = read_missed_records(
            connection, keys, since=0.0 if last_seconds is None else now - last_seconds
        )
    return now, [
        record for record in records if worker in (None, record.worker_id) and why in (None, record.why)
    ]


def _read_acknowledgements(
    connection: Connection, keys: Keys, workers: Iterable[int]
) -> list[tuple[int, dict[str, str]]]:
    ids = list(workers)
    replies = connection.execute_all(
        [
            ("XRANGE", keys.acknowledgements(worker), "-", "+", "COUNT", ACKNOWLEDGEMENTS_AT_ONCE)
            for worker in ids
        ],
        strict=False,
    )
    return [
        (worker, acknowledgement)
        for worker, reply in zip(ids, replies, strict=True)
        for _, fields in default_if_wrong_type(reply, ())
        if (acknowledgement := text_fields(fields)).get("event") == "command"
        and acknowledgement.get("outcome") in ACKNOWLEDGED_STATES
    ]
