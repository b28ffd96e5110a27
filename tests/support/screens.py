"""A terminal for a full-screen command: sends keys, reads the screen, and checks that it is restored."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import pyte
from executable import environment


class _Scrolling(pyte.Screen):
    """A screen that can be scrolled by several lines, which curses sends and pyte lacks."""

    def scroll_up(self, count: int = 1) -> None:
        _, bottom = self.margins or (0, self.lines - 1)
        place, self.cursor.y = self.cursor.y, bottom
        for _ in range(count or 1):
            self.index()
        self.cursor.y = place

    def scroll_down(self, count: int = 1) -> None:
        top, _ = self.margins or (0, self.lines - 1)
        place, self.cursor.y = self.cursor.y, top
        for _ in range(count or 1):
            self.reverse_index()
        self.cursor.y = place


class _Stream(pyte.ByteStream):
    csi = pyte.ByteStream.csi | {"S": "scroll_up", "T": "scroll_down"}


class Screen:
    """A process with a controlling terminal of its own, and what the terminal shows."""

    def __init__(self, command: Sequence[str], columns: int, rows: int, **more: str) -> None:
        """Start a command, with more environment variables."""
        self._controller, self._terminal = pty.openpty()
        self._screen = _Scrolling(columns, rows)
        self._stream = _Stream(self._screen)
        self.sent = b""
        self._set_size(columns, rows)
        self.settings: list[Any] = termios.tcgetattr(self._terminal)
        self.process = subprocess.Popen(
            command,
            env=environment(**{"TERM": "screen-256color"} | more),
            stdin=self._terminal,
            stdout=self._terminal,
            stderr=self._terminal,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._controller)
        os.close(self._terminal)

    @property
    def lines(self) -> list[str]:
        """The lines of the screen, without trailing spaces."""
        return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def restored(self) -> bool:
        """Whether the terminal is restored: settings, main screen and cursor."""
        last = max(self.sent.rfind(b"\x1b[?1049l"), 0)
        shown = self.sent.rfind(b"\x1b[?25h") > self.sent.rfind(b"\x1b[?25l")
        left = last > self.sent.rfind(b"\x1b[?1049h")
        return left and shown and bool(termios.tcgetattr(self._terminal) == self.settings)

    def type(self, keys: str) -> None:
        os.write(self._controller, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        self._screen.resize(rows, columns)
        self._set_size(columns, rows)

    def until(self, what: str, condition: Callable[[], Any], timeout_seconds: float = 10.0) -> Any:
        """Read what the process sends until the condition holds, and return the value of the condition."""
        end = time.monotonic() + timeout_seconds
        while True:
            self._read()
            found = condition()
            if found:
                return found
            assert time.monotonic() < end, f"timed out waiting until {what}:\n{self.text}"

    def shows(self, text: str) -> None:
        """Wait until the screen shows this text."""
        self.until(f"it shows {text!r}", lambda: text in self.text)

    def ends(self) -> int:
        """Wait until the process ends, and return its exit code."""
        self.until("it ends", lambda: self.process.poll() is not None)
        self._read()
        return self.process.returncode

    def _read(self) -> None:
        ready, _, _ = select.select([self._controller], [], [], 0.02)
        if ready:
            part = os.read(self._controller, 1 << 16)
            self.sent += part
            self._stream.feed(part)

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._controller, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
