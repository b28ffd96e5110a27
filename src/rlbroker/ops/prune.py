"""Dead runs: find those that no learner or worker uses any more, and delete their keys.

A learner or worker may open a run while it is deleted, so the keys are deleted in three steps:

1. The run's own keys, in one script, unless the run has changed since it was found dead. A learner that opens the run
   before this step keeps it; one that opens it later begins a new run. The script leaves a mark in `meta`, so that an
   interrupted deletion can be completed.
2. Each worker's queue, in one script each, unless it has changed.
3. Chunks and outcomes. Their names are never used again, so a new run does not share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import EVERY_KEY, Keys, run_of, shard_of
from rlbroker.backend.replies import text_fields, whole_number
from rlbroker.backend.scripts import Script
from rlbroker.backend.text import age
from rlbroker.errors import PeerError
from rlbroker.ops.inspect.runs import RunSummary, list_runs

Item = TypeVar("Item")

#: How many keys of a queue change with every use of it: its batches and their counts and epochs.
_COMPARED_IN_QUEUE: Final = 3

#: Keys that are read or deleted in one round trip.
KEYS_AT_ONCE: Final = 1000

#: How long learners and workers may take to reconnect after the server has started.
BACK_SECONDS: Final = 10

#: The mark of a run that is being deleted: with `ended` the only field of `meta`. A learner adds other fields.
PRUNED: Final = "pruned"

#: Why a dead run, or a part of it, was kept.
OPENED: Final = "it has just been opened again"

FINGERPRINT = Script.load("ops/lua/read_fingerprint.lua")

PRUNE = Script.load("ops/lua/prune.lua")

FINISH = Script.load("ops/lua/finish_pruning.lua")


@dataclass(frozen=True)
class RunVerdict:
    """Whether one run may be deleted, and why.

    Attributes:
        run: its name.
        state: the state of its learner, as in `RunSummary`; `orphaned` for keys without a run, `pruned` after an
            interrupted deletion.
        silent_seconds: time since the last heartbeat of any learner or worker, or else since the last use of a key;
            None if unknown.
        version: its latest version.
        alive: whether a learner or worker is alive.
        dead: whether it may be deleted. A run that is neither alive nor dead may still be used again.
        why: the reason for `dead`, for people.
        names: the names of its keys.
        stored_bytes: their memory on the server; None if unknown.
    """

    run: str
    state: str
    silent_seconds: float | None
    version: int
    alive: bool
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


def judge_runs(
    connection: Connection,
    *,
    older_than_seconds: float,
    run: str | None = None,
    named: bool = False,
    unused: Mapping[str, float | None] | None = None,
) -> list[RunVerdict]:
    """Return for each run on a server, by name, whether it may be deleted.

    Args:
        older_than_seconds: a run is dead only after this time without a heartbeat.
        run: only this run.
        named: whether the user named this run: it is dead as soon as its learner has ended and no worker is alive.
        unused: by run, an earlier result of `unused_seconds`, for a caller that has read the run's keys since: reading
            a key counts as a use.
    """
    names: dict[str, list[str]] = {}
    for key in list_keys(connection, Keys(run).everything if run else EVERY_KEY):
        if owner := run_of(key):
            names.setdefault(owner, []).append(key)
    # Reading the keys of an orphan would count as a use.
    runs = [name for name in sorted(names) if not _is_orphan(name, names[name])]
    summaries = {summary.run: summary for summary in list_runs(connection, runs)}
    just_started = _has_just_started(connection)
    verdicts = []
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
        alive = _describe_alive(summary)
        dead, why = (
            (False, alive) if alive else _judge(state, silent_seconds, older_than_seconds, named=named)
        )
        if dead and just_started and not (named and state in ("ended", "pruned")):
            dead = False
            why = f"{why}, but the server has just started: its learner and workers may not be back yet"
        verdicts.append(
            RunVerdict(
                run=name,
                state=state,
                silent_seconds=silent_seconds,
                version=summary.version,
                alive=bool(alive),
                dead=dead,
                why=why,
                names=tuple(keys),
                stored_bytes=_read_stored_bytes(connection, keys) if dead else None,
            )
        )
    return verdicts


def prune(
    connection: Connection, run: str, names: Sequence[str], *, older_than_seconds: float, named: bool
) -> PruneResult:
    """Delete the keys of a run if it is still dead. A second call completes an interrupted one.

    Args:
        names: the names of its keys, from `judge_runs`; later ones remain.
        older_than_seconds, named: as for `judge_runs`.
    """
    keys = Keys(run)
    unused = {run: unused_seconds(connection, run, names)}
    # First read what the scripts will compare, then judge the run: so the scripts detect every later change.
    incarnations = [name for name in names if name.startswith(keys.life_prefix)]
    compared = (keys.meta, keys.workers, *(incarnations if keys.workers in names else ()))
    queues = sorted({tuple(beside) for name in names if (beside := keys.queue_beside(name))})
    own_print, *queue_prints = connection.execute_all(
        [
            FINGERPRINT.call(compared, (len(compared),)),
            *(FINGERPRINT.call(queue[:_COMPARED_IN_QUEUE], (_COMPARED_IN_QUEUE,)) for queue in queues),
        ]
    )
    (verdict,) = judge_runs(
        connection, older_than_seconds=older_than_seconds, run=run, named=named, unused=unused
    ) or (None,)
    if verdict is None:
        return PruneResult(run, 0)
    if not verdict.dead:
        return PruneResult(run, 0, verdict.why)
    existing = set(verdict.names)
    in_queues = existing.intersection(name for queue in queues for name in queue)
    # Keys that may be in other slots, which a script cannot reach. No learner reads them any more.
    rest = [
        name
        for name in verdict.names
        if name not in in_queues and (keys.is_never_reused(name) or shard_of(name) != keys.prefix)
    ]
    own = (*compared, *sorted(existing - in_queues - set(rest) - set(compared)))
    if not connection.run(PRUNE, own, (len(compared), own_print, PRUNED)):
        return PruneResult(run, 0, OPENED)
    deleted, kept = len(existing.intersection(own)), ""
    for queue, queue_print in zip(queues, queue_prints, strict=True):
        if connection.run(PRUNE, queue, (_COMPARED_IN_QUEUE, queue_print, "")):
            deleted += len(existing.intersection(queue))
        else:
            kept = OPENED
    deleted += sum(connection.execute_on_keys("UNLINK", some) for some in split(rest))
    connection.run(FINISH, (keys.meta,), (PRUNED,))
    return PruneResult(run, deleted, kept)


def list_keys(connection: Connection, pattern: str) -> list[str]:
    """Return the names of all keys that match a pattern, each once."""
    found = dict[str, None]()
    for keys in connection.scan(pattern, count=KEYS_AT_ONCE):
        found.update((key.decode(), None) for key in keys if key.isascii())  # rlbroker's keys are ASCII
    return list(found)


def unused_seconds(connection: Connection, run: str, names: Sequence[str]) -> float | None:
    """Return the time since the last use of any key of a run; None if the server's eviction policy does not record it.

    Of a run that is no orphan, the keys that `list_runs` reads do not count.
    """
    keys, idle, orphan = Keys(run), list[int](), _is_orphan(run, names)
    for names_at_once in split([name for name in names if orphan or not keys.describes_run(name)]):
        replies = connection.execute_all(
            [("OBJECT", "IDLETIME", name) for name in names_at_once], strict=False
        )
        idle += [reply for reply in replies if isinstance(reply, int)]
    return float(min(idle)) if idle else None


def split(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Yield the items in pieces for one round trip each."""
    return (items[first : first + KEYS_AT_ONCE] for first in range(0, len(items), KEYS_AT_ONCE))


def _describe_alive(summary: RunSummary) -> str:
    """Return which learner or worker of a run is alive; empty if none is."""
    if summary.learner == "alive":
        return "its learner is alive"
    if summary.others:
        return "another learner is alive, which collects"
    if summary.alive:
        return "a worker is alive" if summary.alive == 1 else f"{summary.alive} of its workers are alive"
    return ""


def _judge(
    state: str, silent_seconds: float | None, older_than_seconds: float, *, named: bool
) -> tuple[bool, str]:
    """Return whether a run without live processes may be deleted, and why."""
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
        return False, f"{why}, but for less than {age(older_than_seconds)}"
    return True, why


def _read_state(connection: Connection, summary: RunSummary) -> str:
    if summary.learner == "ended":
        (meta,) = connection.execute_all([("HGETALL", Keys(summary.run).meta)], strict=False)
        if not isinstance(meta, PeerError) and text_fields(meta).keys() == {"ended", PRUNED}:
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
        for reply in connection.execute_all(
            [("MEMORY", "USAGE", name) for name in names_at_once], strict=False
        ):
            if isinstance(reply, PeerError):
                return None
            total += whole_number(str(reply)) or 0
    return total
