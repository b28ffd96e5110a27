"""Shows the progress of a command on stderr: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rlbroker.ops.cli.session import Session
from rlbroker.ops.formatting import format_bytes

#: The least time between two lines if stderr is not a terminal.
LINE_SECONDS = 5.0

#: A function that takes the amount done so far.
Advance = Callable[[int], None]


@contextmanager
def show_progress(
    session: Session, what: str, total: int, unit: Literal["bytes", "workers"]
) -> Iterator[Advance]:
    """Show progress until the block ends, unless --quiet is set."""
    if session.quiet:
        yield lambda done: None
    elif sys.stderr.isatty():
        yield from _show_bar(session, what, total, unit)
    else:
        yield from _print_lines(session, what, total, unit)


def _show_bar(session: Session, what: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    console = Console(stderr=True, no_color=session.no_color or None)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def _print_lines(session: Session, what: str, total: int, unit: str) -> Iterator[Advance]:
    last = time.monotonic()

    def advance(done: int) -> None:
        nonlocal last
        if done < total and time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            if unit == "bytes":
                amount = f"{format_bytes(done)} of {format_bytes(total)}"
            else:
                amount = f"{done:,} of {total:,} {unit}"
            session.note(f"{what}: {amount}")

    yield advance
