"""Functions that read the ledger: the outcomes of each worker, and the records of missed updates."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import parsing, text_fields
from rlbroker.backend.text import counted
from rlbroker.control.outcomes import WorkerOutcomes, missed_from_fields
from rlbroker.types import Missed

logger = logging.getLogger("rlbroker")


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


def read_missed_records(
    connection: Connection, keys: Keys, *, since: float = 0.0, count: int | None = None
) -> list[Missed]:
    """Return the records of missed updates, oldest first.

    Entries that no learner wrote are left out, with a warning.

    Args:
        since: leave out records older than this, in seconds since the epoch, by the server's clock.
        count: only this many of the newest; None for all.
    """
    first = str(max(0, int(since * 1000)))
    limit = () if count is None else ("COUNT", count)
    entries = list(reversed(connection.execute("XREVRANGE", keys.missed, "+", first, *limit)))
    records = []
    for _, fields in entries:
        with suppress(KeyError, ValueError):
            records.append(missed_from_fields(text_fields(fields)))
    if len(records) < len(entries):
        logger.warning(
            "%s has %s that no learner wrote, which are ignored; does another program use this key?",
            keys.missed,
            counted(len(entries) - len(records), "entry", "entries"),
        )
    return records
