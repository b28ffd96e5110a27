"""Stale runs: find those that no learner or worker uses any more, and delete their keys.

A deletion is safe against a learner or worker that opens the run meanwhile. First the run's own keys are deleted in one
step, if nothing about the run has changed since it was found dead: a learner that opens it before keeps it, one that
opens it after begins a new run. A mark replaces `meta`, by which an interrupted deletion is recognised. Then each
worker's queue is deleted, also in one step and only if it has not changed. Last come chunks and outcomes: their names
are used once, so a new run cannot share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from rlbroker.backend.connection import Argument, Connection
from rlbroker.backend.keys import EVERY_KEY, Keys, run_of, shard_of
from rlbroker.backend.replies import text_fields, whole_number
from rlbroker.backend.scripts import Script
from rlbroker.errors import AccessDenied, PeerError
from rlbroker.ops.inspect.runs import RunSummary, list_runs

Item = TypeVar("Item")

#: The keys of one worker's batches, in their shard; the run may not know this shard any more.
Queue = tuple[str, ...]

#: Keys that are read, or deleted, in one round trip.
KEYS_AT_ONCE: Final = 1000

#: Time in which learners and workers reconnect after the server's start.
BACK_SECONDS: Final = 10

#: The only field of `meta` besides `learner_state` while a run is deleted; a learner that opens it adds others.
PRUNED: Final = "pruned"

#: Why a run, or a part of it, was kept although it was dead.
OPENED: Final = "it has just been opened again"

PRUNE_RUN = Script.load("ops/lua/prune_run.lua")

PRUNE_QUEUE = Script.load("ops/lua/prune_queue.lua")

FINISH = Script.load("ops/lua/finish_pruning.lua")


@dataclass(frozen=True)
class StaleRun:
    """One run, and whether it may be deleted.

    Attributes:
        run: its name.
        state: the state of its learner, as in `RunSummary`; `orphaned` for keys without a run, `pruned` after an
            interrupted deletion.
        silent_seconds: time since the last heartbeat of any learner or worker, or else since the last use of a key;
            None if unknown.
        version: its latest version.
        dead: whether it may be deleted.
        why: why it may, or may not.
        names: the names of its keys.
        stored_bytes: their memory on the server; None if unknown.
    """

    run: str
    state: str
    silent_seconds: float | None
    version: int
    dead: bool
    why: str
    names: tuple[str, ...] = field(repr=False)
    stored_bytes: int | None


@dataclass(frozen=True)
class PruneResult:
    """The result of deleting one run.

    Attributes:
        run: its name.
        keys: the number of deleted keys.
        kept: why the run, or a part of it, was kept; empty if everything was deleted.
    """

    run: str
    keys: int
    kept: str = ""


def find_stale_runs(
    connection: Connection,
    *,
    older_than_seconds: float,
    run: str | None = None,
    named: bool = False,
    unused: Mapping[str, float | None] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> list[StaleRun]:
    """Return the runs on a server, by name, each with whether it may be deleted.

    Args:
        connection: the connection to the server.
        older_than_seconds: a run is dead only after this time without a heartbeat.
        run: only this run.
        named: whether the user named this run: without live workers it is dead as soon as its learner has ended.
        unused: by run, the result of `unused_seconds` from before its keys were read, which counts as a use.
        progress: called from time to time with the number of keys read.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    names: dict[str, list[str]] = {}
    for key in list_keys(connection, Keys(run).everything if run else EVERY_KEY, progress):
        if owner := run_of(key):
            names.setdefault(owner, []).append(key)
    # Reading the keys of an orphan would count as a use.
    runs = [name for name in sorted(names) if not _is_orphan(name, names[name])]
    summaries = {summary.run: summary for summary in list_runs(connection, runs)}
    just_started = _has_just_started(connection)
    found = []
    for name in sorted(names):
        keys, summary = sorted(names[name]), summaries.get(name)
        if summary is None:
            summary, state = RunSummary(name, "none", 0, 0, 0, 0, None, None), "orphaned"
        else:
            state = _read_state(connection, summary)
        silent_seconds = summary.last_seen_seconds
        if silent_seconds is None:
            known = unused or {}
            silent_seconds = known[name] if name in known else unused_seconds(connection, name, keys)
        dead, why = _judge(summary, state, silent_seconds, older_than_seconds, named=named)
        if dead and just_started and not (named and state in ("ended", "pruned")):
            dead = False
            why = f"{why}, but the server has just started: its learner and workers may not be back yet"
        found.append(
            StaleRun(
                run=name,
                state=state,
                silent_seconds=silent_seconds,
                version=summary.version,
                dead=dead,
                why=why,
                names=tuple(keys),
                stored_bytes=_read_stored_bytes(connection, keys) if dead else None,
            )
        )
    return found


def prune(
    connection: Connection,
    run: str,
    names: Sequence[str],
    *,
    older_than_seconds: float,
    named: bool,
    progress: Callable[[int], None] = lambda count: None,
) -> PruneResult:
    """Delete the keys of a run if it is still dead. A second call finishes an interrupted one.

    Args:
        connection: the connection to the server.
        run: its name.
        names: the names of its keys from `find_stale_runs`; keys that were added since are left for the next time.
        older_than_seconds: as in `find_stale_runs`.
        named: whether the user named this run, rather than all dead runs.
        progress: called with the number of deleted keys.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    keys = Keys(run)
    unused = {run: unused_seconds(connection, run, names)}
    # Read what the scripts compare before judging the run: the scripts detect every change in between.
    incarnations = (
        [name for name in names if name.startswith(keys.life_prefix)] if keys.workers in names else []
    )
    worker_count, *hashes = connection.ask(
        [("SCARD", keys.workers), *(("HGETALL", name) for name in (keys.meta, *incarnations))]
    )
    queues = sorted({tuple(beside) for name in names if (beside := keys.queue_beside(name))})
    queue_states = _read_queue_states(connection, queues)
    (found,) = find_stale_runs(
        connection, older_than_seconds=older_than_seconds, run=run, named=named, unused=unused
    ) or (None,)
    if found is None:
        return PruneResult(run, 0)
    if not found.dead:
        return PruneResult(run, 0, found.why)
    existing = set(found.names)
    in_queues = existing.intersection(name for queue in queue_states for name in queue)
    # Keys in other slots than the scripts can reach. No learner reads them.
    rest = [
        name
        for name in found.names
        if name not in in_queues and (keys.is_never_reused(name) or shard_of(name) != keys.prefix)
    ]
    compared = (keys.workers, keys.meta, *incarnations)
    own = sorted(existing - in_queues - set(rest) - set(compared))
    arguments = [
        len(incarnations),
        *(part for reply in hashes for part in _hash_arguments(reply)),
        -1 if isinstance(worker_count, PeerError) else worker_count,
        PRUNED,
    ]
    if not connection.run(PRUNE_RUN, (*compared, *own), arguments):
        return PruneResult(run, 0, OPENED)
    deleted, kept = len(existing.intersection((*compared, *own))), ""
    progress(deleted)
    for queue, state in queue_states.items():
        if connection.run(PRUNE_QUEUE, queue, state):
            deleted += len(existing.intersection(queue))
            progress(deleted)
        else:
            kept = OPENED
    for names_at_once in split(rest):
        deleted += connection.execute_on_keys("UNLINK", names_at_once)
        progress(deleted)
    connection.run(FINISH, (keys.meta,), (PRUNED,))
    return PruneResult(run, deleted, kept)


def list_keys(
    connection: Connection, pattern: str, progress: Callable[[int], None] = lambda count: None
) -> list[str]:
    """Return the names of all keys that match a pattern, each once."""
    found = dict[str, None]()
    for keys in connection.scan(pattern, count=KEYS_AT_ONCE):
        found.update((key.decode(), None) for key in keys if key.isascii())  # rlbroker's keys are ASCII
        progress(len(found))
    return list(found)


def unused_seconds(connection: Connection, run: str, names: Sequence[str]) -> float | None:
    """Return the time since the last use of any key of a run; None if the server's eviction policy records none.

    The keys that `list_runs` reads do not count, unless the run is an orphan.
    """
    keys, idle, orphan = Keys(run), list[int](), _is_orphan(run, names)
    for names_at_once in split([name for name in names if orphan or not keys.describes_run(name)]):
        replies = connection.ask([("OBJECT", "IDLETIME", name) for name in names_at_once])
        idle += [reply for reply in replies if isinstance(reply, int)]
    return float(min(idle)) if idle else None


def split(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Yield keys, or queues, in pieces for one round trip each."""
    return (items[first : first + KEYS_AT_ONCE] for first in range(0, len(items), KEYS_AT_ONCE))


def _judge(
    summary: RunSummary, state: str, silent_seconds: float | None, older_than_seconds: float, *, named: bool
) -> tuple[bool, str]:
    """Return whether a run may be deleted, and why."""
    if summary.learner == "alive":
        return False, "its learner is alive"
    if summary.others:
        return False, "another learner is alive, which collects"
    if summary.alive:
        return (
            False,
            f"{summary.alive} of its workers are alive" if summary.alive > 1 else "a worker is alive",
        )
    why = {
        "ended": "its learner has ended",
        "pruned": "its deletion was interrupted",
        "orphaned": "its keys belong to no known run",
        "none": "no learner ever opened it",
        "unreadable": "it cannot be read",
    }.get(state, "its learner is away")
    if state == "pruned" or (named and state == "ended"):
        return True, why
    if silent_seconds is None:
        return False, f"{why}, but for how long is unknown"
    if silent_seconds < older_than_seconds:
        return False, f"{why}, but not for long enough"
    return True, why


def _read_state(connection: Connection, summary: RunSummary) -> str:
    if summary.learner == "ended":
        (meta,) = connection.ask([("HGETALL", Keys(summary.run).meta)])
        if not isinstance(meta, PeerError) and text_fields(meta).keys() == {"learner_state", PRUNED}:
            return "pruned"
    return summary.learner


def _has_just_started(connection: Connection) -> bool:
    """Return whether a server started so recently that learners and workers may not have reconnected."""
    uptimes = [connection.server_info(master).get("uptime_in_seconds", "") for master in connection.masters()]
    return any(seconds < BACK_SECONDS for seconds in map(whole_number, uptimes) if seconds is not None)


def _is_orphan(run: str, names: Sequence[str]) -> bool:
    """Return whether a run has keys, but neither `meta` nor `workers`."""
    keys = Keys(run)
    return keys.meta not in names and keys.workers not in names


def _read_stored_bytes(connection: Connection, names: list[str]) -> int | None:
    total = 0
    for names_at_once in split(names):
        for reply in connection.ask([("MEMORY", "USAGE", name) for name in names_at_once]):
            if isinstance(reply, PeerError):
                return None
            total += whole_number(str(reply)) or 0
    return total


def _read_queue_states(connection: Connection, queues: Sequence[Queue]) -> dict[Queue, list[Argument]]:
    """Return the state of each queue, which changes with every use, as arguments of `PRUNE_QUEUE`."""
    states: dict[Queue, list[Argument]] = {}
    for queues_at_once in split(queues):
        commands = [
            command
            for experiences, counts, epochs, *_ in queues_at_once
            for command in (("HGETALL", counts), ("HGETALL", epochs), ("XLEN", experiences))
        ]
        replies = iter(connection.ask(commands))
        for queue, counts, epochs, length in zip(queues_at_once, replies, replies, replies, strict=False):
            waiting = -1 if isinstance(length, PeerError) else length
            states[queue] = [*_hash_arguments(counts), *_hash_arguments(epochs), waiting]
    return states


def _hash_arguments(reply: Any) -> list[Argument]:
    """Return a hash as arguments of the scripts: the number of its fields, names and values; -1 for another type."""
    if isinstance(reply, AccessDenied):
        raise reply
    if isinstance(reply, PeerError):
        return [-1]
    if isinstance(reply, dict):
        return [len(reply), *(part for pair in reply.items() for part in pair)]
    return [len(reply) // 2, *reply]
