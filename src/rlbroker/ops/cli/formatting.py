"""Figures and names as people read them, and tables that fit."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rlbroker.backend.text import age as age
from rlbroker.backend.text import counted as counted
from rlbroker.ops.cli.styled_text import cell_width, fitted, styled

if TYPE_CHECKING:
    from rlbroker.ops.cli.console import Console
    from rlbroker.ops.cli.session import Session
    from rlbroker.ops.inspect.findings import Finding
    from rlbroker.types import Missed


def size(count: float) -> str:
    """Give a number of bytes that is short to read, in powers of 1000.

    >>> [size(count) for count in (0, 999, 1500, 123_456_789, 5e12)]
    ['0 B', '999 B', '1.5 kB', '123 MB', '5.0 TB']
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def figure(value: float | None) -> str:
    """Give a figure in five characters or so; None is not known.

    >>> [figure(value) for value in (None, 0, 0.25, 42.4, 123.4, 52_700, 1_300_000)]
    ['-', '0', '0.2', '42.4', '123', '52.7k', '1.3M']
    """
    if value is None:
        return "-"
    for limit, unit in ((1e3, ""), (1e6, "k"), (1e9, "M")):
        if value < limit:
            shown = value / limit * 1e3
            return f"{shown:.0f}{unit}" if shown >= 99.95 or shown == 0 else f"{shown:.1f}{unit}"
    return f"{value / 1e9:.1f}G"


def share(value: float | None) -> str:
    """Give a part of a whole; None is not known.

    >>> [share(value) for value in (None, 0, 0.005, 0.5, 1)]
    ['-', '0 %', '0.5 %', '50 %', '100 %']
    """
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if 0 < value < 0.0995 else f"{100 * value:.0f} %"


def seconds_of(text: str) -> float:
    """Read a time span such as `90`, `30s`, `15m`, `1h` or `2d`, in seconds.

    >>> [seconds_of(text) for text in ("90", "30s", "1.5h", "2d")]
    [90.0, 30.0, 5400.0, 172800.0]

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+|\d*\.\d+)([smhd]?)", text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is no time span; write it as 90s, 15m, 1h or 2d")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]


def unwrapped(text: str) -> str:
    """Give paragraphs without their line breaks: the terminal has its own.

    >>> unwrapped("One\\ntwo.\\n\\nThree.")
    'One two.\\n\\nThree.'
    """
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(text))


def plain(text: str) -> str:
    """Give what a worker wrote without what would steer the terminal: workers are not trusted."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def describe_missed(record: Missed) -> str:
    """Say what was missed, and why."""
    what = (
        f"version {record.first}" if record.last == record.first else f"versions {record.first}-{record.last}"
    )
    if record.what == "command":
        what = f"the command {plain(record.command)}"
    return f"{what}: {record.why}" + (f", {plain(record.detail)}" if record.detail else "")


def show_table(
    console: Console,
    rows: Sequence[Mapping[str, str]],
    *,
    left: Sequence[str] = (),
    spare: Sequence[str] = (),
    style: Callable[[str, str], str] = lambda column, cell: "",
) -> None:
    """Print a table.

    Args:
        console: where to.
        rows: cells by column; all have the same columns, in order. Without rows nothing is printed.
        left: columns of text; numbers are at the right.
        spare: columns that a narrow terminal does not show, in this order: one less is better than cut numbers.
        style: gives the colour of a cell.
    """
    if not rows:
        return
    columns = list(rows[0])
    widths = {name: max(map(cell_width, (name, *(row[name] for row in rows)))) for name in columns}
    for one in spare:
        if _width(columns, widths) <= console.width:
            break
        if one in columns:
            columns.remove(one)
    over = _width(columns, widths) - console.width
    if over > 0:  # the last column holds what is longest, as a rule
        widths[columns[-1]] = max(1, widths[columns[-1]] - over)

    def line(cells: Mapping[str, str], style: Callable[[str, str], str]) -> str:
        return " " + _GAP.join(
            styled(fitted(cells[name], widths[name], right=name not in left), style(name, cells[name]))
            for name in columns
        )

    console.print()
    console.print(line({name: name for name in columns}, lambda column, cell: "").rstrip())
    console.print(" " + "─" * (_width(columns, widths) - 1))
    for row in rows:
        console.print(line(row, style if console.colors else lambda column, cell: "").rstrip())
    console.print()


#: Between two columns.
_GAP = " " * 3


def _width(columns: Sequence[str], widths: Mapping[str, int]) -> int:
    return 1 + sum(widths[name] for name in columns) + len(_GAP) * (len(columns) - 1)


def the_same_of(workers: Sequence[int]) -> str:
    """Say that there is more of the same.

    >>> the_same_of([3, 4]), the_same_of(range(3, 30))
    ('and the same of workers 3, 4', 'and the same of 27 workers more: 3, 4, 5, 6, 7, 8, 9, 10 …')
    """
    if len(workers) == 1:
        return f"and the same of worker {workers[0]}"
    shown = ", ".join(map(str, workers[:8]))
    if len(workers) <= 8:
        return f"and the same of workers {shown}"
    return f"and the same of {len(workers):,} workers more: {shown} …"


def show_findings(session: Session, findings: Iterable[Finding], *, with_advice: bool = False) -> None:
    """Print what is wrong, each with what to type, or with what to do about it."""
    from rlbroker.ops.inspect.findings import gather

    for one, others in gather(findings):
        mark = {"critical": "✗", "warning": "!"}[one.severity]
        session.console.print(f"{mark} {plain(one.what)}", style="red" if mark == "✗" else "yellow")
        session.console.print(f"    {one.advice if with_advice else session.typed(one.hint)}")
        if others:
            session.console.print(f"  … {the_same_of(others)}")
