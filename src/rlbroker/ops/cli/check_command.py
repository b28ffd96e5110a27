"""`rlbroker check`: whether a run is well, for monitoring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rlbroker.ops.cli.formatting import age, counted, plain, seconds_of, the_same_of
from rlbroker.ops.cli.session import Session, with_session

if TYPE_CHECKING:
    from rlbroker.ops.inspect.findings import FindingLimits

#: What monitoring plugins end with.
OK, WARNING, CRITICAL, UNKNOWN = range(4)
_WORDS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")


@with_session
def check(
    session: Session,
    staleness: Annotated[
        int, typer.Option(min=1, help="A worker so many versions behind is spoken of.")
    ] = 10,
    min_workers: Annotated[
        int | None,
        typer.Option(min=0, help="Fewer workers alive are spoken of; as many as the learner expects."),
    ] = None,
    queue: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="A queue that is full to this share is spoken of.")
    ] = 0.9,
    max_missed: Annotated[
        int | None,
        typer.Option(min=0, help="More versions missed in --since, of all workers together, are spoken of."),
    ] = None,
    since: Annotated[
        float | None, typer.Option(parser=seconds_of, metavar="SPAN", help="Time for --max-missed; 1h.")
    ] = None,
    of_self: Annotated[
        bool, typer.Option("--self", help="Only whether the learner or a worker of this host is alive.")
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="With --self: 3, not 0, where nobody can say, as it may be the server."
        ),
    ] = False,
) -> None:
    """Say in one line whether a run is well, and what is wrong in further ones, as monitoring plugins do.

    With --self, as a container's health check or a probe of Kubernetes: whether the learner or a worker of the run
    that is on this host, by its name, is alive. A server that does not answer is no reason to restart every
    container at once, so that is UNKNOWN and ends with 0, unless --strict.

    Exit code: 0 all is well; 1 warning; 2 critical; 3 nobody can say, as the server or the run cannot be read.
    With --self: 0 alive, or nobody can say; 2 silent for longer than its lease, nobody of the run is here, or wrong
    use.

    Example: rlbroker check --run pong --staleness 20 --min-workers 8
    """
    from rlbroker.errors import InvalidArgument, RlbrokerError
    from rlbroker.ops.inspect.findings import FindingLimits

    if of_self:
        raise typer.Exit(_check_self(session, strict=strict))
    if strict:
        raise InvalidArgument("--strict needs --self")
    try:
        code = _check(session, FindingLimits(staleness, queue, min_workers), max_missed, since or 3600.0)
    except RlbrokerError as error:
        code = UNKNOWN
        _show_unknown(session, error)
    raise typer.Exit(code)


def _show_unknown(session: Session, error: Exception) -> None:
    if session.as_json:
        session.show_json({"state": "unknown", "error": str(error)})
    else:
        print(f"UNKNOWN: {plain(str(error))}")
    session.explain()


def _check_self(session: Session, *, strict: bool) -> int:
    """Say whether anybody of the run is alive on this host, and give the exit code.

    Who lived here before may still be known, such as a worker whose process was started again and has another id now:
    one that is alive is enough.
    """
    import socket
    from dataclasses import asdict

    from rlbroker.config import run_name
    from rlbroker.errors import InvalidArgument, RlbrokerError, UsageError
    from rlbroker.ops.inspect.liveness import find_present

    run, host = session.named_run, socket.gethostname()
    if run is None:  # the only one would do until somebody begins another
        raise InvalidArgument("--self needs the name of the run: set RLBROKER_RUN, or give --run")
    run_name(run)
    try:
        with session.in_time():
            present = find_present(session.connection, run, host)
    except UsageError:  # it would not work at any other time either
        raise
    except RlbrokerError as error:
        _show_unknown(session, error)
        return UNKNOWN if strict else OK
    # A learner that has ended has yet to save what it has learned.
    code = OK if any(one.state in ("alive", "ended") for one in present) else CRITICAL
    if session.as_json:
        here = [asdict(one) for one in present]
        session.show_json({"state": _WORDS[code].lower(), "run": run, "host": host, "here": here})
    else:
        states = [
            f"{one.name} {one.state}"
            + ("" if one.last_seen_seconds is None else f" (heard of {age(one.last_seen_seconds)} ago)")
            for one in present
        ]
        print(f"{_WORDS[code]}: {run} on {host}: {', '.join(states) or 'no learner or worker is here'}")
    return code


def _check(session: Session, limits: FindingLimits, max_missed: int | None, since: float) -> int:

    from rlbroker.ops.inspect.findings import Finding, find, gather
    from rlbroker.ops.inspect.missed_updates import read_missed
    from rlbroker.ops.inspect.snapshot import take_snapshot

    with session.in_time():
        snapshot = take_snapshot(session.connection, session.run)
        findings = find(snapshot, limits)
        if max_missed is not None:
            _, records = read_missed(session.connection, session.keys, last_seconds=since)
            count = sum(one.count for one in records if one.what == "weights")
            if count > max_missed:
                missed = counted(count, "version was", "versions were")
                what = f"{missed} missed within {age(since)}; {max_missed:,} may be"
                hint = f"rlbroker missed --since {since:.0f}s"
                findings.append(Finding("warning", "too_many_missed", None, what, hint))
    code = max(({"warning": WARNING, "critical": CRITICAL}[one.severity] for one in findings), default=OK)
    figures = {
        "version": snapshot.pointer.version if snapshot.pointer else 0,
        "alive": sum(info.state == "alive" for info in snapshot.members),
        "max_staleness": max((info.staleness for info in snapshot.members), default=0),
        "waiting": sum(one.counts.waiting for one in snapshot.workers.values() if one.counts),
        "missed": sum(one.missed.total for one in snapshot.workers.values()),
    }
    if session.as_json:
        found = [one.to_json() for one in findings]
        session.show_json({"state": _WORDS[code].lower(), "run": snapshot.run, **figures, "findings": found})
    else:
        problems = counted(len(findings), "finding") if findings else "nothing is wrong"
        print(
            f"{_WORDS[code]}: {snapshot.run}: {problems} |",
            *(f"{name}={value}" for name, value in figures.items()),
        )
        for one, others in gather(findings):
            more = f"; {the_same_of(others)}" if others else ""
            print(f"{one.severity.upper()}: {plain(one.what)} ({session.typed(one.hint)}){more}")
    return code
