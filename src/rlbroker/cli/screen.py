"""What `rlbroker top` shows: from what a look saw, and what was typed, to the lines of a terminal. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from rlbroker.cli.cells import cell_width, fitted, styled
from rlbroker.cli.text import age, plain, size
from rlbroker.observer.watch import View, WorkerLine

#: How often to look can be chosen from these, seconds.
INTERVALS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

#: Which workers to show, as `f` goes through them.
SHOWN: Final = ("all", "alive", "trouble")

#: A part of a line, and its style.
Piece = tuple[str, str]

_SPARKS: Final = "▁▂▃▄▅▆▇█"
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"

#: Columns of the bar that shows how far a worker is behind, and the fewest versions that fill it.
_BAR_WIDTH, _BAR_VERSIONS = 8, 10

#: Staleness from which on a worker is behind, and one that is just not up to date.
_FAR, _NEAR = 10, 3

#: What cannot be known yet.
_UNKNOWN: Final = "-"


@dataclass(frozen=True)
class State:
    """What was typed so far.

    Attributes:
        sort: name of the column that orders the workers.
        reverse: whether against its usual order.
        shown: which workers; see `SHOWN`.
        text: only workers whose id begins with it, or in whose state or process it is.
        typing: whether that text is being typed.
        top: how many workers are scrolled past.
        page: how many fit.
        interval: seconds between two looks.
        paused: whether not to look.
        helping: whether the keys are explained.
        over: whether to end.
    """

    sort: str = "id"
    reverse: bool = False
    shown: str = "all"
    text: str = ""
    typing: bool = False
    top: int = 0
    page: int = 10
    interval: float = 0.5
    paused: bool = False
    helping: bool = False
    over: bool = False


@dataclass(frozen=True)
class Trouble:
    """That the server did not answer: since how long, and what the error says."""

    seconds: float
    what: str


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


def _figure(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    for limit, unit in ((1e3, ""), (1e6, "k"), (1e9, "M")):
        if value < limit:
            shown = value / limit * 1e3
            return f"{shown:.0f}{unit}" if shown >= 99.95 or shown == 0 else f"{shown:.1f}{unit}"
    return f"{value / 1e9:.1f}G"


def _share(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.0%}".replace("%", " %")


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
        lambda line: "" if line.state == "left" else _figure(line.batches_per_second),
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
        lambda line: "yellow" if (line.unpolled_seconds or 0.0) >= 10 and line.state == "alive" else "",
        width=6,
    ),
    Column(
        "room",
        "o",
        lambda line: line.room_share,
        lambda line: "" if line.state == "left" else _share(line.room_share),
        lambda line: "yellow" if (line.room_share or 0.0) >= 0.25 else "",
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


# What is typed


def pressed(state: State, key: str) -> State:
    """Give the state after a key, which is a character or a name, as `keyboard.keys` gives them."""
    if state.typing:
        return _typed(state, key)
    if state.helping:
        return replace(state, helping=False, over=key == "q")
    if key in _SCROLLS:
        return replace(state, top=max(0, _SCROLLS[key](state)))
    if key in ("left", "right"):
        place = SORTS.index(state.sort) + (1 if key == "right" else -1)
        return replace(state, sort=SORTS[place % len(SORTS)], reverse=False, top=0)
    if key == "f":
        place = SHOWN.index(state.shown) + 1
        return replace(state, shown=SHOWN[place % len(SHOWN)], top=0)
    if key in ("+", "=", "-"):
        return replace(state, interval=_other_interval(state.interval, faster=key != "-"))
    if key in _SIMPLE:
        return _SIMPLE[key](state)
    for column in COLUMNS:
        if key == column.letter:
            return replace(state, sort=column.name, reverse=False, top=0)
    return state


_SCROLLS: Final[dict[str, Callable[[State], int]]] = {
    "up": lambda state: state.top - 1,
    "k": lambda state: state.top - 1,
    "down": lambda state: state.top + 1,
    "j": lambda state: state.top + 1,
    "page up": lambda state: state.top - state.page,
    "page down": lambda state: state.top + state.page,
    "home": lambda state: 0,
    "g": lambda state: 0,
    "end": lambda state: 1 << 20,  # `settled` knows where the end is
    "G": lambda state: 1 << 20,
}

_SIMPLE: Final[dict[str, Callable[[State], State]]] = {
    "q": lambda state: replace(state, over=True),
    "r": lambda state: replace(state, reverse=not state.reverse, top=0),
    "/": lambda state: replace(state, typing=True, top=0),
    " ": lambda state: replace(state, paused=not state.paused),
    "?": lambda state: replace(state, helping=True),
    "escape": lambda state: replace(state, text="", top=0),
}


def _typed(state: State, key: str) -> State:
    if key == "enter":
        return replace(state, typing=False)
    if key == "escape":
        return replace(state, typing=False, text="")
    if key == "backspace":
        return replace(state, text=state.text[:-1])
    return replace(state, text=state.text + key) if len(key) == 1 and key.isprintable() else state


def _other_interval(seconds: float, *, faster: bool) -> float:
    if faster:
        return max((one for one in INTERVALS if one < seconds), default=min(seconds, INTERVALS[0]))
    return min((one for one in INTERVALS if one > seconds), default=max(seconds, INTERVALS[-1]))


def settled(state: State, view: View, columns: int, rows: int) -> State:
    """Give the state as it can be shown: it scrolls no further than there are workers."""
    page = max(1, rows - len(_above(view, columns, rows)) - 2)
    last = max(0, len(chosen(view, state)) - page)
    return replace(state, page=page, top=min(state.top, last))


# Which workers, in which order


def chosen(view: View, state: State) -> list[WorkerLine]:
    """Give the workers that are to be shown, in order."""
    found = [
        line
        for line in view.lines
        if (state.shown != "alive" or line.state == "alive")
        and (state.shown != "trouble" or line.troubled)
        and _has(line, state.text.lower())
    ]
    column = next(column for column in COLUMNS if column.name == state.sort)
    known = [line for line in found if column.value(line) is not None]
    known.sort(key=column.value, reverse=column.rising == state.reverse)
    return known + [line for line in found if column.value(line) is None]


def _has(line: WorkerLine, text: str) -> bool:
    if text.isdecimal():  # an id, as a rule: it is in many a pid too
        return str(line.worker).startswith(text) or line.process.endswith(f":{text}")
    return text in f"{line.state} {line.process}".lower()


# Lines


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


def frame(view: View, state: State, columns: int, rows: int, look: Look) -> list[str]:
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


def page(view: View, state: State, columns: int, look: Look) -> list[str]:
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
    view: View, columns: int, rows: int, state: State | None = None, look: Look | None = None
) -> list[list[Piece]]:
    """Give what is above the table: as much of it as leaves room for the workers."""
    state, look = state or State(), look or Look()
    air: list[list[Piece]] = [[]] if rows >= 24 else []
    figures = 4 if rows >= 20 else 2 if rows >= 16 else 0
    findings = 3 if rows >= 20 else 2 if rows >= 16 else 1
    return [
        *_head(view, state, look, columns),
        *air,
        *_figures(view, columns)[:figures],
        *air,
        *_findings(view, look, columns, findings),
        *(air if view.findings else []),
    ]


def _head(view: View, state: State, look: Look, columns: int) -> Iterator[list[Piece]]:
    snapshot = view.snapshot
    server = snapshot.server
    told = [server.version, "" if server.used_bytes is None else f"{size(server.used_bytes)} used"]
    if server.maxmemory_bytes:
        told[1] += f" of {size(server.maxmemory_bytes)}"
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


def _learner(view: View) -> Iterator[Piece]:
    learner = view.snapshot.learner
    if learner is None:
        yield "none yet", "yellow"
        return
    yield f"{plain(learner.host)}:{learner.pid} ", ""
    seen = "" if learner.last_seen_seconds is None else f", seen {age(learner.last_seen_seconds)} ago"
    style = {"away": "red", "ended": "yellow"}.get(learner.state, "green")
    yield learner.state + ("" if learner.state == "alive" else seen), style


def _version(view: View) -> Iterator[Piece]:
    pointer = view.snapshot.pointer
    yield "version ", "dim"
    if pointer is None:
        yield "none yet", "yellow"
        return
    yield f"{pointer.version:,}", "bold"
    kind = "delta" if pointer.base else "full"
    when = age(max(0.0, view.snapshot.at - pointer.published))
    yield f" {kind}, {size(pointer.stored_bytes)} for {size(pointer.raw_bytes)}, {when} ago", "dim"


def _alive(view: View) -> Iterator[Piece]:
    alive = sum(line.state == "alive" for line in view.lines)
    members = sum(line.state != "left" for line in view.lines)
    yield "workers ", "dim"
    yield f"{alive:,}", "bold" if alive == members else "bold red"
    yield f" of {members:,} alive", "dim"


def _figures(view: View, columns: int) -> list[list[Piece]]:
    abreast = 2 if columns >= 76 else 1
    width = columns // abreast - 2 * (abreast - 1)
    drawn: list[list[Piece]] = []
    for number, (name, label, is_share) in enumerate(_FIGURES):
        newest = view.newest(name)
        text = (_share if is_share else _figure)(newest)
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


def bar(value: int, full: int, width: int) -> str:
    """Draw a number as a bar that is as long as the width where it is `full`.

    >>> [bar(value, 16, 2) for value in (0, 1, 8, 11, 99)]
    ['', '▏', '█', '█▍', '██']
    """
    eighths = min(8 * width, -(-8 * width * value // full))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _findings(view: View, look: Look, columns: int, room: int) -> Iterator[list[Piece]]:
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


def _table(view: View, lines: Sequence[WorkerLine], state: State, columns: int) -> Iterator[list[Piece]]:
    furthest = max((line.staleness or 0 for line in view.lines), default=0)
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
        if name != state.sort:
            kept.remove(next(column for column in kept if column.name == name))
    if any(column.name == "process" for column in kept):
        widths["process"] += max(0, columns - _width(kept, widths))
    yield [(fitted(_headings(kept, widths, state), columns), "reverse")]
    for number, line in enumerate(lines):
        pieces: list[Piece] = []
        for column in kept:
            text = fitted(cells[column.name][number], widths[column.name], right=not column.left)
            pieces += [(text, "dim" if line.state == "left" else column.style(line)), (" ", "")]
        yield pieces[:-1]
    if not lines:
        yield [("no worker has joined yet" if not view.lines else "no worker is like that", "dim")]


def _width(columns: Sequence[Column], widths: dict[str, int]) -> int:
    return sum(widths[column.name] for column in columns) + len(columns) - 1


def _headings(columns: Sequence[Column], widths: dict[str, int], state: State) -> str:
    named = []
    for column in columns:
        mark = ("▲" if column.rising != state.reverse else "▼") if column.name == state.sort else ""
        named.append(fitted(column.name + mark, widths[column.name], right=not column.left))
    return " ".join(named)


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
