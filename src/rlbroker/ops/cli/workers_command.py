"""`rlbroker workers`: lists the workers of a run, or shows one in detail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rlbroker.backend.text import age, counted
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import with_session
from rlbroker.ops.cli.status_command import cell_style
from rlbroker.ops.formatting import sanitize

if TYPE_CHECKING:
    from rlbroker.ops.inspect.findings import Finding
    from rlbroker.ops.inspect.snapshot import Snapshot, WorkerStatus
    from rlbroker.types import Missed

#: How many missed updates of one worker are listed, the newest ones.
MISSED_SHOWN = 5


@with_session
def workers(
    session: Session,
    worker: Annotated[int | None, typer.Argument(metavar="[ID]", help="Show this worker in detail.")] = None,
) -> None:
    """List the workers: state, version, process, and the time since their last heartbeat; or show one in detail.

    Exit code: 0; 1 if there is no such worker; 2 if the server or the run cannot be read.

    Example: rlbroker workers 3 --run pong
    """
    from dataclasses import asdict

    from rlbroker.ops.inspect.control_records import read_missed
    from rlbroker.ops.inspect.findings import list_findings
    from rlbroker.ops.inspect.snapshot import take_snapshot

    with session.time_limit():
        snapshot = take_snapshot(session.connection, session.run)
        missed = [] if worker is None else read_missed(session.connection, session.keys, worker=worker)[1]
    if worker is not None and worker not in snapshot.workers:
        existing = ", ".join(map(str, snapshot.workers)) or "none"
        session.fail(f"there is no worker {worker} in the run {session.run!r}; its workers are: {existing}")
    findings = [finding for finding in list_findings(snapshot) if finding.worker is not None]
    if worker is None:
        _print_all(session, snapshot, findings)
        return
    findings = [finding for finding in findings if finding.worker == worker]
    if session.as_json:
        data = snapshot.to_json()["workers"][str(worker)]
        data["missed"]["records"] = [asdict(record) for record in missed]
        session.print_json(data | {"findings": [finding.to_json() for finding in findings]})
    else:
        _print_one(session, snapshot, worker)
        for record in missed[-MISSED_SHOWN:]:
            ago = age(max(0.0, snapshot.at - record.at))
            session.console.print(f"  missed {ago} ago   {_describe_missed(record)}")
        session.print_findings(findings, with_advice=True)


def _print_all(session: Session, snapshot: Snapshot, findings: list[Finding]) -> None:
    if session.as_json:
        workers = snapshot.to_json()["workers"]
        session.print_json({"workers": workers, "findings": [finding.to_json() for finding in findings]})
        return
    if not snapshot.workers:
        session.note("no worker has joined yet")
    session.console.print_table(
        [_cells(worker, status) for worker, status in snapshot.workers.items()],
        text=("state", "process"),
        optional=("incarnation", "process", "sent", "polled"),
        style=cell_style,
    )
    session.print_findings(findings)


def _cells(worker: int, status: WorkerStatus) -> dict[str, str]:
    """Return the cells of one worker by column, in order."""
    info = status.info
    return {
        "id": str(worker),
        "state": info.state if info else "left",
        "version": str(info.version) if info else "",
        "stale": str(info.staleness) if info else "",
        "seen": age(info.last_seen_seconds) if info else "",
        "polled": age(info.unpolled_seconds) if info else "",
        "sent": f"{info.sent:,}" if info else "",
        "missed": f"{status.missed.total:,}",
        "incarnation": str(info.incarnation) if info else "",
        "process": f"{sanitize(info.host)}:{info.pid}" if info else "",
    }


def _print_one(session: Session, snapshot: Snapshot, worker: int) -> None:
    console, status = session.console, snapshot.workers[worker]
    info, counts, missed = status.info, status.counts, status.missed
    latest = snapshot.manifest.version if snapshot.manifest else 0
    if info is None:
        console.print(f"worker {worker} of {snapshot.run}: it has left, or was silent for too long")
    else:
        console.print(
            f"worker {worker} of {snapshot.run}: {info.state}, seen {age(info.last_seen_seconds)} ago"
        )
        console.print(f"  process      {sanitize(info.host)} pid {info.pid}, incarnation {info.incarnation}")
        console.print(
            f"  runs         version {info.version:,} of {latest:,}; polled {age(info.unpolled_seconds)} ago"
        )
        console.print(f"  waited       {age(info.room_seconds)} for room in its queue, in this incarnation")
    if counts is not None:
        lost = ", ".join(f"{count:,} {reason}" for reason, count in counts.lost.items()) or "0"
        console.print(
            f"  batches      {counts.produced:,} produced = {counts.waiting:,} waiting + {counts.in_hand:,} in hand + "
            f"{counts.delivered:,} delivered + lost: {lost}"
        )
    else:
        console.print("  batches      none yet")
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in missed.by_reason.items())
    console.print(
        f"  missed       {counted(missed.total, 'version')}"
        + (f" ({reasons})" if reasons else "")
        + f", {counted(missed.commands, 'command')}"
    )
    if status.commands_waiting:
        console.print(
            f"  unanswered   {counted(status.commands_waiting, 'command')}, for {age(status.command_seconds)}"
        )


def _describe_missed(record: Missed) -> str:
    if record.what == "command":
        what = f"the command {sanitize(record.command)}"
    elif record.first == record.last:
        what = f"version {record.first}"
    else:
        what = f"versions {record.first}-{record.last}"
    return f"{what}: {record.why}" + (f", {sanitize(record.detail)}" if record.detail else "")
