"""`rlbroker prune`: deletes what dead runs left on a server."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from rlbroker.ops.cli.formatting import age, counted, seconds_of, show_table, size
from rlbroker.ops.cli.session import EXIT_NOT_FOUND, Session, with_session

if TYPE_CHECKING:
    from rlbroker.ops.prune import Pruned
    from rlbroker.ops.stale_runs import StaleRun

#: How long nobody of a run must have been heard of, unless it is said otherwise.
OLDER_THAN_SECONDS = 3600.0

#: Each so many keys something is said.
KEYS_BETWEEN_LINES = 100_000


@with_session
def prune(
    session: Session,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    older_than: Annotated[
        float | None,
        typer.Option(parser=seconds_of, metavar="SPAN", help="Only what was silent for so long; 1h."),
    ] = None,
) -> None:
    """Delete what dead runs left: those whose learner ended or is away, and of which nobody was heard for an hour.

    A run that lives is never touched, and a learner that opens a run meanwhile keeps it, or begins a new one. With
    --run only that run; if its learner has ended, at once. After Ctrl-C the same command finishes what it began.
    Exit code: 0; 1 if something was not deleted that was to be; 2 if the server is not there, or nobody said yes.

    Example: rlbroker prune --dry-run
    """
    from rlbroker.ops.inspect.runs import choose_run
    from rlbroker.ops.stale_runs import find_stale_runs

    seconds, run = OLDER_THAN_SECONDS if older_than is None else older_than, session.asked_run
    found = find_stale_runs(
        session.connection,
        older_than_seconds=seconds,
        run=run,
        named=run is not None,
        progress=_lines(session, "looked at"),
    )
    if run is not None and not found:
        choose_run(session.connection, run)  # names those that exist
    dead = [one for one in found if one.dead]
    if not session.as_json:
        _show(session, found, dead)
    done: dict[str, Pruned] = {}
    if dead and not dry_run and _agreed(session, dead, yes=yes):
        done = _delete(session, dead, seconds, named=run is not None)
    if session.as_json:
        session.show_json({"dry_run": dry_run, "runs": [_json(one, done.get(one.run)) for one in found]})
    kept = [one for one in done.values() if one.kept]
    for one in kept:
        session.say(f"the run {one.run} was not deleted, or not all of it: {one.kept}")
    if kept or (run is not None and not dead):
        raise typer.Exit(EXIT_NOT_FOUND)


def _show(session: Session, found: list[StaleRun], dead: list[StaleRun]) -> None:
    for one in found:
        if not one.dead:
            session.say(f"kept: {one.run}, as {one.why}{_silent(one)}")
    if not dead:
        session.say(f"there is nothing to delete on {session.connection.address}")
    show_table(
        session.console,
        [
            {
                "run": one.run,
                "why": one.why,
                "silent": "" if one.silent_seconds is None else age(one.silent_seconds),
                "version": f"{one.version:,}",
                "keys": f"{len(one.names):,}",
                "size": "" if one.stored_bytes is None else size(one.stored_bytes),
            }
            for one in dead
        ],
        left=("run", "why"),
        spare=("version",),
    )


def _silent(one: StaleRun) -> str:
    return "" if one.silent_seconds is None or "live" in one.why else f" ({age(one.silent_seconds)})"


def _agreed(session: Session, dead: list[StaleRun], *, yes: bool) -> bool:
    from rlbroker.errors import InvalidArgument

    if yes:
        return True
    if session.as_json or not sys.stdin.isatty():
        raise InvalidArgument("nothing was deleted: say --yes to delete it, or --dry-run to only look")
    runs = f"{len(dead)} runs" if len(dead) > 1 else f"the run {dead[0].run}"
    return typer.confirm(f"Delete {runs} for ever?", abort=True, err=True)


def _delete(
    session: Session, dead: list[StaleRun], older_than_seconds: float, *, named: bool
) -> dict[str, Pruned]:
    from rlbroker.ops.prune import prune as prune_run

    done = {}
    try:
        for one in dead:
            done[one.run] = prune_run(
                session.connection,
                one.run,
                one.names,
                older_than_seconds=older_than_seconds,
                named=named,
                progress=_lines(session, f"of {one.run} deleted"),
            )
            if not session.as_json and done[one.run].keys:
                session.console.print(f"deleted {one.run}: {counted(done[one.run].keys, 'key')}")
    except KeyboardInterrupt:
        session.say("interrupted; the same command finishes it")
        raise
    return done


def _lines(session: Session, what: str) -> Callable[[int], None]:
    """Say each so many keys how far it is."""
    said = 0

    def progress(count: int) -> None:
        nonlocal said
        if count // KEYS_BETWEEN_LINES > said:
            said = count // KEYS_BETWEEN_LINES
            session.say(f"… {count:,} keys {what}")

    return progress


def _json(one: StaleRun, done: Pruned | None) -> dict[str, object]:
    return {
        "run": one.run,
        "state": one.state,
        "silent_seconds": one.silent_seconds,
        "version": one.version,
        "dead": one.dead,
        "why": one.why,
        "keys": len(one.names),
        "stored_bytes": one.stored_bytes,
        "deleted_keys": done.keys if done else 0,
        "kept": done.kept if done else "",
    }
