"""What became of each worker's batches, as the server has it; reading changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rlbroker.connection import Connection
from rlbroker.keys import GROUP, Keys
from rlbroker.records import QueueCounts
from rlbroker.replies import pending_count, text_fields, whole_number

#: Why a batch that was produced is not delivered.
LOST = ("stale", "corrupt", "trimmed", "dropped_oldest", "dropped_newest", "stopped", "fenced")


def read_counts(connection: Connection, keys: Keys, workers: Iterable[int]) -> dict[int, QueueCounts]:
    """Give the counts of each worker's batches.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    wanted = list(workers)
    there = connection.execute_all([("EXISTS", keys.experiences(worker)) for worker in wanted])
    found = {}
    for worker, exists in zip(wanted, there, strict=True):
        if exists:
            stream = keys.experiences(worker)
            commands = (("XLEN", stream), ("XPENDING", stream, GROUP), ("HGETALL", keys.counts(worker)))
            # In one step: a batch that is acknowledged in between would be counted twice.
            length, pending, counted = connection.execute_all(commands, atomic=True)
            found[worker] = _counts(int(length), pending_count(pending), text_fields(counted))
    return found


def _counts(length: int, in_hand: int, counted: Mapping[str, str]) -> QueueCounts:
    sums: dict[str, int] = {}
    for name, value in counted.items():
        reason = name.partition(":")[0]  # some are kept by incarnation: `fenced:3`
        sums[reason] = sums.get(reason, 0) + (whole_number(value) or 0)  # the worker can write here too
    return QueueCounts(
        waiting=length - in_hand,
        in_hand=in_hand,
        delivered=sums.get("delivered", 0),
        lost={reason: sums[reason] for reason in LOST if sums.get(reason)},
        duplicates=sums.get("duplicate", 0),
    )
