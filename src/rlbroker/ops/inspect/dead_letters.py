"""Dead letters by name: list, retry and delete them; no learner is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import entry_id
from rlbroker.errors import InvalidArgument
from rlbroker.experience.dead_letters import letter_data as letter_data
from rlbroker.experience.dead_letters import purge_letters, read_letters, retry_letters
from rlbroker.ops.inspect.runs import read_worker_ids
from rlbroker.types import DeadLetter

#: Letters that are retried or deleted in one round trip.
_AT_ONCE = 100


def letter_name(letter: DeadLetter) -> str:
    """Return the name of a dead letter: its worker and the id under which it was sent, `3/1795599266911-7`."""
    return f"{letter.worker_id}/{letter.incarnation}-{letter.sequence}"


def parse_worker_id(name: str) -> int:
    """Return the worker id in the name of a dead letter.

    Raises:
        InvalidArgument: the name is not valid.
    """
    worker, _, batch = name.partition("/")
    try:
        entry_id(batch)
        return int(worker)
    except ValueError:
        raise InvalidArgument(
            f"{name!r} is not the id of a dead batch; ids look like 3/1795599266911-7, as `rlbroker dead list` prints "
            "them"
        ) from None


def find_letters(
    connection: Connection, keys: Keys, *, worker: int | None = None, names: Iterable[str] = ()
) -> list[DeadLetter]:
    """Return the dead letters of one worker, of all, or with these names; oldest first, worker by worker.

    Raises:
        InvalidArgument: one of the names is not valid.
        PeerError: the server refused, or could not be reached in time.
    """
    wanted = set(names)
    workers = sorted({parse_worker_id(name) for name in wanted})
    if not wanted:
        workers = read_worker_ids(connection, keys) if worker is None else [worker]
    sizes = connection.execute_all([("XLEN", keys.dead(one)) for one in workers])
    return [
        letter
        for one, length in zip(workers, sizes, strict=True)
        if length
        for letter in read_letters(connection, keys, one)
        if (not wanted or letter_name(letter) in wanted) and worker in (None, one)
    ]


def retry(connection: Connection, keys: Keys, letters: Sequence[DeadLetter]) -> int:
    """Deliver dead letters once more; return how many still existed.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    pieces = range(0, len(letters), _AT_ONCE)
    return sum(retry_letters(connection, keys, letters[first : first + _AT_ONCE]) for first in pieces)


def purge(connection: Connection, keys: Keys, letters: Sequence[DeadLetter]) -> int:
    """Delete dead letters; return how many still existed.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    pieces = range(0, len(letters), _AT_ONCE)
    return sum(purge_letters(connection, keys, letters[first : first + _AT_ONCE]) for first in pieces)
