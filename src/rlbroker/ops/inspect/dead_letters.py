"""Dead letters by their names: found, tried again, and deleted; no learner is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import entry_id
from rlbroker.errors import InvalidArgument
from rlbroker.experience.dead_letters import letter_data as letter_data
from rlbroker.experience.dead_letters import purge_letters, read_letters, retry_letters
from rlbroker.ops.inspect.runs import worker_ids
from rlbroker.types import DeadLetter

#: Letters that are tried again or deleted in one round trip.
_AT_ONCE = 100


def name_of(letter: DeadLetter) -> str:
    """Give what people call a dead batch: its worker, and the number under which that sent it, `3/1795599266911-7`."""
    return f"{letter.worker_id}/{letter.incarnation}-{letter.sequence}"


def worker_of(name: str) -> int:
    """Give the worker that a name begins with.

    Raises:
        InvalidArgument: it is no such name.
    """
    worker, _, batch = name.partition("/")
    try:
        entry_id(batch)
        return int(worker)
    except ValueError:
        raise InvalidArgument(
            f"{name!r} is no dead batch's id; they look like 3/1795599266911-7, as `rlbroker dead list` prints them"
        ) from None


def find_letters(
    connection: Connection, keys: Keys, *, worker: int | None = None, names: Iterable[str] = ()
) -> list[DeadLetter]:
    """Give the dead letters of a worker, or of all, or those of these names; oldest first, worker by worker.

    Raises:
        InvalidArgument: one of the names is none.
        PeerError: the server refused, or could not be reached in time.
    """
    wanted = set(names)
    workers = sorted({worker_of(name) for name in wanted})
    if not wanted:
        workers = worker_ids(connection, keys) if worker is None else [worker]
    sizes = connection.execute_all([("XLEN", keys.dead(one)) for one in workers])
    return [
        letter
        for one, length in zip(workers, sizes, strict=True)
        if length
        for letter in read_letters(connection, keys, one)
        if (not wanted or name_of(letter) in wanted) and worker in (None, one)
    ]


def retry(connection: Connection, keys: Keys, letters: Sequence[DeadLetter]) -> int:
    """Have dead batches delivered once more; give how many were still there.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    pieces = range(0, len(letters), _AT_ONCE)
    return sum(retry_letters(connection, keys, letters[one : one + _AT_ONCE]) for one in pieces)


def purge(connection: Connection, keys: Keys, letters: Sequence[DeadLetter]) -> int:
    """Delete dead batches for good; give how many were still there.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    pieces = range(0, len(letters), _AT_ONCE)
    return sum(purge_letters(connection, keys, letters[one : one + _AT_ONCE]) for one in pieces)
