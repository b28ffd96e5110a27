"""Full-screen use of a terminal: shows lines, reads keys, and restores the terminal at the end."""

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

#: Switch to the alternate screen, hide the cursor and turn off line wrapping; and undo these.
_ENTER: Final = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
_LEAVE: Final = "\x1b[?7h\x1b[?25h\x1b[?1049l"

#: How long to wait for the rest of a key's escape sequence, which a slow connection may split.
_REST_SECONDS: Final = 0.05

#: Signals that end the command; its exit code is then 128 plus the number of the signal, as in shells.
_END_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)

#: Names of keys by the end of their escape sequence, after `ESC [` or `ESC O`; terminals differ.
_NAMED_KEYS: Final = {
    "A": "up",
    "B": "down",
    "C": "right",
    "D": "left",
    "H": "home",
    "F": "end",
    "1~": "home",
    "4~": "end",
    "5~": "page up",
    "6~": "page down",
    "7~": "home",
    "8~": "end",
}

#: Names of keys that send a control character.
_CONTROL_KEYS: Final = {"\r": "enter", "\n": "enter", "\x7f": "backspace", "\b": "backspace"}


class Terminal:
    """Stdin and stdout as keys and a screen, until the block ends. Ctrl-Z restores the terminal meanwhile."""

    def __init__(self) -> None:
        """Prepare; only entering the block changes the terminal."""
        self._in, self._out = sys.stdin.fileno(), sys.stdout.fileno()
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._rest = ""
        self._drawn: list[str] = []
        self._stale = True  #: whether the terminal no longer shows `_drawn`
        self._handlers: dict[int, Any] = {}
        self._settings: list[Any] = []
        self._wake_read, self._wake_write = -1, -1

    def __enter__(self) -> Self:
        """Take over the terminal, until the block ends."""
        self._wake_read, self._wake_write = os.pipe()
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)
        self._settings = termios.tcgetattr(self._in)
        # A signal must interrupt the wait for keys.
        self._wakeup_fd_before = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number, handler in self._signal_handlers().items():
            self._handlers[number] = signal.signal(number, handler)
        try:
            self._take_over()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the terminal."""
        for number in (signal.SIGINT, *self._handlers):  # a second Ctrl-C must not interrupt the restoring
            before = signal.signal(number, signal.SIG_IGN)
            self._handlers.setdefault(number, before)
        try:
            self._restore()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers.clear()
            signal.set_wakeup_fd(self._wakeup_fd_before)
            wake_read, wake_write = self._wake_read, self._wake_write
            self._wake_read = self._wake_write = -1
            os.close(wake_read)
            os.close(wake_write)

    @property
    def size(self) -> tuple[int, int]:
        """The current number of columns and lines."""
        try:
            columns, rows = os.get_terminal_size(self._out)
        except OSError:
            return 80, 24
        return columns or 80, rows or 24

    def wake(self) -> None:
        """End the wait for keys; may be called by another thread."""
        with suppress(OSError):  # the pipe is full, or the block has ended
            os.write(self._wake_write, b"\0")

    def read_keys(self, seconds: float) -> list[str]:
        """Wait up to `seconds` for keys, a signal or `wake`, and return the keys."""
        keys = self._read(seconds)
        while self._rest:  # the rest of an escape sequence arrives soon, or it was the key Esc
            keys += self._read(_REST_SECONDS)
        return keys

    def draw(self, lines: Sequence[str]) -> None:
        """Show these lines; send only those that changed."""
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
        ready, _, _ = select.select([self._in, self._wake_read], [], [], seconds)
        if self._wake_read in ready:
            with suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
        sent = b""
        if self._in in ready:
            with suppress(OSError):  # Linux raises this if the other end of the terminal is closed
                sent = os.read(self._in, 1024)
            if not sent:
                raise SystemExit(128 + signal.SIGHUP)
        keys, self._rest = parse_keys(self._rest + self._decode(sent), more=bool(sent))
        return keys

    def _send(self, text: str) -> None:
        left = memoryview(text.encode(sys.stdout.encoding or "utf-8", "replace"))
        while left:
            try:
                left = left[os.write(self._out, left) :]
            except BlockingIOError:
                select.select([], [self._out], [], 1.0)

    def _take_over(self) -> None:
        tty.setcbreak(self._in)
        self._stale = True
        self._send(_ENTER)

    def _restore(self) -> None:
        try:
            self._send(_LEAVE)
        finally:
            termios.tcsetattr(self._in, termios.TCSADRAIN, self._settings)

    def _signal_handlers(self) -> dict[int, Callable[[int, FrameType | None], None]]:
        return {
            signal.SIGWINCH: self._on_resize,
            signal.SIGTSTP: self._on_stop,
            **dict.fromkeys(_END_SIGNALS, _exit),
        }

    def _on_resize(self, number: int, stack: FrameType | None) -> None:
        # `draw` may be running, so do no more. The signal ends the wait for keys, and then the caller draws again.
        self._stale = True

    def _on_stop(self, number: int, stack: FrameType | None) -> None:
        """Restore the terminal, suspend the process, and take over the terminal when it continues."""
        self._restore()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)  # the process is suspended here
        signal.signal(signal.SIGTSTP, self._on_stop)
        self._take_over()


def _exit(number: int, stack: FrameType | None) -> None:
    raise SystemExit(128 + number)


def parse_keys(sent: str, *, more: bool = False) -> tuple[list[str], str]:
    """Return the keys in what the terminal sent, and the incomplete escape sequence at its end.

    Args:
        sent: what the terminal sent.
        more: whether the rest of an escape sequence may follow; if not, an ESC at the end is the key Esc.

    >>> parse_keys("q\\x1b[A\\x1b[6~ä\\r")
    (['q', 'up', 'page down', 'ä', 'enter'], '')
    >>> parse_keys("\\x1b[", more=True), parse_keys("\\x1b")
    (([], '\\x1b['), (['escape'], ''))
    """
    keys, at = list[str](), 0
    while at < len(sent):
        if sent[at] != "\x1b":
            keys.append(_CONTROL_KEYS.get(sent[at], sent[at]))
            at += 1
            continue
        end = _find_sequence_end(sent, at)
        if end is None:
            if more:
                return keys, sent[at:]
            end = len(sent)
        name = _NAMED_KEYS.get(sent[at + 2 : end], "") if end > at + 1 else "escape"
        keys += [name] if name else []
        at = end
    return keys, ""


def _find_sequence_end(sent: str, at: int) -> int | None:
    """Return the end of the escape sequence that begins at `at`; None if it is incomplete."""
    if at + 1 == len(sent):
        return None
    if sent[at + 1] not in "[O":
        return at + 1  # the key Esc, then another key
    for place in range(at + 2, len(sent)):
        if "@" <= sent[place] <= "~":
            return place + 1
    return None
