"""A terminal for a command that fills it: what it shows, what is typed, and how it is left."""

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


class Screen:
    """A process on a terminal of its own, as its controlling one, and what a person would see on it."""

    def __init__(self, command: Sequence[str], columns: int, rows: int, **more: str) -> None:
        """Start a command; more variables can be given."""
        self._ours, self._theirs = pty.openpty()
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self.sent = b""
        self._size(columns, rows)
        self.settings: list[Any] = termios.tcgetattr(self._theirs)
        self.process = subprocess.Popen(
            command,
            env=environment(**{"TERM": "xterm-256color"} | more),
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
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
        os.close(self._ours)
        os.close(self._theirs)

    @property
    def lines(self) -> list[str]:
        """What is to be seen, without spaces at the ends of lines."""
        return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def restored(self) -> bool:
        """Whether the terminal is as it was: its settings, its own screen, and its cursor."""
        last = max(self.sent.rfind(b"\x1b[?1049l"), 0)
        shown = self.sent.rfind(b"\x1b[?25h") > self.sent.rfind(b"\x1b[?25l")
        left = last > self.sent.rfind(b"\x1b[?1049h")
        return left and shown and bool(termios.tcgetattr(self._theirs) == self.settings)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        self._screen.resize(rows, columns)
        self._size(columns, rows)

    def until(self, what: str, condition: Callable[[], Any], timeout_seconds: float = 10.0) -> Any:
        """Take in what the process sends until a condition holds, and give its value."""
        end = time.monotonic() + timeout_seconds
        while True:
            self._take_in()
            found = condition()
            if found:
                return found
            assert time.monotonic() < end, f"waited in vain until {what}:\n{self.text}"

    def shows(self, text: str) -> None:
        """Wait until this is to be seen."""
        self.until(f"it shows {text!r}", lambda: text in self.text)

    def ends(self) -> int:
        """Wait until the process ends, and give its exit code."""
        self.until("it ends", lambda: self.process.poll() is not None)
        self._take_in()
        return self.process.returncode

    def _take_in(self) -> None:
        ready, _, _ = select.select([self._ours], [], [], 0.02)
        if ready:
            part = os.read(self._ours, 1 << 16)
            self.sent += part
            self._stream.feed(part)

    def _size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
