"""`rlbroker missed`: lists the versions and commands that workers missed."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from rlbroker.backend.text import age
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import parse_span, with_session
from rlbroker.ops.formatting import sanitize


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
    from dataclasses import asdict

    from rlbroker.ops.inspect.control_records import read_missed
    from rlbroker.ops.inspect.runs import read_worker_ids

    with session.time_limit():
        now, records = read_missed(
            session.connection, session.keys, last_seconds=since, worker=worker, why=why
        )
    if worker is not None and not records and worker not in read_worker_ids(session.connection, session.keys):
        session.fail(f"there is no worker {worker} in the run {session.run!r}")
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
                "which": (
                    sanitize(record.command)
                    if record.what == "command"
                    else _format_versions(record.first, record.last)
                ),
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


def _format_versions(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"
