"""`rlbroker report`: writes a run as one HTML page."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlbroker.backend.text import age, counted
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import parse_span, with_session
from rlbroker.ops.formatting import format_bytes


@with_session
def report(
    session: Session,
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the page; - for stdout.")] = Path(
        "report.html"
    ),
    since: Annotated[
        float | None,
        typer.Option(parser=parse_span, metavar="SPAN", help="Only the last 90s, 15m, 1h … of the history."),
    ] = None,
) -> None:
    """Write a run as one self-contained HTML page: versions by worker and time, losses, throughput and waits.

    The page needs no network, and a run that has ended can still be reported. --json prints the data instead.
    Exit code: 0, or 2 if the run cannot be read or the file cannot be written.

    Example: rlbroker report --run pong --output pong.html
    """
    from rlbroker.ops.inspect.timeline import read_timeline
    from rlbroker.ops.report import require_extras

    if not session.as_json:
        require_extras()
        _check_writable(output)
    with session.time_limit():
        timeline = read_timeline(session.connection, session.run, span_seconds=since)
    if session.as_json:
        session.print_json(timeline.to_json())
        return
    from rlbroker.ops.report.render import render

    session.note(
        f"drawing {counted(len(timeline.samples), 'sample')} of {age(timeline.end - timeline.begin)}"
    )
    page = render(timeline, complete_hint=session.complete_hint)
    if str(output) == "-":
        sys.stdout.buffer.write(page.encode())  # the page says that it is UTF-8
        return
    _write_page(output, page)
    session.note(f"{format_bytes(len(page.encode()))} in {output}")


def _check_writable(output: Path) -> None:
    """Raise `InvalidArgument` if the file cannot be written, before the work of making the page."""
    from rlbroker.errors import InvalidArgument

    parent = output.absolute().parent
    if output.is_dir():
        raise InvalidArgument(f"the report cannot be written to {output}: it is a directory")
    if str(output) != "-" and not os.access(parent, os.W_OK):
        raise InvalidArgument(
            f"the report cannot be written to {output}: {parent} is not a writable directory"
        )


def _write_page(output: Path, page: str) -> None:
    """Write the file whole or not at all."""
    from rlbroker.errors import InvalidArgument

    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(output)
    except OSError as error:
        raise InvalidArgument(f"the report cannot be written to {output}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
