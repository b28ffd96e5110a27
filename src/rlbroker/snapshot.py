"""One look at a run from outside: everything comes from Redis, and nothing is changed by looking."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rlbroker.config import RunSettings
from rlbroker.connection import Connection
from rlbroker.control.ledger import Ledger
from rlbroker.errors import InvalidArgument
from rlbroker.experience.counts import read_counts
from rlbroker.keys import Keys
from rlbroker.membership.roster import Roster
from rlbroker.records import MissedUpdates, QueueCounts, WorkerInfo
from rlbroker.replies import text_fields
from rlbroker.weights.pointer import Pointer


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
        server: address of the server.
        server_version: as the server reports it; empty if it does not.
        epoch: how many learners the run has had.
        learner: host and process id of the latest one.
        learner_seen_seconds: age of its last sign of life; None if it never gave one.
        pointer: the latest version; None before the first.
        workers: by worker id, whoever ever took part.
    """

    run: str
    server: str
    server_version: str
    epoch: int
    learner: str
    learner_seen_seconds: float | None
    pointer: Pointer | None
    workers: dict[int, WorkerStatus]

    def to_json(self) -> dict[str, Any]:
        """Give the snapshot as what JSON can hold."""
        return {
            "run": self.run,
            "server": self.server,
            "server_version": self.server_version,
            "learner": {
                "epoch": self.epoch,
                "process": self.learner,
                "last_seen_seconds": self.learner_seen_seconds,
            },
            "weights": asdict(self.pointer) if self.pointer else None,
            "workers": {str(worker): _worker_json(status) for worker, status in self.workers.items()},
        }


def run_names(connection: Connection) -> list[str]:
    """Give the names of the runs on a server, in order.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    found, cursor = set[str](), b"0"
    prefix, suffix = Keys("RUN").meta.split("RUN")
    while True:
        cursor, keys = connection.execute("SCAN", cursor, "MATCH", f"{prefix}*{suffix}", "COUNT", 1000)
        found.update(key.decode()[len(prefix) : -len(suffix)] for key in keys)
        if int(cursor) == 0:
            return sorted(found)


def choose_run(connection: Connection, run: str | None) -> str:
    """Give the name of a run that exists: the one that was asked for, or the only one.

    Raises:
        InvalidArgument: there is none, or more than one to choose from; those that exist are named.
    """
    names = run_names(connection)
    if run in names:
        return run
    if run is None and len(names) == 1:
        return names[0]
    there = f"runs there are: {', '.join(names)}" if names else "there are no runs on it"
    asked = "choose one with --run" if run is None else f"there is no run {run!r}"
    raise InvalidArgument(f"{asked} on {connection.address}; {there}")


def take_snapshot(connection: Connection, run: str) -> Snapshot:
    """Look at a run.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    keys = Keys(run)
    clock, meta_reply, pointer_reply, pending = connection.execute_all(
        [("TIME",), ("HGETALL", keys.meta), ("HGETALL", keys.weights), ("HGETALL", keys.pending)]
    )
    meta, now = text_fields(meta_reply), int(clock[0]) + int(clock[1]) / 1e6
    pointer = Pointer.from_fields(text_fields(pointer_reply))
    roster = Roster(connection, keys, RunSettings.from_fields(meta))
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
        epoch=int(meta.get("epoch", 0)),
        learner=f"{meta.get('learner_host', '?')} pid {meta.get('learner_pid', '?')}",
        learner_seen_seconds=max(0.0, now - float(meta["learner_seen"])) if "learner_seen" in meta else None,
        pointer=pointer,
        workers={
            worker: WorkerStatus(
                members.get(worker), counts.get(worker), missed[worker], waiting.count(worker)
            )
            for worker in ids
        },
    )


def _worker_json(status: WorkerStatus) -> dict[str, Any]:
    counts, missed = status.counts, status.missed
    return {
        "member": asdict(status.info) if status.info else None,
        "batches": asdict(counts) | {"produced": counts.produced} if counts else None,
        "missed": {
            "versions": missed.total,
            "by_reason": dict(missed.by_reason),
            "commands": missed.commands,
            "behind": missed.behind,
            "skips_in_a_row": missed.skips_in_a_row,
        },
        "commands_waiting": status.commands_waiting,
    }
