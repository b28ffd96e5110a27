"""`rlbroker status`: one look at a run."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from rlbroker.ops.cli.formatting import age, plain, show_findings, show_table, size
from rlbroker.ops.cli.session import Session, with_session

if TYPE_CHECKING:
    from rlbroker.ops.inspect.findings import Finding
    from rlbroker.ops.inspect.snapshot import Snapshot, WorkerStatus

#: How often `--watch` looks.
WATCH_SECONDS = 2.0

#: What a narrow terminal does not show, in this order.
SPARE_COLUMNS = ("process", "in hand", "unanswered", "delivered", "seen", "stale")


@with_session
def status(
    session: Session,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Look again every 2 seconds, until Ctrl-C.")
    ] = False,
) -> None:
    """Show a run: its server, version, workers with their versions, queues, losses, and what is wrong.

    Reading changes nothing. Exit code: 0, or 2 if the server or the run is not there.

    Example: rlbroker status --url redis://host:6379/0 --run pong
    """
    _look(session)
    while watch:
        time.sleep(WATCH_SECONDS)
        if sys.stdout.isatty() and not session.as_json:
            session.console.clear()
        _look(session)


def _look(session: Session) -> None:

    from rlbroker.ops.inspect.findings import find
    from rlbroker.ops.inspect.snapshot import take_snapshot

    with session.in_time():
        snapshot = take_snapshot(session.connection, session.run)
    findings = find(snapshot)
    if session.as_json:
        session.show_json(snapshot.to_json() | {"findings": [one.to_json() for one in findings]})
    else:
        _show(session, snapshot, findings)


def _show(session: Session, snapshot: Snapshot, findings: list[Finding]) -> None:
    console = session.console
    server = snapshot.server
    console.print(
        f"run      {snapshot.run} on {server.address} ({server.version or 'version unknown'}{_memory(snapshot)})"
    )
    console.print(f"learner  {_learner(snapshot)}")
    console.print(f"weights  {_weights(snapshot)}")
    if not snapshot.workers:
        console.print("workers  none yet")
    rows = [_row(worker, one) for worker, one in snapshot.workers.items()]
    show_table(console, rows, left=("state", "process"), spare=SPARE_COLUMNS, style=cell_style)
    show_findings(session, findings)


def _memory(snapshot: Snapshot) -> str:
    used, limit = snapshot.server.used_bytes, snapshot.server.maxmemory_bytes
    if used is None:
        return ""
    where = f" on {snapshot.server.node}, the fullest node" if snapshot.server.node else ""
    return f", {size(used)} used" + (f" of {size(limit)}" if limit else "") + where


def _learner(snapshot: Snapshot) -> str:
    learner = snapshot.learner
    if learner is None:
        return "none yet"
    seen = (
        "not seen yet" if learner.last_seen_seconds is None else f"seen {age(learner.last_seen_seconds)} ago"
    )
    state = {"away": "; it died, or is cut off", "ended": "; it has ended"}.get(learner.state, "")
    return f"{plain(learner.host)} pid {learner.pid}, {seen}{state}"


def _weights(snapshot: Snapshot) -> str:
    pointer = snapshot.pointer
    if pointer is None:
        return "none published yet"
    kind = f"delta to version {pointer.base}" if pointer.base else "full"
    when = age(max(0.0, snapshot.at - pointer.published))
    return (
        f"version {pointer.version}: {kind}, {pointer.codec}, {size(pointer.stored_bytes)} stored for "
        f"{size(pointer.raw_bytes)}, published {when} ago"
    )


def _row(worker: int, one: WorkerStatus) -> dict[str, str]:
    """Give one worker's cells by column, in order; a worker that left has no version any more."""
    info, counts = one.info, one.counts
    return {
        "id": str(worker),
        "state": info.state if info else "left",
        "version": str(info.version) if info else "",
        "stale": str(info.staleness) if info else "",
        "waiting": f"{counts.waiting:,}" if counts else "0",
        "in hand": f"{counts.in_hand:,}" if counts else "0",
        "delivered": f"{counts.delivered:,}" if counts else "0",
        "lost": f"{sum(counts.lost.values()):,}" if counts else "0",
        "missed": f"{one.missed.total + one.missed.commands:,}",
        "unanswered": str(one.commands_waiting),
        "seen": age(info.last_seen_seconds) if info else "",
        "process": f"{plain(info.host)}:{info.pid}" if info else "",
    }


def cell_style(column: str, cell: str) -> str:
    """Give the colour of a cell about a worker."""
    if cell == "away" or (column == "lost" and cell != "0"):
        return "red"
    return "yellow" if column == "missed" and cell != "0" else ""
