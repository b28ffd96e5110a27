"""Reads the server's counts of each worker's batches: how many wait, were delivered, and were lost."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import ONE_TRY
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.backend.replies import (
    newest_place,
    pending_count,
    text_fields,
    whole_number,
)
from rlbroker.errors import PeerError, ServerFault, WrongKeyType
from rlbroker.types import QueueCounts

#: Why batches are lost: the outcomes that learners count, and those that workers count.
LOST_AT_LEARNERS = ("stale", "corrupt", "poison", "trimmed")
LOST_AT_WORKERS = ("dropped_oldest", "dropped_newest", "stopped", "fenced")

#: All of them; `vanished` batches are missing without a count.
LOST = (*LOST_AT_LEARNERS, *LOST_AT_WORKERS, "vanished")

#: How often to read counts that change while they are read. That is rare: usually the server answers all commands at
#: once.
_ATTEMPTS: Final = 5

#: The reply of each command for an empty key.
_EMPTY_REPLIES: Final[Mapping[str, Any]] = {"HGETALL": {}, "XLEN": 0, "XPENDING": [0], "XINFO": None}

#: Outcomes of batches that were in the queue.
_QUEUED = ("delivered", "stale", "corrupt", "poison", "trimmed", "dropped_oldest")


def read_counts(connection: Connection, keys: Keys, workers: Iterable[int]) -> dict[int, QueueCounts]:
    """Return the counts of each worker's batches."""
    wanted = list(workers)
    types = {key: kind for worker in wanted for key, kind in expected_types(keys, worker).items()}
    existing = match_types(types, connection.execute_all([("TYPE", key) for key in types]))
    return connection.retry(lambda: read_existing_counts(connection, keys, wanted, existing))


def expected_types(keys: Keys, worker: int) -> dict[str, str]:
    """Return the keys that hold one worker's counts and batches, each with the Redis type that it must have."""
    return {keys.counts(worker): "hash", keys.experiences(worker): "stream", keys.again(worker): "stream"}


def match_types(expected: Mapping[str, str], replies: Iterable[Any]) -> dict[str, bool]:
    """Return for each key that exists whether it has its type; if not, another program overwrote it.

    `replies` are the replies to TYPE for each expected key.
    """
    found = [reply.decode() if isinstance(reply, bytes) else str(reply) for reply in replies]
    return {
        key: actual == kind
        for (key, kind), actual in zip(expected.items(), found, strict=True)
        if actual != "none"
    }


def read_existing_counts(
    connection: Connection,
    keys: Keys,
    workers: Iterable[int],
    existing: Mapping[str, bool],
    *,
    reported: Mapping[int, tuple[int, int]] | None = None,
) -> dict[int, QueueCounts]:
    """Return the counts of each worker's batches, usually in one round trip, given which keys exist.

    Args:
        existing: what `match_types` returned.
        reported: by worker, its incarnation and how many batches it says it sent. Without this the streams are asked,
            which costs more: the replies contain their first and last batch.
    """
    commands: dict[int, list[tuple[str, ...]]] = {}
    for worker in workers:
        counts, queue = keys.counts(worker), keys.experiences(worker)
        streams = [stream for stream in (queue, keys.again(worker)) if existing.get(stream)]
        if not streams and not existing.get(counts):
            continue
        of_worker: list[tuple[str, ...]] = [("HGETALL", counts)]
        # In this order, a batch that is sent or read meanwhile is seen as it was before: it seems neither lost nor in
        # hand before it was in the queue.
        if reported is None and queue in streams:
            of_worker.append(("XINFO", "STREAM", queue))
        for stream in streams:
            of_worker += [("XPENDING", stream, GROUP), ("XLEN", stream)]
        commands[worker] = of_worker
    found = {}
    for worker, (counted, *sizes) in _read_consistently(connection, commands).items():
        newest = reported.get(worker, (0, 0)) if reported is not None else (0, 0)
        if len(sizes) % 2:
            info = sizes.pop(0)
            newest = newest_place(info) if info else (0, 0)
        in_hand = sum(map(pending_count, sizes[::2]))
        found[worker] = _queue_counts(sum(map(int, sizes[1::2])), in_hand, text_fields(counted), newest)
    return found


def _read_consistently(
    connection: Connection, commands: Mapping[int, list[tuple[str, ...]]]
) -> dict[int, list[Any]]:
    """Repeat each worker's commands until no batch moved meanwhile: it would be counted twice, or not at all.

    Acknowledging, dropping or burying a batch changes the counts in the same step, so the counts are read before and
    after the sizes. MULTI is not used, because read-only users have no right to it.
    """
    found: dict[int, list[Any]] = {worker: [] for worker in commands}
    changing = dict(commands)
    for _ in range(_ATTEMPTS):
        asked = [one for of_worker in changing.values() for one in (*of_worker, of_worker[0])]
        replies = iter(connection.execute_all(asked, strict=False, deadline=ONE_TRY))
        for worker, of_worker in list(changing.items()):
            asked_again = (*of_worker, of_worker[0])
            *found[worker], after = map(
                _reply_or_empty, asked_again, itertools.islice(replies, len(asked_again))
            )
            if found[worker][0] == after:
                del changing[worker]
        if not changing:
            break
    return found


def _reply_or_empty(command: Sequence[str], reply: Any) -> Any:
    """Return the reply, or that of an empty key if the key or its group was lost, or a worker has changed its type."""
    if isinstance(reply, ServerFault) and (
        isinstance(reply, WrongKeyType) or "NOGROUP" in str(reply) or "no such key" in str(reply)
    ):
        return _EMPTY_REPLIES[command[0]]
    if isinstance(reply, PeerError):
        raise reply
    return reply


def _queue_counts(
    length: int, in_hand: int, counted: Mapping[str, str], newest: tuple[int, int]
) -> QueueCounts:
    incarnation, number = newest
    if counted.get("incarnation") == str(incarnation):  # the worker updates `sent` only occasionally
        sent = f"sent:{incarnation}"
        counted = {**counted, sent: str(max(number, whole_number(counted.get(sent, "")) or 0))}
    sums: dict[str, int] = {}
    for name, value in counted.items():
        outcome = name.partition(":")[0]  # some are counted by incarnation: `fenced:3`
        sums[outcome] = sums.get(outcome, 0) + (whole_number(value) or 0)  # a worker may write anything here
    for reason in ("corrupt", "poison"):  # a retried batch is no longer lost
        sums[reason] = max(0, sums.get(reason, 0) - sums.get(f"retried_{reason}", 0))
    # Batches that were stored, and are neither in the stream nor counted: the server lost them, or they were deleted.
    accounted = length + sum(sums.get(outcome, 0) for outcome in _QUEUED)
    sums["vanished"] = max(0, sums.get("sent", 0) - accounted)
    return QueueCounts(
        waiting=length - in_hand,
        in_hand=in_hand,
        delivered=sums.get("delivered", 0),
        lost={reason: sums[reason] for reason in LOST if sums.get(reason)},
        duplicates=sums.get("duplicate", 0),
    )
