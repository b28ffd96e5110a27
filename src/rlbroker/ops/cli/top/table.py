"""The table of workers that `rlbroker top` shows: its columns, and which of them fit. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rlbroker.ops.cli.formatting import age, figure, plain, share
from rlbroker.ops.cli.styled_text import Piece, cell_width, fitted
from rlbroker.ops.inspect.findings import UNPOLLED_SECONDS, FindingLimits
from rlbroker.ops.inspect.watch import WorkerLine

_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"

#: Columns of the bar that shows how far a worker is behind, and the fewest versions that fill it.
_BAR_WIDTH, _BAR_VERSIONS = 8, 10

#: Staleness from which on a worker is behind, and one that is just not up to date.
_FAR, _NEAR = FindingLimits.staleness, 3

#: A worker that waits for room for this share of the time stands out.
_ROOM_SHARE = 0.25


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        name: its heading.
        letter: the key that orders by it; empty if none does.
        value: what a worker is ordered by; None comes last.
        cell: what is shown.
        style: in which colour.
        width: the fewest columns of the terminal that it takes.
        left: whether it is text; numbers are at the right.
        rising: whether it usually begins with the lowest; figures of trouble begin with the highest.
    """

    name: str
    letter: str
    value: Callable[[WorkerLine], Any]
    cell: Callable[[WorkerLine], str]
    style: Callable[[WorkerLine], str] = lambda line: ""
    width: int = 0
    left: bool = False
    rising: bool = False


def _span(seconds: float | None) -> str:
    return "" if seconds is None else age(seconds)


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _state_style(line: WorkerLine) -> str:
    return {"away": "red", "left": "dim"}.get(line.state, "green")


def _stale_style(line: WorkerLine) -> str:
    if line.staleness is None or line.staleness < _NEAR:
        return "" if line.staleness is None else "green"
    return "red" if line.staleness >= _FAR else "yellow"


COLUMNS: Final = (
    Column("id", "i", lambda line: line.worker, lambda line: str(line.worker), width=3, rising=True),
    Column(
        "state",
        "t",
        lambda line: line.state,
        lambda line: line.state,
        _state_style,
        5,
        left=True,
        rising=True,
    ),
    Column("version", "v", lambda line: line.version, lambda line: _number(line.version), width=7),
    Column("stale", "s", lambda line: line.staleness, lambda line: _number(line.staleness), _stale_style, 5),
    Column("behind", "", lambda line: line.staleness, lambda line: "", _stale_style, _BAR_WIDTH, left=True),
    Column(
        "rate",
        "b",
        lambda line: line.batches_per_second,
        lambda line: "" if line.state == "left" else figure(line.batches_per_second),
        width=5,
    ),
    Column("waiting", "w", lambda line: line.waiting, lambda line: _number(line.waiting)),
    Column("in hand", "h", lambda line: line.in_hand, lambda line: _number(line.in_hand)),
    Column(
        "lost",
        "l",
        lambda line: line.lost,
        lambda line: _number(line.lost),
        lambda line: "red" * bool(line.lost),
    ),
    Column(
        "missed",
        "m",
        lambda line: line.missed,
        lambda line: _number(line.missed),
        lambda line: "yellow" * bool(line.missed),
    ),
    Column(
        "polled",
        "p",
        lambda line: line.unpolled_seconds,
        lambda line: _span(line.unpolled_seconds),
        lambda line: (
            "yellow" if (line.unpolled_seconds or 0.0) >= UNPOLLED_SECONDS and line.state == "alive" else ""
        ),
        width=6,
    ),
    Column(
        "room",
        "o",
        lambda line: line.room_share,
        lambda line: "" if line.state == "left" else share(line.room_share),
        lambda line: "yellow" if (line.room_share or 0.0) >= _ROOM_SHARE else "",
        width=5,
    ),
    Column(
        "seen",
        "n",
        lambda line: line.last_seen_seconds,
        lambda line: _span(line.last_seen_seconds),
        lambda line: "red" if line.state == "away" else "",
        width=6,
    ),
    Column(
        "process",
        "c",
        lambda line: line.process or None,
        lambda line: plain(line.process),
        width=12,
        left=True,
        rising=True,
    ),
)

#: What a narrow terminal does not show, in this order.
SPARE: Final = (
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

#: What to order by, as the arrows go through it.
SORTS: Final = tuple(column.name for column in COLUMNS if column.letter)


def rows_of(
    lines: Sequence[WorkerLine], columns: int, *, furthest: int, sort: str, reverse: bool
) -> Iterator[list[Piece]]:
    """Give the heading and a line for each worker, in pieces.

    Args:
        lines: the workers, in order.
        columns: of the terminal; what does not fit is left out, but for what the workers are ordered by.
        furthest: how far behind the last worker of the run is.
        sort: name of the column that orders them.
        reverse: whether against its usual order.
    """
    full = max(_BAR_VERSIONS, furthest)
    cells = {
        column.name: [
            bar(line.staleness or 0, full, _BAR_WIDTH) if column.name == "behind" else column.cell(line)
            for line in lines
        ]
        for column in COLUMNS
    }
    widths = {
        column.name: max(column.width, len(column.name) + 1, *map(cell_width, ["", *cells[column.name]]))
        for column in COLUMNS
    }
    widths["process"] = COLUMNS[-1].width  # it takes what is left
    kept = list(COLUMNS)
    for name in SPARE:
        if _width(kept, widths) <= columns:
            break
        if name != sort:
            kept.remove(next(column for column in kept if column.name == name))
    if any(column.name == "process" for column in kept):
        widths["process"] += max(0, columns - _width(kept, widths))
    yield [(fitted(_headings(kept, widths, sort, reverse), columns), "reverse")]
    for number, line in enumerate(lines):
        pieces: list[Piece] = []
        for column in kept:
            text = fitted(cells[column.name][number], widths[column.name], right=not column.left)
            pieces += [(text, "dim" if line.state == "left" else column.style(line)), (" ", "")]
        yield pieces[:-1]


def _width(columns: Sequence[Column], widths: dict[str, int]) -> int:
    return sum(widths[column.name] for column in columns) + len(columns) - 1


def _headings(columns: Sequence[Column], widths: dict[str, int], sort: str, reverse: bool) -> str:
    named = []
    for column in columns:
        mark = ("▲" if column.rising != reverse else "▼") if column.name == sort else ""
        named.append(fitted(column.name + mark, widths[column.name], right=not column.left))
    return " ".join(named)


def bar(value: int, full: int, width: int) -> str:
    """Draw a number as a bar that is as long as the width where it is `full`.

    >>> [bar(value, 16, 2) for value in (0, 1, 8, 11, 99)]
    ['', '▏', '█', '█▍', '██']
    """
    eighths = min(8 * width, -(-8 * width * value // full))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
