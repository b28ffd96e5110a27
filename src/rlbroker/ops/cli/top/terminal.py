"""The terminal of `rlbroker top`, by curses: shows lines, reads keys, and is restored at the end and by Ctrl-Z."""

from __future__ import annotations

import curses
import locale
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, Final, Self

from rlbroker.errors import UsageError
from rlbroker.ops.cli.styled_text import Piece

#: The longest wait before looking for a resized terminal or a new view.
_POLL_SECONDS: Final = 0.05

#: How long to wait for the rest of a key's escape sequence, which a slow connection may split.
_REST_MILLISECONDS: Final = 50

#: Signals that end the command; its exit code is then 128 plus the number of the signal, as in shells.
_END_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)

#: Names of keys that are no printable character.
_KEYS: Final[dict[int | str, str]] = {
    curses.KEY_UP: "up",
    curses.KEY_DOWN: "down",
    curses.KEY_LEFT: "left",
    curses.KEY_RIGHT: "right",
    curses.KEY_HOME: "home",
    curses.KEY_END: "end",
    curses.KEY_PPAGE: "page up",
    curses.KEY_NPAGE: "page down",
    **dict.fromkeys(("\r", "\n", curses.KEY_ENTER), "enter"),
    **dict.fromkeys(("\x7f", "\b", curses.KEY_BACKSPACE), "backspace"),
    "\x1b": "escape",
}

_COLORS: Final = ("red", "green", "yellow", "blue", "magenta", "cyan")


class Terminal:
    """Stdin and stdout as keys and a screen, until the block ends."""

    def __init__(self, *, colors: bool) -> None:
        """Prepare; only entering the block changes the terminal."""
        self._colors = colors
        self._attributes = {"": 0}
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take over the terminal, until the block ends.

        Raises:
            UsageError: curses does not know this type of terminal, or it is not able to move the cursor.
        """
        locale.setlocale(locale.LC_ALL, "")
        for name in (
            "LINES",
            "COLUMNS",
        ):  # with these, which readline sets too, curses would never see a new size
            os.environ.pop(name, None)
        try:
            curses.setupterm()
            known = curses.tigetstr("cup")  # moves the cursor
        except curses.error:
            known = None
        if not known:
            raise UsageError(
                "curses cannot draw on a terminal of this type; set TERM=xterm, or use `rlbroker status --watch`"
            )
        for number in _END_SIGNALS:
            self._handlers[number] = signal.signal(number, _exit)
        self._screen = curses.initscr()
        try:
            self._set_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the terminal."""
        for number in (signal.SIGINT, *self._handlers):  # a second Ctrl-C must not interrupt the restoring
            before = signal.signal(number, signal.SIG_IGN)
            self._handlers.setdefault(number, before)
        with suppress(curses.error):
            curses.endwin()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def size(self) -> tuple[int, int]:
        """The current number of columns and lines."""
        rows, columns = self._screen.getmaxyx()
        return columns, rows

    def draw(self, lines: Sequence[Sequence[Piece]]) -> None:
        """Show these lines, which must fit; curses sends only what changed."""
        encoding = self._screen.encoding
        self._screen.erase()
        for row, pieces in enumerate(lines):
            with suppress(curses.error):  # after the last character of the screen the cursor has no place
                self._screen.move(row, 0)
                for text, style in pieces:
                    shown = text.encode(encoding, "replace").decode(encoding)
                    self._screen.addstr(shown, self._attribute(style))
        self._screen.refresh()

    def read_key(self, seconds: float, is_due: Callable[[], bool]) -> str:
        """Return the name of the next key; an empty text after this time, if the terminal was resized, or if due."""
        end = time.monotonic() + seconds
        while not is_due() and time.monotonic() < end:
            ready, _, _ = select.select([sys.stdin], [], [], _POLL_SECONDS)
            try:
                key = self._screen.get_wch()
            except curses.error:
                if ready:  # the other end of the terminal is closed
                    raise SystemExit(128 + signal.SIGHUP) from None
                continue
            if key == curses.KEY_RESIZE:  # the terminal may have moved what it shows: draw all anew
                self._screen.clearok(True)
            return _KEYS.get(key, key if isinstance(key, str) else "")
        return ""

    def _set_up(self) -> None:
        curses.noecho()
        curses.cbreak()
        curses.set_escdelay(_REST_MILLISECONDS)
        with suppress(curses.error):  # some terminals cannot hide the cursor
            curses.curs_set(0)
        self._screen.keypad(True)
        self._screen.nodelay(True)
        self._colors = self._colors and curses.has_colors()
        if not self._colors:
            return
        curses.start_color()
        curses.use_default_colors()
        self._attributes |= {"bold": curses.A_BOLD, "dim": curses.A_DIM, "reverse": curses.A_REVERSE}
        for number, color in enumerate(_COLORS, start=1):  # the number of the colour is that of its pair
            curses.init_pair(number, number, -1)
            self._attributes[color] = curses.color_pair(number)

    def _attribute(self, style: str) -> int:
        attribute = 0
        for word in style.split():
            attribute |= self._attributes.get(word, 0)
        return attribute


def _exit(number: int, stack: FrameType | None) -> None:
    raise SystemExit(128 + number)
