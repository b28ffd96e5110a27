"""The snapshot of a run: server, learner, weights, and each worker with its batches and missed updates.

The findings, the exporter, the report and most commands are made from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import ONE_TRY
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import (
    default_if_wrong_type,
    entry_place,
    info_fields,
    parsing,
    raise_first_error,
    server_seconds,
    stored_integer,
    text_fields,
    whole_number,
)
from rlbroker.backend.suitability import name_and_version
from rlbroker.config import RunSettings
from rlbroker.control.outcomes import WorkerOutcomes, summarize_missed
from rlbroker.errors import AccessDenied, ConnectionFailed, PeerError
from rlbroker.experience.counts import expected_types, match_types, read_existing_counts
from rlbroker.membership.incarnations import incarnation_command, parse_incarnations, parse_worker_ids
from rlbroker.membership.worker_info import parse_worker_infos
from rlbroker.ops.inspect.control_records import add_unsettled_acknowledgements
from rlbroker.ops.inspect.liveness import LearnerState, LearnerStatus, parse_learner
from rlbroker.types import MissedUpdates, Outcome, QueueCounts, WorkerInfo
from rlbroker.weights.manifest import Manifest

#: Commands that a server may not have, or that the user may have no right to run.
_SERVER_COMMANDS = (("INFO", "server"), ("INFO", "memory"))

#: The fields of the manifest for people; the others are for downloads.
_WEIGHTS_FIELDS = ("version", "kind", "base", "codec", "raw_bytes", "stored_bytes", "published")


@dataclass(frozen=True)
class ServerStatus:
    """The server of the run, or the fullest node of a Cluster; unknown fields are empty or None.

    Attributes:
        address: without user and password.
        version: its name and version.
        maxmemory_policy: in a Cluster, the policy of a master that evicts keys, if there is one.
        used_bytes: memory in use.
        maxmemory_bytes: the memory limit; 0 for no limit.
        node: the name of the node; empty for a single server.
        evicting_node: the master of a Cluster that evicts keys; empty if there is none, and for a single server.
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
        info: its entry in the roster; None once it has left.
        counts: the counts of its batches; None before the first.
        missed: totals of what it missed, without the records.
        commands_waiting: commands that it has not answered.
        command_seconds: age of the oldest of them; 0 without one.
        dead_letters: its batches that are kept because no learner could use them.
        spoiled: keys that it should write, and that have a wrong type.
    """

    info: WorkerInfo | None
    counts: QueueCounts | None
    missed: MissedUpdates
    commands_waiting: int
    command_seconds: float
    dead_letters: int
    spoiled: tuple[str, ...] = ()

    @property
    def waiting(self) -> int:
        """The batches in its queue that no learner has read."""
        return self.counts.waiting if self.counts else 0

    @property
    def in_hand(self) -> int:
        """The batches that a learner has read and not acknowledged."""
        return self.counts.in_hand if self.counts else 0

    @property
    def delivered(self) -> int:
        """The batches that learners acknowledged."""
        return self.counts.delivered if self.counts else 0

    @property
    def lost(self) -> int:
        """The batches that were produced and will not be delivered, for any reason."""
        return sum(self.counts.lost.values()) if self.counts else 0

    @property
    def missed_total(self) -> int:
        """The versions and commands that it missed."""
        return self.missed.total + self.missed.commands


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at one moment.

    Attributes:
        at: seconds since 1970 by the server's clock.
        settings: the learner's settings for the run; the defaults before the first learner.
        expected_workers: the number of workers that the learner expects; 0 before the first learner.
        learner: the latest learner; None before the first.
        manifest: the manifest of the latest version; None before the first.
        workers: every worker that ever took part, by id.
    """

    run: str
    at: float
    server: ServerStatus
    settings: RunSettings
    expected_workers: int
    learner: LearnerStatus | None
    manifest: Manifest | None
    workers: dict[int, WorkerStatus]

    @property
    def version(self) -> int:
        """The latest version; 0 before the first."""
        return self.manifest.version if self.manifest else 0

    @property
    def learner_state(self) -> LearnerState:
        """The state of the latest learner; `none` before the first."""
        return self.learner.state if self.learner else "none"

    @property
    def members(self) -> list[WorkerInfo]:
        """The workers that belong to the run, by id."""
        return [status.info for status in self.workers.values() if status.info]

    @property
    def alive(self) -> int:
        """The number of workers with a heartbeat within their lease."""
        return sum(info.state == "alive" for info in self.members)

    def to_json(self) -> dict[str, Any]:
        """Return the snapshot as values for JSON.

        Returns:
            `run`: text. `at`: seconds since 1970.
            `server`: the fields of `ServerStatus`. `settings`: those of `RunSettings`. `expected_workers`: a number.
            `learner`: null, or the fields of `LearnerStatus`.
            `weights`: null, or `version`, `kind`, `base`, `codec`, `raw_bytes`, `stored_bytes`, `published`.
            `workers`: by id, each with
            `member`: null once it left, or the fields of `WorkerInfo`;
            `batches`: null before its first, or the fields of `QueueCounts`, and `produced`;
            `missed`: the fields of `MissedUpdates` without `records`;
            `commands_waiting`, `command_seconds`, `dead_letters`, `spoiled`: as in `WorkerStatus`.
        """
        weights = None
        if self.manifest:
            weights = {name: getattr(self.manifest, name) for name in _WEIGHTS_FIELDS}
        return {
            "run": self.run,
            "at": self.at,
            "server": asdict(self.server),
            "settings": asdict(self.settings),
            "expected_workers": self.expected_workers,
            "learner": asdict(self.learner) if self.learner else None,
            "weights": weights,
            "workers": {str(worker): _worker_to_json(status) for worker, status in self.workers.items()},
        }


def take_snapshot(connection: Connection, run: str) -> Snapshot:
    """Read the state of a run.

    Raises:
        WireError: the run's keys hold what no learner or worker writes.
    """
    return SnapshotReader(connection, run).read()


class SnapshotReader:
    """Reads snapshots of one run, each in three round trips, and in one more while answers to commands are missing.

    The types of the keys are read before their contents: reading a missing queue would be an error, and the server
    counts errors.
    """

    def __init__(self, connection: Connection, run: str) -> None:
        """Prepare; nothing is read yet."""
        self._connection, self._keys = connection, Keys(run)

    def read(self) -> Snapshot:
        """Read a snapshot.

        Raises:
            WireError: the run's keys hold what no learner or worker writes.
        """
        return self._connection.retry(self._read)

    def _read(self) -> Snapshot:
        keys = self._keys
        replies = self._connection.execute_all(
            [
                *_SERVER_COMMANDS,
                ("TIME",),
                ("HGETALL", keys.meta),
                ("HGETALL", keys.weights),
                ("HGETALL", keys.pending),
                ("SMEMBERS", keys.workers),
            ],
            strict=False,
            deadline=ONE_TRY,
        )
        server_replies = _without_refusals(replies[: len(_SERVER_COMMANDS)])
        clock, meta_reply, manifest_reply, pending_reply, names_reply = raise_first_error(
            replies[len(_SERVER_COMMANDS) :]
        )
        now, manifest = server_seconds(clock), Manifest.from_fields(text_fields(manifest_reply))
        with parsing(keys.meta):
            meta = text_fields(meta_reply)
            settings = RunSettings.from_fields(meta)
            learner = parse_learner(meta, now) if meta else None
            expected_workers = stored_integer(meta.get("num_workers"), 0)
            back_at = stored_integer(meta.get("back_at"), 0)
        keys.use_shards(meta.get("shards", ""))
        workers = self._read_workers(
            parse_worker_ids(names_reply), now, manifest, settings.lease_seconds, back_at, pending_reply
        )
        return Snapshot(
            run=keys.run,
            at=now,
            server=_read_server(self._connection, server_replies),
            settings=settings,
            expected_workers=expected_workers,
            learner=learner,
            manifest=manifest,
            workers=workers,
        )

    def _read_workers(
        self,
        ids: Sequence[int],
        now: float,
        manifest: Manifest | None,
        lease_seconds: float,
        back_at: int,
        pending_reply: Any,
    ) -> dict[int, WorkerStatus]:
        keys, latest_version = self._keys, manifest.version if manifest else 0
        types = {
            key: kind
            for worker in ids
            for key, kind in (keys.written_by_worker(worker) | expected_types(keys, worker)).items()
        }
        replies = iter(
            self._connection.execute_all(
                [
                    *(incarnation_command(keys, worker) for worker in ids),
                    *(("HGETALL", keys.heartbeat(worker)) for worker in ids),
                    *(("HGETALL", keys.ledger(worker)) for worker in ids),
                    *(("XLEN", keys.dead(worker)) for worker in ids),
                    *(("TYPE", key) for key in types),
                ],
                strict=False,
                deadline=ONE_TRY,
            )
        )
        incarnations = parse_incarnations(ids, islice(replies, len(ids)))
        heartbeats = {
            worker: text_fields(default_if_wrong_type(reply, {}))
            for worker, reply in zip(ids, islice(replies, len(ids)), strict=True)
        }
        ledgers = raise_first_error(islice(replies, len(ids)))
        dead_letters = raise_first_error(islice(replies, len(ids)))
        found_types = raise_first_error(replies)
        members = {worker: incarnation for worker, incarnation in incarnations.items() if incarnation.member}
        infos = {
            info.worker_id: info
            for info in parse_worker_infos(
                now=now,
                latest_version=latest_version,
                members=members,
                heartbeats=[heartbeats[worker] for worker in members],
                lease_seconds=lease_seconds,
                back_milliseconds=back_at,
            )
        }
        missed = _parse_missed(keys, ids, ledgers, manifest)
        sent = {worker: (info.incarnation, info.sent) for worker, info in infos.items()}
        is_right_type = match_types(types, found_types)
        counts = read_existing_counts(self._connection, keys, ids, is_right_type, reported=sent)
        with parsing(keys.pending):
            pending = text_fields(pending_reply)
            waiting = _parse_waiting_commands(pending, self._read_unanswered(pending), now)
        return {
            worker: WorkerStatus(
                info=infos.get(worker),
                counts=counts.get(worker),
                missed=worker_missed,
                commands_waiting=len(waiting.get(worker, ())),
                command_seconds=max(waiting.get(worker, ()), default=0.0),
                dead_letters=letters,
                spoiled=tuple(
                    key for key in keys.written_by_worker(worker) if not is_right_type.get(key, True)
                ),
            )
            for worker, worker_missed, letters in zip(ids, missed, dead_letters, strict=True)
        }

    def _read_unanswered(self, pending: dict[str, str]) -> set[tuple[str, int]]:
        """Return the command and worker of each pending answer that the worker has not written either.

        Without a learner the answers stay where the workers wrote them.
        """
        outcomes: dict[str, dict[int, Outcome]] = {}
        for name in pending:
            command_id, worker = _parse_pending(name)
            outcomes.setdefault(command_id, {})[worker] = Outcome("waiting")
        if outcomes:
            add_unsettled_acknowledgements(self._connection, self._keys, outcomes)
        return {
            (command_id, worker)
            for command_id, by_worker in outcomes.items()
            for worker, outcome in by_worker.items()
            if outcome.state == "waiting"
        }


def _without_refusals(replies: Sequence[Any]) -> list[Any]:
    """Return the replies, with None for refused commands; raise other errors."""
    return [None if _is_refusal(reply) else reply for reply in replies]


def _is_refusal(reply: Any) -> bool:
    if not isinstance(reply, PeerError):
        return False
    if isinstance(reply, AccessDenied) or "unknown command" in str(reply).lower():  # fakeredis has no INFO
        return True
    raise reply


def _parse_missed(
    keys: Keys, ids: Sequence[int], ledgers: Sequence[Any], manifest: Manifest | None
) -> list[MissedUpdates]:
    with parsing(f"{keys.prefix}:ledger:…"):
        return [
            summarize_missed(
                worker,
                WorkerOutcomes.from_fields(text_fields(reply)),
                latest_version=manifest.version if manifest else 0,
                published={manifest.version: manifest.published} if manifest else {},
            )
            for worker, reply in zip(ids, ledgers, strict=True)
        ]


def _parse_pending(name: str) -> tuple[str, int]:
    """Return the command and the worker that a field of `pending` is about."""
    command_id, _, worker = name.rpartition(":")
    return command_id, stored_integer(worker)


def _parse_waiting_commands(
    pending: dict[str, str], unanswered: set[tuple[str, int]], now: float
) -> dict[int, list[float]]:
    """Return, by worker, the age of each command without an answer, in seconds."""
    ages: dict[int, list[float]] = {}
    for name, value in pending.items():
        command_id, worker = _parse_pending(name)
        sent_seconds = entry_place(value.split()[1])[0] / 1000
        if (command_id, worker) in unanswered:
            ages.setdefault(worker, []).append(max(0.0, now - sent_seconds))
    return ages


def _read_server(connection: Connection, replies: Sequence[bytes | None]) -> ServerStatus:
    if not connection.servers.several:
        return _parse_server(connection, "", replies)
    nodes = []
    for master in connection.masters():
        with suppress(ConnectionFailed):  # a node that does not answer is left out
            node_replies = _without_refusals(connection.execute_at(master, _SERVER_COMMANDS))
            nodes.append(_parse_server(connection, master.name, node_replies))
    fullest = max(nodes, key=_fullness, default=_parse_server(connection, "", ()))
    evicting = [node for node in nodes if node.maxmemory_policy not in ("noeviction", "")]
    if not evicting:
        return fullest
    worst = min(evicting, key=lambda node: node.maxmemory_policy)
    return replace(fullest, maxmemory_policy=worst.maxmemory_policy, evicting_node=worst.node)


def _fullness(status: ServerStatus) -> tuple[float, int]:
    used = status.used_bytes or 0
    return used / status.maxmemory_bytes if status.maxmemory_bytes else 0.0, used


def _parse_server(connection: Connection, node: str, replies: Sequence[bytes | None]) -> ServerStatus:
    info: dict[str, str] = {}
    for reply in replies:
        info |= info_fields(reply) if reply else {}
    return ServerStatus(
        address=connection.address,
        version=name_and_version(info),
        maxmemory_policy=info.get("maxmemory_policy", ""),
        used_bytes=whole_number(info.get("used_memory", "")),
        maxmemory_bytes=whole_number(info.get("maxmemory", "")),
        node=node,
    )


def _worker_to_json(status: WorkerStatus) -> dict[str, Any]:
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
