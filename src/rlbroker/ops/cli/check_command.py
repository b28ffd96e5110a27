"""`rlbroker check`: reports whether a run is healthy, to monitoring systems and container probes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rlbroker.backend.text import age, counted
from rlbroker.ops.cli.exit_codes import CRITICAL, OK, UNKNOWN, WARNING
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import parse_span, with_session
from rlbroker.ops.formatting import describe_other_workers, sanitize

if TYPE_CHECKING:
    from rlbroker.ops.inspect.findings import FindingLimits
    from rlbroker.ops.inspect.liveness import Participant

_STATE_NAMES = {OK: "OK", WARNING: "WARNING", CRITICAL: "CRITICAL"}


@with_session
def check(
    session: Session,
    staleness: Annotated[
        int, typer.Option(min=1, help="Report a worker that is this many versions behind.")
    ] = 10,
    min_workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Report fewer live workers than this; by default the learner's num_workers.",
        ),
    ] = None,
    queue: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Report a queue that is full to this share.")
    ] = 0.9,
    max_missed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Report more than this many versions missed within --since, over all workers."
        ),
    ] = None,
    since: Annotated[
        float | None,
        typer.Option(parser=parse_span, metavar="SPAN", help="Time span of --max-missed; by default 1h."),
    ] = None,
    of_self: Annotated[
        bool,
        typer.Option(
            "--self", help="Only check that the learner or a worker of the run is alive on this host."
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="With --self: exit code 3, not 0, if the server cannot be read."),
    ] = False,
) -> None:
    """Print one line with the state of a run, and one for each finding, as monitoring plugins do.

    --self is for health checks of containers and Kubernetes probes: it checks that the learner or a worker with this
    host's name is alive. If the server does not answer, the state is UNKNOWN and the exit code 0, so that an
    orchestrator does not restart all containers at once; with --strict it is 3.

    Exit code: 0 ok; 1 warning; 2 critical; 3 unknown: the server or the run cannot be read.
    With --self: 0 alive or unknown; 2 away, no process of the run on this host, or wrong usage.

    Example: rlbroker check --run pong --staleness 20 --min-workers 8
    """
    from rlbroker.errors import InvalidArgument, RlbrokerError
    from rlbroker.ops.inspect.findings import FindingLimits

    if of_self:
        raise typer.Exit(_check_self(session, strict=strict))
    if strict:
        raise InvalidArgument("--strict needs --self")
    try:
        code = _check_run(session, FindingLimits(staleness, queue, min_workers), max_missed, since or 3600.0)
    except RlbrokerError as error:
        code = UNKNOWN
        _print_unknown(session, error)
    raise typer.Exit(code)


def _print_unknown(session: Session, error: Exception) -> None:
    if session.as_json:
        session.print_json({"state": "unknown", "error": str(error)})
    else:
        print(f"UNKNOWN: {sanitize(str(error))}")
    session.print_traceback()


def _check_self(session: Session, *, strict: bool) -> int:
    """Print whether a process of the run is alive on this host, and return the exit code.

    One live process is enough: after a restart a worker may have a new id, while its old id is still a member.
    """
    import socket
    from dataclasses import asdict

    from rlbroker.config import check_run_name
    from rlbroker.errors import InvalidArgument, RlbrokerError, UsageError
    from rlbroker.ops.inspect.liveness import find_participants

    run, host = session.named_run, socket.gethostname()
    if run is None:  # the default, the only run, would fail as soon as the server has a second one
        raise InvalidArgument("--self needs the name of the run: set RLBROKER_RUN, or use --run")
    check_run_name(run)
    try:
        with session.time_limit():
            present = find_participants(session.connection, run, host)
    except UsageError:  # wrong settings stay wrong: report them, also without --strict
        raise
    except RlbrokerError as error:
        _print_unknown(session, error)
        return UNKNOWN if strict else OK
    # A learner that has ended may still be saving its checkpoint.
    code = OK if any(process.state in ("alive", "ended") for process in present) else CRITICAL
    if session.as_json:
        here = [asdict(process) for process in present]
        session.print_json({"state": _STATE_NAMES[code].lower(), "run": run, "host": host, "here": here})
    else:
        states = ", ".join(map(_describe_participant, present))
        print(f"{_STATE_NAMES[code]}: {run} on {host}: {states or 'no learner or worker runs here'}")
    return code


def _describe_participant(process: Participant) -> str:
    seconds = process.last_seen_seconds
    return f"{process.name} {process.state}" + ("" if seconds is None else f" (last seen {age(seconds)} ago)")


def _check_run(session: Session, limits: FindingLimits, max_missed: int | None, since: float) -> int:
    """Print the state of the run with its findings, and return the exit code."""
    from rlbroker.ops.inspect.control_records import read_missed
    from rlbroker.ops.inspect.findings import Finding, group_findings, list_findings
    from rlbroker.ops.inspect.snapshot import take_snapshot

    with session.time_limit():
        snapshot = take_snapshot(session.connection, session.run)
        findings = list_findings(snapshot, limits)
        if max_missed is not None:
            _, records = read_missed(session.connection, session.keys, last_seconds=since)
            count = sum(record.count for record in records if record.what == "weights")
            if count > max_missed:
                missed = counted(count, "version was", "versions were")
                what = f"{missed} missed within {age(since)}; the limit is {max_missed:,}"
                hint = f"rlbroker missed --since {since:.0f}s"
                findings.append(Finding("warning", "too_many_missed", None, what, hint))
    codes = {"warning": WARNING, "critical": CRITICAL}
    code = max((codes[finding.severity] for finding in findings), default=OK)
    metrics = {
        "version": snapshot.version,
        "alive": snapshot.alive,
        "max_staleness": max((info.staleness for info in snapshot.members), default=0),
        "waiting": sum(status.waiting for status in snapshot.workers.values()),
        "missed": sum(status.missed.total for status in snapshot.workers.values()),
    }
    state = _STATE_NAMES[code]
    if session.as_json:
        found = [finding.to_json() for finding in findings]
        session.print_json({"state": state.lower(), "run": snapshot.run, **metrics, "findings": found})
        return code
    problems = counted(len(findings), "finding") if findings else "nothing is wrong"
    print(
        f"{state}: {snapshot.run}: {problems} |",
        *(f"{name}={value}" for name, value in metrics.items()),
    )
    for finding, other_workers in group_findings(findings):
        others = f"; {describe_other_workers(other_workers)}" if other_workers else ""
        hint = session.complete_hint(finding.hint)
        print(f"{finding.severity.upper()}: {sanitize(finding.what)} ({hint}){others}")
    return code
