"""What the members of a run said of themselves last, as values. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlbroker.backend.replies import seconds_number, whole_number
from rlbroker.membership.incarnations import Incarnation
from rlbroker.types import WorkerInfo

#: Characters that are kept of how a process names itself.
PROCESS_KEPT = 300


def member_infos(
    *,
    now: float,
    latest_version: int,
    members: Mapping[int, Incarnation],
    beats: Sequence[Mapping[str, str]],
    lease_seconds: float,
) -> list[WorkerInfo]:
    """Give the members of a run, by id.

    Args:
        now: the server's clock, seconds since the epoch.
        latest_version: of the weights.
        members: who takes part, each with its newest life.
        beats: what each of them said in its last heartbeat.
        lease_seconds: a worker that was silent for longer is `away`.
    """
    found = []
    for (worker, life), said in zip(members.items(), beats, strict=True):
        version, silent_seconds = _number(said, "version"), life.silent_seconds(now)
        fenced_at = _seconds(said, "fenced_at")
        found.append(
            WorkerInfo(
                worker_id=worker,
                incarnation=life.incarnation,
                state="alive" if silent_seconds < lease_seconds else "away",
                host=said.get("host", ""),
                pid=_number(said, "pid"),
                version=version,
                staleness=max(0, latest_version - version),
                last_seen_seconds=silent_seconds,
                sent=_number(said, "sent"),
                problem=said.get("problem", ""),
                unconfirmed=said.get("unconfirmed", ""),
                room_seconds=_seconds(said, "room_seconds") or 0.0,
                unpolled_seconds=_seconds(said, "unpolled_seconds") or 0.0,
                fenced_process=said.get("fenced_process", "")[:PROCESS_KEPT],
                fenced_seconds=None if fenced_at is None else max(0.0, now - fenced_at),
            )
        )
    return sorted(found, key=lambda info: info.worker_id)


def _seconds(said: Mapping[str, str], name: str) -> float | None:
    """Give seconds that a worker wrote of itself; None for anything else, as older releases do not write all."""
    return seconds_number(said.get(name, ""))


def _number(said: Mapping[str, str], name: str) -> int:
    """Give a number that a worker wrote of itself; 0 for anything else."""
    return whole_number(said.get(name, "")) or 0
