"""Dead letters: batches that no learner could use, kept with the reason, to be looked at and tried again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.backend.replies import entry_place, text_fields, whole_number
from rlbroker.backend.scripts import Script
from rlbroker.experience.pending import PendingEntries, Source
from rlbroker.types import DeadLetter

#: Dead letters of one worker that are kept; the oldest go first. They are counted all the same.
KEPT = 1_000

#: Dead letters that are read in one round trip: the server holds an answer in memory, which a full one does not have.
READ_AT_ONCE = 4

#: Fields that a dead letter has besides those of the batch.
_OWN_FIELDS = ("entry", "reason", "detail", "deliveries", "died_at")

BURY = Script.load("experience/lua/bury.lua")

RETRY = Script.load("experience/lua/retry_dead_letter.lua")

PURGE = Script.load("experience/lua/purge_dead_letter.lua")


class DeadLetters:
    """The dead letters of one run."""

    def __init__(
        self, connection: Connection, keys: Keys, holdings: PendingEntries, *, max_bytes: int
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            holdings: what the learner holds, and gives up when it dies.
            max_bytes: bytes of dead letters that are kept for each worker.
        """
        self._connection, self._keys, self._holdings = connection, keys, holdings
        self._max_bytes = max_bytes

    def bury(
        self,
        source: Source,
        entry_id: str,
        size: int,
        *,
        reason: str,
        detail: str,
        deliveries: int,
        batch: str,
    ) -> None:
        """Move an entry that is held to the dead letters, and count it.

        Raises:
            Fenced: a newer learner of this name has taken over.
            PeerError: the server refused, or could not be reached in time.
        """
        said: tuple[Any, ...] = (batch, reason, detail[:500], deliveries, f"{time.time():.3f}")
        fields = [part for pair in zip(_OWN_FIELDS, said, strict=True) for part in pair]
        keys = (*source.keys, self._keys.dead(source.worker_id))
        bytes_in_books = 0 if source.retried else size
        arguments = (*self._holdings.signature, entry_id, bytes_in_books, reason, KEPT, self._max_bytes)
        with self._holdings.counting():
            moved = self._connection.run(BURY, keys, (*arguments, *fields))
            self._holdings.gave_up(source, [entry_id], [reason] if moved != 2 else [])
            if moved not in (1, 2):  # done before, and the reply was lost; or the server lost it
                self._holdings.restore([source.worker_id])

    def list(self, workers: Iterable[int]) -> list[DeadLetter]:
        """Give the dead letters of some workers, oldest first.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        return [letter for worker in workers for letter in read_letters(self._connection, self._keys, worker)]

    def retry(self, letters: Sequence[DeadLetter]) -> int:
        """Have batches delivered once more; give how many were still there.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        done = 0
        for letter in letters:
            with self._holdings.counting():
                done += retry_letters(self._connection, self._keys, [letter])
                counts = self._connection.execute("HGETALL", self._keys.counts(letter.worker_id))
                self._holdings.remember(letter.worker_id, counts)
        return done

    def purge(self, letters: Sequence[DeadLetter]) -> int:
        """Delete dead letters for good; give how many were still there. They stay counted.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        return purge_letters(self._connection, self._keys, letters)


# What needs no learner. One that lives learns from the server's counts what others tried again: within
# RECHECK_SECONDS (see collector.py), as each of these numbers only grows.


def read_letters(connection: Connection, keys: Keys, worker: int) -> Iterator[DeadLetter]:
    """Give one worker's dead letters, oldest first. They are read piece by piece, as they may be large together.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    position = "-"
    while True:
        entries = connection.execute("XRANGE", keys.dead(worker), position, "+", "COUNT", READ_AT_ONCE)
        for entry_id, fields in entries:
            yield _letter(worker, entry_id, fields)
        if len(entries) < READ_AT_ONCE:
            return
        position = f"({entries[-1][0].decode()}"


def letter_data(connection: Connection, keys: Keys, letter: DeadLetter) -> bytes | None:
    """Give the message of a dead letter; None if it is not there any more.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    found = connection.execute("XRANGE", keys.dead(letter.worker_id), letter.entry_id, letter.entry_id)
    return bytes(found[0][1].get(b"data", b"")) if found else None


def retry_letters(connection: Connection, keys: Keys, letters: Sequence[DeadLetter]) -> int:
    """Have batches delivered once more, by whoever may; give how many were still there.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    calls = [
        (
            RETRY,
            (keys.dead(one.worker_id), keys.again(one.worker_id), keys.counts(one.worker_id)),
            (GROUP, one.entry_id, one.reason),
        )
        for one in letters
    ]
    return sum(connection.run_all(calls))


def purge_letters(connection: Connection, keys: Keys, letters: Sequence[DeadLetter]) -> int:
    """Delete dead letters for good; give how many were still there. They stay counted.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    calls = [
        (PURGE, (keys.dead(one.worker_id), keys.counts(one.worker_id)), (one.entry_id,)) for one in letters
    ]
    return sum(connection.run_all(calls))


def _letter(worker: int, entry_id: bytes, fields: dict[bytes, bytes]) -> DeadLetter:
    said = text_fields({name: value for name, value in fields.items() if name != b"data"})
    incarnation, sequence = entry_place(said["entry"])
    return DeadLetter(
        worker_id=worker,
        incarnation=incarnation,
        sequence=sequence,
        reason=said["reason"],
        detail=said["detail"],
        deliveries=int(said["deliveries"]),
        version=whole_number(said.get("version", "")) or 0,
        stored_bytes=len(fields.get(b"data", b"")),
        died_at=float(said["died_at"]),
        entry_id=entry_id.decode(),
    )
