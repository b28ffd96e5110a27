"""Functions that read the ledger: the outcomes of each worker, and the records of missed updates."""

from __future__ import annotations

from collections.abc import Iterable

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import parsing, text_fields
from rlbroker.control.outcomes import WorkerOutcomes, missed_from_fields
from rlbroker.types import Missed


def read_outcomes(
    connection: Connection, keys: Keys, workers: Iterable[int], *, deadline: Deadline | None = None
) -> dict[int, WorkerOutcomes]:
    """Return the outcomes of each worker.

    Raises:
        WireError: a ledger holds what no learner writes.
    """
    ids = list(workers)
    replies = connection.execute_all([("HGETALL", keys.ledger(worker)) for worker in ids], deadline=deadline)
    with parsing(f"{keys.prefix}:ledger:…"):
        return {
            worker: WorkerOutcomes.from_fields(text_fields(fields))
            for worker, fields in zip(ids, replies, strict=True)
        }


def read_missed_records(connection: Connection, keys: Keys, *, since: float = 0.0) -> list[Missed]:
    """Return the records of missed updates, oldest first.

    Args:
        since: leave out records older than this, in seconds since the epoch, by the server's clock.

    Raises:
        WireError: an entry holds what no learner writes.
    """
    first = str(max(0, int(since * 1000)))
    entries = connection.execute("XRANGE", keys.missed, first, "+")
    with parsing(keys.missed):
        return [missed_from_fields(text_fields(fields)) for _, fields in entries]
