"""Stdout for people: as wide as the terminal, and in colours where they are wanted.

It is what little these commands need of rich, which takes a fifth of a second to start.
"""

from __future__ import annotations

import shutil
from typing import TextIO

from rlbroker.config import colors_wanted
from rlbroker.ops.cli.styled_text import styled


class Console:
    """Where a command prints what it found."""

    def __init__(self, file: TextIO, *, no_color: bool = False, other_width: int = 1000) -> None:
        """Take a file as it is now; a terminal may be resized later.

        Args:
            file: where to print.
            no_color: whether to do without colours, also where NO_COLOR does not ask for that.
            other_width: columns where there is no terminal.
        """
        self._file = file
        terminal = file.isatty()
        self.width = shutil.get_terminal_size().columns if terminal else other_width
        self.colors = terminal and colors_wanted() and not no_color

    def print(self, text: str = "", style: str = "") -> None:
        """Print a line."""
        print(styled(text, style if self.colors else ""), file=self._file)

    def clear(self) -> None:
        """Empty the screen."""
        print("\x1b[H\x1b[2J", end="", file=self._file)
