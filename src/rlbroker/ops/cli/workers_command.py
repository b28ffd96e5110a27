"""`rlbroker workers`: who takes part, and one worker in detail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rlbroker.ops.cli.formatting import age, counted, describe_missed, plain, show_findings, show_table
from rlbroker.ops.cli.session import Session, with_session
from rlbroker.ops.cli.status_command import cell_style

if TYPE_CHECKING:
    from rlbroker.ops.inspect.findings import Finding
    from rlbroker.ops.inspect.snapshot import Snapshot, WorkerStatus

#: Missed updates that are listed of one worker: the newest.
MISSED_SHOWN = 5


@with_session
def workers(
    session: Session,
    worker: Annotated[
        int | None, typer.Argument(metavar="[ID]", help="Only this one, with all that is known of it.")
    ] = None,
) -> None:
    """Show who takes part: where each worker runs, what it runs, since when it is silent; and one in detail.

    Exit code: 0; 1 if there is no such worker; 2 if the server or the run is not there.

    Example: rlbroker workers 3 --run pong
    """
    from dataclasses import asdict

    from rlbroker.ops.inspect.findings import find
    from rlbroker.ops.inspect.missed_updates import read_missed
    from rlbroker.ops.inspect.snapshot import take_snapshot

    with session.in_time():
        snapshot = take_snapshot(session.connection, session.run)
        missed = [] if worker is None else read_missed(session.connection, session.keys, worker=worker)[1]
    if worker is not None and worker not in snapshot.workers:
        there = ", ".join(map(str, snapshot.workers)) or "none"
        session.fail(f"there is no worker {worker} in the run {session.run!r}; workers there are: {there}")
    findings = [one for one in find(snapshot) if one.worker is not None]
    if worker is None:
        if session.as_json:
            session.show_json(
                {
                    "workers": snapshot.to_json()["workers"],
                    "findings": [one.to_json() for one in findings],
                }
            )
            return
        rows = [_row(one, status) for one, status in snapshot.workers.items()]
        if not rows:
            session.say("no worker has joined yet")
        show_table(
            session.console,
            rows,
            left=("state", "process"),
            spare=("incarnation", "process", "sent", "polled"),
            style=cell_style,
        )
        show_findings(session, findings)
        return
    findings = [one for one in findings if one.worker == worker]
    if session.as_json:
        said = snapshot.to_json()["workers"][str(worker)]
        said["missed"]["records"] = [asdict(one) for one in missed]
        session.show_json(said | {"findings": [one.to_json() for one in findings]})
    else:
        _show_one(session, snapshot, worker, findings)
        for record in missed[-MISSED_SHOWN:]:
            ago = age(max(0.0, snapshot.at - record.at))
            session.console.print(f"  missed {ago} ago   {describe_missed(record)}")
        show_findings(session, findings, with_advice=True)


def _row(worker: int, one: WorkerStatus) -> dict[str, str]:
    info = one.info
    return {
        "id": str(worker),
        "state": info.state if info else "left",
        "version": str(info.version) if info else "",
        "stale": str(info.staleness) if info else "",
        "seen": age(info.last_seen_seconds) if info else "",
        "polled": age(info.unpolled_seconds) if info else "",
        "sent": f"{info.sent:,}" if info else "",
        "missed": f"{one.missed.total:,}",
        "incarnation": str(info.incarnation) if info else "",
        "process": f"{plain(info.host)}:{info.pid}" if info else "",
    }


def _show_one(session: Session, snapshot: Snapshot, worker: int, findings: list[Finding]) -> None:
    console, one = session.console, snapshot.workers[worker]
    info, counts, missed = one.info, one.counts, one.missed
    latest = snapshot.pointer.version if snapshot.pointer else 0
    if info is None:
        console.print(f"worker {worker} of {snapshot.run}: it has left, or was silent for too long")
    else:
        console.print(
            f"worker {worker} of {snapshot.run}: {info.state}, seen {age(info.last_seen_seconds)} ago"
        )
        console.print(f"  process      {plain(info.host)} pid {info.pid}, incarnation {info.incarnation}")
        console.print(
            f"  runs         version {info.version:,} of {latest:,}; polled {age(info.unpolled_seconds)} ago"
        )
        console.print(f"  waited       {age(info.room_seconds)} for room in its queue, in this life")
    if counts is not None:
        lost = ", ".join(f"{count:,} {why}" for why, count in counts.lost.items()) or "0"
        console.print(
            f"  batches      {counts.produced:,} produced = {counts.waiting:,} waiting + {counts.in_hand:,} in hand + "
            f"{counts.delivered:,} delivered + lost: {lost}"
        )
    else:
        console.print("  batches      none yet")
    reasons = ", ".join(f"{count:,} {why}" for why, count in missed.by_reason.items())
    console.print(
        f"  missed       {counted(missed.total, 'version')}"
        + (f" ({reasons})" if reasons else "")
        + f", {counted(missed.commands, 'command')}"
    )
    if one.commands_waiting:
        console.print(
            f"  unanswered   {counted(one.commands_waiting, 'command')}, for {age(one.command_seconds)}"
        )
