"""`rlbroker top`: shows a run live."""

from __future__ import annotations

import json
import sys
import threading
import time
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated

import typer

from rlbroker.errors import RlbrokerError
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import with_session

if TYPE_CHECKING:
    from rlbroker.ops.cli.top.key_bindings import ViewState
    from rlbroker.ops.cli.top.view import Outage
    from rlbroker.ops.inspect.watch import RunView, RunWatch

#: How often to draw while nothing happens, to update the age of a stale view.
REDRAW_SECONDS = 1.0

#: How late a reply may be before the server is reported as silent.
SILENT_SECONDS = 1.5

#: How long to wait at the end for a read that is in progress.
STOP_SECONDS = 1.0

#: The largest width of the table in a pipe.
PIPE_WIDTH = 160


@with_session
def top(
    session: Session,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600.0, help="Seconds between two refreshes.")
    ] = 0.5,
    sort: Annotated[
        str, typer.Option(metavar="COLUMN", help="Order by this column: id, stale, rate, lost, …")
    ] = "id",
    filter_: Annotated[
        str,
        typer.Option(
            "--filter",
            metavar="TEXT",
            help="Only workers with this id, or this text in state or process; alive or trouble selects that group.",
        ),
    ] = "",
) -> None:
    """Show a run live: rates, staleness, queues, what is wrong, and a table of its workers.

    `?` explains the keys, `q` quits. Without a terminal it prints the run once. --json prints one JSON object per line
    at each refresh, until Ctrl-C. It only reads from Redis. Exit code: 0, or 2 if the server or the run cannot be
    read.

    Example: rlbroker top --run pong --sort stale
    """
    from rlbroker.ops.cli.top.key_bindings import GROUPS, ViewState
    from rlbroker.ops.cli.top.table import SORT_COLUMNS
    from rlbroker.ops.inspect.watch import RunWatch

    if sort not in SORT_COLUMNS:
        raise typer.BadParameter(f"{sort!r} is not one of {', '.join(SORT_COLUMNS)}", param_hint="--sort")
    state = ViewState(
        sort=sort,
        interval=interval,
        group=filter_ if filter_ in GROUPS else "all",
        search="" if filter_ in GROUPS else filter_,
    )
    watch = RunWatch(session.connection, session.run)
    if session.as_json:
        _print_json_lines(session, watch, interval)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        _show_live(session, watch, state)
    else:
        _print_once(session, watch, state)


def _read_run(session: Session, watch: RunWatch) -> RunView:
    with session.time_limit():
        return watch.read()


def _print_json_lines(session: Session, watch: RunWatch, interval: float) -> None:
    due = time.monotonic()
    while True:
        print(json.dumps(_read_run(session, watch).to_json()), flush=True)
        due = max(due + interval, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


def _print_once(session: Session, watch: RunWatch, state: ViewState) -> None:
    """Print all workers once. The rates need two reads of the run."""
    from rlbroker.ops.cli.top.view import DrawOptions, draw_text

    _read_run(session, watch)
    time.sleep(state.interval)
    view = _read_run(session, watch)
    console = session.console
    options = DrawOptions(live=False, complete_hint=session.complete_hint)
    for pieces in draw_text(view, state, min(console.width, PIPE_WIDTH), options):
        console.print_pieces(pieces)


def _show_live(session: Session, watch: RunWatch, state: ViewState) -> None:
    from rlbroker.ops.cli.top.key_bindings import press_key
    from rlbroker.ops.cli.top.terminal import Terminal
    from rlbroker.ops.cli.top.view import DrawOptions, clamp_scroll, draw_screen

    # Read once before taking over the screen, so that an error is printed as usual.
    refresher = _Refresher(session, watch, _read_run(session, watch))
    with Terminal(colors=session.console.colors) as terminal:
        while not state.quit:
            view, outage = refresher.latest()
            columns, rows = terminal.size
            state = clamp_scroll(state, view, columns, rows)
            options = DrawOptions(complete_hint=session.complete_hint, outage=outage)
            terminal.draw(draw_screen(view, state, columns, rows, options))
            if key := terminal.read_key(REDRAW_SECONDS, partial(refresher.has_news, state)):
                state = press_key(state, key)
    refresher.close()


class _Refresher:
    """Reads the run in threads, so that keys work even while the server does not answer."""

    def __init__(self, session: Session, watch: RunWatch, view: RunView) -> None:
        self._session, self._watch = session, watch
        self._view, self._error = view, ""
        self._began = self._read_at = time.monotonic()
        self._thread: threading.Thread | None = None  #: the thread that reads, until its outcome is taken
        self._outcomes: SimpleQueue[RunView | Exception] = SimpleQueue()

    def has_news(self, state: ViewState) -> bool:
        """Begin to read the run if that is due; return whether a read has ended."""
        due = not state.paused and time.monotonic() - self._began >= state.interval
        if self._thread is None and due:
            self._began = time.monotonic()
            self._thread = threading.Thread(target=self._read, name="rlbroker-top", daemon=True)
            self._thread.start()
        return not self._outcomes.empty()

    def latest(self) -> tuple[RunView, Outage | None]:
        """Return the latest view, and the reason if it is stale."""
        from rlbroker.ops.cli.top.view import Outage

        if not self._outcomes.empty():
            outcome, self._thread = self._outcomes.get(), None
            if isinstance(outcome, RlbrokerError):
                self._error = str(outcome)
            elif isinstance(outcome, Exception):  # a bug in rlbroker
                raise outcome
            else:
                self._view, self._error, self._read_at = outcome, "", time.monotonic()
        silent = self._thread is not None and time.monotonic() - self._began > SILENT_SECONDS
        reason = self._error or (f"{self._session.connection.address} is silent" if silent else "")
        return self._view, Outage(time.monotonic() - self._read_at, reason) if reason else None

    def close(self) -> None:
        """Wait a little for a read that is in progress."""
        if self._thread:
            self._thread.join(STOP_SECONDS)

    def _read(self) -> None:
        try:
            self._outcomes.put(_read_run(self._session, self._watch))
        except Exception as error:  # noqa: BLE001 - the main thread shows or raises it
            self._outcomes.put(error)
