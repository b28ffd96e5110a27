"""What waits in the workers' queues: a look into batches that takes none of them; reading changes nothing."""

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
    text_fields,
    whole_number,
)
from rlbroker.experience.dead_letters import READ_AT_ONCE
from rlbroker.ops.inspect.batch_shapes import Content, shape_of


@dataclass(frozen=True)
class WaitingBatch:
    """A batch in a worker's queue. What the worker wrote of it may be wrong: workers are not trusted.

    Attributes:
        worker_id: whose it is.
        batch_id: `<incarnation>-<sequence>`.
        retried: whether it was dead before, and is tried again.
        held_by: the learner that has it in its hands; empty if it waits.
        deliveries: how often it was handed out.
        version: the weights that produced it; None if the entry does not say.
        staleness: versions published since.
        rows: its leading dimension.
        raw_bytes: bytes of its arrays.
        stored_bytes: bytes of its message, as it is there.
        age_seconds: since it was sent, by the worker's clock then, and the server's now; None if it does not say.
        contents: what it holds; empty if it does not decode.
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
class WaitingQueue:
    """One worker's queue.

    Attributes:
        worker_id: whose it is.
        waiting: batches that nobody has read.
        in_hand: batches that a learner has read and not acknowledged.
        batches: those that were looked at, in the order of the queue.
    """

    worker_id: int
    waiting: int
    in_hand: int
    batches: tuple[WaitingBatch, ...]


def peek(
    connection: Connection, keys: Keys, worker: int, *, count: int, newest: bool = False
) -> WaitingQueue:
    """Look at some batches of one worker, those that are tried again first; nothing is taken.

    The batches are transferred: `count` bounds how many.

    Args:
        connection: way to the server.
        keys: names of the run's keys.
        worker: whose.
        count: how many, at most, of each of its two streams.
        newest: the newest, and not the oldest.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    waiting = in_hand = 0
    batches: list[WaitingBatch] = []
    for key, retried in ((keys.again(worker), True), (keys.experiences(worker), False)):
        if connection.execute("TYPE", key) in (b"stream", "stream"):  # learners delete anything else
            length, pending, found = _peek_stream(connection, keys, worker, key, count, newest, retried)
            waiting, in_hand = waiting + length - pending, in_hand + pending
            batches += found
    return WaitingQueue(worker, waiting, in_hand, tuple(batches))


def _peek_stream(
    connection: Connection, keys: Keys, worker: int, key: str, count: int, newest: bool, retried: bool
) -> tuple[int, int, list[WaitingBatch]]:
    """Give how many entries a stream has, how many of them are in a learner's hands, and some of them."""
    clock, latest, length, groups = connection.execute_all(
        [("TIME",), ("HGET", keys.weights, "version"), ("XLEN", key), ("XINFO GROUPS", key)]
    )
    entries = _read(connection, key, count, newest)
    ids = [entry_id.decode() for entry_id, _ in entries]
    pending, held = 0, list[Any]([()] * len(ids))
    if any(text_fields(group)["name"] == GROUP for group in groups):
        summary, *held = connection.execute_all(
            [("XPENDING", key, GROUP), *(("XPENDING", key, GROUP, one, one, 1) for one in ids)]
        )
        pending = pending_count(summary)
    with parsing(keys.weights):
        now, version = server_seconds(clock), int(latest or 0)
    found = [
        _batch(worker, entry_id, fields, pending_rows(rows), now, version, retried)
        for entry_id, (_, fields), rows in zip(ids, entries, held, strict=True)
    ]
    return int(length), pending, found[::-1] if newest else found


def _read(connection: Connection, key: str, count: int, newest: bool) -> list[Any]:
    """Give the first or last entries of a stream, few at once: the server holds each answer in memory."""
    found: list[Any] = []
    command, position, end = ("XREVRANGE", "+", "-") if newest else ("XRANGE", "-", "+")
    while len(found) < count:
        some = connection.execute(command, key, position, end, "COUNT", min(READ_AT_ONCE, count - len(found)))
        if not some:
            break
        found += some
        position = f"({some[-1][0].decode()}"
    return found


def _batch(
    worker: int,
    entry_id: str,
    fields: Mapping[bytes, bytes],
    held: Sequence[tuple[str, str, int, int]],
    now: float,
    latest: int,
    retried: bool,
) -> WaitingBatch:
    said = text_fields({name: value for name, value in fields.items() if name != b"data"})
    data = fields.get(b"data", b"")
    version = whole_number(said.get("version", ""))
    _, consumer, _, deliveries = held[0] if held else ("", "", 0, 0)
    found, problem = shape_of(data)
    return WaitingBatch(
        worker_id=worker,
        batch_id=_batch_id(said.get("entry", ""), entry_id),
        retried=retried,
        held_by=consumer.removesuffix("+"),
        deliveries=deliveries,
        version=version,
        staleness=None if version is None else max(0, latest - version),
        rows=whole_number(said.get("rows", "")),
        raw_bytes=whole_number(said.get("raw_bytes", "")),
        stored_bytes=len(data),
        age_seconds=_age(said.get("sent_at", ""), now),
        contents=found,
        problem=problem,
    )


def _batch_id(said: str, entry_id: str) -> str:
    """Give the id under which a batch was sent: one that is tried again has another one now."""
    try:
        life, sequence = entry_place(said)
    except ValueError:
        return entry_id
    return f"{life}-{sequence}"


def _age(sent_at: str, now: float) -> float | None:
    try:
        sent = float(sent_at)
    except ValueError:
        return None
    return max(0.0, now - sent) if math.isfinite(sent) else None
