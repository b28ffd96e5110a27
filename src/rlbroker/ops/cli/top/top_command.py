"""`rlbroker top`: a run, live."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Self

import typer

from rlbroker.errors import RlbrokerError
from rlbroker.ops.cli.session import Session, with_session

if TYPE_CHECKING:
    from rlbroker.ops.cli.top.key_bindings import State
    from rlbroker.ops.cli.top.view import Trouble
    from rlbroker.ops.inspect.watch import RunView, RunWatch

#: How often the age of a view that is old is shown anew.
AGE_SECONDS = 1.0

#: How much later than it should a look may come before that is said.
SILENT_SECONDS = 1.5

#: How long the end waits for a look that is under way.
END_SECONDS = 1.0


@with_session
def top(
    session: Session,
    interval: Annotated[float, typer.Option(min=0.1, max=3600.0, help="Seconds between two looks.")] = 0.5,
    sort: Annotated[
        str, typer.Option(metavar="COLUMN", help="Order by this column: id, stale, rate, lost, …")
    ] = "id",
    filter_: Annotated[
        str,
        typer.Option(
            "--filter",
            metavar="TEXT",
            help="Only workers with this id, or this in state or process; or 'trouble'.",
        ),
    ] = "",
) -> None:
    """Show a run as it goes on: rates, staleness, queues and what is wrong; and its workers, ordered as you like.

    `?` explains the keys, `q` ends. Without a terminal it looks twice and prints once; with --json it prints an
    object on a line of its own for each look, until Ctrl-C. Reading changes nothing. Exit code: 0, or 2 if the server
    or the run is not there.

    Example: rlbroker top --run pong --sort stale
    """
    from rlbroker.ops.cli.top.key_bindings import SHOWN, State
    from rlbroker.ops.cli.top.table import SORTS
    from rlbroker.ops.inspect.watch import RunWatch

    if sort not in SORTS:
        raise typer.BadParameter(f"{sort!r} is none of {', '.join(SORTS)}", param_hint="--sort")
    state = State(
        sort=sort,
        interval=interval,
        shown=filter_ if filter_ in SHOWN else "all",
        text="" if filter_ in SHOWN else filter_,
    )
    watch = RunWatch(session.connection, session.run)
    if session.as_json:
        _print_looks(session, watch, interval)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        _live(session, watch, state)
    else:
        _print_once(session, watch, state)


def _look(session: Session, watch: RunWatch) -> RunView:
    with session.in_time():
        return watch.look()


def _print_looks(session: Session, watch: RunWatch, interval: float) -> None:
    due = time.monotonic()
    while True:
        print(json.dumps(_look(session, watch).to_json()), flush=True)
        due = max(due + interval, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


def _print_once(session: Session, watch: RunWatch, state: State) -> None:
    """Look twice, as rates are differences, and print all workers."""
    from rlbroker.ops.cli.top.view import Look, page

    _look(session, watch)
    time.sleep(state.interval)
    view = _look(session, watch)
    console = session.console
    for line in page(
        view, state, min(console.width, 160), Look(console.colors, live=False, typed=session.typed)
    ):
        console.print(line)


def _live(session: Session, watch: RunWatch, state: State) -> None:
    from rlbroker.ops.cli.top.key_bindings import pressed
    from rlbroker.ops.cli.top.terminal import Terminal
    from rlbroker.ops.cli.top.view import Look, frame, settled

    colors = session.console.colors
    view = _look(session, watch)  # what is wrong with server or run is said as by any command
    with Terminal() as terminal, _Looks(session, watch, view, state.interval, terminal.wake) as looks:
        while True:
            view, trouble = looks.newest()
            columns, rows = terminal.size
            state = settled(state, view, columns, rows)
            look = Look(colors=colors, typed=session.typed, trouble=trouble)
            terminal.draw(frame(view, state, columns, rows, look))
            for key in terminal.keys(AGE_SECONDS):
                state = settled(pressed(state, key), view, columns, rows)
                if state.over:
                    return
            looks.pace(state.interval, paused=state.paused)


class _Looks:
    """Looks in the background, so that keys are obeyed while a server does not answer."""

    def __init__(
        self, session: Session, watch: RunWatch, view: RunView, interval: float, changed: Callable[[], None]
    ) -> None:
        self._session, self._watch, self._interval, self._changed = session, watch, interval, changed
        self._view, self._problem, self._at = view, "", time.monotonic()
        self._paused = self._over = False
        self._mistake: Exception | None = None
        self._turn = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="rlbroker-top", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._turn:
            self._over = True
            self._turn.notify()
        self._thread.join(END_SECONDS)

    def newest(self) -> tuple[RunView, Trouble | None]:
        """Give what was seen last, and what is the matter if that is old."""
        from rlbroker.ops.cli.top.view import Trouble

        with self._turn:
            if self._mistake is not None:
                raise self._mistake
            seconds = time.monotonic() - self._at
            silent = not self._paused and seconds > self._interval + SILENT_SECONDS
            problem = self._problem or (f"{self._session.connection.address} is silent" if silent else "")
            return self._view, Trouble(seconds, problem) if problem else None

    def pace(self, interval: float, *, paused: bool) -> None:
        """Look as often as this, or not at all."""
        with self._turn:
            if (interval, paused) != (self._interval, self._paused):
                self._interval, self._paused = interval, paused
                self._at = time.monotonic() if not self._problem else self._at
                self._turn.notify()

    def _work(self) -> None:
        began = time.monotonic()
        while self._wait(began):
            began = time.monotonic()
            try:
                view = _look(self._session, self._watch)
            except RlbrokerError as error:
                with self._turn:
                    self._problem = str(error)
            except Exception as error:  # noqa: BLE001 - a mistake of ours, which the command is to end with
                with self._turn:
                    self._mistake = error
            else:
                with self._turn:
                    self._view, self._problem, self._at = view, "", time.monotonic()
            self._changed()

    def _wait(self, began: float) -> bool:
        """Wait for the next turn to look; give whether there is one."""
        with self._turn:
            while not self._over and self._mistake is None:
                left = began + self._interval - time.monotonic()
                if left <= 0 and not self._paused:
                    return True
                self._turn.wait(None if self._paused else left)
            return False
