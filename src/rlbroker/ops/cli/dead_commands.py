"""`rlbroker dead`: list, show, retry and delete dead letters, the batches that no learner could use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlbroker.backend.text import age, counted
from rlbroker.ops.cli.exit_codes import EXIT_ERROR, EXIT_NOT_FOUND
from rlbroker.ops.cli.experiences_commands import contents_json, print_contents
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import with_session
from rlbroker.ops.formatting import format_bytes, sanitize

if TYPE_CHECKING:
    from rlbroker.backend.connection import Connection
    from rlbroker.backend.keys import Keys
    from rlbroker.types import DeadLetter

dead = typer.Typer(
    name="dead",
    no_args_is_help=True,
    help="Dead letters, the batches that no learner could use: list, show, retry or delete them.",
)

Worker = Annotated[int | None, typer.Option(min=0, help="Only those of this worker.")]
Ids = Annotated[
    list[str] | None, typer.Argument(metavar="[ID]…", help="Ids, as printed by `rlbroker dead list`.")
]


@dead.command("list")
@with_session
def list_dead(session: Session, worker: Worker = None) -> None:
    """List dead letters with worker, reason and age, oldest first.

    At most 1,000 of each worker are kept. Exit code: 0, or 2 if the server or the run cannot be read.

    Example: rlbroker dead list --worker 3
    """
    letters, now = _find_letters(session, worker, None)
    if session.as_json:
        session.print_json({"run": session.run, "dead": [_letter_json(letter, now) for letter in letters]})
        return
    if not letters:
        session.note("there are no dead letters")
        return
    session.console.print_table(
        [
            {
                "id": _id_of(letter),
                "reason": sanitize(letter.reason),
                "version": f"{letter.version:,}",
                "bytes": format_bytes(letter.stored_bytes),
                "deliveries": f"{letter.deliveries:,}",
                "died": f"{age(max(0.0, now - letter.died_at))} ago",
                "detail": sanitize(letter.detail),
            }
            for letter in letters
        ],
        text=("id", "reason", "detail"),
        optional=("deliveries", "version", "detail"),
    )
    oldest = _id_of(letters[0])
    session.note(f"to see the contents of one:  {session.complete_hint(f'rlbroker dead show {oldest}')}")
    session.note(f"to deliver it once more:     {session.complete_hint(f'rlbroker dead retry {oldest}')}")


@dead.command("show")
@with_session
def show_dead(session: Session, ids: Ids = None, worker: Worker = None) -> None:
    """Show dead letters in detail, with their contents as far as they can be decoded: by id, or all of a worker.

    Exit code: 0; 1 if an id does not exist (any more); 2 if the server or the run cannot be read.

    Example: rlbroker dead show 3/1795599266911-7
    """
    if not ids and worker is None:
        raise typer.BadParameter("name ids as printed by `rlbroker dead list`, or use --worker")
    from rlbroker.experience.dead_letters import letter_data
    from rlbroker.ops.inspect.queues import describe_batch

    letters, now = _find_letters(session, worker, ids)
    shown = []
    for letter in letters:
        with session.time_limit():
            data = letter_data(session.connection, session.keys, letter)
        if data is None:  # retried or deleted since it was found
            continue
        contents, problem = describe_batch(data)
        if session.as_json:
            more = {"problem": problem or None, "contents": contents_json(contents)}
            shown.append(_letter_json(letter, now) | more)
            continue
        session.console.print(
            f"{_id_of(letter)}: {sanitize(letter.reason)}, {age(max(0.0, now - letter.died_at))} ago, "
            f"delivery {letter.deliveries:,}, version {letter.version:,}, {format_bytes(letter.stored_bytes)}"
        )
        if letter.detail:
            session.console.print(f"    {sanitize(letter.detail)}")
        if problem and problem not in letter.detail:
            session.console.print(f"    does not decode: {sanitize(problem)}", style="red")
        print_contents(session, contents)
    if session.as_json:
        session.print_json({"run": session.run, "dead": shown})
    _fail_if_missing(session, ids, letters)


@dead.command("retry")
@with_session
def retry_dead(
    session: Session,
    ids: Ids = None,
    worker: Worker = None,
    every: Annotated[bool, typer.Option("--all", help="All of the run, or of --worker.")] = False,
) -> None:
    """Deliver dead letters once more: to the learner within seconds, or to the next one if there is none.

    Exit code: 0; 1 if an id does not exist (any more); 2 if the server or the run cannot be read.

    Example: rlbroker dead retry 3/1795599266911-7
    """
    if bool(ids) == (every or worker is not None):
        raise typer.BadParameter("name ids as printed by `rlbroker dead list`, or use --worker or --all")
    from rlbroker.ops.inspect.dead_letters import retry

    letters, _ = _find_letters(session, worker, ids)
    _apply(session, retry, letters, ids, "retried", "will be delivered once more")


@dead.command("purge")
@with_session
def purge_dead(
    session: Session,
    ids: Ids = None,
    worker: Worker = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete dead letters for good: by id, all of a worker, or all of the run. They stay counted as lost.

    It asks for confirmation; without a terminal, --yes is needed.
    Exit code: 0; 1 if an id does not exist (any more); 2 if not confirmed, or the run cannot be read.

    Example: rlbroker dead purge --worker 3
    """
    from rlbroker.ops.inspect.dead_letters import purge

    letters, _ = _find_letters(session, worker, ids)
    if letters and not yes:
        _confirm(session, letters)
    _apply(session, purge, letters, ids, "purged", "deleted")


def _apply(
    session: Session,
    action: Callable[[Connection, Keys, Sequence[DeadLetter]], int],
    letters: Sequence[DeadLetter],
    ids: list[str] | None,
    key: str,
    what: str,
) -> None:
    """Retry or purge dead letters, and print how many."""
    with session.time_limit():
        count = action(session.connection, session.keys, letters)
    if session.as_json:
        session.print_json({"run": session.run, key: count, "missing": _missing_ids(ids, letters)})
    else:
        session.console.print(f"{counted(count, 'dead letter')} {what}")
    _fail_if_missing(session, ids, letters)


def _find_letters(
    session: Session, worker: int | None, ids: list[str] | None
) -> tuple[list[DeadLetter], float]:
    """Return the selected letters, and the server's time at which they were read."""
    from rlbroker.ops.inspect.dead_letters import find_letters

    with session.time_limit():
        now = session.connection.clock(session.keys.meta)
        letters = find_letters(session.connection, session.keys, worker=worker, ids=ids or ())
    return letters, now


def _confirm(session: Session, letters: Sequence[DeadLetter]) -> None:
    stored_bytes = sum(letter.stored_bytes for letter in letters)
    what = f"{counted(len(letters), 'dead letter')} of {session.run} ({format_bytes(stored_bytes)})"
    if not sys.stdin.isatty():
        session.fail(f"this would delete {what}; confirm it with --yes", EXIT_ERROR)
    if not typer.confirm(f"Delete {what} for good?", err=True):
        session.fail("nothing was deleted", EXIT_ERROR)


def _missing_ids(ids: list[str] | None, letters: Sequence[DeadLetter]) -> list[str]:
    existing = {_id_of(letter) for letter in letters}
    return [name for name in ids or () if name not in existing]


def _fail_if_missing(session: Session, ids: list[str] | None, letters: Sequence[DeadLetter]) -> None:
    missing = _missing_ids(ids, letters)
    if missing:
        what = "is not a dead letter" if len(missing) == 1 else "are not dead letters"
        hint = session.complete_hint("rlbroker dead list")
        session.fail(f"{', '.join(map(sanitize, missing))} {what} (any more): {hint}", EXIT_NOT_FOUND)


def _id_of(letter: DeadLetter) -> str:
    from rlbroker.ops.inspect.dead_letters import letter_id

    return letter_id(letter)


def _letter_json(letter: DeadLetter, now: float) -> dict[str, Any]:
    names = (
        "incarnation",
        "sequence",
        "reason",
        "detail",
        "deliveries",
        "version",
        "stored_bytes",
        "died_at",
    )
    return {
        "id": _id_of(letter),
        "worker": letter.worker_id,
        **{name: getattr(letter, name) for name in names},
        "age_seconds": max(0.0, now - letter.died_at),
    }
