"""The rows as a table on the terminal, as JSON, as Markdown for docs/benchmarks.md, and as a picture."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Row

#: The columns of every table.
COLUMNS = ("work", "against", "ours", "theirs", "unit", "ratio", "wanted", "met", "note")

#: The width of the table if stdout is not a terminal.
_PIPE_WIDTH = 1000

#: Packages whose versions affect the results.
_PACKAGES = ("rlbroker", "redis", "hiredis", "numpy", "blosc2", "torch", "ray")


def format_number(value: float) -> str:
    """Return a number with three significant digits.

    >>> [format_number(value) for value in (0.01234, 1.5, 23.456, 1234.5, 0.0)]
    ['0.0123', '1.50', '23.5', '1,234', '0']
    """
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}" if abs(value) >= 1 else f"{value:.3g}"


def format_ratio(row: Row) -> str:
    """Return the ratio as text: "3.00×", or "28.0× less" if the target is below 1."""
    ratio = row.ratio
    if ratio is None:
        return "–"
    if not row.higher_is_better and row.target is not None and row.target < 1 and 0 < ratio < 1:
        return f"{format_number(1 / ratio)}× less"
    return f"{format_number(ratio)}×"


def format_cells(row: Row) -> dict[str, str]:
    """Return one line of the table, by column."""
    return {
        "work": row.work,
        "against": row.against,
        "ours": format_number(median(row.ours)) if row.ours else "–",
        "theirs": format_number(median(row.theirs)) if row.theirs else "–",
        "unit": row.unit,
        "ratio": format_ratio(row),
        "wanted": row.wanted or "–",
        "met": {True: "yes", False: "no", None: "–"}[row.met],
        "note": row.note,
    }


def print_table(rows: Sequence[Row]) -> None:
    """Print the table on stdout."""
    table = Table(show_lines=False)
    for column in COLUMNS:
        right = column in ("ours", "theirs", "ratio")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        style = "red" if row.met is False else ""
        table.add_row(*format_cells(row).values(), style=style)
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, markup=False, highlight=False).print(table)


def format_markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """Return the table as Markdown, with a description of the machine."""

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"

    lines = [line(COLUMNS), line(["---"] * len(COLUMNS))]
    lines += [line(list(format_cells(row).values())) for row in rows]
    described = "; ".join(f"{name} {fact}" for name, fact in facts.items())
    return "\n".join([*lines, "", f"Medians, measured side by side in one run: {described}.", ""])


def describe_machine() -> dict[str, Any]:
    """Return what the results depend on besides the code: processor, load, Python, versions of packages."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def save_report(rows: Sequence[Row], facts: Mapping[str, Any], directory: Path, name: str) -> list[Path]:
    """Write `<name>.json`, `<name>.md` and, if matplotlib is installed, `<name>.png`; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.json", directory / f"{name}.md"]
    row_dicts = [asdict(row) | {"ratio": row.ratio, "met": row.met} for row in rows]
    paths[0].write_text(
        json.dumps({"facts": dict(facts), "rows": row_dicts}, indent=2, ensure_ascii=False) + "\n"
    )
    paths[1].write_text(format_markdown(rows, facts))
    picture = directory / f"{name}.png"
    if draw_picture(rows, picture):
        paths.append(picture)
    return paths


def draw_picture(rows: Sequence[Row], path: Path) -> bool:
    """Draw how many times better rlbroker is, for the rows with a target; return False without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("agg")
    from matplotlib import pyplot

    measured = [row for row in rows if row.ratio]
    shown = [row for row in measured if row.target] or measured
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.4 * len(shown)), layout="constrained")
    for position, row in enumerate(shown):
        color = {True: "tab:green", False: "tab:red", None: "tab:gray"}[row.met]
        assert row.ratio
        axes.barh(position, _better(row, row.ratio) - 1, left=1, color=color, height=0.6)
        if row.target:
            mark = _better(row, row.target)
            axes.plot([mark, mark], [position - 0.45, position + 0.45], color="black", linewidth=2)
    axes.set_yticks(range(len(shown)), [_label(row) for row in shown], fontsize=8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.axvline(1, color="black", linewidth=0.5)
    axes.set_xlabel("times better than the peer; black: target")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _better(row: Row, ratio: float) -> float:
    return ratio if row.higher_is_better else 1 / ratio


def _label(row: Row) -> str:
    return f"{row.work}\nagainst {row.against}"
