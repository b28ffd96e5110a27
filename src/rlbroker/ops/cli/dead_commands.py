"""`rlbroker dead`: batches that no learner could use: looked at, tried again, and deleted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlbroker.ops.cli.experiences_commands import contents_json, show_contents
from rlbroker.ops.cli.formatting import age, counted, plain, show_table, size
from rlbroker.ops.cli.session import EXIT_NOT_FOUND, Session, with_session

if TYPE_CHECKING:
    from rlbroker.types import DeadLetter

#: Exit code if it was not confirmed.
EXIT_REFUSED = 2

dead = typer.Typer(
    name="dead",
    no_args_is_help=True,
    help="Batches that no learner could use (dead letters): look at them, try them again, delete them.",
)

Worker = Annotated[int | None, typer.Option(min=0, help="Only this worker's.")]
Names = Annotated[
    list[str] | None, typer.Argument(metavar="[ID]…", help="As `rlbroker dead list` prints it.")
]


@dead.command("list")
@with_session
def list_dead(session: Session, worker: Worker = None) -> None:
    """List dead batches: whose, why, and since when. Oldest first.

    At most 1,000 of each worker are kept. Exit code: 0, or 2 if the server or the run is not there.

    Example: rlbroker dead list --worker 3
    """
    letters, now = _letters(session, worker, None)
    if session.as_json:
        session.show_json({"run": session.run, "dead": [_letter_json(one, now) for one in letters]})
        return
    if not letters:
        session.say("there are no dead batches")
        return
    show_table(
        session.console,
        [
            {
                "id": _name(one),
                "reason": plain(one.reason),
                "version": f"{one.version:,}",
                "bytes": size(one.stored_bytes),
                "deliveries": f"{one.deliveries:,}",
                "died": f"{age(max(0.0, now - one.died_at))} ago",
                "detail": plain(one.detail),
            }
            for one in letters
        ],
        left=("id", "reason", "detail"),
        spare=("deliveries", "version", "detail"),
    )
    session.say(f"what one holds: {session.typed(f'rlbroker dead show {_name(letters[0])}')}")
    session.say(f"once more:      {session.typed(f'rlbroker dead retry {_name(letters[0])}')}")


@dead.command("show")
@with_session
def show_dead(session: Session, names: Names = None, worker: Worker = None) -> None:
    """Show dead batches in detail, with what they hold as far as it can be read: by their ids, or all of a worker.

    Exit code: 0; 1 if one of them is not there (any more); 2 if the server or the run is not there.

    Example: rlbroker dead show 3/1795599266911-7
    """
    if not names and worker is None:
        raise typer.BadParameter("say which: ids as `rlbroker dead list` prints them, or --worker")
    from rlbroker.ops.inspect.batch_shapes import shape_of
    from rlbroker.ops.inspect.dead_letters import letter_data

    letters, now = _letters(session, worker, names)
    shown = []
    for one in letters:
        with session.in_time():
            data = letter_data(session.connection, session.keys, one)
        if data is None:  # it was tried again or deleted meanwhile
            continue
        contents, problem = shape_of(data)
        if session.as_json:
            more = {"problem": problem or None, "contents": contents_json(contents)}
            shown.append(_letter_json(one, now) | more)
            continue
        session.console.print(
            f"{_name(one)}: {plain(one.reason)}, {age(max(0.0, now - one.died_at))} ago, "
            f"delivery {one.deliveries:,}, version {one.version:,}, {size(one.stored_bytes)}"
        )
        if one.detail:
            session.console.print(f"    {plain(one.detail)}")
        if problem and problem not in one.detail:
            session.console.print(f"    does not decode: {plain(problem)}", style="red")
        show_contents(session, contents)
    if session.as_json:
        session.show_json({"run": session.run, "dead": shown})
    _end(session, names, letters)


@dead.command("retry")
@with_session
def retry_dead(
    session: Session,
    names: Names = None,
    worker: Worker = None,
    every: Annotated[bool, typer.Option("--all", help="All of the run, or of --worker.")] = False,
) -> None:
    """Have dead batches delivered once more: the learner collects them within seconds, or the next one.

    Exit code: 0; 1 if one of them is not there (any more); 2 if the server or the run is not there.

    Example: rlbroker dead retry 3/1795599266911-7
    """
    if bool(names) == (every or worker is not None):
        raise typer.BadParameter("say which: ids as `rlbroker dead list` prints them, or --worker, or --all")
    from rlbroker.ops.inspect.dead_letters import retry

    letters, _ = _letters(session, worker, names)
    with session.in_time():
        done = retry(session.connection, session.keys, letters)
    if session.as_json:
        session.show_json({"run": session.run, "retried": done, "missing": _missing(names, letters)})
    else:
        session.console.print(f"{_batches(done)} will be delivered once more")
    _end(session, names, letters)


@dead.command("purge")
@with_session
def purge_dead(
    session: Session,
    names: Names = None,
    worker: Worker = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete dead batches for good: by their ids, or all of a worker, or all. They stay counted as lost.

    It asks first; where there is no terminal, --yes is needed.
    Exit code: 0; 1 if one of them is not there (any more); 2 if it was not confirmed, or the run is not there.

    Example: rlbroker dead purge --worker 3
    """
    from rlbroker.ops.inspect.dead_letters import purge

    letters, _ = _letters(session, worker, names)
    if letters and not yes:
        _confirm(session, letters)
    with session.in_time():
        done = purge(session.connection, session.keys, letters)
    if session.as_json:
        session.show_json({"run": session.run, "purged": done, "missing": _missing(names, letters)})
    else:
        session.console.print(f"{_batches(done)} deleted")
    _end(session, names, letters)


def _letters(session: Session, worker: int | None, names: list[str] | None) -> tuple[list[DeadLetter], float]:
    """Give the letters that are meant, and when that was."""
    from rlbroker.ops.inspect.dead_letters import find_letters

    with session.in_time():
        now = session.connection.clock(session.keys.meta)
        found = find_letters(session.connection, session.keys, worker=worker, names=names or ())
    return found, now


def _confirm(session: Session, letters: Sequence[DeadLetter]) -> None:
    stored_bytes = sum(one.stored_bytes for one in letters)
    what = f"{_batches(len(letters))} of {session.run} ({size(stored_bytes)})"
    if not sys.stdin.isatty():
        session.fail(f"this would delete {what}; --yes does it", EXIT_REFUSED)
    if not typer.confirm(f"Delete {what} for good?", err=True):
        session.fail("nothing was deleted", EXIT_REFUSED)


def _missing(names: list[str] | None, letters: Sequence[DeadLetter]) -> list[str]:
    there = {_name(one) for one in letters}
    return [name for name in names or () if name not in there]


def _end(session: Session, names: list[str] | None, letters: Sequence[DeadLetter]) -> None:
    """End with a message if something that was asked for is not there."""
    missing = _missing(names, letters)
    if missing:
        are = "is no dead batch" if len(missing) == 1 else "are no dead batches"
        hint = session.typed("rlbroker dead list")
        session.fail(f"{', '.join(map(plain, missing))} {are} (any more): {hint}", EXIT_NOT_FOUND)


def _name(letter: DeadLetter) -> str:
    from rlbroker.ops.inspect.dead_letters import name_of

    return name_of(letter)


def _batches(count: int) -> str:
    return counted(count, "dead batch", "dead batches")


def _letter_json(one: DeadLetter, now: float) -> dict[str, Any]:
    return {
        "id": _name(one),
        "worker": one.worker_id,
        "incarnation": one.incarnation,
        "sequence": one.sequence,
        "reason": one.reason,
        "detail": one.detail,
        "deliveries": one.deliveries,
        "version": one.version,
        "stored_bytes": one.stored_bytes,
        "died_at": one.died_at,
        "age_seconds": max(0.0, now - one.died_at),
    }
