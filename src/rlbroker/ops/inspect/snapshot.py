"""One look at a run: its learner, its weights, and each worker with its batches and what it missed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Literal

from rlbroker.backend.connection import Argument, Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import (
    default_if_wrong_type,
    entry_place,
    info_fields,
    parsing,
    raise_first_error,
    server_seconds,
    text_fields,
    whole_number,
)
from rlbroker.config import RunSettings
from rlbroker.control.outcomes import WorkerOutcomes, missed_updates
from rlbroker.errors import AccessDenied, ConnectionFailed, PeerError
from rlbroker.experience.counts import known_counts, right_types, types_of
from rlbroker.membership.incarnations import incarnation_command, incarnations_from, worker_numbers
from rlbroker.membership.worker_info import member_infos
from rlbroker.ops.inspect.runs import learner_silence, learner_state, silences_of_others
from rlbroker.types import Liveness, MissedUpdates, QueueCounts, WorkerInfo
from rlbroker.weights.manifest import Manifest

#: What asks a server for itself.
_OF_SERVER = (("INFO", "server"), ("INFO", "memory"))

#: What of the pointer concerns people; the rest says how to fetch it.
_WEIGHTS = ("version", "kind", "base", "codec", "raw_bytes", "stored_bytes", "published")


@dataclass(frozen=True)
class LearnerStatus:
    """The latest learner of a run.

    Attributes:
        epoch: number of this life of the learner; it only grows.
        state: `alive`; `ended` after it was cleaned up; or `away` when it has been silent for longer than a lease.
        last_seen_seconds: age of its last sign of life, by the server's clock; None if it never gave one.
        others: further learners that were heard of within their lease; they only collect.
    """

    epoch: int
    state: Liveness | Literal["ended", "none"]
    host: str
    pid: int
    last_seen_seconds: float | None
    others: int = 0


@dataclass(frozen=True)
class ServerStatus:
    """The server that holds the run, or the fullest node of a Cluster; what it does not tell is empty or None.

    Attributes:
        address: without user and password.
        version: its name and version.
        maxmemory_policy: what it deletes when memory is short, it or any of the other masters.
        used_bytes: memory that it uses.
        maxmemory_bytes: memory that it may use; 0 for as much as there is.
        node: which one it is; empty where there is only one.
        evicting_node: which master of a Cluster has that policy, if it may delete keys; empty where there is only one.
    """

    address: str
    version: str
    maxmemory_policy: str
    used_bytes: int | None
    maxmemory_bytes: int | None
    node: str = ""
    evicting_node: str = ""


@dataclass(frozen=True)
class WorkerStatus:
    """One worker.

    Attributes:
        info: its line of the roster; None once it left.
        counts: what became of its batches; None before its first.
        missed: what it missed, in sums; without the records.
        commands_waiting: commands that it has not answered.
        command_seconds: how long the oldest of them has been waiting; 0 without one.
        dead_letters: its batches that no learner could use and that are kept.
        spoiled: keys that it should write, and that are of another type now.
    """

    info: WorkerInfo | None
    counts: QueueCounts | None
    missed: MissedUpdates
    commands_waiting: int
    command_seconds: float
    dead_letters: int
    spoiled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at one moment.

    Attributes:
        run: its name.
        at: when that was, by the server's clock, seconds since the epoch.
        server: where it is.
        settings: what the learner chose for the run; the defaults before there is one.
        expected_workers: how many the learner expects; 0 before there is one.
        learner: the latest learner; None if no learner has opened the run.
        pointer: the latest version; None before the first.
        workers: by worker id, whoever ever took part.
    """

    run: str
    at: float
    server: ServerStatus
    settings: RunSettings
    expected_workers: int
    learner: LearnerStatus | None
    pointer: Manifest | None
    workers: dict[int, WorkerStatus]

    @property
    def members(self) -> list[WorkerInfo]:
        """Those that belong to the run, by id."""
        return [status.info for status in self.workers.values() if status.info]

    def to_json(self) -> dict[str, Any]:
        """Give the snapshot as what JSON can hold.

        Returns:
            `run`: text. `at`: seconds since the epoch.
            `server`: the fields of `ServerStatus`. `settings`: those of `RunSettings`. `expected_workers`: a number.
            `learner`: null, or the fields of `LearnerStatus`.
            `weights`: null, or `version`, `kind`, `base`, `codec`, `raw_bytes`, `stored_bytes`, `published`.
            `workers`: by id, each with
            `member`: null once it left, or the fields of `WorkerInfo`;
            `batches`: null before its first, or the fields of `QueueCounts`, and `produced`;
            `missed`: the fields of `MissedUpdates` but for its `records`;
            `commands_waiting`, `command_seconds`, `dead_letters`, `spoiled`: as in `WorkerStatus`.
        """
        return {
            "run": self.run,
            "at": self.at,
            "server": asdict(self.server),
            "settings": asdict(self.settings),
            "expected_workers": self.expected_workers,
            "learner": asdict(self.learner) if self.learner else None,
            "weights": {name: getattr(self.pointer, name) for name in _WEIGHTS} if self.pointer else None,
            "workers": {str(worker): _worker_json(status) for worker, status in self.workers.items()},
        }


def take_snapshot(connection: Connection, run: str) -> Snapshot:
    """Look at a run, once.

    Raises:
        WireError: what is stored is not what learners and workers write.
        PeerError: the server refused, or could not be reached in time.
    """
    return Observer(connection, run).look()


class Observer:
    """Looks at one run again and again, in three round trips each time.

    Which keys there are is asked before what is in them, as asking for a queue that is not there is an error, which
    the server would count.
    """

    def __init__(self, connection: Connection, run: str) -> None:
        """Prepare; nothing is read yet."""
        self._connection, self._keys = connection, Keys(run)

    def look(self) -> Snapshot:
        """Look at the run.

        Raises:
            WireError: what is stored is not what learners and workers write.
            PeerError: the server refused, or could not be reached in time.
        """
        return self._connection.retry(self._look)

    def _look(self) -> Snapshot:
        keys = self._keys
        told, (clock, meta_reply, pointer_reply, pending, names_reply) = self._ask(
            _OF_SERVER,
            [
                ("TIME",),
                ("HGETALL", keys.meta),
                ("HGETALL", keys.weights),
                ("HGETALL", keys.pending),
                ("SMEMBERS", keys.workers),
            ],
        )
        now, pointer = server_seconds(clock), Manifest.from_fields(text_fields(pointer_reply))
        with parsing(keys.meta):
            meta = text_fields(meta_reply)
            settings = RunSettings.from_fields(meta)
            learner = _learner(meta, now, settings.lease_seconds) if meta else None
            expected_workers = int(meta.get("num_workers", 0))
        keys.spread(meta.get("shards", ""))
        ids = worker_numbers(names_reply)
        types = {
            name: what
            for worker in ids
            for name, what in (keys.written_by_worker(worker) | types_of(keys, worker)).items()
        }
        replies = iter(
            self._connection.ask_once(
                [
                    *(incarnation_command(keys, worker) for worker in ids),
                    *(("HGETALL", keys.heartbeat(worker)) for worker in ids),
                    *(("HGETALL", keys.ledger(worker)) for worker in ids),
                    *(("XLEN", keys.dead(worker)) for worker in ids),
                    *(("TYPE", name) for name in types),
                ]
            )
        )
        lives = incarnations_from(ids, islice(replies, len(ids)))
        beats = {
            worker: text_fields(default_if_wrong_type(reply, {}))
            for worker, reply in zip(ids, islice(replies, len(ids)), strict=True)
        }
        ledgers, dead, found = (
            raise_first_error(islice(replies, many)) for many in (len(ids), len(ids), None)
        )
        members = {worker: life for worker, life in lives.items() if life.member}
        infos = {
            info.worker_id: info
            for info in member_infos(
                now=now,
                latest_version=pointer.version if pointer else 0,
                members=members,
                beats=[beats[worker] for worker in members],
                lease_seconds=settings.lease_seconds,
            )
        }
        with parsing(f"{keys.prefix}:ledger:…"):
            missed = [
                missed_updates(
                    worker,
                    WorkerOutcomes.from_fields(text_fields(reply)),
                    latest_version=pointer.version if pointer else 0,
                    published={pointer.version: pointer.published} if pointer else {},
                )
                for worker, reply in zip(ids, ledgers, strict=True)
            ]
        said = {worker: (info.incarnation, info.sent) for worker, info in infos.items()}
        there = right_types(types, found)
        counts = known_counts(self._connection, keys, ids, there, said=said)
        with parsing(keys.pending):
            waiting = _waiting_commands(text_fields(pending), now)
        return Snapshot(
            run=keys.run,
            at=now,
            server=_server(self._connection, told),
            settings=settings,
            expected_workers=expected_workers,
            learner=learner,
            pointer=pointer,
            workers={
                worker: WorkerStatus(
                    info=infos.get(worker),
                    counts=counts.get(worker),
                    missed=missed_by_worker,
                    commands_waiting=len(waiting.get(worker, ())),
                    command_seconds=max(waiting.get(worker, ()), default=0.0),
                    dead_letters=letters,
                    spoiled=tuple(key for key in keys.written_by_worker(worker) if not there.get(key, True)),
                )
                for worker, missed_by_worker, letters in zip(ids, missed, dead, strict=True)
            },
        )

    def _ask(
        self, optional: Sequence[Sequence[Argument]], commands: Sequence[Sequence[Argument]]
    ) -> tuple[list[Any], list[Any]]:
        """Give the answers to what this user, or this server, need not answer; and those to the others."""
        replies = self._connection.ask_once([*optional, *commands])
        told, left = replies[: len(optional)], replies[len(optional) :]
        return [None if _untold(reply) else reply for reply in told], raise_first_error(left)


def _untold(reply: Any) -> bool:
    """Whether a user, or a server, has no answer; any other refusal is raised."""
    if not isinstance(reply, PeerError):
        return False
    if isinstance(reply, AccessDenied) or "unknown command" in str(reply).lower():  # fakeredis has no INFO
        return True
    raise reply


def _waiting_commands(pending: dict[str, str], now: float) -> dict[int, list[float]]:
    """Give, by worker, how long each command without an answer has been waiting, in seconds."""
    found: dict[int, list[float]] = {}
    for name, value in pending.items():
        sent_seconds = entry_place(value.split()[1])[0] / 1000
        found.setdefault(int(name.rpartition(":")[2]), []).append(max(0.0, now - sent_seconds))
    return found


def _server(connection: Connection, replies: Sequence[bytes | None]) -> ServerStatus:
    if not connection.servers.several:
        return _status(connection, "", replies)
    nodes = []
    for node in connection.masters():
        with suppress(ConnectionFailed):  # what is on it could not be read either
            told = [None if _untold(reply) else reply for reply in connection.ask_at(node, _OF_SERVER)]
            nodes.append(_status(connection, node.name, told))
    fullest = max(nodes, key=_fullness, default=_status(connection, "", ()))
    evicting = [one for one in nodes if one.maxmemory_policy not in ("noeviction", "")]
    if not evicting:
        return fullest
    worst = min(evicting, key=lambda one: one.maxmemory_policy)
    return replace(fullest, maxmemory_policy=worst.maxmemory_policy, evicting_node=worst.node)


def _fullness(status: ServerStatus) -> tuple[float, int]:
    used = status.used_bytes or 0
    return used / status.maxmemory_bytes if status.maxmemory_bytes else 0.0, used


def _status(connection: Connection, node: str, replies: Sequence[bytes | None]) -> ServerStatus:
    info: dict[str, str] = {}
    for reply in replies:
        info |= info_fields(reply) if reply else {}
    return ServerStatus(
        address=connection.address,
        version=connection.server_version(info),
        maxmemory_policy=info.get("maxmemory_policy", ""),
        used_bytes=whole_number(info.get("used_memory", "")),
        maxmemory_bytes=whole_number(info.get("maxmemory", "")),
        node=node,
    )


def _learner(meta: dict[str, str], now: float, lease_seconds: float) -> LearnerStatus:
    silent_seconds = learner_silence(meta, now)
    return LearnerStatus(
        epoch=int(meta.get("epoch", 0)),
        state=learner_state(meta, silent_seconds),
        host=meta.get("learner_host", ""),
        pid=int(meta.get("learner_pid", 0)),
        last_seen_seconds=silent_seconds,
        others=sum(silence < lease_seconds for silence in silences_of_others(meta, now)),
    )


def _worker_json(status: WorkerStatus) -> dict[str, Any]:
    counts = status.counts
    return {
        "member": asdict(status.info) if status.info else None,
        "batches": asdict(counts) | {"produced": counts.produced} if counts else None,
        "missed": {name: value for name, value in asdict(status.missed).items() if name != "records"},
        "commands_waiting": status.commands_waiting,
        "command_seconds": status.command_seconds,
        "dead_letters": status.dead_letters,
        "spoiled": status.spoiled,
    }
