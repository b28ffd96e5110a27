"""The table of workers of `rlbroker top`: its columns, and which of them fit. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rlbroker.backend.text import age
from rlbroker.ops.cli.styled_text import Piece, cell_width, fit
from rlbroker.ops.formatting import format_number, format_share, sanitize
from rlbroker.ops.inspect.findings import UNPOLLED_SECONDS, FindingLimits
from rlbroker.ops.inspect.watch import WorkerLine

_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"

#: The width of the bar for a worker's staleness, and the least staleness that can fill it.
_BAR_WIDTH, _BAR_VERSIONS = 8, 10

#: The least staleness that is shown in red, and in yellow.
_RED_STALENESS, _YELLOW_STALENESS = FindingLimits.staleness, 3

#: The least share of the time spent waiting for room that is shown in yellow.
_YELLOW_ROOM_SHARE = 0.25


def _show_count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _show_age(seconds: float | None) -> str:
    return "" if seconds is None else age(seconds)


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        name: its heading.
        key: the key that orders by it; empty if none does.
        field: the field of `WorkerLine` that orders workers; None and empty text come last.
        show: returns the text of a value.
        style: the style of the cell.
        width: the least width.
        text: whether to align it to the left and to order it ascending, as text; numbers are aligned to the right, and
            those that show problems are descending.
        is_rate: whether it is empty for a worker that has left.
    """

    name: str
    key: str
    field: str
    show: Callable[[Any], str] = _show_count
    style: Callable[[WorkerLine], str] = lambda line: ""
    width: int = 0
    text: bool = False
    is_rate: bool = False

    @property
    def ascending(self) -> bool:
        """Whether the usual order is ascending."""
        return self.text or self.name == "id"

    def value(self, line: WorkerLine) -> Any:
        """Return the value that orders a worker; None comes last."""
        value = getattr(line, self.field)
        return None if value == "" else value

    def cell(self, line: WorkerLine) -> str:
        """Return the text of a worker's cell."""
        return "" if self.is_rate and line.state == "left" else self.show(getattr(line, self.field))


def _state_style(line: WorkerLine) -> str:
    return {"away": "red", "left": "dim"}.get(line.state, "green")


def _stale_style(line: WorkerLine) -> str:
    if line.staleness is None or line.staleness < _YELLOW_STALENESS:
        return "" if line.staleness is None else "green"
    return "red" if line.staleness >= _RED_STALENESS else "yellow"


def _polled_style(line: WorkerLine) -> str:
    unpolled = line.state == "alive" and (line.unpolled_seconds or 0.0) >= UNPOLLED_SECONDS
    return "yellow" if unpolled else ""


def _room_style(line: WorkerLine) -> str:
    return "yellow" if (line.room_share or 0.0) >= _YELLOW_ROOM_SHARE else ""


#: All columns, in order.
COLUMNS: Final = (
    Column("id", "i", "worker", str, width=3),
    Column("state", "t", "state", str, _state_style, width=5, text=True),
    Column("version", "v", "version", width=7),
    Column("stale", "s", "staleness", style=_stale_style, width=5),
    Column("behind", "", "staleness", lambda value: "", _stale_style, width=_BAR_WIDTH, text=True),
    Column("rate", "b", "batches_per_second", format_number, width=5, is_rate=True),
    Column("waiting", "w", "waiting"),
    Column("in hand", "h", "in_hand"),
    Column("lost", "l", "lost", style=lambda line: "red" * bool(line.lost)),
    Column("missed", "m", "missed", style=lambda line: "yellow" * bool(line.missed)),
    Column("polled", "p", "unpolled_seconds", _show_age, _polled_style, width=6),
    Column("room", "o", "room_share", format_share, _room_style, width=5, is_rate=True),
    Column("seen", "n", "last_seen_seconds", _show_age, lambda line: "red" * (line.state == "away"), width=6),
    Column("process", "c", "process", sanitize, width=12, text=True),
)

#: Columns to omit on a narrow terminal, first to last.
OPTIONAL_COLUMNS: Final = (
    "in hand",
    "room",
    "seen",
    "process",
    "behind",
    "polled",
    "missed",
    "rate",
    "waiting",
    "state",
)

#: Columns by which the table can be ordered, in the order of the arrow keys.
SORT_COLUMNS: Final = tuple(column.name for column in COLUMNS if column.key)


def draw_table(
    lines: Sequence[WorkerLine], columns: int, *, max_staleness: int, sort: str, reverse: bool
) -> Iterator[list[Piece]]:
    """Yield the heading and a line for each worker, in pieces.

    Args:
        lines: the workers, in order.
        columns: width of the terminal; table columns that do not fit are omitted, except the sort column.
        max_staleness: the largest staleness of any worker of the run.
        sort: name of the sort column.
        reverse: whether its usual order is reversed.
    """
    full = max(_BAR_VERSIONS, max_staleness)
    cells = {
        column.name: [
            draw_bar(line.staleness or 0, full, _BAR_WIDTH) if column.name == "behind" else column.cell(line)
            for line in lines
        ]
        for column in COLUMNS
    }
    widths = {
        column.name: max(column.width, len(column.name) + 1, *map(cell_width, ["", *cells[column.name]]))
        for column in COLUMNS
    }
    widths["process"] = COLUMNS[-1].width  # the remaining width is added below
    kept = list(COLUMNS)
    for name in OPTIONAL_COLUMNS:
        if _width(kept, widths) <= columns:
            break
        if name != sort:
            kept.remove(next(column for column in kept if column.name == name))
    if any(column.name == "process" for column in kept):
        widths["process"] += max(0, columns - _width(kept, widths))
    yield [(fit(_draw_heading(kept, widths, sort, reverse), columns), "reverse")]
    for number, line in enumerate(lines):
        pieces: list[Piece] = []
        for column in kept:
            text = fit(cells[column.name][number], widths[column.name], right=not column.text)
            pieces += [(text, "dim" if line.state == "left" else column.style(line)), (" ", "")]
        yield pieces[:-1]


def _width(columns: Sequence[Column], widths: dict[str, int]) -> int:
    return sum(widths[column.name] for column in columns) + len(columns) - 1


def _draw_heading(columns: Sequence[Column], widths: dict[str, int], sort: str, reverse: bool) -> str:
    names = []
    for column in columns:
        mark = ("▲" if column.ascending != reverse else "▼") if column.name == sort else ""
        names.append(fit(column.name + mark, widths[column.name], right=not column.text))
    return " ".join(names)


def draw_bar(value: int, full: int, width: int) -> str:
    """Return a bar for a number; `full` is the one that fills the width.

    >>> [draw_bar(value, 16, 2) for value in (0, 1, 8, 11, 99)]
    ['', '▏', '█', '█▍', '██']
    """
    eighths = min(8 * width, -(-8 * width * value // full))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
