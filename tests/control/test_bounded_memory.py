"""What is kept stays as small, however many versions and commands there were."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.scripts import Script
from rlbroker.control import commands, ledger
from rlbroker.control.commands import CommandSender
from rlbroker.control.ledger import Ledger
from rlbroker.control.outcomes import Event, WorkerOutcomes, settle
from rlbroker.types import Outcome

pytestmark = pytest.mark.unit

KEYS = Keys("bounds")
VERSIONS = 100_000


def _story(worker: int, random_: random.Random) -> list[Event]:
    """Give what a worker says that now follows, now jumps, now fails, and now comes again."""
    events, life, version = [Event("1-0", worker, "joined", {"version": "0"}, 0.0)], 1, 0
    while version < VERSIONS:
        version = min(VERSIONS, version + random_.choice((1, 1, 1, 2, 50)))
        outcome = random_.choice(("applied", "applied", "applied", "failed"))
        fields = {"version": str(version), "outcome": outcome, "detail": "x" * 1000}
        events.append(Event(f"{life}-{len(events)}", worker, "version", fields, float(version)))
        if random_.random() < 0.001:
            life += 1
            events.append(Event(f"{life}-0", worker, "joined", {"version": str(version)}, float(version)))
    return events


def test_what_is_kept_of_versions_does_not_grow_with_their_number() -> None:
    """For each worker one account of a few fields; and of what was missed the newest, the rest as sums."""
    books, random_ = Ledger(cast(Connection, None), KEYS), random.Random(1)
    for worker in range(3):
        for happened in _story(worker, random_):
            done = settle(books._accounts.get(worker, WorkerOutcomes()), happened, {}, VERSIONS)
            books._unsure[worker, happened.entry_id] = done
            books._adopt([(worker, happened.entry_id)])
    assert books._accounts.keys() == {0, 1, 2}
    assert not books._unsure
    assert len(books._missed) == ledger.MISSED_KEPT
    for account in books._accounts.values():
        fields = account.to_fields()
        assert len(fields) <= 20
        assert sum(map(len, fields.values())) < 200
        assert account.applied_total + sum(account.missed.values()) == VERSIONS


class _Sending:
    """A way to a server which takes every command."""

    timeout_seconds = 1.0

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def ask(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        if commands[0][0] == "SMEMBERS":
            return [{str(worker).encode() for worker in range(self._workers)}]
        return [[b"7", b"1", b"1000", None] for _ in commands]

    def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> bytes:
        return b"sent"


@pytest.mark.parametrize(("workers", "remembered"), [(1, 1000), (200, 500), (2000, 50)])
def test_what_is_remembered_of_commands_is_bounded_by_all_their_answers(
    workers: int, remembered: int
) -> None:
    sending = CommandSender(cast(Connection, _Sending(workers)), KEYS, epoch=1)
    # Who they are for is noted after the next was remembered: the newest are one more.
    for _ in range(remembered + 5):
        command = sending.send("reset", None, None, expires_seconds=None)
        for worker in command.worker_ids:
            sending.note(worker, {command.id: Outcome("done")})
    assert remembered <= len(sending._sent) <= remembered + 1
    answers = sum(len(sent.outcomes) for sent in sending._sent.values())
    assert answers <= commands.REMEMBERED_ANSWERS + workers


@pytest.mark.parametrize(("workers", "remembered"), [(1, 1000), (2000, 50), (200_000, 1)])
def test_a_learner_reads_no_more_of_what_was_sent_before_it(workers: int, remembered: int) -> None:
    names = ",".join(map(str, range(workers))).encode()
    sent: list[tuple[bytes, Mapping[bytes, bytes]]] = [(b"1-0", {b"workers": names})] * 2000
    assert len(commands._newest(sent)) == remembered
