"""Dead letters by id: list, retry and delete them, without a learner."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import entry_id
from rlbroker.errors import InvalidArgument
from rlbroker.experience.dead_letters import purge_letters, read_letters, retry_letters
from rlbroker.ops.inspect.runs import read_worker_ids
from rlbroker.types import DeadLetter

#: Letters to retry or delete in one round trip.
_AT_ONCE = 100


def letter_id(letter: DeadLetter) -> str:
    """Return the id of a dead letter: its worker and the id under which it was sent, `3/1795599266911-7`."""
    return f"{letter.worker_id}/{letter.incarnation}-{letter.sequence}"


def _parse_worker(text: str) -> int:
    """Return the worker in the id of a dead letter."""
    worker, _, batch = text.partition("/")
    try:
        entry_id(batch)
        return int(worker)
    except ValueError:
        raise InvalidArgument(
            f"{text!r} is not the id of a dead letter; ids look like 3/1795599266911-7, as `rlbroker dead list` prints "
            "them"
        ) from None


def find_letters(
    connection: Connection, keys: Keys, *, worker: int | None = None, ids: Iterable[str] = ()
) -> list[DeadLetter]:
    """Return the dead letters of one worker, of all, or with these ids: worker by worker, oldest first.

    Raises:
        InvalidArgument: one of the ids is not valid.
    """
    wanted = set(ids)
    workers = sorted({_parse_worker(one) for one in wanted})
    if not wanted:
        workers = read_worker_ids(connection, keys) if worker is None else [worker]
    sizes = connection.execute_all([("XLEN", keys.dead(one)) for one in workers])
    return [
        letter
        for one, length in zip(workers, sizes, strict=True)
        if length
        for letter in read_letters(connection, keys, one)
        if (not wanted or letter_id(letter) in wanted) and worker in (None, one)
    ]


def retry(connection: Connection, keys: Keys, letters: Sequence[DeadLetter]) -> int:
    """Deliver dead letters once more; return how many still existed."""
    pieces = range(0, len(letters), _AT_ONCE)
    return sum(retry_letters(connection, keys, letters[first : first + _AT_ONCE]) for first in pieces)


def purge(connection: Connection, keys: Keys, letters: Sequence[DeadLetter]) -> int:
    """Delete dead letters; return how many still existed."""
    pieces = range(0, len(letters), _AT_ONCE)
    return sum(purge_letters(connection, keys, letters[first : first + _AT_ONCE]) for first in pieces)
