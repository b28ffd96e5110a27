"""`rlbroker check`: whether a run is well, for monitoring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rlbroker.cli.session import Session, with_session
from rlbroker.cli.text import age, counted, plain, seconds_of, the_same_of

if TYPE_CHECKING:
    from rlbroker.observer.findings import Limits

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
) -> None:
    """Say in one line whether a run is well, and what is wrong in further ones, as monitoring plugins do.

    Exit code: 0 all is well; 1 warning; 2 critical; 3 nobody can say, as the server or the run cannot be read.

    Example: rlbroker check --run pong --staleness 20 --min-workers 8
    """
    from rlbroker.errors import RlbrokerError
    from rlbroker.observer.findings import Limits

    try:
        code = _check(session, Limits(staleness, queue, min_workers), max_missed, since or 3600.0)
    except RlbrokerError as error:
        code = UNKNOWN
        if session.as_json:
            session.show_json({"state": "unknown", "error": str(error)})
        else:
            print(f"UNKNOWN: {error}")
        session.explain()
    raise typer.Exit(code)


def _check(session: Session, limits: Limits, max_missed: int | None, since: float) -> int:

    from rlbroker.observer.findings import Finding, find, gather
    from rlbroker.observer.missed import read_missed
    from rlbroker.observer.snapshot import take_snapshot

    with session.in_time():
        snapshot = take_snapshot(session.connection, session.run)
        findings = find(snapshot, limits)
        if max_missed is not None:
            _, records = read_missed(session.connection, session.keys, last_seconds=since)
            count = sum(one.count for one in records if one.what == "weights")
            if count > max_missed:
                what = f"{count:,} versions were missed within {age(since)}; {max_missed:,} may be"
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
