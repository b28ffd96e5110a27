"""Which runs are on a server, and which of them is meant."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import parsing, raise_first_error, server_seconds, text_fields
from rlbroker.codec.version import FORMAT_VERSION
from rlbroker.config import RunSettings, is_run_name
from rlbroker.errors import AccessDenied, IncompatibleFormat, InvalidArgument, PeerError
from rlbroker.membership.incarnations import incarnation_command, incarnations_from, worker_numbers
from rlbroker.types import Liveness

logger = logging.getLogger("rlbroker")


@dataclass(frozen=True)
class RunSummary:
    """One run of a server.

    Attributes:
        learner: `alive`; `ended` after it was cleaned up; `away` when it has been silent for longer than a lease;
            `none` if no learner has opened the run yet; `unreadable` if what is stored was not written by one.
        version: its latest version; 0 before the first.
        alive: workers heard of within their lease.
        members: workers that belong to it, those included.
        others: further learners that were heard of within their lease; they only collect.
        last_seen_seconds: how long ago a learner or a worker of it was heard of; None if none ever was.
        wire_format: as its learner writes it; None before there was one.
    """

    run: str
    learner: Liveness | Literal["ended", "none", "unreadable"]
    version: int
    alive: int
    members: int
    others: int
    last_seen_seconds: float | None
    wire_format: int | None


def run_names(connection: Connection) -> list[str]:
    """Give the names of the runs on a server, in order; those that wait for their learner too.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    prefix, _, meta = Keys("RUN").meta.partition("RUN")
    suffixes = (meta, Keys("RUN").workers.partition("RUN")[2])
    found = set[str]()
    for keys in connection.scan(f"{prefix}*"):
        for name in (key.decode(errors="replace") for key in keys):
            found.update(name[len(prefix) : -len(suffix)] for suffix in suffixes if name.endswith(suffix))
    return sorted(filter(is_run_name, found))


def keys_of(connection: Connection, run: str) -> Keys:
    """Give the names of a run's keys, in its shards if it has any.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    keys = Keys(run)
    keys.spread(str(connection.execute("HGET", keys.meta, "shards") or b"", "ascii", "replace"))
    return keys


def choose_run(connection: Connection, run: str | None) -> str:
    """Give the name of a run that exists: the one that was asked for, or the only one.

    Raises:
        InvalidArgument: there is none, or more than one to choose from; those that exist are named.
        IncompatibleFormat: it was written by a release with another wire format.
        PeerError: the server refused, or could not be reached in time.
    """
    if run is None:
        names = run_names(connection)
        if not names:
            raise InvalidArgument(f"there are no runs on {connection.address}")
        if len(names) > 1:
            raise InvalidArgument(f"there are {len(names):,} runs on {connection.address}; {_there(names)}")
        run = names[0]
    keys = Keys(run)
    wire_format, there = connection.execute_all(
        [("HGET", keys.meta, "wire_format"), ("EXISTS", keys.meta, keys.workers)]
    )
    if not there:
        raise InvalidArgument(
            f"there is no run {run!r} on {connection.address}; {_there(run_names(connection))}"
        )
    if wire_format is not None and wire_format != str(FORMAT_VERSION).encode():
        raise IncompatibleFormat(
            f"the run {run!r} was written with wire format {wire_format.decode(errors='replace')}, this release reads "
            f"{FORMAT_VERSION}; use the release that wrote it"
        )
    return run


def list_runs(connection: Connection, names: list[str] | None = None) -> list[RunSummary]:
    """Give the runs on a server, by name.

    Args:
        connection: way to the server.
        names: only these, in this order.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    names = run_names(connection) if names is None else names
    commands: list[tuple[Any, ...]] = [("TIME",)]
    for keys in map(Keys, names):
        commands += [("HGETALL", keys.meta), ("HGET", keys.weights, "version")]
        commands.append(("SMEMBERS", keys.workers))
    clock, *replies = connection.ask(commands)
    if isinstance(clock, PeerError):
        raise clock
    by_run = {name: replies[3 * number : 3 * number + 3] for number, name in enumerate(names)}
    ids = {
        name: worker_numbers(workers)
        for name, (*_, workers) in by_run.items()
        if not isinstance(workers, PeerError)
    }
    lives = iter(
        connection.ask(
            [incarnation_command(Keys(name), worker) for name, some in ids.items() for worker in some]
        )
    )
    found = {name: list(islice(lives, len(some))) for name, some in ids.items()}
    now = server_seconds(clock)
    return [_summary_of(name, now, by_run[name], ids.get(name, []), found.get(name, [])) for name in names]


def worker_ids(connection: Connection, keys: Keys) -> list[int]:
    """Give every worker id that the run ever had, in order.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    return worker_numbers(connection.execute("SMEMBERS", keys.workers))


def learner_state(meta: dict[str, str], silent_seconds: float | None) -> Liveness | Literal["ended", "none"]:
    """Say what the newest learner of a run is about, by the run's `meta` and how long it has been silent."""
    if not meta:
        return "none"
    if meta.get("learner_state") == "ended":
        return "ended"
    lease_seconds = RunSettings.from_fields(meta).lease_seconds
    return "alive" if silent_seconds is not None and silent_seconds < lease_seconds else "away"


def learner_silence(meta: dict[str, str], now: float) -> float | None:
    """Give for how many seconds the newest learner of a run has been silent; None if it never gave a sign of life."""
    return max(0.0, now - float(meta["learner_seen"])) if "learner_seen" in meta else None


def silences_of_others(meta: dict[str, str], now: float) -> list[float]:
    """Give for how many seconds each further learner of a run has been silent: those that only collect."""
    return [
        max(0.0, now - float(seen))
        for name, seen in _by_name(meta, "seen:").items()
        if meta.get(f"learner:{name}") != meta.get("epoch")
    ]


def _summary_of(name: str, now: float, replies: list[Any], ids: list[int], lives: list[Any]) -> RunSummary:
    """Sum a run up; one that another program has written into must not hide the others."""
    for reply in replies:
        if isinstance(reply, AccessDenied):
            raise reply
    try:
        with parsing(Keys(name).meta):
            meta, version, _ = raise_first_error(replies)
            members = [life for life in incarnations_from(ids, lives).values() if life.member]
            silences = [life.silent_seconds(now) for life in members]
            return _summary(name, now, text_fields(meta), int(version or 0), silences)
    except PeerError as error:
        logger.info("the run %r cannot be read: %s", name, error)
        return RunSummary(name, "unreadable", 0, 0, 0, 0, None, None)


def _summary(name: str, now: float, meta: dict[str, str], version: int, silences: list[float]) -> RunSummary:
    lease_seconds = RunSettings.from_fields(meta).lease_seconds
    of_learner = learner_silence(meta, now)
    others = silences_of_others(meta, now)
    heard = [*silences, *others, *([] if of_learner is None else [of_learner])]
    return RunSummary(
        run=name,
        learner=learner_state(meta, of_learner),
        version=version,
        alive=sum(silence < lease_seconds for silence in silences),
        members=len(silences),
        others=sum(silence < lease_seconds for silence in others),
        last_seen_seconds=min(heard, default=None),
        wire_format=int(meta["wire_format"]) if "wire_format" in meta else None,
    )


def _by_name(meta: dict[str, str], prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): value for name, value in meta.items() if name.startswith(prefix)}


def _there(names: list[str]) -> str:
    if not names:
        return "there are no runs on it"
    return f"runs there are: {', '.join(names)}; choose one with --run"
