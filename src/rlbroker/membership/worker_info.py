"""Parse the heartbeats of a run's members. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlbroker.backend.replies import seconds_number, whole_number
from rlbroker.membership.incarnations import Incarnation
from rlbroker.types import WorkerInfo

#: Length to which the name of a fenced process is cut.
PROCESS_LENGTH = 300


def parse_worker_infos(
    *,
    now: float,
    latest_version: int,
    members: Mapping[int, Incarnation],
    back_milliseconds: int,
    heartbeats: Sequence[Mapping[str, str]],
    lease_seconds: float,
) -> list[WorkerInfo]:
    """Return the members of a run, by worker id.

    Args:
        now: the server's clock, seconds since the epoch.
        members: the newest incarnation of each member.
        back_milliseconds: as in `Incarnation.silent_seconds`.
        heartbeats: the fields of each member's last heartbeat, in the order of `members`.
        lease_seconds: a worker that was silent for longer is `away`.
    """
    found = []
    for (worker, incarnation), heartbeat in zip(members.items(), heartbeats, strict=True):
        version = _parse_number(heartbeat, "version")
        is_alive = incarnation.silent_seconds(now, back_milliseconds) < lease_seconds
        fenced_at = _parse_seconds(heartbeat, "fenced_at")
        found.append(
            WorkerInfo(
                worker_id=worker,
                incarnation=incarnation.number,
                state="alive" if is_alive else "away",
                host=heartbeat.get("host", ""),
                pid=_parse_number(heartbeat, "pid"),
                version=version,
                staleness=max(0, latest_version - version),
                last_seen_seconds=incarnation.silent_seconds(now),
                sent=_parse_number(heartbeat, "sent"),
                problem=heartbeat.get("problem", ""),
                unconfirmed=heartbeat.get("unconfirmed", ""),
                room_seconds=_parse_seconds(heartbeat, "room_seconds") or 0.0,
                unpolled_seconds=_parse_seconds(heartbeat, "unpolled_seconds") or 0.0,
                fenced_process=heartbeat.get("fenced_process", "")[:PROCESS_LENGTH],
                fenced_seconds=None if fenced_at is None else max(0.0, now - fenced_at),
            )
        )
    return sorted(found, key=lambda info: info.worker_id)


def _parse_seconds(heartbeat: Mapping[str, str], name: str) -> float | None:
    """Return seconds from a heartbeat; None if they are invalid, or missing as in older releases."""
    return seconds_number(heartbeat.get(name, ""))


def _parse_number(heartbeat: Mapping[str, str], name: str) -> int:
    """Return a number from a heartbeat; 0 if it is invalid or missing."""
    return whole_number(heartbeat.get(name, "")) or 0
