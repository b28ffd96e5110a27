"""`rlbroker runs`: lists the runs on a server."""

from __future__ import annotations

from rlbroker.backend.text import age
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import with_session


@with_session(without=("run",))
def runs(session: Session) -> None:
    """List the runs on a server: the state of each learner, the latest version, and how many workers are alive.

    Exit code: 0, or 2 if the server cannot be read.

    Example: rlbroker runs --url redis://host:6379/0
    """
    from dataclasses import asdict

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
