"""What became of each worker's batches, as the server has it; reading changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Mapping
from typing import Any, Final

from rlbroker.connection import Channel, Connection
from rlbroker.errors import PeerError
from rlbroker.keys import GROUP, Keys
from rlbroker.legible import unless_spoiled
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
    there = present(keys, wanted, connection.execute_all(types_asked(keys, wanted)))
    channel = Channel(connection)
    try:
        return connection.retry(lambda: known_counts(channel, keys, wanted, there, said=said))
    finally:
        channel.give_back()


def types_asked(keys: Keys, workers: Iterable[int]) -> list[tuple[str, str]]:
    """Give the commands whose answers `present` takes."""
    return [("TYPE", name) for worker in workers for name in _keys_of(keys, worker)]


def present(keys: Keys, workers: Iterable[int], types: Iterable[bytes]) -> set[str]:
    """Give the keys that hold these workers' counts and batches. One of a wrong type is not there: it was spoiled."""
    found = zip((name for worker in workers for name in _keys_of(keys, worker)), types, strict=True)
    return {
        name
        for name, kind in found
        if kind == (b"hash" if name.startswith(f"{keys.prefix}:counts:") else b"stream")
    }


def _keys_of(keys: Keys, worker: int) -> tuple[str, str, str]:
    return keys.counts(worker), keys.experiences(worker), keys.again(worker)


def known_counts(
    channel: Channel,
    keys: Keys,
    workers: Iterable[int],
    there: Container[str],
    *,
    said: Mapping[int, tuple[int, int]] | None = None,
) -> dict[int, QueueCounts]:
    """Give the counts of each worker's batches where it is known which keys exist, in one round trip as a rule.

    Args:
        channel: way to the server.
        keys: names of the run's keys.
        workers: which workers.
        there: what `present` gives.
        said: as in `read_counts`.

    Raises:
        PeerError: the server refused, or the connection broke.
    """
    groups: dict[int, list[tuple[str, ...]]] = {}
    for worker in workers:
        counts, *streams = _keys_of(keys, worker)
        existing = [stream for stream in streams if stream in there]
        if not existing and counts not in there:
            continue
        group: list[tuple[str, ...]] = [("HGETALL", counts)]
        for stream in existing:
            group += [("XLEN", stream), ("XPENDING", stream, GROUP)]
        if said is None and streams[0] in there:
            group.append(("XINFO", "STREAM", streams[0]))
        groups[worker] = group
    found = {}
    for worker, (counted, *sizes) in _in_one_step(channel, groups).items():
        newest = said.get(worker, (0, 0)) if said is not None else (0, 0)
        if groups[worker][-1][0] == "XINFO":
            newest = newest_place(sizes.pop())
        in_hand = sum(map(pending_count, sizes[1::2]))
        found[worker] = _counts(sum(map(int, sizes[::2])), in_hand, text_fields(counted), newest)
    return found


def _in_one_step(channel: Channel, groups: Mapping[int, list[tuple[str, ...]]]) -> dict[int, list[Any]]:
    """Ask each worker's questions as if nothing happened between them: a batch would be counted twice, or not at all.

    What is acknowledged, dropped or set aside changes the counts in the same step. So they are asked for before and
    after; who only may read has no right to MULTI.
    """
    found: dict[int, list[Any]] = {worker: [] for worker in groups}
    left = dict(groups)
    for _ in range(_TRIES):
        replies = iter(channel.execute_all([one for group in left.values() for one in (*group, group[0])]))
        for worker, group in list(left.items()):
            *found[worker], after = map(_answer, itertools.islice(replies, len(group) + 1))
            if found[worker][0] == after:
                del left[worker]
        if not left:
            break
    return found


def _answer(reply: Any) -> Any:
    """Give a reply of the server; without the group, which the learner makes again, nothing is in its hands."""
    return [0] if isinstance(reply, PeerError) and "NOGROUP" in str(reply) else unless_spoiled(reply, {})


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
