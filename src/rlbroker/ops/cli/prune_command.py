"""`rlbroker prune`: deletes the keys of dead runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from rlbroker.backend.text import age, counted
from rlbroker.ops.cli.exit_codes import EXIT_NOT_FOUND
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import parse_span, with_session
from rlbroker.ops.formatting import format_bytes

if TYPE_CHECKING:
    from rlbroker.ops.prune import PruneResult, RunVerdict

#: How long a run must have been silent by default.
OLDER_THAN_SECONDS = 3600.0


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
    """Delete dead runs: those in which no learner or worker was alive for an hour.

    A live run is never touched. A learner that opens a dead run meanwhile keeps it, or begins a new one. With --run
    only that run is deleted, without the wait if its learner has ended. If Ctrl-C interrupts the deletion, the same
    command completes it.
    Exit code: 0; 1 if a dead or named run was kept; 2 if the server cannot be read, or without confirmation.

    Example: rlbroker prune --dry-run
    """
    from rlbroker.ops.inspect.runs import choose_run
    from rlbroker.ops.prune import judge_runs

    seconds = OLDER_THAN_SECONDS if older_than is None else older_than
    verdicts = judge_runs(session.connection, older_than_seconds=seconds, run=run, named=run is not None)
    if run is not None and not verdicts:
        choose_run(session.connection, run)  # its error lists the runs that exist
    dead = [verdict for verdict in verdicts if verdict.dead]
    if not session.as_json:
        _print_runs(session, verdicts, dead, seconds)
    results: dict[str, PruneResult] = {}
    if dead and not dry_run and _is_confirmed(session, dead, yes=yes):
        results = _delete(session, dead, seconds, named=run is not None)
    if session.as_json:
        session.print_json(
            {
                "dry_run": dry_run,
                "runs": [_run_json(verdict, results.get(verdict.run)) for verdict in verdicts],
            }
        )
    kept = [result for result in results.values() if result.kept]
    for result in kept:
        session.note(f"the run {result.run} was kept, at least in part: {result.kept}")
    if kept or (run is not None and not dead):
        raise typer.Exit(EXIT_NOT_FOUND)


def _print_runs(
    session: Session, verdicts: list[RunVerdict], dead: list[RunVerdict], older_than_seconds: float
) -> None:
    for verdict in verdicts:
        if not verdict.dead:
            reason = verdict.why
            if verdict.silent_seconds is not None and not verdict.alive:
                reason += f" ({age(verdict.silent_seconds)})"
                if verdict.silent_seconds < older_than_seconds:
                    sooner = f"rlbroker prune --run {verdict.run} --older-than 0s"
                    reason += f"; to delete it now: {session.complete_hint(sooner)}"
            session.note(f"kept: {verdict.run}, as {reason}")
    if not dead:
        session.note(f"there is nothing to delete on {session.connection.address}")
    session.console.print_table(
        [
            {
                "run": verdict.run,
                "why": verdict.why,
                "silent": "" if verdict.silent_seconds is None else age(verdict.silent_seconds),
                "version": f"{verdict.version:,}",
                "keys": f"{len(verdict.names):,}",
                "size": "" if verdict.stored_bytes is None else format_bytes(verdict.stored_bytes),
            }
            for verdict in dead
        ],
        text=("run", "why"),
        optional=("version",),
    )


def _is_confirmed(session: Session, dead: list[RunVerdict], *, yes: bool) -> bool:
    from rlbroker.errors import InvalidArgument

    if yes:
        return True
    if session.as_json or not sys.stdin.isatty():
        raise InvalidArgument("nothing was deleted: confirm it with --yes, or list the runs with --dry-run")
    runs = f"{len(dead)} runs" if len(dead) > 1 else f"the run {dead[0].run}"
    return typer.confirm(f"Delete {runs} for good?", abort=True, err=True)


def _delete(
    session: Session, dead: list[RunVerdict], older_than_seconds: float, *, named: bool
) -> dict[str, PruneResult]:
    from rlbroker.ops.prune import prune as prune_run

    results = {}
    try:
        for verdict in dead:
            result = results[verdict.run] = prune_run(
                session.connection,
                verdict.run,
                verdict.names,
                older_than_seconds=older_than_seconds,
                named=named,
            )
            if not session.as_json and result.keys:
                session.console.print(f"deleted {verdict.run}: {counted(result.keys, 'key')}")
    except KeyboardInterrupt:
        session.note("interrupted; run the same command again to complete it")
        raise
    return results


def _run_json(verdict: RunVerdict, result: PruneResult | None) -> dict[str, object]:
    names = ("run", "state", "silent_seconds", "version", "dead", "why", "stored_bytes")
    return {
        **{name: getattr(verdict, name) for name in names},
        "keys": len(verdict.names),
        "deleted_keys": result.keys if result else 0,
        "kept": result.kept if result else "",
    }
