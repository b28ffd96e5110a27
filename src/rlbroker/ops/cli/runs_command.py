"""`rlbroker runs`: which runs are on a server."""

from __future__ import annotations

from rlbroker.ops.cli.formatting import age, show_table
from rlbroker.ops.cli.session import Session, with_session


@with_session(without=("run",))
def runs(session: Session) -> None:
    """List the runs on a server: whether their learners live, their versions and workers.

    Exit code: 0, or 2 if the server is not there.

    Example: rlbroker runs --url redis://host:6379/0
    """
    from dataclasses import asdict

    from rlbroker.ops.inspect.runs import list_runs

    with session.in_time():
        found = list_runs(session.connection)
    if session.as_json:
        session.show_json({"runs": [asdict(one) for one in found]})
        return
    if not found:
        session.say(f"there are no runs on {session.connection.address}")
    show_table(
        session.console,
        [
            {
                "run": one.run,
                "learner": one.learner,
                "version": f"{one.version:,}",
                "workers": f"{one.alive:,} of {one.members:,} alive" if one.members else "none",
                "seen": "never" if one.last_seen_seconds is None else f"{age(one.last_seen_seconds)} ago",
                "format": "" if one.wire_format is None else str(one.wire_format),
            }
            for one in found
        ],
        left=("run", "learner", "workers"),
        spare=("format",),
        style=lambda column, cell: "red" if (column, cell) == ("learner", "away") else "",
    )
