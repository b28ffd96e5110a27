"""What `rlbroker top` shows: from what a look saw, and what was typed, to the lines of a terminal. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from rlbroker.ops.cli.formatting import age, figure, plain, share, size
from rlbroker.ops.cli.styled_text import Piece, cell_width, fitted, styled
from rlbroker.ops.cli.top.key_bindings import State, chosen
from rlbroker.ops.cli.top.table import COLUMNS, rows_of
from rlbroker.ops.inspect.watch import RunView, WorkerLine

_SPARKS: Final = "▁▂▃▄▅▆▇█"

#: Figures of the whole run: name in the view, label, whether it is a share. The most telling first, two in a row.
_FIGURES: Final = (
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
    "← →              order by another column; or by its letter:",
    "    " + ", ".join(f"{column.letter} {column.name}" for column in COLUMNS if column.letter),
    "r                the other way round",
    "/                show only workers with this id, or this text in state or process; Esc ends that",
    "f                all, alive, or those in trouble: with a finding about them",
    "↑ ↓ PgUp PgDn    scroll; Home and End, or j, k, g and G",
    "+ -              look more often, or less",
    "space            pause, and go on",
    "q or Ctrl-C      end",
    "",
    "no data          share of the time in which the learner waited for batches",
    "encoding         share of the time in which it encoded weights; sending: in which it sent them",
    "rate             batches that the worker produced each second, over the last seconds",
    "room             share of the time in which the worker waited for room in its queue",
    "polled           since it last looked for weights and commands",
)


@dataclass(frozen=True)
class Trouble:
    """That the server did not answer: since how long, and what the error says."""

    seconds: float
    what: str


def settled(state: State, view: RunView, columns: int, rows: int) -> State:
    """Give the state as it can be shown: it scrolls no further than there are workers."""
    page = max(1, rows - len(_above(view, columns, rows)) - 2)
    last = max(0, len(chosen(view, state)) - page)
    return replace(state, page=page, top=min(state.top, last))


@dataclass(frozen=True)
class Look:
    """How to draw: what does not come from the run.

    Attributes:
        colors: whether there are any.
        live: whether it goes on.
        typed: completes a hint to what can be typed.
        trouble: that the view is old, and why.
    """

    colors: bool = True
    live: bool = True
    typed: Callable[[str], str] = field(default=lambda hint: hint)
    trouble: Trouble | None = None


def frame(view: RunView, state: State, columns: int, rows: int, look: Look) -> list[str]:
    """Give the lines of a terminal of this size, without their ends; the state must be `settled`."""
    above = _above(view, columns, rows, state, look)
    lines = chosen(view, state)
    if state.helping:
        table: list[list[Piece]] = [[("", "")], *([(line, "")] for line in _HELP)]
    else:
        table = list(_table(view, lines[state.top : state.top + state.page], state, columns))
    room = max(0, rows - len(above) - 1)
    table = table[:room] + [[]] * (room - len(table))
    drawn = [*above, *table, _foot(state, len(lines), columns)]
    return [_drawn(pieces, columns, look.colors) for pieces in drawn[:rows]]


def page(view: RunView, state: State, columns: int, look: Look) -> list[str]:
    """Give what a file or a pipe gets: everything, once."""
    above = _above(view, columns, 1000, state, look)
    table = _table(view, chosen(view, state), state, columns)
    return [_drawn(pieces, columns, look.colors).rstrip() for pieces in (*above, *table)]


def _drawn(pieces: Sequence[Piece], columns: int, colors: bool) -> str:
    """Give a line: what does not fit is cut."""
    drawn, left = [], columns
    for text, style in pieces:
        width = cell_width(text)
        if width > left:
            text, width = fitted(text, left), left
        drawn.append(styled(text, style if colors and text else ""))
        left -= width
        if left <= 0:
            break
    return "".join(drawn)


def _above(
    view: RunView, columns: int, rows: int, state: State | None = None, look: Look | None = None
) -> list[list[Piece]]:
    """Give what is above the table: as much of it as leaves room for the workers."""
    state, look = state or State(), look or Look()
    air: list[list[Piece]] = [[]] if rows >= 24 else []
    figures = 4 if rows >= 20 else 2 if rows >= 16 else 0
    above = [*_head(view, state, look, columns), *air, *_figures(view, columns)[:figures], *air]
    air = air if view.findings else []
    # What is wrong gets the lines that the workers do not need.
    spare = rows - len(above) - len(air) - len(view.lines) - 2
    findings = max(spare, 3 if rows >= 20 else 2 if rows >= 16 else 1)
    return [
        *above,
        *_findings(view, look, columns, findings),
        *air,
    ]


def _head(view: RunView, state: State, look: Look, columns: int) -> Iterator[list[Piece]]:
    snapshot = view.snapshot
    server = snapshot.server
    told = [server.version, "" if server.used_bytes is None else f"{size(server.used_bytes)} used"]
    if server.maxmemory_bytes:
        told[1] += f" of {size(server.maxmemory_bytes)}"
    if server.node and told[1]:
        told[1] += f" on {server.node}"
    where = f"  {server.address} ({', '.join(filter(None, told))})"
    clock = time.strftime("%H:%M:%S", time.localtime(snapshot.at))
    if look.trouble:
        now = f"  as {age(look.trouble.seconds)} ago"
    elif not look.live:
        now = ""
    else:
        now = "  paused" if state.paused else f"  every {state.interval:g} s"
    name = ("rlbroker top  ", "bold"), (snapshot.run, "bold cyan")
    room = columns - sum(cell_width(text) for text, _ in name) - len(clock) - len(now)
    middle = fitted(plain(where), max(0, room))
    yield [
        *name,
        (middle, "dim"),
        (clock, "bold"),
        (now, "yellow" if look.trouble or state.paused else "dim"),
    ]
    if look.trouble:
        yield [(fitted(f"no answer: {plain(look.trouble.what)}", columns), "reverse red")]
    else:
        yield [("learner ", "dim"), *_learner(view), ("   ", ""), *_version(view), ("   ", ""), *_alive(view)]


def _learner(view: RunView) -> Iterator[Piece]:
    learner = view.snapshot.learner
    if learner is None:
        yield "none yet", "yellow"
        return
    yield f"{plain(learner.host)}:{learner.pid} ", ""
    seen = "" if learner.last_seen_seconds is None else f", seen {age(learner.last_seen_seconds)} ago"
    style = {"away": "red", "ended": "yellow"}.get(learner.state, "green")
    yield learner.state + ("" if learner.state == "alive" else seen), style


def _version(view: RunView) -> Iterator[Piece]:
    pointer = view.snapshot.pointer
    yield "version ", "dim"
    if pointer is None:
        yield "none yet", "yellow"
        return
    yield f"{pointer.version:,}", "bold"
    kind = "delta" if pointer.base else "full"
    when = age(max(0.0, view.snapshot.at - pointer.published))
    yield f" {kind}, {size(pointer.stored_bytes)} for {size(pointer.raw_bytes)}, {when} ago", "dim"


def _alive(view: RunView) -> Iterator[Piece]:
    alive = sum(line.state == "alive" for line in view.lines)
    members = sum(line.state != "left" for line in view.lines)
    yield "workers ", "dim"
    yield f"{alive:,}", "bold" if alive == members else "bold red"
    yield f" of {members:,} alive", "dim"


def _figures(view: RunView, columns: int) -> list[list[Piece]]:
    abreast = 2 if columns >= 76 else 1
    width = columns // abreast - 2 * (abreast - 1)
    drawn: list[list[Piece]] = []
    for number, (name, label, is_share) in enumerate(_FIGURES):
        newest = view.newest(name)
        text = (share if is_share else figure)(newest)
        spark = sparkline(view.series[name], max(0, width - 20), top=1.0 if is_share else None)
        pieces = [
            (f"{label:<10}", "dim"),
            (f"{text:>7} ", "bold"),
            (fitted(spark, max(0, width - 20)), "cyan"),
        ]
        if number % abreast:
            drawn[-1] += [("    ", ""), *pieces]
        else:
            drawn.append(pieces)
    return drawn


def sparkline(values: Sequence[float | None], width: int, *, top: float | None = None) -> str:
    """Draw the newest values as columns of a character each, from 0 to the largest, or to `top`; None is a gap.

    >>> sparkline([9.0, 0.0, 1.0, None, 4.0, 8.0], 5)
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


def _findings(view: RunView, look: Look, columns: int, room: int) -> Iterator[list[Piece]]:
    shown = view.findings if len(view.findings) <= room else view.findings[: max(1, room - 1)]
    more = len(view.findings) - len(shown)
    for one in shown:
        style = "red" if one.severity == "critical" else "yellow"
        what = f"{'✗' if one.severity == 'critical' else '!'} {plain(one.what)}"
        hint = f"  {look.typed(one.hint)}"
        if room == 1 and more:
            hint = f"  and {more} more: {look.typed('rlbroker status')}"
        fits = cell_width(what + hint) <= columns
        if not fits and room == 1 and more:
            hint = f"  and {more} more"
            what, fits = fitted(what, max(0, columns - len(hint))).rstrip(), True
        yield [(what, style), (hint, "dim")] if fits else [(what, style)]
    if more and room > 1:
        yield [(f"  and {more} more: {look.typed('rlbroker status')}", "dim")]


def _table(view: RunView, lines: Sequence[WorkerLine], state: State, columns: int) -> Iterator[list[Piece]]:
    furthest = max((line.staleness or 0 for line in view.lines), default=0)
    yield from rows_of(lines, columns, furthest=furthest, sort=state.sort, reverse=state.reverse)
    if not lines:
        yield [("no worker has joined yet" if not view.lines else "no worker is like that", "dim")]


def _foot(state: State, workers: int, columns: int) -> list[Piece]:
    if state.typing:
        return [("/" + plain(state.text), "bold"), ("▏", "bold"), ("  Enter keeps it, Esc ends it", "dim")]
    keys = f"q quit  ? help  ←→ order  r reverse  / filter  f {state.shown}  space pause  +- {state.interval:g} s"
    if state.helping:
        keys = "any key ends the help"
    first, last = min(workers, state.top + 1), min(workers, state.top + state.page)
    where = f"{first}-{last} of {workers:,}" if workers else "0 of 0"
    if state.text:
        where = f"/{plain(state.text)}  {where}"
    room = columns - cell_width(where) - 2
    return [(fitted(keys, max(0, room)), "dim"), ("  ", ""), (where, "bold" if state.text else "dim")]
