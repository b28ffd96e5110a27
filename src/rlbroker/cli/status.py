"""`rlbroker status`: one look at a run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rlbroker.snapshot import Snapshot, WorkerStatus


def status(
    url: Annotated[
        str | None, typer.Option(help="Server; without it RLBROKER_REDIS_URL, REDIS_URL, localhost.")
    ] = None,
    run: Annotated[str | None, typer.Option(help="Which run; not needed if there is only one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the server.")] = 5.0,
) -> None:
    """Show a run: its server, version, workers with their versions, queues, and what was missed.

    Reading changes nothing.

    Example: rlbroker status --url redis://host:6379/0 --run pong
    """
    from rlbroker.connection import Connection
    from rlbroker.snapshot import choose_run, take_snapshot

    connection = Connection(url, timeout_seconds=timeout)
    try:
        snapshot = take_snapshot(connection, choose_run(connection, run))
    finally:
        connection.close()
    if as_json:
        print(json.dumps(snapshot.to_json(), indent=2))
    else:
        _show(snapshot)


def _show(snapshot: Snapshot) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Wider than some terminals, but whole: a cut number would be a wrong one.
    console = Console(highlight=False, width=max(110, Console().width))
    console.print(
        f"run      [bold]{snapshot.run}[/] on {snapshot.server} ({snapshot.server_version or 'version unknown'})"
    )
    seen = snapshot.learner_seen_seconds
    alive = "never seen" if seen is None else f"last seen {seen:.1f} s ago"
    console.print(f"learner  {snapshot.learner}, epoch {snapshot.epoch}, {alive}")
    pointer = snapshot.pointer
    if pointer is None:
        console.print("weights  none published yet")
    else:
        size = f"{pointer.stored_bytes:,} bytes stored for {pointer.raw_bytes:,}, {pointer.codec}"
        console.print(f"weights  version {pointer.version}: {size}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("id", justify="right")
    for name in ("state", "process"):
        table.add_column(name, no_wrap=True)
    for name in ("version", "stale", "waiting", "in hand", "delivered", "lost", "missed", "commands", "seen"):
        table.add_column(name, justify="right", no_wrap=True)
    for worker, one in snapshot.workers.items():
        table.add_row(str(worker), *_cells(one))
    if snapshot.workers:
        console.print(table)
    else:
        console.print("workers  none yet")


def _cells(one: WorkerStatus) -> list[str]:
    info, counts = one.info, one.counts
    state = "[dim]left[/]" if info is None else info.state if info.state == "alive" else "[red]away[/]"
    lost = sum(counts.lost.values()) if counts else 0
    missed = one.missed.total + one.missed.commands
    return [
        state,
        f"{info.host}:{info.pid}" if info else "",
        str(info.version) if info else "",
        str(info.staleness) if info else "",
        str(counts.waiting) if counts else "",
        str(counts.in_hand) if counts else "",
        f"{counts.delivered:,}" if counts else "",
        f"[red]{lost:,}[/]" if lost else "0",
        f"[yellow]{missed:,}[/]" if missed else "0",
        str(one.commands_waiting),
        f"{info.last_seen_seconds:.1f} s" if info else "",
    ]
