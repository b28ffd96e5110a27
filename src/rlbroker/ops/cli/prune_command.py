"""`rlbroker prune`: deletes the keys that dead runs left on a server."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from rlbroker.backend.text import age, counted
from rlbroker.ops.cli.exit_codes import EXIT_NOT_FOUND
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import with_session
from rlbroker.ops.formatting import format_bytes, parse_span

if TYPE_CHECKING:
    from rlbroker.ops.prune import PruneResult, StaleRun

#: How long a run must have been silent by default.
OLDER_THAN_SECONDS = 3600.0

#: Progress is printed each time this many keys more are done.
KEYS_PER_LINE = 100_000


@with_session(without=("run",))
def prune(
    session: Session,
    run: Annotated[str | None, typer.Option(help="Only this run; RLBROKER_RUN is ignored.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    older_than: Annotated[
        float | None,
        typer.Option(
            parser=parse_span, metavar="SPAN", help="Only runs silent for this long; by default 1h."
        ),
    ] = None,
) -> None:
    """Delete dead runs: the learner has ended or is away, no worker is alive, and all were silent for an hour.

    A live run is never touched; if a learner opens a dead run meanwhile, it keeps the run or begins a new one. With
    --run only that run is deleted, at once if its learner has ended. If Ctrl-C interrupts the deletion, the same
    command completes it.
    Exit code: 0; 1 if a run that should go was kept; 2 if the server cannot be read, or without confirmation.

    Example: rlbroker prune --dry-run
    """
    from rlbroker.ops.inspect.runs import choose_run
    from rlbroker.ops.prune import find_stale_runs

    seconds = OLDER_THAN_SECONDS if older_than is None else older_than
    found = find_stale_runs(
        session.connection,
        older_than_seconds=seconds,
        run=run,
        named=run is not None,
        progress=_note_progress(session, "examined"),
    )
    if run is not None and not found:
        choose_run(session.connection, run)  # its error lists the runs that exist
    dead = [stale for stale in found if stale.dead]
    if not session.as_json:
        _print_runs(session, found, dead)
    results: dict[str, PruneResult] = {}
    if dead and not dry_run and _is_confirmed(session, dead, yes=yes):
        results = _delete(session, dead, seconds, named=run is not None)
    if session.as_json:
        session.print_json(
            {"dry_run": dry_run, "runs": [_run_json(stale, results.get(stale.run)) for stale in found]}
        )
    kept = [result for result in results.values() if result.kept]
    for result in kept:
        session.note(f"the run {result.run} was not deleted, or only partly: {result.kept}")
    if kept or (run is not None and not dead):
        raise typer.Exit(EXIT_NOT_FOUND)


def _print_runs(session: Session, found: list[StaleRun], dead: list[StaleRun]) -> None:
    for stale in found:
        if not stale.dead:
            session.note(f"kept: {stale.run}, as {stale.why}{_silence(stale)}")
    if not dead:
        session.note(f"there is nothing to delete on {session.connection.address}")
    session.console.print_table(
        [
            {
                "run": stale.run,
                "why": stale.why,
                "silent": "" if stale.silent_seconds is None else age(stale.silent_seconds),
                "version": f"{stale.version:,}",
                "keys": f"{len(stale.names):,}",
                "size": "" if stale.stored_bytes is None else format_bytes(stale.stored_bytes),
            }
            for stale in dead
        ],
        text=("run", "why"),
        optional=("version",),
    )


def _silence(stale: StaleRun) -> str:
    if stale.silent_seconds is None or "live" in stale.why:
        return ""
    return f" ({age(stale.silent_seconds)})"


def _is_confirmed(session: Session, dead: list[StaleRun], *, yes: bool) -> bool:
    from rlbroker.errors import InvalidArgument

    if yes:
        return True
    if session.as_json or not sys.stdin.isatty():
        raise InvalidArgument("nothing was deleted: confirm it with --yes, or list the runs with --dry-run")
    runs = f"{len(dead)} runs" if len(dead) > 1 else f"the run {dead[0].run}"
    return typer.confirm(f"Delete {runs} for good?", abort=True, err=True)


def _delete(
    session: Session, dead: list[StaleRun], older_than_seconds: float, *, named: bool
) -> dict[str, PruneResult]:
    from rlbroker.ops.prune import prune as prune_run

    results = {}
    try:
        for stale in dead:
            result = results[stale.run] = prune_run(
                session.connection,
                stale.run,
                stale.names,
                older_than_seconds=older_than_seconds,
                named=named,
                progress=_note_progress(session, f"of {stale.run} deleted"),
            )
            if not session.as_json and result.keys:
                session.console.print(f"deleted {stale.run}: {counted(result.keys, 'key')}")
    except KeyboardInterrupt:
        session.note("interrupted; run the same command again to complete it")
        raise
    return results


def _note_progress(session: Session, what: str) -> Callable[[int], None]:
    """Return a function that takes a number of keys, and prints it once per `KEYS_PER_LINE`."""
    lines = 0

    def progress(count: int) -> None:
        nonlocal lines
        if count // KEYS_PER_LINE > lines:
            lines = count // KEYS_PER_LINE
            session.note(f"… {count:,} keys {what}")

    return progress


def _run_json(stale: StaleRun, result: PruneResult | None) -> dict[str, object]:
    return {
        "run": stale.run,
        "state": stale.state,
        "silent_seconds": stale.silent_seconds,
        "version": stale.version,
        "dead": stale.dead,
        "why": stale.why,
        "keys": len(stale.names),
        "stored_bytes": stale.stored_bytes,
        "deleted_keys": result.keys if result else 0,
        "kept": result.kept if result else "",
    }
