"""What a learner keeps of versions and commands stays small, however many there were."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import entry_place
from rlbroker.backend.scripts import Script
from rlbroker.control import commands, ledger
from rlbroker.control.commands import CommandSender
from rlbroker.control.ledger import Ledger
from rlbroker.control.outcomes import Event, WorkerOutcomes, settle
from rlbroker.control.settlements import Settlements
from rlbroker.types import Outcome

pytestmark = pytest.mark.unit

KEYS = Keys("bounds")
VERSIONS = 100_000


def _history(worker: int, random_: random.Random) -> list[Event]:
    """Return the events of a worker that follows each version, jumps, fails, and now and then joins again."""
    events, incarnation, version = [Event("1-0", worker, "joined", {"version": "0"}, 0.0)], 1, 0
    while version < VERSIONS:
        version = min(VERSIONS, version + random_.choice((1, 1, 1, 2, 50)))
        outcome = random_.choice(("applied", "applied", "applied", "failed"))
        fields = {"version": str(version), "outcome": outcome, "detail": "x" * 1000}
        events.append(Event(f"{incarnation}-{len(events)}", worker, "version", fields, float(version)))
        if random_.random() < 0.001:
            incarnation += 1
            events.append(
                Event(f"{incarnation}-0", worker, "joined", {"version": str(version)}, float(version))
            )
    return events


def test_what_is_kept_of_versions_does_not_grow_with_their_number() -> None:
    """A few fields for each worker, the newest records of missed updates, and sums for the older ones."""
    folding = Ledger(
        cast(Connection, None),
        KEYS,
        epoch=1,
        last_version=lambda: VERSIONS,
        signed=False,
        note_outcomes=lambda worker, outcomes: None,
        settlements=Settlements(),
    )
    random_ = random.Random(1)
    for worker in range(3):
        for event in _history(worker, random_):
            settled = settle(folding._outcomes.get(worker, WorkerOutcomes()), event, {}, VERSIONS)
            folding._unconfirmed[worker, event.entry_id] = settled
            folding._confirm_up_to({worker: entry_place(event.entry_id)})
    assert folding._outcomes.keys() == {0, 1, 2}
    assert not folding._unconfirmed
    assert len(folding._missed) == ledger.MISSED_KEPT
    for outcomes in folding._outcomes.values():
        fields = outcomes.to_fields()
        assert len(fields) <= 20
        assert sum(map(len, fields.values())) < 200
        assert outcomes.applied_total + sum(outcomes.missed.values()) == VERSIONS


class _AcceptingConnection:
    """A connection to a server that accepts every command for a number of workers."""

    timeout_seconds = 1.0

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def execute_all(self, commands: Sequence[Sequence[Any]], *, strict: bool) -> list[Any]:
        if commands[0][0] == "SMEMBERS":
            return [{str(worker).encode() for worker in range(self._workers)}, None]
        return [[b"7", b"1", b"1000", None] for _ in commands]

    def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> bytes:
        return b"sent"


@pytest.mark.parametrize(("workers", "remembered"), [(1, 1000), (200, 500), (2000, 50)])
def test_what_is_remembered_of_commands_is_bounded_by_the_number_of_outcomes(
    workers: int, remembered: int
) -> None:
    sender = CommandSender(cast(Connection, _AcceptingConnection(workers)), KEYS, epoch=1)
    # The workers of the newest command are not counted until it was sent: one more command is remembered.
    for _ in range(remembered + 5):
        command = sender.send("reset", None, None, expires_seconds=None)
        for worker in command.worker_ids:
            sender.note_outcomes(worker, {command.id: Outcome("done")})
    assert remembered <= len(sender._sent) <= remembered + 1
    outcomes = sum(len(sent.outcomes) for sent in sender._sent.values())
    assert outcomes <= commands.REMEMBERED_OUTCOMES + workers


@pytest.mark.parametrize(("workers", "remembered"), [(1, 1000), (2000, 50), (200_000, 1)])
def test_a_learner_remembers_no_more_than_that_of_earlier_learners(workers: int, remembered: int) -> None:
    names = ",".join(map(str, range(workers))).encode()
    sent: list[tuple[bytes, Mapping[bytes, bytes]]] = [(b"1-0", {b"workers": names})] * 2000
    assert len(commands._keep_within_bounds(sent)) == remembered
