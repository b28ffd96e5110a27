"""What an examination says of one run: its queues as Redis has them, their bounds, and what is wrong with it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any, Final

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import GROUP
from rlbroker.backend.replies import text_fields
from rlbroker.backend.text import counted
from rlbroker.errors import PeerError
from rlbroker.ops.doctor.checks import Check, size, unread, untold
from rlbroker.ops.doctor.server_info import ServerInfo
from rlbroker.ops.inspect.findings import find
from rlbroker.ops.inspect.runs import keys_of
from rlbroker.ops.inspect.snapshot import Snapshot, take_snapshot

#: A learner that holds batches and has not been heard of in their stream for so many seconds is spoken of.
IDLE_SECONDS: Final = 60.0

#: What the points of the server say already.
_OF_THE_SERVER: Final = ("server_evicts", "server_full")


def of_run(connection: Connection, facts: ServerInfo, run: str) -> tuple[list[Check], Snapshot | None]:
    """Judge a run; give the look at it too, if one was possible.

    Raises:
        ConnectionFailed: the server could not be reached in time.
    """
    try:
        snapshot = take_snapshot(connection, run)
    except PeerError as error:
        return [unread("run", f"the run {run!r} cannot be read", error)], None
    points = [*_queues(connection, snapshot), *_bounds(facts, snapshot)]
    found = [one for one in find(snapshot) if one.code not in _OF_THE_SERVER]
    points += [Check(one.code, one.severity, one.what, one.hint) for one in found]
    if not found:
        points.append(Check("run", "ok", f"nothing is wrong with the run {run!r} itself"))
    return points, snapshot


def _queues(connection: Connection, snapshot: Snapshot) -> Iterator[Check]:
    """Look at each worker's stream: has it the learners' group, and does somebody hold batches and sleep?"""
    keys = keys_of(connection, snapshot.run)
    workers = {worker: keys.experiences(worker) for worker, one in snapshot.workers.items() if one.counts}
    there = connection.ask([("EXISTS", key) for key in workers.values()])
    existing = {
        worker: key for (worker, key), found in zip(workers.items(), there, strict=True) if found == 1
    }
    groups = connection.ask([("XINFO", "GROUPS", key) for key in existing.values()])
    read = connection.ask([("XINFO", "CONSUMERS", key, GROUP) for key in existing.values()])
    wrong = False
    for (worker, key), of_groups, consumers in zip(existing.items(), groups, read, strict=True):
        if isinstance(of_groups, PeerError):
            yield unread("queues", f"the queue of worker {worker} cannot be looked at", of_groups)
            return
        if GROUP not in [one["name"] for one in map(text_fields, of_groups)]:
            wrong = True
            yield Check(
                "group_missing",
                "critical",
                f"the queue of worker {worker} has no group {GROUP!r}: no learner gets its batches",
                f"redis-cli XGROUP CREATE {shlex.quote(key)} {GROUP} 0",
            )
        elif not isinstance(consumers, PeerError) and _goes_on(snapshot):
            for name, held, idle_seconds in _sleepers(consumers):
                wrong = True
                batches = counted(held, f"batch of worker {worker} is", f"batches of worker {worker} are")
                yield Check(
                    "holder_idle",
                    "warning",
                    f"{batches} in the hands of the learner {name!r}, not heard of "
                    f"there for {idle_seconds:,.0f} s; another learner takes over, or this one after a restart",
                    f"rlbroker workers {worker}",
                )
    if not wrong:
        counts = [one.counts for one in snapshot.workers.values() if one.counts]
        waiting, in_hand = (sum(getattr(one, name) for one in counts) for name in ("waiting", "in_hand"))
        most = max((one.waiting for one in counts), default=0)
        where = f"{counted(len(existing), 'queue')}, {most:,} at most in one; {in_hand:,} in hand"
        what = f"{counted(waiting, 'batch waits', 'batches wait')} in {where}"
        yield Check("queues", "ok", what)


def _goes_on(snapshot: Snapshot) -> bool:
    return snapshot.learner is not None and snapshot.learner.state != "ended"


def _sleepers(consumers: Any) -> Iterator[tuple[str, int, float]]:
    for one in map(text_fields, consumers):
        held, idle_seconds = int(one["pending"]), int(one["idle"]) / 1000
        if held and idle_seconds > IDLE_SECONDS:
            yield one["name"], held, idle_seconds


def _bounds(facts: ServerInfo, snapshot: Snapshot) -> Iterator[Check]:
    """Compare what the learner allows with what the server can take."""
    bytes_of_one = snapshot.settings.max_queue_bytes
    largest = facts.number("proto-max-bulk-len")
    if largest is not None and largest < bytes_of_one:
        yield Check(
            "batch_bytes",
            "warning",
            f"max_queue_bytes allows a batch of {size(bytes_of_one)}, the server takes {size(largest)} as one value",
            f"redis-cli CONFIG SET proto-max-bulk-len {bytes_of_one}",
        )
    workers = max(len(snapshot.members), snapshot.expected_workers)
    pointer = snapshot.pointer
    weights = (
        4 * pointer.stored_bytes if pointer else 0
    )  # two full versions and differences, while they overlap
    needed = workers * bytes_of_one + weights
    room = facts.number("maxmemory") or facts.number("total_system_memory")
    what = f"full queues of {counted(workers, 'worker')} and the weights need {size(needed)}"
    if room is None:
        yield untold("room", f"{what}; what the server has is not known", facts, "INFO")
    elif needed > room:
        limit = facts.number("maxmemory")
        machine = facts.number("total_system_memory") or 0
        hint = (
            f"redis-cli CONFIG SET maxmemory {needed}" if limit and needed < machine else "rlbroker workers"
        )
        yield Check(
            "room",
            "warning",
            f"{what}, the server has {size(room)}: a learner that stands still fills it; lower max_queue_bytes",
            hint,
        )
    else:
        yield Check("room", "ok", f"{what}, of {size(room)}")
