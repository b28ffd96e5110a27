"""`rlbroker doctor`: examines the server, the run and this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from rlbroker.backend.text import counted
from rlbroker.ops.cli.check_command import CRITICAL, OK, UNKNOWN, WARNING
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import with_session
from rlbroker.ops.formatting import sanitize

if TYPE_CHECKING:
    from rlbroker.ops.doctor.diagnosis import Diagnosis

#: The exit code for each state, and its mark with colour.
_EXIT_CODES = {"ok": OK, "unknown": OK, "warning": WARNING, "critical": CRITICAL}
_MARKS = {"ok": ("✓", "green"), "unknown": ("?", "dim"), "warning": ("!", "yellow"), "critical": ("✗", "red")}


@with_session
def doctor(session: Session) -> None:
    """Examine the server, the run and this machine: settings, latency, rights, memory, and what is wrong with the run.

    Each point that fails comes with a command that fixes it. A point that the server does not report, or not to this
    user, is marked with ? and is not an error. Without a run, or with several runs and no --run, only the server is
    examined.
    Exit code: 0 ok; 1 warning; 2 critical; 3 the server or the run cannot be examined.

    Example: rlbroker doctor --url redis://host:6379/0 --run pong
    """
    from rlbroker.errors import RlbrokerError

    try:
        code = _examine(session)
    except RlbrokerError as error:
        session.print_traceback()
        session.fail(str(error), UNKNOWN)
    raise typer.Exit(code)


def _examine(session: Session) -> int:
    """Print the diagnosis and return the exit code."""
    from dataclasses import asdict

    from rlbroker.ops.doctor.diagnosis import diagnose

    with session.time_limit():
        diagnosis = diagnose(session.connection, _find_run(session))
    if session.as_json:
        points = [asdict(point) for point in diagnosis.checks]
        session.print_json(
            {"server": diagnosis.server, "run": diagnosis.run, "state": diagnosis.state, "points": points}
        )
    else:
        _print_text(session, diagnosis)
    return _EXIT_CODES[diagnosis.state]


def _find_run(session: Session) -> str | None:
    """Return the run that was named, or the only one on the server; None if there are none or several."""
    from rlbroker.errors import AccessDenied
    from rlbroker.ops.inspect.runs import list_run_names

    if session.named_run is not None:
        return session.run
    try:
        names = list_run_names(session.connection)
    except AccessDenied:  # the point `rights` reports it
        names = []
    if len(names) == 1:
        session.run_option = names[0]
        return session.run
    reason = (
        f"there are {len(names)} runs: {', '.join(names)}; choose one with --run"
        if names
        else "there are none"
    )
    session.note(f"no run was examined: {reason}")
    return None


def _print_text(session: Session, diagnosis: Diagnosis) -> None:
    run = f" and the run {diagnosis.run}" if diagnosis.run else ""
    session.console.print(f"{diagnosis.server}{run}")
    width = max(len(point.code) for point in diagnosis.checks)
    printed_hints = set[str]()
    for point in diagnosis.checks:
        mark, style = _MARKS[point.state]
        session.console.print(f"{mark} {point.code:<{width}}  {sanitize(point.what)}", style=style)
        # One missing right makes many points unknown: its hint is printed once.
        if point.hint and not (point.state == "unknown" and point.hint in printed_hints):
            printed_hints.add(point.hint)
            for line in point.hint.splitlines():
                session.console.print(f"  {'':<{width}}  {session.complete_hint(line)}")
    count = {state: sum(point.state == state for point in diagnosis.checks) for state in _MARKS}
    session.console.print(
        f"{count['ok']} ok, {counted(count['warning'], 'warning')}, {count['critical']} critical, "
        f"{count['unknown']} unknown"
    )
