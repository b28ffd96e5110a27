"""Shows the progress of a command as a bar, if stderr is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rlbroker.ops.cli.session import Session

#: A function that takes the amount done so far.
Advance = Callable[[int], None]


@contextmanager
def show_progress(
    session: Session, what: str, total: int, unit: Literal["bytes", "workers"]
) -> Iterator[Advance]:
    """Show progress on a terminal until the block ends, unless --quiet is set."""
    if session.quiet or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    console = Console(stderr=True, no_color=session.no_color or None)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
