"""The workers' queues: counts and contents of waiting and pending batches, read without taking them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.backend.replies import (
    entry_place,
    parsing,
    pending_count,
    pending_rows,
    server_seconds,
    stored_integer,
    text_fields,
    whole_number,
)
from rlbroker.codec.describe import Content, describe
from rlbroker.errors import ServerFault, WireError
from rlbroker.experience.dead_letters import READ_AT_ONCE
from rlbroker.experience.watched_streams import is_stream_lost


@dataclass(frozen=True)
class QueuedBatch:
    """A batch in a worker's queue. What the worker wrote may be wrong: workers are not trusted.

    Attributes:
        batch_id: `<incarnation>-<sequence>`.
        retried: whether it was a dead letter and is delivered again.
        held_by: the learner at which it is pending; empty if it waits.
        deliveries: the number of times that it was delivered.
        version: the version that produced it; None if the entry has none.
        staleness: versions published since.
        raw_bytes: bytes of its arrays.
        stored_bytes: bytes of its message.
        age_seconds: time since sending; None if the entry has no time. Compares the worker's clock with the server's.
        contents: its arrays and values; empty if it does not decode.
        problem: why it does not decode; empty if it does.
    """

    worker_id: int
    batch_id: str
    retried: bool
    held_by: str
    deliveries: int
    version: int | None
    staleness: int | None
    rows: int | None
    raw_bytes: int | None
    stored_bytes: int
    age_seconds: float | None
    contents: tuple[Content, ...]
    problem: str


@dataclass(frozen=True)
class PeekedQueue:
    """One worker's queue, with some of its batches.

    Attributes:
        waiting: batches that no learner has read.
        in_hand: batches that a learner has read and not acknowledged.
        batches: some of them, in the order of the queue.
    """

    worker_id: int
    waiting: int
    in_hand: int
    batches: tuple[QueuedBatch, ...]


def peek_queue(
    connection: Connection, keys: Keys, worker: int, *, count: int, newest: bool = False
) -> PeekedQueue:
    """Read some batches of one worker without taking them; retried dead letters first.

    The batches are transferred, which may take long.

    Args:
        count: the most batches to read from each of its two streams.
        newest: whether to read the newest batches instead of the oldest.
    """
    waiting = in_hand = 0
    batches: list[QueuedBatch] = []
    for key, retried in ((keys.again(worker), True), (keys.experiences(worker), False)):
        if connection.execute("TYPE", key) in (b"stream", "stream"):  # a learner deletes any other type
            try:
                length, pending, found = _peek_stream(connection, keys, worker, key, count, newest, retried)
            except ServerFault as error:
                if not is_stream_lost(error):
                    raise
                continue
            waiting, in_hand = waiting + length - pending, in_hand + pending
            batches += found
    return PeekedQueue(worker, waiting, in_hand, tuple(batches))


def describe_batch(data: bytes) -> tuple[tuple[Content, ...], str]:
    """Return the contents of a message, and why it does not decode, or an empty text; needs no torch."""
    try:
        return tuple(describe(data)), ""
    except WireError as error:
        return (), f"{type(error).__name__}: {error}"


def _peek_stream(
    connection: Connection, keys: Keys, worker: int, key: str, count: int, newest: bool, retried: bool
) -> tuple[int, int, list[QueuedBatch]]:
    """Return the length of a stream, the number of pending entries, and some of its batches."""
    clock, latest, length, groups = connection.execute_all(
        [("TIME",), ("HGET", keys.weights, "version"), ("XLEN", key), ("XINFO GROUPS", key)]
    )
    entries = _read_entries(connection, key, count, newest)
    ids = [entry_id.decode() for entry_id, _ in entries]
    pending, pending_replies = 0, list[Any]([()] * len(ids))
    if any(text_fields(group)["name"] == GROUP for group in groups):
        summary, *pending_replies = connection.execute_all(
            [("XPENDING", key, GROUP), *(("XPENDING", key, GROUP, one, one, 1) for one in ids)]
        )
        pending = pending_count(summary)
    with parsing(keys.weights):
        now, version = server_seconds(clock), stored_integer(latest, 0)
    batches = [
        _parse_batch(worker, entry_id, fields, pending_rows(rows), now, version, retried)
        for entry_id, (_, fields), rows in zip(ids, entries, pending_replies, strict=True)
    ]
    return int(length), pending, batches[::-1] if newest else batches


def _read_entries(connection: Connection, key: str, count: int, newest: bool) -> list[Any]:
    """Return the first or last entries of a stream, in small reads: the server buffers each reply in memory."""
    entries: list[Any] = []
    command, position, end = ("XREVRANGE", "+", "-") if newest else ("XRANGE", "-", "+")
    while len(entries) < count:
        page = connection.execute(
            command, key, position, end, "COUNT", min(READ_AT_ONCE, count - len(entries))
        )
        if not page:
            break
        entries += page
        position = f"({page[-1][0].decode()}"
    return entries


def _parse_batch(
    worker: int,
    entry_id: str,
    fields: Mapping[bytes, bytes],
    pending: Sequence[tuple[str, str, int, int]],
    now: float,
    latest: int,
    retried: bool,
) -> QueuedBatch:
    header = text_fields({name: value for name, value in fields.items() if name != b"data"})
    data = fields.get(b"data", b"")
    version = whole_number(header.get("version", ""))
    _, consumer, _, deliveries = pending[0] if pending else ("", "", 0, 0)
    found, problem = describe_batch(data)
    return QueuedBatch(
        worker_id=worker,
        batch_id=_parse_batch_id(header.get("entry", ""), entry_id),
        retried=retried,
        held_by=consumer.removesuffix("+"),
        deliveries=deliveries,
        version=version,
        staleness=None if version is None else max(0, latest - version),
        rows=whole_number(header.get("rows", "")),
        raw_bytes=whole_number(header.get("raw_bytes", "")),
        stored_bytes=len(data),
        age_seconds=_parse_age(header.get("sent_at", ""), now),
        contents=found,
        problem=problem,
    )


def _parse_batch_id(original_id: str, entry_id: str) -> str:
    """Return the id under which the worker sent a batch; the entry of a retried one has another id."""
    try:
        incarnation, sequence = entry_place(original_id)
    except ValueError:
        return entry_id
    return f"{incarnation}-{sequence}"


def _parse_age(sent_at: str, now: float) -> float | None:
    try:
        sent = float(sent_at)
    except ValueError:
        return None
    return max(0.0, now - sent) if math.isfinite(sent) else None
