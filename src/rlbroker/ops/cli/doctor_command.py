"""`rlbroker doctor`: whether server, run and this machine are fit for each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from rlbroker.ops.cli.check_command import CRITICAL, OK, UNKNOWN, WARNING
from rlbroker.ops.cli.formatting import counted, plain
from rlbroker.ops.cli.session import Session, with_session

if TYPE_CHECKING:
    from rlbroker.ops.doctor.diagnosis import Diagnosis

#: Exit code, mark and colour of each state.
_CODES = {"ok": OK, "unknown": OK, "warning": WARNING, "critical": CRITICAL}
_MARKS = {"ok": ("✓", "green"), "unknown": ("?", "dim"), "warning": ("!", "yellow"), "critical": ("✗", "red")}


@with_session
def doctor(session: Session) -> None:
    """Examine the server, the run and this machine: settings, speed, rights, room, and what is wrong with the run.

    Each point that fails comes with what mends it. What the server does not tell, or not this user, is marked with ?
    and is no fault. Without a run, or with several and no --run, the server alone is examined.
    Exit code: 0 all is well; 1 warning; 2 critical; 3 the server or the run cannot be examined.

    Example: rlbroker doctor --url redis://host:6379/0 --run pong
    """
    from rlbroker.errors import RlbrokerError

    try:
        code = _examine(session)
    except RlbrokerError as error:
        session.explain()
        session.fail(str(error), UNKNOWN)
    raise typer.Exit(code)


def _examine(session: Session) -> int:
    from dataclasses import asdict

    from rlbroker.ops.doctor.diagnosis import diagnose

    with session.in_time():
        found = diagnose(session.connection, _run(session))
    if session.as_json:
        points = [asdict(one) for one in found.points]
        session.show_json({"server": found.server, "run": found.run, "state": found.state, "points": points})
    else:
        _show(session, found)
    return _CODES[found.state]


def _run(session: Session) -> str | None:
    """Give the run that is asked for, or the only one; None if there is no single one."""
    from rlbroker.errors import AccessDenied
    from rlbroker.ops.inspect.runs import run_names

    if session.named_run is not None:
        return session.run
    try:
        names = run_names(session.connection)
    except AccessDenied:  # one of the points says so
        names = []
    if len(names) == 1:
        session.asked_run = names[0]
        return session.run
    there = f"runs there are: {', '.join(names)}; choose one with --run" if names else "there are no runs"
    session.say(f"no run was examined: {there}")
    return None


def _show(session: Session, found: Diagnosis) -> None:
    of = f" and the run {found.run}" if found.run else ""
    session.console.print(f"{found.server}{of}")
    width = max(len(one.code) for one in found.points)
    said = set[str]()
    for one in found.points:
        mark, style = _MARKS[one.state]
        session.console.print(f"{mark} {one.code:<{width}}  {plain(one.what)}", style=style)
        if one.hint and not (one.state == "unknown" and one.hint in said):
            said.add(one.hint)
            for line in one.hint.splitlines():
                session.console.print(f"  {'':<{width}}  {session.typed(line)}")
    count = {state: sum(one.state == state for one in found.points) for state in _MARKS}
    session.console.print(
        f"{count['ok']} well, {counted(count['warning'], 'warning')}, {count['critical']} critical, "
        f"{count['unknown']} unknown"
    )
