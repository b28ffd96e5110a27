"""One look at a run from outside: everything comes from Redis, and nothing is changed by looking."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rlbroker.config import RunSettings
from rlbroker.connection import Connection
from rlbroker.control.ledger import Ledger
from rlbroker.errors import InvalidArgument
from rlbroker.experience.counts import read_counts
from rlbroker.keys import Keys
from rlbroker.membership.roster import Roster
from rlbroker.records import Liveness, MissedUpdates, QueueCounts, WorkerInfo
from rlbroker.replies import server_seconds, text_fields
from rlbroker.weights.pointer import Pointer

#: What of the pointer concerns people; the rest says how to fetch it.
_WEIGHTS = ("version", "kind", "base", "codec", "raw_bytes", "stored_bytes", "published")


@dataclass(frozen=True)
class LearnerStatus:
    """The latest learner of a run.

    Attributes:
        epoch: number of this life of the learner; it only grows.
        state: `alive`; `ended` after it was cleaned up; or `away` when it has been silent for longer than a lease.
        last_seen_seconds: age of its last sign of life, by the server's clock; None if it never gave one.
    """

    epoch: int
    state: Liveness | Literal["ended"]
    host: str
    pid: int
    last_seen_seconds: float | None


@dataclass(frozen=True)
class WorkerStatus:
    """One worker: its line of the roster (None once it left), its batches, and what it missed."""

    info: WorkerInfo | None
    counts: QueueCounts | None
    missed: MissedUpdates
    commands_waiting: int


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at one moment.

    Attributes:
        run: its name.
        server: address of the server, without password.
        server_version: as the server reports it; empty if it does not.
        learner: the latest learner; None if no learner has opened the run.
        pointer: the latest version; None before the first.
        workers: by worker id, whoever ever took part.
    """

    run: str
    server: str
    server_version: str
    learner: LearnerStatus | None
    pointer: Pointer | None
    workers: dict[int, WorkerStatus]

    def to_json(self) -> dict[str, Any]:
        """Give the snapshot as what JSON can hold.

        Returns:
            `run`, `server`, `server_version`: text.
            `learner`: null, or the fields of `LearnerStatus`.
            `weights`: null, or `version`, `kind`, `base`, `codec`, `raw_bytes`, `stored_bytes`, `published`.
            `workers`: by id, each with
            `member`: null once it left, or the fields of `WorkerInfo`;
            `batches`: null before its first, or the fields of `QueueCounts`, and `produced`;
            `missed`: the fields of `MissedUpdates`, its `records` with those of `Missed`;
            `commands_waiting`: commands that it has not answered.
        """
        return {
            "run": self.run,
            "server": self.server,
            "server_version": self.server_version,
            "learner": asdict(self.learner) if self.learner else None,
            "weights": {name: getattr(self.pointer, name) for name in _WEIGHTS} if self.pointer else None,
            "workers": {str(worker): _worker_json(status) for worker, status in self.workers.items()},
        }


def run_names(connection: Connection) -> list[str]:
    """Give the names of the runs on a server, in order; those that wait for their learner too.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    prefix, _, meta = Keys("RUN").meta.partition("RUN")
    suffixes = (meta, Keys("RUN").incarnations.partition("RUN")[2])
    found, cursor = set[str](), b"0"
    while True:
        cursor, keys = connection.execute("SCAN", cursor, "MATCH", f"{prefix}*", "COUNT", 1000)
        for name in (key.decode(errors="replace") for key in keys):
            found.update(name[len(prefix) : -len(suffix)] for suffix in suffixes if name.endswith(suffix))
        if int(cursor) == 0:
            return sorted(found)


def choose_run(connection: Connection, run: str | None) -> str:
    """Give the name of a run that exists: the one that was asked for, or the only one.

    Raises:
        InvalidArgument: there is none, or more than one to choose from; those that exist are named.
        PeerError: the server refused, or could not be reached in time.
    """
    if run is not None and connection.execute("EXISTS", Keys(run).meta, Keys(run).incarnations):
        return run
    names = run_names(connection)
    if run is None and len(names) == 1:
        return names[0]
    there = f"runs there are: {', '.join(names)}" if names else "there are no runs on it"
    asked = "there is no single run" if run is None else f"there is no run {run!r}"
    choose = "; choose one with --run" if names else ""
    raise InvalidArgument(f"{asked} on {connection.address}; {there}{choose}")


def take_snapshot(connection: Connection, run: str) -> Snapshot:
    """Look at a run.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    keys = Keys(run)
    clock, meta_reply, pointer_reply, pending = connection.execute_all(
        [("TIME",), ("HGETALL", keys.meta), ("HGETALL", keys.weights), ("HGETALL", keys.pending)]
    )
    meta, now = text_fields(meta_reply), server_seconds(clock)
    pointer, settings = Pointer.from_fields(text_fields(pointer_reply)), RunSettings.from_fields(meta)
    roster = Roster(connection, keys, settings)
    ids = roster.ids()
    members = {info.worker_id: info for info in roster.workers()}
    counts = read_counts(connection, keys, ids)
    missed = Ledger(connection, keys).missed_updates(
        ids,
        latest_version=pointer.version if pointer else 0,
        published={pointer.version: pointer.published} if pointer else {},
    )
    waiting = [int(name.rpartition(":")[2]) for name in text_fields(pending)]
    return Snapshot(
        run=run,
        server=connection.address,
        server_version=connection.server_version(),
        learner=_learner(meta, now, settings.lease_seconds) if meta else None,
        pointer=pointer,
        workers={
            worker: WorkerStatus(
                members.get(worker), counts.get(worker), missed[worker], waiting.count(worker)
            )
            for worker in ids
        },
    )


def _learner(meta: dict[str, str], now: float, lease_seconds: float) -> LearnerStatus:
    silent_seconds = max(0.0, now - float(meta["learner_seen"])) if "learner_seen" in meta else None
    alive = silent_seconds is not None and silent_seconds < lease_seconds
    return LearnerStatus(
        epoch=int(meta.get("epoch", 0)),
        state="ended" if meta.get("learner_state") == "ended" else "alive" if alive else "away",
        host=meta.get("learner_host", ""),
        pid=int(meta.get("learner_pid", 0)),
        last_seen_seconds=silent_seconds,
    )


def _worker_json(status: WorkerStatus) -> dict[str, Any]:
    counts = status.counts
    return {
        "member": asdict(status.info) if status.info else None,
        "batches": asdict(counts) | {"produced": counts.produced} if counts else None,
        "missed": asdict(status.missed),
        "commands_waiting": status.commands_waiting,
    }
