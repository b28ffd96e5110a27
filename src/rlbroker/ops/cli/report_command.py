"""`rlbroker report`: a run as one page."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlbroker.ops.cli.formatting import age, counted, seconds_of, size
from rlbroker.ops.cli.session import Session, with_session


@with_session
def report(
    session: Session,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it; - for stdout.")] = Path(
        "report.html"
    ),
    since: Annotated[
        float | None,
        typer.Option(parser=seconds_of, metavar="SPAN", help="Only the last 90s, 15m, 1h … of its history."),
    ] = None,
) -> None:
    """Write a run as one HTML page, with everything in it: who ran what when, what was lost, and who waits for whom.

    It can be read without a network, sent to others and printed, and works after the run's end too. --json gives the
    figures instead. Exit code: 0, or 2 if the server or the run is not there, or the file cannot be written.

    Example: rlbroker report --run pong --output pong.html
    """
    from rlbroker.errors import InvalidArgument
    from rlbroker.ops.inspect.timeline import read_timeline
    from rlbroker.ops.report import require_extras

    if not session.as_json:
        require_extras()
        _check(output)
    with session.in_time():
        course = read_timeline(session.connection, session.run, span_seconds=since)
    if session.as_json:
        session.show_json(course.to_json())
        return
    from rlbroker.ops.report.render import render

    session.say(f"drawing {counted(len(course.samples), 'sample')} of {age(course.end - course.begin)}")
    page = render(course, typed=session.typed)
    if str(output) == "-":
        sys.stdout.write(page)
        return
    beside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        beside.write_text(page, encoding="utf-8")
        beside.replace(output)
    except OSError as error:
        raise InvalidArgument(f"the report cannot be written to {output}: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)
    session.say(f"{size(len(page.encode()))} in {output}")


def _check(output: Path) -> None:
    """Refuse, before anything is read and drawn, where nothing can be written."""
    from rlbroker.errors import InvalidArgument

    parent = output.absolute().parent
    if output.is_dir():
        raise InvalidArgument(f"the report cannot be written to {output}: it is a directory")
    if str(output) != "-" and not os.access(parent, os.W_OK):
        raise InvalidArgument(f"the report cannot be written to {output}: {parent} is no writable directory")
