"""`rlbroker control`: send commands to the workers, and list those that were sent."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlbroker.backend.text import age, counted
from rlbroker.ops.cli.exit_codes import EXIT_INTERRUPTED
from rlbroker.ops.cli.progress import show_progress
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import parse_span, with_session
from rlbroker.ops.formatting import sanitize

if TYPE_CHECKING:
    from rlbroker.control.commands import Command
    from rlbroker.ops.inspect.control_records import SentCommand
    from rlbroker.types import Outcome

#: Interval between two reads of the workers' answers.
POLL_SECONDS = 0.1

#: Exit code if at least one worker did not do the command.
EXIT_NOT_DONE = 1

#: How many of the workers without an answer a table names.
WAITING_SHOWN = 8

control = typer.Typer(
    name="control", no_args_is_help=True, help="Send commands to the workers, and list the commands sent."
)


@control.command("send")
@with_session
def send(
    session: Session,
    name: Annotated[
        str,
        typer.Argument(help="stop, pause, resume, reset, or a name that the workers handle."),
    ],
    data: Annotated[
        str | None, typer.Option(metavar="JSON", help='Data for the handler, such as {"duration": 5}.')
    ] = None,
    worker: Annotated[
        list[int] | None, typer.Option(min=0, help="Only this worker; may be repeated. By default all.")
    ] = None,
    expires: Annotated[
        float | None,
        typer.Option(
            parser=parse_span,
            metavar="SPAN",
            help="Workers that read the command later than this ignore it; by default it does not expire.",
        ),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(
            parser=parse_span, metavar="SPAN", help="How long to wait for the answers; by default 30s."
        ),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait for the answers.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Send even if the learner has ended or is away.")
    ] = False,
) -> None:
    """Send a command to workers on behalf of their learner, and show the answers as they arrive.

    Without a live learner no process records the answers, so --force is needed; the workers apply the command.
    A stop to all workers, without --expires, ends the run: workers that join later stop too, until a learner opens the
    run again.
    Ctrl-C ends the wait, and the command stays sent. If the server loses it, it is not sent again, unlike a command of
    the learner.
    Exit code: 0 all workers did it, or --no-wait; 1 some did not, or not yet; 2 it could not be sent; 130 after Ctrl-C.

    Example: rlbroker control send pause --data '{"duration": 5}' --worker 0 --worker 3
    """
    from rlbroker.control.commands import ends_run
    from rlbroker.ops.send_command import send_command

    arguments = parse_arguments(data)
    with session.time_limit():
        command = send_command(
            session.connection,
            session.keys,
            name,
            arguments,
            worker or None,
            expires_seconds=expires,
            also_without_learner=force,
            key=session.signing_key,
        )
    if ends_run(name, worker or None, expires):
        session.note("the run has ended: workers that join later stop too, until a learner opens it again")
    elif not command:
        session.fail(f"the run {session.run!r} has no workers; nothing was sent", EXIT_NOT_DONE)
    outcomes: dict[int, Outcome] = {}
    if not no_wait:
        try:
            outcomes = _wait_for_answers(session, command, 30.0 if wait is None else wait)
        except KeyboardInterrupt:
            hint = session.complete_hint("rlbroker control list")
            session.note(f"the command stays sent; to see the answers: {hint}")
            raise typer.Exit(EXIT_INTERRUPTED) from None
    _print_outcomes(session, command, outcomes, waited=not no_wait)
    if not no_wait and not all(outcomes.values()):
        raise typer.Exit(EXIT_NOT_DONE)


@control.command("list")
@with_session
def list_commands(
    session: Session,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many of the newest to list.")] = 20,
) -> None:
    """List the newest commands, newest last, with their outcomes.

    A command is listed for about an hour, and for up to a day while answers are missing.
    Exit code: 0, or 2 if the server or the run cannot be read.

    Example: rlbroker control list --run pong --count 5
    """
    from rlbroker.ops.inspect import control_records

    with session.time_limit():
        commands = control_records.list_commands(session.connection, session.keys, count=count)
    if session.as_json:
        session.print_json({"run": session.run, "commands": [_command_json(command) for command in commands]})
        return
    if not commands:
        session.note("no commands are recorded")
    session.console.print_table(
        [
            {
                "ago": age(command.age_seconds),
                "id": sanitize(command.command_id),
                "command": sanitize(command.name),
                "arguments": sanitize(command.arguments),
                "outcomes": _count_states(command.outcomes),
                "detail": _describe_problem(command.outcomes),
            }
            for command in commands
        ],
        text=("id", "command", "arguments", "outcomes", "detail"),
        optional=("id", "detail", "arguments"),
    )


def parse_arguments(data: str | None) -> Any:
    """Return the value of the JSON text of --data; None without it."""
    try:
        return None if data is None else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(
            f"""not JSON: {error}; write it as '{{"duration": 5}}'""", param_hint="--data"
        ) from None


def _wait_for_answers(session: Session, command: Command, seconds: float) -> dict[int, Outcome]:
    """Return the outcomes when all workers have answered, or after this time."""
    from rlbroker.ops.send_command import read_outcomes

    end = time.monotonic() + seconds
    workers = len(command.worker_ids)
    session.note(f"sent {sanitize(command.name)} to {counted(workers, 'worker')}")
    with show_progress(session, sanitize(command.name), workers, "workers") as advance:
        while True:
            with session.time_limit():
                outcomes = read_outcomes(session.connection, session.keys, command)
            answered = sum(outcome.state != "waiting" for outcome in outcomes.values())
            advance(answered)
            if answered == workers or time.monotonic() >= end:
                return outcomes
            time.sleep(POLL_SECONDS)


def _print_outcomes(
    session: Session, command: Command, outcomes: Mapping[int, Outcome], *, waited: bool
) -> None:
    if session.as_json:
        session.print_json(
            {
                "run": session.run,
                "id": command.id,
                "name": command.name,
                "workers": list(command.worker_ids),
                "outcomes": _outcomes_json(outcomes) if waited else None,
                "done": waited and all(outcomes.values()),
            }
        )
        return
    if not waited:
        workers = ", ".join(map(str, command.worker_ids))
        session.console.print(f"sent {sanitize(command.name)} as {command.id} to workers {workers}")
        return
    session.console.print_table(
        [
            {"worker": str(worker), "outcome": outcome.state, "detail": sanitize(outcome.detail)}
            for worker, outcome in sorted(outcomes.items())
        ],
        text=("outcome", "detail"),
        style=_cell_style,
    )
    if any(outcome.state == "waiting" for outcome in outcomes.values()):
        hint = session.complete_hint("rlbroker control list")
        session.note(f"some workers have not answered; the command stays sent; to see later answers: {hint}")


def _cell_style(column: str, cell: str) -> str:
    if column != "outcome" or cell == "done":
        return ""
    return "yellow" if cell == "waiting" else "red"


def _count_states(outcomes: Mapping[int, Outcome]) -> str:
    states = Counter(outcome.state for outcome in outcomes.values())
    return ", ".join(f"{count:,} {state}" for state, count in states.items()) or "forgotten"


def _describe_problem(outcomes: Mapping[int, Outcome]) -> str:
    """Return the first worker that did not do it, with the reason, or else the workers without an answer."""
    for worker, outcome in outcomes.items():
        if outcome.state not in ("done", "waiting"):
            reason = f", {sanitize(outcome.detail)}" if outcome.detail else ""
            return f"worker {worker}: {outcome.state}{reason}"
    waiting = [str(worker) for worker, outcome in outcomes.items() if outcome.state == "waiting"]
    if not waiting:
        return ""
    return (
        f"no answer from {', '.join(waiting[:WAITING_SHOWN])}{' …' if len(waiting) > WAITING_SHOWN else ''}"
    )


def _command_json(command: SentCommand) -> dict[str, Any]:
    return {
        "id": command.command_id,
        "name": command.name,
        "arguments": command.arguments,
        "sent": command.sent,
        "age_seconds": command.age_seconds,
        "states": dict(Counter(outcome.state for outcome in command.outcomes.values())),
        "outcomes": _outcomes_json(command.outcomes),
    }


def _outcomes_json(outcomes: Mapping[int, Outcome]) -> dict[str, dict[str, str]]:
    return {
        str(worker): {"state": outcome.state, "detail": outcome.detail}
        for worker, outcome in sorted(outcomes.items())
    }
