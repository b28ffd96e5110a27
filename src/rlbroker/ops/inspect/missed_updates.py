"""The record of missed updates, as people ask for it."""

from __future__ import annotations

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import parsing
from rlbroker.control.ledger import Ledger
from rlbroker.types import Missed


def read_missed(
    connection: Connection,
    keys: Keys,
    *,
    last_seconds: float | None = None,
    worker: int | None = None,
    why: str | None = None,
) -> tuple[float, list[Missed]]:
    """Give the server's clock, seconds since the epoch, and what was missed, oldest first.

    Args:
        connection: way to the server.
        keys: names of the run's keys.
        last_seconds: only what was recorded within so many seconds; None for all that is kept.
        worker: only what this worker missed.
        why: only what was missed for this reason.

    Raises:
        WireError: the record holds what no learner writes.
        PeerError: the server refused, or could not be reached in time.
    """
    now = connection.clock(keys.meta)
    with parsing(keys.missed):
        records = Ledger(connection, keys).records(since=0.0 if last_seconds is None else now - last_seconds)
    return now, [one for one in records if worker in (None, one.worker_id) and why in (None, one.why)]
