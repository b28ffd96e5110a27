"""`rlbroker status`: one look at a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from rlbroker.cli.options import Url

if TYPE_CHECKING:
    from rich.table import Table

    from rlbroker.records import Missed
    from rlbroker.snapshot import Snapshot, WorkerStatus

#: What a narrow terminal does not show, in this order: a column less is better than cut numbers.
_SPARE_COLUMNS = ("process", "in hand", "unanswered", "stale", "seen")

#: Columns of text that a pipe has room for.
_PIPE_WIDTH = 1000


def status(
    url: Url = None,
    run: Annotated[str | None, typer.Option(help="Which run; not needed if there is only one.")] = None,
    missed: Annotated[bool, typer.Option("--missed", help="List missed versions and commands too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the server.")] = 5.0,
) -> None:
    """Show a run: its server, version, workers with their versions, queues, and what was missed.

    Reading changes nothing. Exit code: 0, or 2 if the server or the run is not there.

    Example: rlbroker status --url redis://host:6379/0 --run pong
    """
    from rlbroker.connection import Connection
    from rlbroker.deadline import Deadline, within
    from rlbroker.snapshot import choose_run, take_snapshot

    connection = Connection(url, timeout_seconds=timeout)
    try:
        with within(Deadline(timeout)):
            # Without retries: who looks wants to know at once that nobody answers.
            connection.execute_once("PING")
            snapshot = take_snapshot(connection, choose_run(connection, run))
    finally:
        connection.close()
    if as_json:
        print(json.dumps(snapshot.to_json(), indent=2))
    else:
        _show(snapshot, list_missed=missed)


def _show(snapshot: Snapshot, *, list_missed: bool) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    console = Console(width=width, highlight=False, markup=False, soft_wrap=True)
    server = f"{snapshot.server} ({snapshot.server_version or 'version unknown'})"
    console.print(f"run      {snapshot.run} on {server}")
    console.print(f"learner  {_learner(snapshot)}")
    console.print(f"weights  {_weights(snapshot)}")
    if not snapshot.workers:
        console.print("workers  none yet")
        return
    rows = {worker: _row(worker, one) for worker, one in snapshot.workers.items()}
    columns = list(next(iter(rows.values())))
    unlimited = console.options.update(width=_PIPE_WIDTH)
    for spare in _SPARE_COLUMNS:
        if console.measure(_table(columns, rows.values()), options=unlimited).maximum <= console.width:
            break
        columns.remove(spare)
    console.print(_table(columns, rows.values()))
    for worker, one in snapshot.workers.items():
        if one.info and one.info.problem:
            problem = _plain(one.info.problem)
            console.print(f"worker {worker} cannot load the newest weights: {problem}", style="red")
        for record in one.missed.records if list_missed else ():
            console.print(f"worker {worker} missed {_describe(record)}")


def _learner(snapshot: Snapshot) -> str:
    learner = snapshot.learner
    if learner is None:
        return "none yet"
    seen = (
        "not seen yet" if learner.last_seen_seconds is None else f"seen {_age(learner.last_seen_seconds)} ago"
    )
    state = {"alive": "", "away": "; it died, or is cut off", "ended": "; it has ended"}[learner.state]
    return f"{learner.host} pid {learner.pid}, {seen}{state}"


def _weights(snapshot: Snapshot) -> str:
    pointer = snapshot.pointer
    if pointer is None:
        return "none published yet"
    size = f"{pointer.stored_bytes:,} bytes stored for {pointer.raw_bytes:,}"
    return f"version {pointer.version}: {size}, {pointer.codec}"


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
        "seen": _age(info.last_seen_seconds) if info else "",
        "process": f"{_plain(info.host)}:{info.pid}" if info else "",
    }


def _table(columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="")
    for name in columns:
        table.add_column(name, justify="left" if name in ("state", "process") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(row[name], _style(name, row[name])) for name in columns))
    return table


def _style(column: str, cell: str) -> str:
    if cell == "away" or (column == "lost" and cell != "0"):
        return "red"
    return "yellow" if column == "missed" and cell != "0" else ""


def _describe(record: Missed) -> str:
    what = (
        f"version {record.first}" if record.last == record.first else f"versions {record.first}-{record.last}"
    )
    if record.what == "command":
        what = f"the command {_plain(record.command)}"
    return f"{what}: {record.why}" + (f", {_plain(record.detail)}" if record.detail else "")


def _age(seconds: float) -> str:
    """Give an age that is short to read.

    >>> [_age(seconds) for seconds in (0.25, 75, 300, 7200, 260000)]
    ['0.2 s', '75 s', '5 min', '2 h', '3 days']
    """
    for limit, unit_seconds, unit in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds:.1f} s" if seconds < 10 else f"{seconds / unit_seconds:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def _plain(text: str) -> str:
    """Give what a worker wrote without what would steer the terminal: workers are not trusted."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
