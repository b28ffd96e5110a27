"""What dead runs left on a server: which runs are dead, and how much of them is there; looking changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import EVERY_KEY, Keys, run_of
from rlbroker.backend.replies import text_fields, whole_number
from rlbroker.errors import PeerError
from rlbroker.ops.inspect.runs import RunSummary, list_runs

Item = TypeVar("Item")

#: Keys that are looked at in one round trip.
KEYS_AT_ONCE: Final = 1000

#: Within this learners and workers are back after the server's start.
BACK_SECONDS: Final = 10

#: The only field of `meta` besides `learner_state` while a run is being deleted; a learner that opens it adds others.
PRUNED: Final = "pruned"


@dataclass(frozen=True)
class StaleRun:
    """One run, and whether it may go.

    Attributes:
        run: its name.
        state: of its learner, as `RunSummary` has it; `orphaned` for keys without a run, `pruned` for one whose
            deletion was interrupted.
        silent_seconds: how long nobody of it was heard of, or used its keys; None if the server does not tell.
        version: its latest version.
        dead: whether it may go.
        why: why it may go, or may not.
        names: of its keys.
        stored_bytes: what they take on the server; None if it does not tell.
    """

    run: str
    state: str
    silent_seconds: float | None
    version: int
    dead: bool
    why: str
    names: tuple[str, ...] = field(repr=False)
    stored_bytes: int | None


def find_stale_runs(
    connection: Connection,
    *,
    older_than_seconds: float,
    run: str | None = None,
    named: bool = False,
    unused: Mapping[str, float | None] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> list[StaleRun]:
    """Give the runs on a server, by name, each with whether it may go.

    Args:
        connection: way to the server.
        older_than_seconds: a run is dead only if nobody of it was heard of for so long.
        run: only this one.
        named: whether somebody asked for that one: if its learner has ended and no worker lives, it is dead at once.
        unused: by run, what `unused_seconds` gave before its keys were read, which counts as using them.
        progress: is told now and then how many keys were looked at.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    names: dict[str, list[str]] = {}
    for key in every_key(connection, Keys(run).everything if run else EVERY_KEY, progress):
        if one := run_of(key):
            names.setdefault(one, []).append(key)
    # Orphans are not asked for what they may have: that would count as using their keys.
    runs = [one for one in sorted(names) if not _is_orphan(one, names[one])]
    summaries = {one.run: one for one in list_runs(connection, runs)}
    just_started = _just_started(connection)
    found = []
    for name in sorted(names):
        keys, summary = sorted(names[name]), summaries.get(name)
        if summary is None:
            summary, state = RunSummary(name, "none", 0, 0, 0, 0, None, None), "orphaned"
        else:
            state = _state(connection, summary)
        silent_seconds = summary.last_seen_seconds
        if silent_seconds is None:
            known = unused or {}
            silent_seconds = known[name] if name in known else unused_seconds(connection, name, keys)
        dead, why = _verdict(summary, state, silent_seconds, older_than_seconds, named=named)
        if dead and just_started and not (named and state in ("ended", "pruned")):
            dead, why = (
                False,
                f"{why}, but the server has just started, and whoever lives may not be back yet",
            )
        found.append(
            StaleRun(
                run=name,
                state=state,
                silent_seconds=silent_seconds,
                version=summary.version,
                dead=dead,
                why=why,
                names=tuple(keys),
                stored_bytes=_stored_bytes(connection, keys) if dead else None,
            )
        )
    return found


def _just_started(connection: Connection) -> bool:
    """Whether a server has been running for so short a time that those who live may not be back."""
    told = [connection.server_info(one).get("uptime_in_seconds", "") for one in connection.masters()]
    return any(seconds < BACK_SECONDS for seconds in map(whole_number, told) if seconds is not None)


def every_key(
    connection: Connection, pattern: str, progress: Callable[[int], None] = lambda count: None
) -> list[str]:
    """Give the names of all keys like this; each once."""
    found = dict[str, None]()
    for keys in connection.scan(pattern, count=KEYS_AT_ONCE):
        found.update((key.decode(), None) for key in keys if key.isascii())  # as all of ours are
        progress(len(found))
    return list(found)


def _state(connection: Connection, summary: RunSummary) -> str:
    if summary.learner == "ended":
        (meta,) = connection.ask([("HGETALL", Keys(summary.run).meta)])
        if not isinstance(meta, PeerError) and text_fields(meta).keys() == {"learner_state", PRUNED}:
            return "pruned"
    return summary.learner


def _verdict(
    summary: RunSummary, state: str, silent_seconds: float | None, older_than_seconds: float, *, named: bool
) -> tuple[bool, str]:
    if summary.learner == "alive":
        return False, "its learner lives"
    if summary.others:
        return False, "another learner of it lives, which collects"
    if summary.alive:
        return False, f"{summary.alive} of its workers live" if summary.alive > 1 else "a worker of it lives"
    why = {
        "ended": "its learner has ended",
        "pruned": "its deletion was interrupted",
        "orphaned": "nothing says which run it was",
        "none": "no learner ever opened it",
        "unreadable": "it cannot be read",
    }.get(state, "its learner is away")
    if state == "pruned" or (named and state == "ended"):
        return True, why
    if silent_seconds is None:
        return False, f"{why}, but nobody knows for how long"
    if silent_seconds < older_than_seconds:
        return False, f"{why}, but not for long enough"
    return True, why


def unused_seconds(connection: Connection, run: str, names: Sequence[str]) -> float | None:
    """Give how long nobody used any key of a run, as far as the server tells: with some policies it does not.

    Where there is a run, the keys do not count that are used by looking for runs.
    """
    keys, idle, orphan = Keys(run), list[int](), _is_orphan(run, names)
    for some in batches([name for name in names if orphan or not keys.describes_run(name)]):
        answers = connection.ask([("OBJECT", "IDLETIME", name) for name in some])
        idle += [answer for answer in answers if isinstance(answer, int)]
    return float(min(idle)) if idle else None


def _is_orphan(run: str, names: Sequence[str]) -> bool:
    keys = Keys(run)
    return keys.meta not in names and keys.workers not in names


def batches(those: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Give keys, or workers, in as many as are looked at, or deleted, in one round trip."""
    return (those[first : first + KEYS_AT_ONCE] for first in range(0, len(those), KEYS_AT_ONCE))


def _stored_bytes(connection: Connection, names: list[str]) -> int | None:
    total = 0
    for some in batches(names):
        for answer in connection.ask([("MEMORY", "USAGE", name) for name in some]):
            if isinstance(answer, PeerError):
                return None
            total += whole_number(str(answer)) or 0
    return total
