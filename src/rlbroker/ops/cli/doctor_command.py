"""`rlbroker doctor`: examines the server, the run and this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from rlbroker.backend.text import counted
from rlbroker.ops.cli.exit_codes import CRITICAL, OK, UNKNOWN, WARNING
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import with_session
from rlbroker.ops.formatting import sanitize

if TYPE_CHECKING:
    from rlbroker.ops.doctor.diagnosis import Diagnosis

#: The exit code for each state, and its mark and colour.
_EXIT_CODES = {"ok": OK, "unknown": OK, "warning": WARNING, "critical": CRITICAL}
_MARKS = {"ok": ("✓", "green"), "unknown": ("?", "dim"), "warning": ("!", "yellow"), "critical": ("✗", "red")}


@with_session
def doctor(session: Session) -> None:
    """Examine the server, the run and this machine: settings, latency, rights, memory, and what is wrong with the run.

    A check that fails is printed with a command that repairs it. A value that the server does not report, or not to
    this user, is marked with ? and is no error. Without a run, or with several runs and no --run, only the server and
    this machine are examined.
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
        checks = [asdict(check) for check in diagnosis.checks]
        session.print_json(
            {"server": diagnosis.server, "run": diagnosis.run, "state": diagnosis.state, "points": checks}
        )
    else:
        _print_text(session, diagnosis)
    return _EXIT_CODES[diagnosis.state]


def _find_run(session: Session) -> str | None:
    """Return the named run, or the only one on the server; None if there is none, or several."""
    from rlbroker.errors import AccessDenied
    from rlbroker.ops.inspect.runs import list_run_names

    if session.named_run is not None:
        return session.run
    try:
        names = list_run_names(session.connection)
    except AccessDenied:  # the check `rights` reports it
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
    width = max(len(check.code) for check in diagnosis.checks)
    printed_hints = set[str]()
    for check in diagnosis.checks:
        mark, style = _MARKS[check.state]
        session.console.print(f"{mark} {check.code:<{width}}  {sanitize(check.what)}", style=style)
        # One missing right makes many values unknown; print its hint once.
        if check.hint and not (check.state == "unknown" and check.hint in printed_hints):
            printed_hints.add(check.hint)
            for line in check.hint.splitlines():
                session.console.print(f"  {'':<{width}}  {session.complete_hint(line)}")
    count = {state: sum(check.state == state for check in diagnosis.checks) for state in _MARKS}
    session.console.print(
        f"{count['ok']} ok, {counted(count['warning'], 'warning')}, {count['critical']} critical, "
        f"{count['unknown']} unknown"
    )
