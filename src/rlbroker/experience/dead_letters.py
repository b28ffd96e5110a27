"""Dead letters: batches that no learner could use, kept with the reason, to be looked at and tried again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rlbroker.backend.connection import Connection, Script
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.backend.replies import entry_place, text_fields, whole_number
from rlbroker.experience.pending import OWN, Holdings, Source
from rlbroker.types import DeadLetter

#: Dead letters of one worker that are kept; the oldest go first. They are counted all the same.
KEPT = 1_000

#: Dead letters that are read in one round trip: the server holds an answer in memory, which a full one does not have.
READ_AT_ONCE = 4

#: Fields that a dead letter has besides those of the batch.
_OWN_FIELDS = ("entry", "reason", "detail", "deliveries", "died_at")

BURY = Script(
    "bury",
    OWN
    + """
    -- further KEYS: the worker's dead letters
    -- further ARGV: id, stored bytes, reason, entries to keep, bytes to keep, then field and value pairs
    -- Moves an entry that no learner can use.
    -- Gives 1, 0 if it was gone, or 2 if it is another learner's now.
    local has = mine(ARGV[4])
    if not has then return has == false and 2 or 0 end
    local entry = redis.call('XRANGE', KEYS[1], ARGV[4], ARGV[4])[1]
    redis.call('XACK', KEYS[1], ARGV[1], ARGV[4])
    redis.call('XDEL', KEYS[1], ARGV[4])
    count(ARGV[6], 1)
    count('removed_bytes', ARGV[5])
    if not entry then return 1 end
    local function size(fields)
      local sum = 0
      for i = 1, #fields do sum = sum + #fields[i] end
      return sum
    end
    local fields = {unpack(entry[2], 1, 1000)}  -- a worker may have sent more than Lua can pass on
    for i = 9, #ARGV do table.insert(fields, ARGV[i]) end
    local added = redis.pcall('XADD', KEYS[4], '*', unpack(fields))
    if type(added) == 'table' and added['err'] then return 1 end  -- no room for it; it is counted
    count('dead_bytes', size(fields))
    while redis.call('XLEN', KEYS[4]) > tonumber(ARGV[7])
      or (redis.call('XLEN', KEYS[4]) > 0
        and (tonumber(redis.call('HGET', KEYS[2], 'dead_bytes')) or 0) > tonumber(ARGV[8])) do
      local oldest = redis.call('XRANGE', KEYS[4], '-', '+', 'COUNT', 1)[1]
      redis.call('XDEL', KEYS[4], oldest[1])
      count('dead_bytes', -size(oldest[2]))
    end
    return 1
    """,
)

RETRY = Script(
    "retry_dead_letter",
    """
    -- KEYS: the worker's dead letters, its stream of batches to be tried again, its counts
    -- ARGV: group, id, reason for which it was counted
    local entry = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])[1]
    if not entry then return 0 end
    if redis.call('EXISTS', KEYS[2]) == 0 then
      redis.call('XGROUP', 'CREATE', KEYS[2], ARGV[1], '0', 'MKSTREAM')
    end
    redis.call('XADD', KEYS[2], '*', unpack(entry[2]))
    redis.call('XDEL', KEYS[1], ARGV[2])
    local size = 0
    for i = 1, #entry[2] do size = size + #entry[2][i] end
    -- The worker can write here too: what is no number is not counted.
    redis.pcall('HINCRBY', KEYS[3], 'dead_bytes', -size)
    redis.pcall('HINCRBY', KEYS[3], 'retried_' .. ARGV[3], 1)
    return 1
    """,
)

PURGE = Script(
    "purge_dead_letter",
    """
    -- KEYS: the worker's dead letters, its counts
    -- ARGV: id
    local entry = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
    if not entry then return 0 end
    local size = 0
    for i = 1, #entry[2] do size = size + #entry[2][i] end
    redis.call('XDEL', KEYS[1], ARGV[1])
    redis.pcall('HINCRBY', KEYS[2], 'dead_bytes', -size)  -- the worker may have written what is no number
    return 1
    """,
)


class DeadLetters:
    """The dead letters of one run."""

    def __init__(self, connection: Connection, keys: Keys, holdings: Holdings, *, max_bytes: int) -> None:
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
