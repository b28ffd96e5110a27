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


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        name: its heading.
        key: the key that orders by it; empty if none does.
        value: the value that orders workers; None comes last.
        cell: the text of the cell.
        style: the style of the cell.
        width: the least width.
        text: whether to align it to the left, as text; numbers are aligned to the right.
        ascending: whether the usual order is ascending; numbers that show problems are descending.
    """

    name: str
    key: str
    value: Callable[[WorkerLine], Any]
    cell: Callable[[WorkerLine], str]
    style: Callable[[WorkerLine], str] = lambda line: ""
    width: int = 0
    text: bool = False
    ascending: bool = False


def _format_age(seconds: float | None) -> str:
    return "" if seconds is None else age(seconds)


def _format_count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _state_style(line: WorkerLine) -> str:
    return {"away": "red", "left": "dim"}.get(line.state, "green")


def _stale_style(line: WorkerLine) -> str:
    if line.staleness is None or line.staleness < _YELLOW_STALENESS:
        return "" if line.staleness is None else "green"
    return "red" if line.staleness >= _RED_STALENESS else "yellow"


#: All columns, in order.
COLUMNS: Final = (
    Column("id", "i", lambda line: line.worker, lambda line: str(line.worker), width=3, ascending=True),
    Column(
        "state",
        "t",
        lambda line: line.state,
        lambda line: line.state,
        _state_style,
        5,
        text=True,
        ascending=True,
    ),
    Column("version", "v", lambda line: line.version, lambda line: _format_count(line.version), width=7),
    Column(
        "stale", "s", lambda line: line.staleness, lambda line: _format_count(line.staleness), _stale_style, 5
    ),
    Column("behind", "", lambda line: line.staleness, lambda line: "", _stale_style, _BAR_WIDTH, text=True),
    Column(
        "rate",
        "b",
        lambda line: line.batches_per_second,
        lambda line: "" if line.state == "left" else format_number(line.batches_per_second),
        width=5,
    ),
    Column("waiting", "w", lambda line: line.waiting, lambda line: _format_count(line.waiting)),
    Column("in hand", "h", lambda line: line.in_hand, lambda line: _format_count(line.in_hand)),
    Column(
        "lost",
        "l",
        lambda line: line.lost,
        lambda line: _format_count(line.lost),
        lambda line: "red" * bool(line.lost),
    ),
    Column(
        "missed",
        "m",
        lambda line: line.missed,
        lambda line: _format_count(line.missed),
        lambda line: "yellow" * bool(line.missed),
    ),
    Column(
        "polled",
        "p",
        lambda line: line.unpolled_seconds,
        lambda line: _format_age(line.unpolled_seconds),
        lambda line: (
            "yellow" if (line.unpolled_seconds or 0.0) >= UNPOLLED_SECONDS and line.state == "alive" else ""
        ),
        width=6,
    ),
    Column(
        "room",
        "o",
        lambda line: line.room_share,
        lambda line: "" if line.state == "left" else format_share(line.room_share),
        lambda line: "yellow" if (line.room_share or 0.0) >= _YELLOW_ROOM_SHARE else "",
        width=5,
    ),
    Column(
        "seen",
        "n",
        lambda line: line.last_seen_seconds,
        lambda line: _format_age(line.last_seen_seconds),
        lambda line: "red" if line.state == "away" else "",
        width=6,
    ),
    Column(
        "process",
        "c",
        lambda line: line.process or None,
        lambda line: sanitize(line.process),
        width=12,
        text=True,
        ascending=True,
    ),
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
