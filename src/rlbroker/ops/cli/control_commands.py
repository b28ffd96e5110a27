"""`rlbroker control`: send a command to the workers and watch their answers, and what was sent before."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlbroker.ops.cli.formatting import age, counted, plain, seconds_of, show_table
from rlbroker.ops.cli.progress import progress
from rlbroker.ops.cli.session import EXIT_INTERRUPTED, Session, with_session

if TYPE_CHECKING:
    from rlbroker.ops.inspect.sent_commands import SentCommand
    from rlbroker.ops.send_command import Command
    from rlbroker.types import Outcome

#: How often the answers are looked for.
LOOK_SECONDS = 0.1

#: Exit code if not every worker did it.
EXIT_NOT_DONE = 1

control = typer.Typer(
    name="control", no_args_is_help=True, help="Commands to the workers: send one, and what became of them."
)


@control.command("send")
@with_session
def send(
    session: Session,
    name: Annotated[
        str, typer.Argument(help="stop, pause, resume, reset, or a name for which workers have a handler.")
    ],
    data: Annotated[
        str | None, typer.Option(metavar="JSON", help='What the handler gets, such as {"duration": 5}.')
    ] = None,
    worker: Annotated[
        list[int] | None, typer.Option(min=0, help="To this worker; may be repeated. Else to all.")
    ] = None,
    expires: Annotated[
        float | None,
        typer.Option(parser=seconds_of, metavar="SPAN", help="A worker that reads it later leaves it; 30s."),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(parser=seconds_of, metavar="SPAN", help="How long to wait for the answers; 30s."),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Send it, and wait for nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also if the learner has ended or is away.")] = False,
) -> None:
    """Send a command to workers in the place of their learner, and watch the answers arrive.

    Without a learner that lives nobody settles the answers, so that needs --force; workers that live obey all the
    same. Ctrl-C ends the watching: the command stays sent. Unlike a command of the learner's own, it is not sent again
    to a server that has lost it.
    Exit code: 0 all workers did it, or --no-wait; 1 some did not (yet); 2 it could not be sent; 130 after Ctrl-C.

    Example: rlbroker control send pause --data '{"duration": 5}' --worker 0 --worker 3
    """
    from rlbroker.ops.send_command import send_command

    arguments = parse_arguments(data)
    with session.in_time():
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
    if not command:
        session.fail(f"nobody belongs to the run {session.run!r} at present; nothing was sent", EXIT_NOT_DONE)
    outcomes: dict[int, Outcome] = {}
    if not no_wait:
        try:
            outcomes = _watch(session, command, 30.0 if wait is None else wait)
        except KeyboardInterrupt:
            session.say(f"the command stays sent; {session.typed('rlbroker control list')} shows the answers")
            raise typer.Exit(EXIT_INTERRUPTED) from None
    _show_sent(session, command, outcomes, waited=not no_wait)
    if not no_wait and not all(outcomes.values()):
        raise typer.Exit(EXIT_NOT_DONE)


@control.command("list")
@with_session
def list_commands(
    session: Session,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many, the newest.")] = 20,
) -> None:
    """List the commands that were sent, newest last, and what became of them at how many workers.

    They are kept for about an hour, and until they are answered, but for a day at most.
    Exit code: 0, or 2 if the server or the run is not there.

    Example: rlbroker control list --run pong --count 5
    """
    from rlbroker.ops.inspect import sent_commands

    with session.in_time():
        found = sent_commands.list_commands(session.connection, session.keys, count=count)
    if session.as_json:
        session.show_json({"run": session.run, "commands": [_command_json(one) for one in found]})
        return
    if not found:
        session.say("no commands were sent lately")
    show_table(
        session.console,
        [
            {
                "ago": age(one.age_seconds),
                "id": plain(one.command_id),
                "command": plain(one.name),
                "arguments": plain(one.arguments),
                "outcomes": _sums(one.outcomes),
                "detail": _first_fault(one.outcomes),
            }
            for one in found
        ],
        left=("id", "command", "arguments", "outcomes", "detail"),
        spare=("id", "detail", "arguments"),
    )


def parse_arguments(data: str | None) -> Any:
    """Return the value of --data, which is JSON; without it None."""
    try:
        return None if data is None else json.loads(data)
    except ValueError as error:
        raise typer.BadParameter(
            f"""not JSON: {error}; such as '{{"duration": 5}}'""", param_hint="--data"
        ) from None


def _watch(session: Session, command: Command, seconds: float) -> dict[int, Outcome]:
    """Look for answers until all are there, or the time is over; give what there is."""
    from rlbroker.ops.send_command import look_at_command

    end = time.monotonic() + seconds
    workers = len(command.worker_ids)
    session.say(f"sent {plain(command.name)} to {counted(workers, 'worker')}")
    with progress(session, plain(command.name), workers, "workers") as advance:
        while True:
            with session.in_time():
                outcomes = look_at_command(session.connection, session.keys, command)
            answered = sum(one.state != "waiting" for one in outcomes.values())
            advance(answered)
            if answered == workers or time.monotonic() >= end:
                return outcomes
            time.sleep(LOOK_SECONDS)


def _show_sent(session: Session, command: Command, outcomes: Mapping[int, Outcome], *, waited: bool) -> None:
    if session.as_json:
        session.show_json(
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
        where = ", ".join(map(str, command.worker_ids))
        session.console.print(f"sent {plain(command.name)} as {command.id} to workers {where}")
        return
    show_table(
        session.console,
        [
            {"worker": str(worker), "outcome": one.state, "detail": plain(one.detail)}
            for worker, one in sorted(outcomes.items())
        ],
        left=("outcome", "detail"),
        style=_style,
    )
    if any(one.state == "waiting" for one in outcomes.values()):
        session.say(
            f"not all have answered; the command stays sent: {session.typed('rlbroker control list')}"
        )


def _style(column: str, cell: str) -> str:
    if column != "outcome" or cell == "done":
        return ""
    return "yellow" if cell == "waiting" else "red"


def _sums(outcomes: Mapping[int, Outcome]) -> str:
    states = Counter(one.state for one in outcomes.values())
    return ", ".join(f"{count:,} {state}" for state, count in states.items()) or "forgotten"


def _first_fault(outcomes: Mapping[int, Outcome]) -> str:
    """Give the first worker that did not do it, and why, or those that have not answered; the JSON has all."""
    for worker, one in outcomes.items():
        if one.state not in ("done", "waiting"):
            return f"worker {worker}: {one.state}" + (f", {plain(one.detail)}" if one.detail else "")
    waiting = [str(worker) for worker, one in outcomes.items() if one.state == "waiting"]
    return f"no answer from {', '.join(waiting[:8])}{' …' if len(waiting) > 8 else ''}" if waiting else ""


def _command_json(one: SentCommand) -> dict[str, Any]:
    return {
        "id": one.command_id,
        "name": one.name,
        "arguments": one.arguments,
        "sent": one.sent,
        "age_seconds": one.age_seconds,
        "states": dict(Counter(outcome.state for outcome in one.outcomes.values())),
        "outcomes": _outcomes_json(one.outcomes),
    }


def _outcomes_json(outcomes: Mapping[int, Outcome]) -> dict[str, dict[str, str]]:
    return {
        str(worker): {"state": one.state, "detail": one.detail} for worker, one in sorted(outcomes.items())
    }
