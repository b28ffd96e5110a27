"""The runs on a server: names, summaries, and the choice of one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import (
    parsing,
    raise_first_error,
    server_seconds,
    stored_integer,
    text_fields,
)
from rlbroker.codec.limits import FORMAT_VERSION
from rlbroker.config import RunSettings, is_run_name
from rlbroker.errors import AccessDenied, IncompatibleFormat, InvalidArgument, PeerError
from rlbroker.membership.incarnations import incarnation_command, parse_incarnations, parse_worker_ids
from rlbroker.ops.inspect.liveness import LearnerState, other_learners_silent_seconds, parse_learner

logger = logging.getLogger("rlbroker")


@dataclass(frozen=True)
class RunSummary:
    """A run in brief.

    Attributes:
        learner: `alive`; `ended` once the run has ended; `away` after a lease without a heartbeat; `none` before the
            first learner; `unreadable` if another program has written into its keys.
        version: the latest version; 0 before the first.
        alive: workers with a heartbeat within their lease.
        members: workers that belong to the run, alive or away.
        others: further learners with a heartbeat within their lease; they only collect.
        last_seen_seconds: age of the newest heartbeat of any learner or worker; None without any.
        wire_format: the wire format of the learner; None before the first learner.
    """

    run: str
    learner: LearnerState | Literal["unreadable"]
    version: int
    alive: int
    members: int
    others: int
    last_seen_seconds: float | None
    wire_format: int | None


def list_run_names(connection: Connection) -> list[str]:
    """Return the names of the runs on a server, sorted; a run may have workers and no learner yet."""
    prefix, _, meta = Keys("RUN").meta.partition("RUN")
    suffixes = (meta, Keys("RUN").workers.partition("RUN")[2])
    found = set[str]()
    for keys in connection.scan(f"{prefix}*"):
        for name in (key.decode(errors="replace") for key in keys):
            found.update(name[len(prefix) : -len(suffix)] for suffix in suffixes if name.endswith(suffix))
    return sorted(filter(is_run_name, found))


def read_keys(connection: Connection, run: str) -> Keys:
    """Return the keys of a run; on a Cluster, spread over its shards."""
    keys = Keys(run)
    keys.use_shards(str(connection.execute("HGET", keys.meta, "shards") or b"", "ascii", "replace"))
    return keys


def choose_run(connection: Connection, run: str | None) -> str:
    """Return the name of an existing run: the given one, or the only one on the server.

    Raises:
        InvalidArgument: there is no such run, or more than one; the message lists the runs.
        IncompatibleFormat: a release with another wire format wrote the run.
    """
    if run is None:
        names = list_run_names(connection)
        if not names:
            raise InvalidArgument(f"there are no runs on {connection.address}")
        if len(names) > 1:
            raise InvalidArgument(
                f"there are {len(names):,} runs on {connection.address}; {_list_names(names)}"
            )
        run = names[0]
    keys = Keys(run)
    wire_format, key_count = connection.execute_all(
        [("HGET", keys.meta, "wire_format"), ("EXISTS", keys.meta, keys.workers)]
    )
    if not key_count:
        raise InvalidArgument(
            f"there is no run {run!r} on {connection.address}; {_list_names(list_run_names(connection))}"
        )
    if wire_format is not None and wire_format != str(FORMAT_VERSION).encode():
        raise IncompatibleFormat(
            f"the run {run!r} was written with wire format {wire_format.decode(errors='replace'):.40}, this release "
            f"reads {FORMAT_VERSION}; use the release that wrote it"
        )
    return run


def list_runs(connection: Connection, names: list[str] | None = None) -> list[RunSummary]:
    """Return a summary of each run on a server, by name, or of these runs in this order."""
    names = list_run_names(connection) if names is None else names
    commands: list[tuple[Any, ...]] = [("TIME",)]
    for keys in map(Keys, names):
        commands += [("HGETALL", keys.meta), ("HGET", keys.weights, "version")]
        commands.append(("SMEMBERS", keys.workers))
    clock, *replies = connection.execute_all(commands, strict=False)
    if isinstance(clock, PeerError):
        raise clock
    by_run = {name: replies[3 * number : 3 * number + 3] for number, name in enumerate(names)}
    ids_by_run = {
        name: parse_worker_ids(workers)
        for name, (*_, workers) in by_run.items()
        if not isinstance(workers, PeerError)
    }
    incarnations = iter(
        connection.execute_all(
            [incarnation_command(Keys(name), worker) for name, ids in ids_by_run.items() for worker in ids],
            strict=False,
        )
    )
    incarnations_by_run = {name: list(islice(incarnations, len(ids))) for name, ids in ids_by_run.items()}
    now = server_seconds(clock)
    return [
        _parse_summary(name, now, by_run[name], ids_by_run.get(name, []), incarnations_by_run.get(name, []))
        for name in names
    ]


def read_worker_ids(connection: Connection, keys: Keys) -> list[int]:
    """Return every worker id that the run ever had, sorted."""
    return parse_worker_ids(connection.execute("SMEMBERS", keys.workers))


def _parse_summary(
    name: str, now: float, replies: list[Any], ids: list[int], incarnation_replies: list[Any]
) -> RunSummary:
    """Summarize a run; an unreadable run must not hide the others."""
    for reply in replies:
        if isinstance(reply, AccessDenied):
            raise reply
    try:
        with parsing(Keys(name).meta):
            meta, version, _ = raise_first_error(replies)
            incarnations = parse_incarnations(ids, incarnation_replies).values()
            silences = [one.silent_seconds(now) for one in incarnations if one.member]
            return _summarize(name, now, text_fields(meta), stored_integer(version, 0), silences)
    except PeerError as error:
        logger.info("the run %r cannot be read: %s", name, str(error))
        return RunSummary(name, "unreadable", 0, 0, 0, 0, None, None)


def _summarize(
    name: str, now: float, meta: dict[str, str], version: int, silences: list[float]
) -> RunSummary:
    lease_seconds = RunSettings.from_fields(meta).lease_seconds
    learner, other_silences = parse_learner(meta, now), other_learners_silent_seconds(meta, now)
    known = [*silences, *other_silences]
    if learner.last_seen_seconds is not None:
        known.append(learner.last_seen_seconds)
    return RunSummary(
        run=name,
        learner=learner.state,
        version=version,
        alive=sum(silence < lease_seconds for silence in silences),
        members=len(silences),
        others=learner.others,
        last_seen_seconds=min(known, default=None),
        wire_format=stored_integer(meta["wire_format"]) if "wire_format" in meta else None,
    )


def _list_names(names: list[str]) -> str:
    if not names:
        return "there are no runs on it"
    return f"its runs are: {', '.join(names)}; choose one with --run"
