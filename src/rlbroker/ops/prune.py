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

from rlbroker.backend.connection import Argument, Connection, Script
from rlbroker.backend.keys import Keys, shard_of
from rlbroker.errors import AccessDenied, PeerError
from rlbroker.ops.stale_runs import PRUNED, batches, find_leftovers, unused_seconds

#: The keys of one worker's batches, in the shard where they are; it need not be one that the run still knows.
Queue = tuple[str, ...]

#: Why a run, or a part of it, was kept that had been found dead.
OPENED: Final = "somebody has opened it just now"

#: Compares hashes with what was read before; ARGV has the number of their fields, then names and values.
_SAME: Final = """
    local at = 1
    local function same(key)
      local count = tonumber(ARGV[at])
      local first = at + 1
      at = at + 1 + 2 * math.max(count, 0)
      local length = redis.pcall('HLEN', key)
      if type(length) == 'table' then length = -1 end  -- no hash, then and now
      if length ~= count then return false end
      for i = first, at - 1, 2 do
        if redis.call('HGET', key, ARGV[i]) ~= ARGV[i + 1] then return false end
      end
      return true
    end
"""

PRUNE_RUN = Script(
    "prune_run",
    _SAME
    + """
    -- KEYS: workers, meta, the lives of workers that are known, then the run's other keys
    -- ARGV: number of lives, fields of meta and of each life, number of workers, name of the mark
    -- Gives 1, or 0 where somebody has used the run meanwhile.
    at = 2
    for i = 2, 2 + tonumber(ARGV[1]) do
      if not same(KEYS[i]) then return 0 end
    end
    local count = redis.pcall('SCARD', KEYS[1])
    if type(count) == 'table' then count = -1 end
    if count ~= tonumber(ARGV[at]) then return 0 end
    for _, key in ipairs(KEYS) do redis.call('UNLINK', key) end
    redis.call('HSET', KEYS[2], 'learner_state', 'ended', ARGV[at + 1], '1')
    return 1
    """,
)

PRUNE_QUEUE = Script(
    "prune_queue",
    _SAME
    + """
    -- KEYS: a worker's experiences, counts, epochs, dead and again
    -- ARGV: fields of counts and of epochs, number of batches that waited
    -- Gives 1, or 0 where somebody has used the queue meanwhile.
    if not same(KEYS[2]) or not same(KEYS[3]) then return 0 end
    local length = redis.pcall('XLEN', KEYS[1])
    if type(length) == 'table' then length = -1 end
    if length ~= tonumber(ARGV[at]) then return 0 end
    for _, key in ipairs(KEYS) do redis.call('UNLINK', key) end
    return 1
    """,
)

FINISH = Script(
    "finish_pruning",
    """
    -- KEYS: meta
    -- ARGV: name of the mark
    -- A learner that has opened the run keeps what it wrote.
    if redis.call('HLEN', KEYS[1]) == 2 and redis.call('HGET', KEYS[1], ARGV[1]) then
      return redis.call('UNLINK', KEYS[1])
    end
    return 0
    """,
)


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
        names: of its keys, as `find_leftovers` found them; what was added since is left to the next time.
        older_than_seconds: as `find_leftovers` takes it.
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
    (found,) = find_leftovers(
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
        if name not in in_queues and (keys.is_given_once(name) or shard_of(name) != keys.prefix)
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
