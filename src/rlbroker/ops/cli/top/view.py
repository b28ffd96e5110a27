"""Draws the screen of `rlbroker top`: makes lines from a `RunView` and a `ViewState`. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from rlbroker.backend.text import age
from rlbroker.ops.cli.styled_text import Piece, cell_width, fit
from rlbroker.ops.cli.top.key_bindings import ViewState, select_workers
from rlbroker.ops.cli.top.table import COLUMNS, draw_table
from rlbroker.ops.formatting import format_bytes, format_number, format_share, sanitize
from rlbroker.ops.inspect.watch import RunView, WorkerLine

_SPARKS: Final = "▁▂▃▄▅▆▇█"

#: Metrics of the whole run: name in the view, label, whether it is a share. The most important first, two per line.
_METRICS: Final = (
    ("batches_per_second", "batches/s", False),
    ("wait_share", "no data", True),
    ("staleness", "staleness", False),
    ("waiting", "waiting", False),
    ("rows_per_second", "rows/s", False),
    ("encode_share", "encoding", True),
    ("missed_per_second", "missed/s", False),
    ("send_share", "sending", True),
)

_HELP: Final = (
    "← →              order by another column; or press its letter:",
    "    " + ", ".join(f"{column.key} {column.name}" for column in COLUMNS if column.key),
    "r                reverse the order",
    "/                show only workers with this id, or this text in state or process; Esc shows all",
    "f                show all workers, those alive, or those in trouble: with a finding about them",
    "↑ ↓ PgUp PgDn    scroll; also Home and End, or j, k, g and G",
    "+ -              refresh more or less often",
    "space            pause, and continue",
    "q or Ctrl-C      quit",
    "",
    "no data          share of the time that the learner waited for batches",
    "encoding         share of the time that the learner encoded weights; sending: that it sent them",
    "rate             batches per second that the worker produced in the last seconds",
    "room             share of the time that the worker waited for room in its queue",
    "polled           time since the worker last polled for weights and commands",
)


@dataclass(frozen=True)
class Outage:
    """The time since the server last answered, and the error."""

    seconds: float
    reason: str


@dataclass(frozen=True)
class DrawOptions:
    """How to draw, besides the `ViewState`.

    Attributes:
        live: whether the view is refreshed.
        complete_hint: returns a hint as a line that can be typed.
        outage: set while the server does not answer: the view is stale.
    """

    live: bool = True
    complete_hint: Callable[[str], str] = field(default=lambda hint: hint)
    outage: Outage | None = None


def clamp_scroll(state: ViewState, view: RunView, columns: int, rows: int) -> ViewState:
    """Return the state for this size of the terminal, scrolled no further than to the last worker."""
    page_rows = max(1, rows - len(_draw_header(view, columns, rows)) - 2)
    last = max(0, len(select_workers(view, state)) - page_rows)
    return replace(state, page_rows=page_rows, top_row=min(state.top_row, last))


def draw_screen(
    view: RunView, state: ViewState, columns: int, rows: int, options: DrawOptions
) -> list[list[Piece]]:
    """Return the lines of a terminal of this size, in pieces; the state must come from `clamp_scroll`."""
    above = _draw_header(view, columns, rows, state, options)
    lines = select_workers(view, state)
    if state.help_shown:
        table: list[list[Piece]] = [[("", "")], *([(line, "")] for line in _HELP)]
    else:
        table = list(
            _draw_workers(view, lines[state.top_row : state.top_row + state.page_rows], state, columns)
        )
    room = max(0, rows - len(above) - 1)
    table = table[:room] + [[]] * (room - len(table))
    drawn = [*above, *table, _draw_foot(state, len(lines), columns)]
    return [_cut(pieces, columns) for pieces in drawn[:rows]]


def draw_text(view: RunView, state: ViewState, columns: int, options: DrawOptions) -> list[list[Piece]]:
    """Return the lines for a file or a pipe, in pieces, with all workers."""
    above = _draw_header(view, columns, 1000, state, options)
    table = _draw_workers(view, select_workers(view, state), state, columns)
    return [_cut(pieces, columns) for pieces in (*above, *table)]


def _cut(pieces: Sequence[Piece], columns: int) -> list[Piece]:
    """Return the pieces of a line, cut at the width."""
    cut, left = list[Piece](), columns
    for text, style in pieces:
        width = min(cell_width(text), left)
        cut.append((text if cell_width(text) <= left else fit(text, left), style))
        left -= width
    return [piece for piece in cut if piece[0]]


def _draw_header(
    view: RunView, columns: int, rows: int, state: ViewState | None = None, options: DrawOptions | None = None
) -> list[list[Piece]]:
    """Return the lines above the table; a low terminal gets fewer of them, to leave room for workers."""
    state, options = state or ViewState(), options or DrawOptions()
    gap: list[list[Piece]] = [[]] if rows >= 24 else []
    metric_lines = 4 if rows >= 20 else 2 if rows >= 16 else 0
    above = [
        *_draw_title(view, state, options, columns),
        *gap,
        *_draw_metrics(view, columns)[:metric_lines],
        *gap,
    ]
    gap = gap if view.findings else []
    # Findings get the lines that workers do not need.
    spare = rows - len(above) - len(gap) - len(view.lines) - 2
    finding_lines = max(spare, 3 if rows >= 20 else 2 if rows >= 16 else 1)
    return [
        *above,
        *_draw_findings(view, options, columns, finding_lines),
        *gap,
    ]


def _draw_title(view: RunView, state: ViewState, options: DrawOptions, columns: int) -> Iterator[list[Piece]]:
    snapshot = view.snapshot
    server = snapshot.server
    facts = [server.version, "" if server.used_bytes is None else f"{format_bytes(server.used_bytes)} used"]
    if server.maxmemory_bytes:
        facts[1] += f" of {format_bytes(server.maxmemory_bytes)}"
    if server.node and facts[1]:
        facts[1] += f" on {server.node}"
    location = f"  {server.address} ({', '.join(filter(None, facts))})"
    clock = time.strftime("%H:%M:%S", time.localtime(snapshot.at))
    if options.outage:
        now = f"  {age(options.outage.seconds)} old"
    elif not options.live:
        now = ""
    else:
        now = "  paused" if state.paused else f"  every {state.interval:g} s"
    name = ("rlbroker top  ", "bold"), (snapshot.run, "bold cyan")
    room = columns - sum(cell_width(text) for text, _ in name) - len(clock) - len(now)
    middle = fit(sanitize(location), max(0, room))
    yield [
        *name,
        (middle, "dim"),
        (clock, "bold"),
        (now, "yellow" if options.outage or state.paused else "dim"),
    ]
    if options.outage:
        yield [(fit(f"no answer: {sanitize(options.outage.reason)}", columns), "reverse red")]
    else:
        yield [
            ("learner ", "dim"),
            *_draw_learner(view),
            ("   ", ""),
            *_draw_version(view),
            ("   ", ""),
            *_draw_alive(view),
        ]


def _draw_learner(view: RunView) -> Iterator[Piece]:
    learner = view.snapshot.learner
    if learner is None:
        yield "none yet", "yellow"
        return
    yield f"{sanitize(learner.host)}:{learner.pid} ", ""
    seen = "" if learner.last_seen_seconds is None else f", seen {age(learner.last_seen_seconds)} ago"
    style = {"away": "red", "ended": "yellow"}.get(learner.state, "green")
    yield learner.state + ("" if learner.state == "alive" else seen), style


def _draw_version(view: RunView) -> Iterator[Piece]:
    manifest = view.snapshot.manifest
    yield "version ", "dim"
    if manifest is None:
        yield "none yet", "yellow"
        return
    yield f"{manifest.version:,}", "bold"
    kind = "delta" if manifest.base else "full"
    when = age(max(0.0, view.snapshot.at - manifest.published))
    yield (
        f" {kind}, {format_bytes(manifest.stored_bytes)} for {format_bytes(manifest.raw_bytes)}, {when} ago",
        "dim",
    )


def _draw_alive(view: RunView) -> Iterator[Piece]:
    alive = sum(line.state == "alive" for line in view.lines)
    members = sum(line.state != "left" for line in view.lines)
    yield "workers ", "dim"
    yield f"{alive:,}", "bold" if alive == members else "bold red"
    yield f" of {members:,} alive", "dim"


def _draw_metrics(view: RunView, columns: int) -> list[list[Piece]]:
    per_line = 2 if columns >= 76 else 1
    width = columns // per_line - 2 * (per_line - 1)
    drawn: list[list[Piece]] = []
    for number, (name, label, is_share) in enumerate(_METRICS):
        newest = view.newest(name)
        text = (format_share if is_share else format_number)(newest)
        spark = draw_sparkline(view.series[name], max(0, width - 20), top=1.0 if is_share else None)
        pieces = [
            (f"{label:<10}", "dim"),
            (f"{text:>7} ", "bold"),
            (fit(spark, max(0, width - 20)), "cyan"),
        ]
        if number % per_line:
            drawn[-1] += [("    ", ""), *pieces]
        else:
            drawn.append(pieces)
    return drawn


def draw_sparkline(values: Sequence[float | None], width: int, *, top: float | None = None) -> str:
    """Return the newest values as bars of one character each; the highest bar is the largest value, or `top`.

    None is a gap.

    >>> draw_sparkline([9.0, 0.0, 1.0, None, 4.0, 8.0], 5)
    '▁▁ ▄█'
    """
    newest = list(values)[len(values) - min(width, len(values)) :]
    highest = max((value for value in newest if value is not None), default=0.0)
    highest = max(highest, top or 0.0) or 1.0
    last = len(_SPARKS) - 1
    return "".join(
        " " if value is None else _SPARKS[min(last, max(0, -int(-value / highest * (last + 1) // 1) - 1))]
        for value in newest
    )


def _draw_findings(view: RunView, options: DrawOptions, columns: int, room: int) -> Iterator[list[Piece]]:
    shown = view.findings if len(view.findings) <= room else view.findings[: max(1, room - 1)]
    more = len(view.findings) - len(shown)
    for finding in shown:
        style = "red" if finding.severity == "critical" else "yellow"
        what = f"{'✗' if finding.severity == 'critical' else '!'} {sanitize(finding.what)}"
        hint = f"  {options.complete_hint(finding.hint)}"
        if room == 1 and more:
            hint = f"  and {more} more: {options.complete_hint('rlbroker status')}"
        fits = cell_width(what + hint) <= columns
        if not fits and room == 1 and more:
            hint = f"  and {more} more"
            what, fits = fit(what, max(0, columns - len(hint))).rstrip(), True
        yield [(what, style), (hint, "dim")] if fits else [(what, style)]
    if more and room > 1:
        yield [(f"  and {more} more: {options.complete_hint('rlbroker status')}", "dim")]


def _draw_workers(
    view: RunView, lines: Sequence[WorkerLine], state: ViewState, columns: int
) -> Iterator[list[Piece]]:
    max_staleness = max((line.staleness or 0 for line in view.lines), default=0)
    yield from draw_table(lines, columns, max_staleness=max_staleness, sort=state.sort, reverse=state.reverse)
    if not lines:
        yield [("no worker has joined yet" if not view.lines else "no worker matches", "dim")]


def _draw_foot(state: ViewState, workers: int, columns: int) -> list[Piece]:
    if state.typing:
        return [
            ("/" + sanitize(state.search), "bold"),
            ("▏", "bold"),
            ("  Enter keeps the filter, Esc ends it", "dim"),
        ]
    keys = f"q quit  ? help  ←→ order  r reverse  / filter  f {state.group}  space pause  +- {state.interval:g} s"
    if state.help_shown:
        keys = "any key closes the help"
    first, last = min(workers, state.top_row + 1), min(workers, state.top_row + state.page_rows)
    where = f"{first}-{last} of {workers:,}" if workers else "0 of 0"
    if state.search:
        where = f"/{sanitize(state.search)}  {where}"
    room = columns - cell_width(where) - 2
    return [(fit(keys, max(0, room)), "dim"), ("  ", ""), (where, "bold" if state.search else "dim")]
