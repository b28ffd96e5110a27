"""Dead letters: batches that no learner could use, kept with the reason until they are retried or purged."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.backend.replies import (
    entry_place,
    parsing,
    stored_integer,
    stored_seconds,
    text_fields,
    whole_number,
)
from rlbroker.backend.resp import Argument
from rlbroker.backend.scripts import Script
from rlbroker.experience.pending import PendingEntries
from rlbroker.experience.read_position import Entry
from rlbroker.types import DeadLetter

#: Dead letters that are kept for each worker. Older ones are deleted, and stay counted.
KEPT = 1_000

#: Dead letters that are read in one round trip. A server that is out of memory has no room for a larger reply.
READ_AT_ONCE = 4

#: Fields of a dead letter that are added to those of the batch.
_OWN_FIELDS = ("entry", "reason", "detail", "deliveries", "died_at")

BURY = Script.load("experience/lua/bury.lua")
RETRY = Script.load("experience/lua/retry_dead_letter.lua")
PURGE = Script.load("experience/lua/purge_dead_letter.lua")


class DeadLetters:
    """The dead letters of one run."""

    def __init__(
        self, connection: Connection, keys: Keys, pending: PendingEntries, *, max_bytes: int
    ) -> None:
        """Keep at most `max_bytes` of dead letters for each worker; nothing is read yet."""
        self._connection, self._keys, self._pending = connection, keys, pending
        self._max_bytes = max_bytes

    def bury(self, entry: Entry, reason: str, detail: str) -> None:
        """Move a pending entry to the dead letters, and count it.

        Args:
            entry: the entry.
            reason: the outcome to count: one of `BURIED`.
            detail: a description of what is wrong.
        """
        stream = entry.stream
        values: tuple[Any, ...] = (
            entry.batch_id,
            reason,
            detail[:500],
            max(1, entry.deliveries),
            f"{time.time():.3f}",
        )
        fields = [part for pair in zip(_OWN_FIELDS, values, strict=True) for part in pair]
        keys = (*stream.keys, self._keys.dead(stream.worker_id))
        # The queue was credited the bytes of a retried batch when it became a dead letter.
        credited_bytes = 0 if stream.retried else entry.stored_bytes
        arguments = (*self._pending.identity, entry.entry_id, credited_bytes, reason, KEPT, self._max_bytes)
        self._pending.write_counts(self._move, entry, reason, BURY.call(keys, (*arguments, *fields)))

    def _move(self, entry: Entry, reason: str, command: Sequence[Argument]) -> None:
        entry.outcome = reason
        self._pending.ask([entry])
        moved = self._connection.execute(*command)
        self._pending.remove([entry], {reason: 1} if moved != 2 else {})
        if moved not in (1, 2):  # moved before, and the reply was lost; or the server lost the entry
            self._pending.restore([entry.stream.worker_id])

    def list(self, workers: Iterable[int]) -> list[DeadLetter]:
        """Return the dead letters of these workers, oldest first."""
        return [letter for worker in workers for letter in read_letters(self._connection, self._keys, worker)]

    def retry(self, letters: Sequence[DeadLetter]) -> int:
        """Queue batches to be delivered again; return how many dead letters still existed."""
        return sum([self._pending.write_counts(self._retry, letter) for letter in letters])

    def _retry(self, letter: DeadLetter) -> int:
        found = retry_letters(self._connection, self._keys, [letter])
        counts = self._connection.execute("HGETALL", self._keys.counts(letter.worker_id))
        self._pending.remember_counts(letter.worker_id, counts)
        return found

    def purge(self, letters: Sequence[DeadLetter]) -> int:
        """Delete dead letters for good; return how many still existed. They stay counted."""
        return purge_letters(self._connection, self._keys, letters)


# The functions below need no learner. A live learner learns of their retries from the server's counts, which only grow,
# within RECHECK_SECONDS of watched_streams.py.


def read_letters(connection: Connection, keys: Keys, worker: int) -> Iterator[DeadLetter]:
    """Return one worker's dead letters, oldest first. A few are read at a time, because they may be large."""
    position = "-"
    while True:
        entries = connection.execute("XRANGE", keys.dead(worker), position, "+", "COUNT", READ_AT_ONCE)
        for entry_id, fields in entries:
            with parsing(keys.dead(worker)):
                letter = _parse_letter(worker, entry_id, fields)
            yield letter
        if len(entries) < READ_AT_ONCE:
            return
        position = f"({entries[-1][0].decode()}"


def letter_data(connection: Connection, keys: Keys, letter: DeadLetter) -> bytes | None:
    """Return the message of a dead letter; None if it no longer exists."""
    found = connection.execute("XRANGE", keys.dead(letter.worker_id), letter.entry_id, letter.entry_id)
    return bytes(found[0][1].get(b"data", b"")) if found else None


def retry_letters(connection: Connection, keys: Keys, letters: Sequence[DeadLetter]) -> int:
    """Queue batches to be delivered again to any learner; return how many dead letters still existed."""
    calls = [
        RETRY.call(
            (keys.dead(one.worker_id), keys.again(one.worker_id), keys.counts(one.worker_id)),
            (GROUP, one.entry_id, one.reason),
        )
        for one in letters
    ]
    return sum(connection.execute_all(calls))


def purge_letters(connection: Connection, keys: Keys, letters: Sequence[DeadLetter]) -> int:
    """Delete dead letters for good; return how many still existed. They stay counted."""
    calls = [
        PURGE.call((keys.dead(one.worker_id), keys.counts(one.worker_id)), (one.entry_id,)) for one in letters
    ]
    return sum(connection.execute_all(calls))


def _parse_letter(worker: int, entry_id: bytes, fields: dict[bytes, bytes]) -> DeadLetter:
    text = text_fields({name: value for name, value in fields.items() if name != b"data"})
    incarnation, sequence = entry_place(text["entry"])
    return DeadLetter(
        worker_id=worker,
        incarnation=incarnation,
        sequence=sequence,
        reason=text["reason"],
        detail=text["detail"],
        deliveries=stored_integer(text["deliveries"]),
        version=whole_number(text.get("version", "")) or 0,
        stored_bytes=len(fields.get(b"data", b"")),
        died_at=stored_seconds(text["died_at"]),
        entry_id=entry_id.decode(),
    )
