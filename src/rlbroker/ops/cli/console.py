"""Text output for people: lines and tables that fit the terminal, in colour if the user wants it.

It does what the commands need of rich, which takes 0.2 s to import.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from rlbroker.config import colors_wanted
from rlbroker.ops.cli.styled_text import Piece, add_style, cell_width, fit

#: The space between two columns of a table.
_GAP = " " * 3


class Console:
    """Prints lines and tables to a file.

    Attributes:
        width: number of columns of the terminal, or of a pipe.
        colors: whether to print colours.
    """

    def __init__(self, file: TextIO, *, no_color: bool = False, pipe_width: int = 1000) -> None:
        """Read the size of the terminal.

        Args:
            file: where to print.
            no_color: print no colours; NO_COLOR in the environment does the same.
            pipe_width: columns if the file is not a terminal.
        """
        self._file = file
        terminal = file.isatty()
        self.width = shutil.get_terminal_size().columns if terminal else pipe_width
        self.colors = terminal and colors_wanted() and not no_color

    def print(self, text: str = "", style: str = "") -> None:
        """Print a line."""
        print(add_style(text, style if self.colors else ""), file=self._file)

    def print_pieces(self, pieces: Sequence[Piece]) -> None:
        """Print a line of several styles."""
        line = "".join(add_style(text, style if self.colors else "") for text, style in pieces)
        print(line.rstrip(), file=self._file)

    def clear(self) -> None:
        """Clear the screen."""
        print("\x1b[H\x1b[2J", end="", file=self._file)

    def print_table(
        self,
        rows: Sequence[Mapping[str, str]],
        *,
        text: Sequence[str] = (),
        optional: Sequence[str] = (),
        style: Callable[[str, str], str] = lambda column, cell: "",
    ) -> None:
        """Print a table; print nothing if there are no rows.

        Args:
            rows: cells by column; every row has the same columns in the same order.
            text: the columns to align to the left, which hold text; numbers are aligned to the right.
            optional: columns to omit on a narrow terminal, first to last.
            style: returns the style for a column and a cell.
        """
        if not rows:
            return
        columns = list(rows[0])
        widths = {name: max(map(cell_width, (name, *(row[name] for row in rows)))) for name in columns}
        for name in optional:
            if _table_width(columns, widths) <= self.width:
                break
            if name in columns:
                columns.remove(name)
        excess = _table_width(columns, widths) - self.width
        if excess > 0:  # usually the last column has the longest text
            widths[columns[-1]] = max(1, widths[columns[-1]] - excess)

        def line(cells: Mapping[str, str], style: Callable[[str, str], str]) -> str:
            return " " + _GAP.join(
                add_style(fit(cells[name], widths[name], right=name not in text), style(name, cells[name]))
                for name in columns
            )

        self.print()
        self.print(line({name: name for name in columns}, lambda column, cell: "").rstrip())
        self.print(" " + "─" * (_table_width(columns, widths) - 1))
        for row in rows:
            self.print(line(row, style if self.colors else lambda column, cell: "").rstrip())
        self.print()


def _table_width(columns: Sequence[str], widths: Mapping[str, int]) -> int:
    return 1 + sum(widths[name] for name in columns) + len(_GAP) * (len(columns) - 1)
