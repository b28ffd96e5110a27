"""Deleting what a dead run left, so that a learner which opens it meanwhile loses nothing.

First the run's own keys go, in one step and only if nothing about the run has changed since it was found dead: whoever
opens it before keeps it, whoever opens it after begins a new run. A mark takes the place of `meta`, by which an
interrupted deletion is recognised. Then each worker's queue goes, in one step too and only if nobody used it since;
and last what no later run can share: chunks and outcomes have names that are given once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rlbroker.backend.connection import Argument, Connection
from rlbroker.backend.keys import Keys, shard_of
from rlbroker.backend.scripts import Script
from rlbroker.errors import AccessDenied, PeerError
from rlbroker.ops.stale_runs import PRUNED, batches, find_stale_runs, unused_seconds

#: The keys of one worker's batches, in the shard where they are; it need not be one that the run still knows.
Queue = tuple[str, ...]

#: Why a run, or a part of it, was kept that had been found dead.
OPENED: Final = "somebody has opened it just now"


PRUNE_RUN = Script.load("ops/lua/prune_run.lua")

PRUNE_QUEUE = Script.load("ops/lua/prune_queue.lua")

FINISH = Script.load("ops/lua/finish_pruning.lua")


@dataclass(frozen=True)
class Pruned:
    """What became of one run.

    Attributes:
        run: its name.
        keys: how many of its keys were deleted.
        kept: why it was kept, or a part of it; empty if everything is gone.
    """

    run: str
    keys: int
    kept: str = ""


def prune(
    connection: Connection,
    run: str,
    names: Sequence[str],
    *,
    older_than_seconds: float,
    named: bool,
    progress: Callable[[int], None] = lambda count: None,
) -> Pruned:
    """Delete what a run left, if it is dead still. Doing it again finishes what was interrupted.

    Args:
        connection: way to the server.
        run: its name.
        names: of its keys, as `find_stale_runs` found them; what was added since is left to the next time.
        older_than_seconds: as `find_stale_runs` takes it.
        named: whether somebody asked for this run, and not for whatever is dead.
        progress: is told how many keys are deleted.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    keys = Keys(run)
    unused = {run: unused_seconds(connection, run, names)}
    # First what the scripts compare, and then the judgement: what changes in between, they find changed.
    known = [name for name in names if name.startswith(keys.life_prefix)] if keys.workers in names else []
    count, *hashes = connection.ask(
        [("SCARD", keys.workers), *(("HGETALL", name) for name in (keys.meta, *known))]
    )
    used = _use(connection, sorted({tuple(all_of) for name in names if (all_of := keys.queue_beside(name))}))
    (found,) = find_stale_runs(
        connection, older_than_seconds=older_than_seconds, run=run, named=named, unused=unused
    ) or (None,)
    if found is None:
        return Pruned(run, 0)
    if not found.dead:
        return Pruned(run, 0, found.why)
    there = set(found.names)
    in_queues = there.intersection(name for queue in used for name in queue)
    # What is elsewhere no script could take along, and no learner reads.
    rest = [
        name
        for name in found.names
        if name not in in_queues and (keys.is_never_reused(name) or shard_of(name) != keys.prefix)
    ]
    named_first = (keys.workers, keys.meta, *known)
    own = sorted(there - in_queues - set(rest) - set(named_first))
    before = [part for answer in hashes for part in _fields(answer)]
    workers_there = -1 if isinstance(count, PeerError) else count
    arguments = [len(known), *before, workers_there, PRUNED]
    if not connection.run(PRUNE_RUN, (*named_first, *own), arguments):
        return Pruned(run, 0, OPENED)
    deleted, kept = len(there.intersection((*named_first, *own))), ""
    progress(deleted)
    for queue, use in used.items():
        if connection.run(PRUNE_QUEUE, queue, use):
            deleted += len(there.intersection(queue))
            progress(deleted)
        else:
            kept = OPENED
    for some in batches(rest):
        deleted += connection.on_each("UNLINK", some)
        progress(deleted)
    connection.run(FINISH, (keys.meta,), (PRUNED,))
    return Pruned(run, deleted, kept)


def _use(connection: Connection, queues: Sequence[Queue]) -> dict[Queue, list[Argument]]:
    """Give what changes of each queue when somebody uses it, as the script compares it."""
    found: dict[Queue, list[Argument]] = {}
    for some in batches(queues):
        commands = [
            command
            for experiences, counts, epochs, *_ in some
            for command in (("HGETALL", counts), ("HGETALL", epochs), ("XLEN", experiences))
        ]
        answers = iter(connection.ask(commands))
        for queue, counts, epochs, length in zip(some, answers, answers, answers, strict=False):
            waiting = -1 if isinstance(length, PeerError) else length
            found[queue] = [*_fields(counts), *_fields(epochs), waiting]
    return found


def _fields(answer: Any) -> list[Argument]:
    """Give a hash as the scripts compare it: the number of its fields, their names and values; -1 for no hash."""
    if isinstance(answer, AccessDenied):
        raise answer
    if isinstance(answer, PeerError):
        return [-1]
    if isinstance(answer, dict):
        return [len(answer), *(part for pair in answer.items() for part in pair)]
    return [len(answer) // 2, *answer]
