"""A terminal that a command fills: its other screen, keys and size; and at the end it is as it was."""

from __future__ import annotations

import codecs
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, Final, Self

from rlbroker.ops.cli.top.keyboard import keys

#: The other screen, without a cursor, and without wrapping of long lines; and back.
_ENTER: Final = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
_LEAVE: Final = "\x1b[?7h\x1b[?25h\x1b[?1049l"

#: How long the rest of a key may take: a slow line cuts what a key sends into two.
_REST_SECONDS: Final = 0.05

#: What ends the command, as a shell has it: 128 and the number of the signal.
_ENDS: Final = (signal.SIGTERM, signal.SIGHUP)


class Terminal:
    """Stdin and stdout as a screen and keys, while the block lasts, and through Ctrl-Z."""

    def __init__(self) -> None:
        """Prepare; the terminal is not touched yet."""
        self._in, self._out = sys.stdin.fileno(), sys.stdout.fileno()
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._rest = ""
        self._drawn: list[str] = []
        self._stale = True  #: what the terminal shows is not what was drawn
        self._handlers: dict[int, Any] = {}
        self._before: list[Any] = []
        self._wake_out, self._wake_in = -1, -1

    def __enter__(self) -> Self:
        """Take the terminal; whatever ends the block gives it back."""
        self._wake_out, self._wake_in = os.pipe()
        for end in (self._wake_out, self._wake_in):
            os.set_blocking(end, False)
        self._before = termios.tcgetattr(self._in)
        # A signal wakes whoever waits for keys.
        self._wakeup_before = signal.set_wakeup_fd(self._wake_in, warn_on_full_buffer=False)
        for number, handler in self._handling().items():
            self._handlers[number] = signal.signal(number, handler)
        try:
            self._take()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Give the terminal back as it was."""
        for number in (signal.SIGINT, *self._handlers):  # a second Ctrl-C must not come between
            before = signal.signal(number, signal.SIG_IGN)
            self._handlers.setdefault(number, before)
        try:
            self._give_back()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers.clear()
            signal.set_wakeup_fd(self._wakeup_before)
            wake_out, wake_in, self._wake_out, self._wake_in = self._wake_out, self._wake_in, -1, -1
            os.close(wake_out)
            os.close(wake_in)

    @property
    def size(self) -> tuple[int, int]:
        """Its columns and lines, now."""
        try:
            columns, rows = os.get_terminal_size(self._out)
        except OSError:
            return 80, 24
        return columns or 80, rows or 24

    def wake(self) -> None:
        """End the wait for keys, from another thread."""
        with suppress(OSError):  # it is awake, or is over
            os.write(self._wake_in, b"\0")

    def keys(self, seconds: float) -> list[str]:
        """Wait for keys, a signal or `wake`; give the keys.

        Args:
            seconds: to wait at most.
        """
        found = self._read(seconds)
        while self._rest:  # what follows an ESC comes with it, or it was that key
            found += self._read(_REST_SECONDS)
        return found

    def draw(self, lines: Sequence[str]) -> None:
        """Show these lines; only those that changed are sent."""
        parts = []
        if self._stale:
            self._stale, self._drawn = False, []
            parts.append("\x1b[2J")
        for row, line in enumerate(lines, start=1):
            if row > len(self._drawn) or self._drawn[row - 1] != line:
                parts.append(f"\x1b[{row};1H{line}\x1b[K")
        if len(lines) < len(self._drawn):
            parts.append(f"\x1b[{len(lines) + 1};1H\x1b[J")
        self._drawn = list(lines)
        if parts:
            self._send("".join(parts))

    def _read(self, seconds: float) -> list[str]:
        ready, _, _ = select.select([self._in, self._wake_out], [], [], seconds)
        if self._wake_out in ready:
            with suppress(BlockingIOError):
                os.read(self._wake_out, 4096)
        sent = b""
        if self._in in ready:
            with suppress(OSError):  # so Linux says that the other end of a terminal is gone
                sent = os.read(self._in, 1024)
            if not sent:
                raise SystemExit(128 + signal.SIGHUP)
        found, self._rest = keys(self._rest + self._decode(sent), more=bool(sent))
        return found

    def _send(self, text: str) -> None:
        left = memoryview(text.encode())
        while left:
            try:
                left = left[os.write(self._out, left) :]
            except BlockingIOError:
                select.select([], [self._out], [], 1.0)

    def _take(self) -> None:
        tty.setcbreak(self._in)
        self._stale = True
        self._send(_ENTER)

    def _give_back(self) -> None:
        try:
            self._send(_LEAVE)
        finally:
            termios.tcsetattr(self._in, termios.TCSADRAIN, self._before)

    def _handling(self) -> dict[int, Callable[[int, FrameType | None], None]]:
        return {
            signal.SIGWINCH: self._resized,
            signal.SIGTSTP: self._stop,
            **dict.fromkeys(_ENDS, _end),
        }

    def _resized(self, number: int, where: FrameType | None) -> None:
        # Not more than that: it may be amid a `draw`. Whoever waits for keys is woken, and draws again.
        self._stale = True

    def _stop(self, number: int, where: FrameType | None) -> None:
        """Give the terminal back, be stopped as by any Ctrl-Z, and take it again when the shell lets us go on."""
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)  # here it stops
        signal.signal(signal.SIGTSTP, self._stop)
        self._take()


def _end(number: int, where: FrameType | None) -> None:
    raise SystemExit(128 + number)
