"""`rlbroker missed`: the record of updates that workers did not run."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from rlbroker.ops.cli.formatting import age, plain, seconds_of, show_table
from rlbroker.ops.cli.session import Session, with_session


@with_session
def missed(
    session: Session,
    since: Annotated[
        float | None,
        typer.Option(parser=seconds_of, metavar="SPAN", help="Only the last 90s, 15m, 1h, 2d …"),
    ] = None,
    worker: Annotated[int | None, typer.Option(min=0, help="Only of this worker.")] = None,
    why: Annotated[
        Literal["superseded", "failed", "away", "left", "unknown", "expired", "refused"] | None,
        typer.Option(help="Only for this reason."),
    ] = None,
) -> None:
    """List missed versions and commands: by which worker, why, and when.

    The record keeps about the newest 10,000 entries; sums since the beginning are in `rlbroker workers`.
    Exit code: 0; 1 if there is no such worker; 2 if the server or the run is not there.

    Example: rlbroker missed --since 1h --worker 3
    """
    from dataclasses import asdict

    from rlbroker.ops.inspect.missed_updates import read_missed
    from rlbroker.ops.inspect.runs import worker_ids

    with session.in_time():
        now, records = read_missed(
            session.connection, session.keys, last_seconds=since, worker=worker, why=why
        )
    if worker is not None and not records and worker not in worker_ids(session.connection, session.keys):
        session.fail(f"there is no worker {worker} in the run {session.run!r}")
    if session.as_json:
        session.show_json({"missed": [asdict(one) for one in records]})
        return
    if not records:
        session.say("nothing was missed" + (" in this time" if since is not None else ""))
    show_table(
        session.console,
        [
            {
                "ago": age(max(0.0, now - one.at)),
                "worker": str(one.worker_id),
                "what": one.what,
                "which": plain(one.command) if one.what == "command" else _versions(one.first, one.last),
                "count": f"{one.count:,}",
                "why": one.why,
                "detail": plain(one.detail),
            }
            for one in records
        ],
        left=("what", "which", "why", "detail"),
        spare=("detail", "what"),
        style=lambda column, cell: "red" if column == "why" and cell in ("failed", "refused") else "",
    )


def _versions(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"
