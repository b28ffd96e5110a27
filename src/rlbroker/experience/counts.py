"""What became of each worker's batches, as the server has it; reading changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Final

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.backend.replies import (
    default_if_wrong_type,
    newest_place,
    pending_count,
    text_fields,
    whole_number,
)
from rlbroker.errors import PeerError
from rlbroker.types import QueueCounts

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

#: Counts that change while they are read are read so often. The server answers such a question in one go as a rule.
_TRIES: Final = 5

#: What became of batches that were in the queue once.
_ONCE_QUEUED = ("delivered", "stale", "corrupt", "poison", "trimmed", "dropped_oldest")


def read_counts(
    connection: Connection,
    keys: Keys,
    workers: Iterable[int],
    *,
    said: Mapping[int, tuple[int, int]] | None = None,
) -> dict[int, QueueCounts]:
    """Give the counts of each worker's batches.

    Args:
        connection: way to the server.
        keys: names of the run's keys.
        workers: which workers.
        said: by worker, its incarnation and how many batches it says that it sent. Without it the streams are asked,
            which costs more: their answers hold their first and last batch.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    wanted = list(workers)
    types = {name: what for worker in wanted for name, what in types_of(keys, worker).items()}
    there = right_types(types, connection.execute_all([("TYPE", name) for name in types]))
    return connection.retry(lambda: known_counts(connection, keys, wanted, there, said=said))


def types_of(keys: Keys, worker: int) -> dict[str, str]:
    """Give the keys that hold one worker's counts and batches, each with the type that it must have."""
    return {keys.counts(worker): "hash", keys.experiences(worker): "stream", keys.again(worker): "stream"}


def right_types(wanted: Mapping[str, str], replies: Iterable[Any]) -> dict[str, bool]:
    """Give the keys that exist, and whether each is of the type that it must have. One that is not was spoiled.

    Args:
        wanted: keys with their types.
        replies: what TYPE says of each.
    """
    found = [reply.decode() if isinstance(reply, bytes) else str(reply) for reply in replies]
    return {
        name: kind == what for (name, what), kind in zip(wanted.items(), found, strict=True) if kind != "none"
    }


def known_counts(
    connection: Connection,
    keys: Keys,
    workers: Iterable[int],
    there: Mapping[str, bool],
    *,
    said: Mapping[int, tuple[int, int]] | None = None,
) -> dict[int, QueueCounts]:
    """Give the counts of each worker's batches where it is known which keys exist, in one round trip as a rule.

    Args:
        connection: way to the server.
        keys: names of the run's keys.
        workers: which workers.
        there: what `right_types` gives.
        said: as in `read_counts`.

    Raises:
        PeerError: the server refused, or the connection broke.
    """
    groups: dict[int, list[tuple[str, ...]]] = {}
    for worker in workers:
        counts, queue = keys.counts(worker), keys.experiences(worker)
        streams = [stream for stream in (queue, keys.again(worker)) if there.get(stream)]
        if not streams and not there.get(counts):
            continue
        group: list[tuple[str, ...]] = [("HGETALL", counts)]
        for stream in streams:
            group += [("XLEN", stream), ("XPENDING", stream, GROUP)]
        if said is None and queue in streams:
            group.append(("XINFO", "STREAM", queue))
        groups[worker] = group
    found = {}
    for worker, (counted, *sizes) in _in_one_step(connection, groups).items():
        newest = said.get(worker, (0, 0)) if said is not None else (0, 0)
        if groups[worker][-1][0] == "XINFO":
            newest = newest_place(sizes.pop())
        in_hand = sum(map(pending_count, sizes[1::2]))
        found[worker] = _counts(sum(map(int, sizes[::2])), in_hand, text_fields(counted), newest)
    return found


def _in_one_step(connection: Connection, groups: Mapping[int, list[tuple[str, ...]]]) -> dict[int, list[Any]]:
    """Ask each worker's questions as if nothing happened between them: a batch would be counted twice, or not at all.

    What is acknowledged, dropped or set aside changes the counts in the same step. So they are asked for before and
    after; who only may read has no right to MULTI.
    """
    found: dict[int, list[Any]] = {worker: [] for worker in groups}
    left = dict(groups)
    for _ in range(_TRIES):
        asked = [one for group in left.values() for one in (*group, group[0])]
        replies = iter(connection.ask_once(asked) if asked else ())
        for worker, group in list(left.items()):
            *found[worker], after = map(_answer, itertools.islice(replies, len(group) + 1))
            if found[worker][0] == after:
                del left[worker]
        if not left:
            break
    return found


def _answer(reply: Any) -> Any:
    """Give a reply of the server; without the group, which the learner makes again, nothing is in its hands."""
    return (
        [0] if isinstance(reply, PeerError) and "NOGROUP" in str(reply) else default_if_wrong_type(reply, {})
    )


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
