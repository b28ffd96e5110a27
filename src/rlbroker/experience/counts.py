"""What became of each worker's batches, as the server has it; reading changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from rlbroker.connection import Connection
from rlbroker.keys import GROUP, Keys
from rlbroker.records import QueueCounts
from rlbroker.replies import newest_place, pending_count, text_fields, whole_number

#: Why a batch that was produced is not delivered: by learners, and by the worker itself.
LOST = (
    "stale",
    "corrupt",
    "poison",
    "trimmed",
    "dropped_oldest",
    "dropped_newest",
    "stopped",
    "fenced",
    "vanished",
)

#: What became of batches that were in the queue once.
_ONCE_QUEUED = ("delivered", "stale", "corrupt", "poison", "trimmed", "dropped_oldest")


def read_counts(connection: Connection, keys: Keys, workers: Iterable[int]) -> dict[int, QueueCounts]:
    """Give the counts of each worker's batches.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    found = {}
    names = {one: (keys.counts(one), keys.experiences(one), keys.again(one)) for one in workers}
    replies = connection.execute_all([("EXISTS", name) for three in names.values() for name in three])
    there = {name for name, exists in zip(itertools.chain(*names.values()), replies, strict=True) if exists}
    for worker, (counts, *streams) in names.items():
        if there.isdisjoint((counts, *streams)):
            continue
        commands: list[tuple[str, ...]] = [("HGETALL", counts)]
        streams = [stream for stream in streams if stream in there]
        for stream in streams:
            commands += [("XLEN", stream), ("XPENDING", stream, GROUP), ("XINFO", "STREAM", stream)]
        # In one step: a batch that is acknowledged in between would be counted twice.
        counted, *sizes = connection.execute_all(commands, atomic=True)
        in_hand = sum(pending_count(reply) for reply in sizes[1::3])
        newest = newest_place(sizes[2]) if keys.experiences(worker) in streams else (0, 0)
        found[worker] = _counts(sum(map(int, sizes[::3])), in_hand, text_fields(counted), newest)
    return found


def _counts(length: int, in_hand: int, counted: Mapping[str, str], newest: tuple[int, int]) -> QueueCounts:
    life, number = newest
    if counted.get("incarnation") == str(life):  # the worker says how much it sent only now and then
        sent = f"sent:{life}"
        counted = {**counted, sent: str(max(number, whole_number(counted.get(sent, "")) or 0))}
    sums: dict[str, int] = {}
    for name, value in counted.items():
        reason = name.partition(":")[0]  # some are kept by incarnation: `fenced:3`
        sums[reason] = sums.get(reason, 0) + (whole_number(value) or 0)  # the worker can write here too
    for reason in ("corrupt", "poison"):  # what was tried again is no longer lost
        sums[reason] = max(0, sums.get(reason, 0) - sums.get(f"retried_{reason}", 0))
    # What the worker got stored, and is neither there nor settled: the server lost it, or somebody deleted it.
    accounted = length + sum(sums.get(reason, 0) for reason in _ONCE_QUEUED)
    sums["vanished"] = max(0, sums.get("sent", 0) - accounted)
    return QueueCounts(
        waiting=length - in_hand,
        in_hand=in_hand,
        delivered=sums.get("delivered", 0),
        lost={reason: sums[reason] for reason in LOST if sums.get(reason)},
        duplicates=sums.get("duplicate", 0),
    )
