"""`rlbroker status`: prints a snapshot of a run."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from rlbroker.backend.text import age
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import with_session
from rlbroker.ops.formatting import format_bytes, sanitize

if TYPE_CHECKING:
    from rlbroker.ops.inspect.findings import Finding
    from rlbroker.ops.inspect.snapshot import Snapshot, WorkerStatus

#: Seconds between two snapshots with `--watch`.
WATCH_SECONDS = 2.0

#: Columns with text in the table of workers; the others have numbers.
TEXT_COLUMNS = ("state", "process")

#: Columns to omit on a narrow terminal, first to last.
OPTIONAL_COLUMNS = ("process", "in hand", "unanswered", "delivered", "seen", "stale")


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
    console.print_table(
        [_cells(worker, worker_status) for worker, worker_status in snapshot.workers.items()],
        text=TEXT_COLUMNS,
        optional=OPTIONAL_COLUMNS,
        style=cell_style,
    )
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
    state = {"away": "; it died, or lost its connection", "ended": "; it has ended"}.get(learner.state, "")
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


def _cells(worker: int, status: WorkerStatus) -> dict[str, str]:
    """Return the cells of one worker by column, in order; some are empty if it has left."""
    info, counts = status.info, status.counts
    return {
        "id": str(worker),
        "state": info.state if info else "left",
        "version": str(info.version) if info else "",
        "stale": str(info.staleness) if info else "",
        "waiting": f"{counts.waiting:,}" if counts else "0",
        "in hand": f"{counts.in_hand:,}" if counts else "0",
        "delivered": f"{counts.delivered:,}" if counts else "0",
        "lost": f"{sum(counts.lost.values()):,}" if counts else "0",
        "missed": f"{status.missed.total + status.missed.commands:,}",
        "unanswered": str(status.commands_waiting),
        "seen": age(info.last_seen_seconds) if info else "",
        "process": f"{sanitize(info.host)}:{info.pid}" if info else "",
    }


def cell_style(column: str, cell: str) -> str:
    """Return the style of a cell in a table of workers."""
    if cell == "away" or (column == "lost" and cell != "0"):
        return "red"
    return "yellow" if column == "missed" and cell != "0" else ""
