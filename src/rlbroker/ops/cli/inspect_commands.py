"""`rlbroker status`, `workers`, `missed` and `runs`: print what a run, or a server, has at the moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlbroker.backend.text import age, counted
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import parse_span, with_session
from rlbroker.ops.formatting import format_bytes, sanitize

if TYPE_CHECKING:
    from rlbroker.ops.inspect.findings import Finding
    from rlbroker.ops.inspect.snapshot import Snapshot, WorkerStatus
    from rlbroker.types import Missed, WorkerInfo

#: Seconds between two snapshots with `--watch`.
WATCH_SECONDS = 2.0

#: Columns of the table of workers, for `status` and for `workers`.
STATUS_COLUMNS = (
    *("id", "state", "version", "stale", "waiting", "in hand", "delivered", "lost", "missed"),
    *("unanswered", "seen", "process"),
)
WORKERS_COLUMNS = (
    *("id", "state", "version", "stale", "seen", "polled", "sent", "missed", "incarnation", "process"),
)

#: Columns to omit on a narrow terminal, first to last.
OPTIONAL_STATUS_COLUMNS = ("process", "in hand", "unanswered", "delivered", "seen", "stale")
OPTIONAL_WORKERS_COLUMNS = ("incarnation", "process", "sent", "polled")

#: How many missed updates of one worker are listed, the newest ones.
MISSED_SHOWN = 5


@with_session
def status(
    session: Session,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Refresh every 2 seconds, until Ctrl-C.")
    ] = False,
) -> None:
    """Show a run: server, learner, latest weights, workers with their queues and losses, and what is wrong.

    It only reads from Redis. Exit code: 0, or 2 if the server or the run cannot be read.

    Example: rlbroker status --url redis://host:6379/0 --run pong
    """
    _print_status(session)
    while watch:
        time.sleep(WATCH_SECONDS)
        if sys.stdout.isatty() and not session.as_json:
            session.console.clear()
        _print_status(session)


def _print_status(session: Session) -> None:
    from rlbroker.ops.inspect.findings import list_findings
    from rlbroker.ops.inspect.snapshot import take_snapshot

    with session.time_limit():
        snapshot = take_snapshot(session.connection, session.run)
    findings = list_findings(snapshot)
    if session.as_json:
        session.print_json(snapshot.to_json() | {"findings": [finding.to_json() for finding in findings]})
    else:
        _print_text(session, snapshot, findings)


def _print_text(session: Session, snapshot: Snapshot, findings: list[Finding]) -> None:
    console, server = session.console, snapshot.server
    facts = f"{server.version or 'version unknown'}{_describe_memory(snapshot)}"
    console.print(f"run      {snapshot.run} on {server.address} ({facts})")
    console.print(f"learner  {_describe_learner(snapshot)}")
    console.print(f"weights  {_describe_weights(snapshot)}")
    if not snapshot.workers:
        console.print("workers  none yet")
    _print_workers(session, snapshot, STATUS_COLUMNS, OPTIONAL_STATUS_COLUMNS)
    session.print_findings(findings)


def _describe_memory(snapshot: Snapshot) -> str:
    used, limit = snapshot.server.used_bytes, snapshot.server.maxmemory_bytes
    if used is None:
        return ""
    node = f" on {snapshot.server.node}, the fullest node" if snapshot.server.node else ""
    return f", {format_bytes(used)} used" + (f" of {format_bytes(limit)}" if limit else "") + node


def _describe_learner(snapshot: Snapshot) -> str:
    learner = snapshot.learner
    if learner is None:
        return "none yet"
    seen = (
        "not seen yet" if learner.last_seen_seconds is None else f"seen {age(learner.last_seen_seconds)} ago"
    )
    state = {"away": "; it died, or lost its connection", "ended": "; the run has ended"}.get(
        learner.state, ""
    )
    return f"{sanitize(learner.host)} pid {learner.pid}, {seen}{state}"


def _describe_weights(snapshot: Snapshot) -> str:
    manifest = snapshot.manifest
    if manifest is None:
        return "none published yet"
    kind = f"delta to version {manifest.base}" if manifest.base else "full"
    when = age(max(0.0, snapshot.at - manifest.published))
    return (
        f"version {manifest.version}: {kind}, {manifest.codec}, {format_bytes(manifest.stored_bytes)} stored for "
        f"{format_bytes(manifest.raw_bytes)}, published {when} ago"
    )


def _print_workers(
    session: Session, snapshot: Snapshot, columns: Sequence[str], optional: Sequence[str]
) -> None:
    """Print these columns of the table of workers."""
    rows = [_cells(worker, status) for worker, status in snapshot.workers.items()]
    session.console.print_table(
        [{name: row[name] for name in columns} for row in rows],
        text=("state", "process"),
        optional=optional,
        style=_cell_style,
    )


def _cells(worker: int, status: WorkerStatus) -> dict[str, str]:
    """Return all cells of one worker by column; some are empty if it has left."""
    info = status.info
    return {
        "id": str(worker),
        "state": info.state if info else "left",
        "version": str(info.version) if info else "",
        "stale": str(info.staleness) if info else "",
        "waiting": f"{status.waiting:,}",
        "in hand": f"{status.in_hand:,}",
        "delivered": f"{status.delivered:,}",
        "lost": f"{status.lost:,}",
        "missed": f"{status.missed_total:,}",
        "unanswered": str(status.commands_waiting),
        "seen": age(info.last_seen_seconds) if info else "",
        "polled": _polled(info) if info else "",
        "sent": f"{info.sent:,}" if info else "",
        "incarnation": str(info.incarnation) if info else "",
        "process": f"{sanitize(info.host)}:{info.pid}" if info else "",
    }


def _polled(info: WorkerInfo) -> str:
    """Return the time since the worker polled; its last heartbeat knows the time until then."""
    return age(info.unpolled_seconds + info.last_seen_seconds)


def _cell_style(column: str, cell: str) -> str:
    if cell == "away" or (column == "lost" and cell != "0"):
        return "red"
    return "yellow" if column == "missed" and cell != "0" else ""


@with_session
def workers(
    session: Session,
    worker: Annotated[int | None, typer.Argument(metavar="[ID]", help="Show this worker in detail.")] = None,
) -> None:
    """List the workers: state, version, process, and the time since their last heartbeat; or show one in detail.

    If the learner is gone, it says so: then workers wait.

    Exit code: 0; 1 if there is no such worker; 2 if the server or the run cannot be read.

    Example: rlbroker workers 3 --run pong
    """
    from rlbroker.ops.inspect.control_records import read_missed
    from rlbroker.ops.inspect.findings import LEARNER_GONE, list_findings
    from rlbroker.ops.inspect.snapshot import take_snapshot

    with session.time_limit():
        snapshot = take_snapshot(session.connection, session.run)
        missed = [] if worker is None else read_missed(session.connection, session.keys, worker=worker)[1]
    session.check_worker(worker, snapshot.workers)
    findings = [
        finding
        for finding in list_findings(snapshot)
        if finding.code in LEARNER_GONE
        or (finding.worker is not None if worker is None else finding.worker == worker)
    ]
    if worker is None:
        _print_all(session, snapshot, findings)
        return
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
        session.note(
            f"no worker has joined yet: start workers with this server and the run name {snapshot.run!r}; if they "
            f"are running, look for a mistyped name: {session.complete_hint('rlbroker runs')}"
        )
    _print_workers(session, snapshot, WORKERS_COLUMNS, OPTIONAL_WORKERS_COLUMNS)
    session.print_findings(findings)


def _print_one(session: Session, snapshot: Snapshot, worker: int) -> None:
    console, status = session.console, snapshot.workers[worker]
    info, counts, missed = status.info, status.counts, status.missed
    if info is None:
        console.print(f"worker {worker} of {snapshot.run}: it has left, or was silent for too long")
    else:
        console.print(
            f"worker {worker} of {snapshot.run}: {info.state}, seen {age(info.last_seen_seconds)} ago"
        )
        console.print(f"  process      {sanitize(info.host)} pid {info.pid}, incarnation {info.incarnation}")
        console.print(
            f"  runs         version {info.version:,} of {snapshot.version:,}; polled {_polled(info)} ago"
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
    what = "the command" if record.what == "command" else counted(record.count, "version").partition(" ")[2]
    detail = f", {sanitize(record.detail)}" if record.detail else ""
    return f"{what} {_describe_which(record)}: {record.why}{detail}"


def _describe_which(record: Missed) -> str:
    if record.what == "command":
        return sanitize(record.command)
    return f"{record.first:,}" if record.count == 1 else f"{record.first:,} to {record.last:,}"


@with_session
def missed(
    session: Session,
    since: Annotated[
        float | None,
        typer.Option(parser=parse_span, metavar="SPAN", help="Only the last 90s, 15m, 1h, 2d …"),
    ] = None,
    worker: Annotated[int | None, typer.Option(min=0, help="Only this worker.")] = None,
    why: Annotated[
        Literal["superseded", "failed", "away", "left", "unknown", "expired", "refused"] | None,
        typer.Option(help="Only this reason."),
    ] = None,
) -> None:
    """List missed versions and commands: which worker missed them, why, and when.

    The record keeps about the newest 10,000 entries; `rlbroker workers` has the totals since the run began.
    Exit code: 0; 1 if there is no such worker; 2 if the server or the run cannot be read.

    Example: rlbroker missed --since 1h --worker 3
    """
    from rlbroker.ops.inspect.control_records import read_missed
    from rlbroker.ops.inspect.runs import read_worker_ids

    with session.time_limit():
        now, records = read_missed(
            session.connection, session.keys, last_seconds=since, worker=worker, why=why
        )
    if not records:
        session.check_worker(worker, read_worker_ids(session.connection, session.keys))
    if session.as_json:
        session.print_json({"missed": [asdict(record) for record in records]})
        return
    if not records:
        session.note("nothing was missed" + (" in this time" if since is not None else ""))
    session.console.print_table(
        [
            {
                "ago": age(max(0.0, now - record.at)),
                "worker": str(record.worker_id),
                "what": record.what,
                "which": _describe_which(record),
                "count": f"{record.count:,}",
                "why": record.why,
                "detail": sanitize(record.detail),
            }
            for record in records
        ],
        text=("what", "which", "why", "detail"),
        optional=("detail", "what"),
        style=lambda column, cell: "red" if column == "why" and cell in ("failed", "refused") else "",
    )


@with_session(without=("run",))
def runs(session: Session) -> None:
    """List the runs on a server: the state of each learner, the latest version, and how many workers are alive.

    Exit code: 0, or 2 if the server cannot be read.

    Example: rlbroker runs --url redis://host:6379/0
    """
    from rlbroker.ops.inspect.runs import list_runs

    with session.time_limit():
        found = list_runs(session.connection)
    if session.as_json:
        session.print_json({"runs": [asdict(run) for run in found]})
        return
    if not found:
        session.note(f"there are no runs on {session.connection.address}")
    session.console.print_table(
        [
            {
                "run": run.run,
                "learner": run.learner,
                "version": f"{run.version:,}",
                "workers": f"{run.alive:,} of {run.members:,} alive" if run.members else "none",
                "seen": "never" if run.last_seen_seconds is None else f"{age(run.last_seen_seconds)} ago",
                "format": "" if run.wire_format is None else str(run.wire_format),
            }
            for run in found
        ],
        text=("run", "learner", "workers"),
        optional=("format",),
        style=lambda column, cell: "red" if (column, cell) == ("learner", "away") else "",
    )
