"""How far a command is, on stderr: a bar on a terminal, and now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rlbroker.ops.cli.formatting import size
from rlbroker.ops.cli.session import Session

#: Where there is no terminal, a line says how far it is, at most so often.
LINE_SECONDS = 5.0

#: Is told how much is done by now.
Advance = Callable[[int], None]


@contextmanager
def progress(session: Session, what: str, total: int, unit: Literal["bytes", "workers"]) -> Iterator[Advance]:
    """Show how far something is, until the block ends; nothing with --quiet."""
    if session.quiet:
        yield lambda done: None
    elif sys.stderr.isatty():
        yield from _bar(session, what, total, unit)
    else:
        yield from _lines(session, what, total, unit)


def _bar(session: Session, what: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

    figures = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    console = Console(stderr=True, no_color=session.no_color or None)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), figures)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def _lines(session: Session, what: str, total: int, unit: str) -> Iterator[Advance]:
    last = time.monotonic()

    def advance(done: int) -> None:
        nonlocal last
        if done < total and time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            far = f"{size(done)} of {size(total)}" if unit == "bytes" else f"{done:,} of {total:,} {unit}"
            session.say(f"{what}: {far}")

    yield advance
