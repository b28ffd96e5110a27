"""The keys of `rlbroker top`, and the workers that it shows after they were pressed. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from rlbroker.ops.cli.top.table import COLUMNS, SORT_COLUMNS
from rlbroker.ops.inspect.watch import RunView, WorkerLine

#: The refresh intervals that `+` and `-` step through, in seconds.
INTERVALS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

#: The groups of workers that `f` steps through.
GROUPS: Final = ("all", "alive", "trouble")

#: A row below the end of every table; `clamp_scroll` replaces it with the last row.
_END_ROW: Final = 1 << 20


@dataclass(frozen=True)
class ViewState:
    """What the user has chosen with keys and options.

    Attributes:
        sort: name of the column that orders the workers.
        reverse: whether to reverse the column's usual order.
        group: which workers are shown, one of `GROUPS`.
        search: only workers with this id, or with this text in state or process, are shown.
        typing: whether keys are added to `search`.
        top_row: number of workers above the screen.
        page_rows: number of workers that fit on the screen.
        interval: seconds between two refreshes.
        paused: whether refreshing is paused.
        help_shown: whether the help replaces the table.
        quit: whether to end the command.
    """

    sort: str = "id"
    reverse: bool = False
    group: str = "all"
    search: str = ""
    typing: bool = False
    top_row: int = 0
    page_rows: int = 10
    interval: float = 0.5
    paused: bool = False
    help_shown: bool = False
    quit: bool = False


def press_key(state: ViewState, key: str) -> ViewState:
    """Return the state after a key, which is a character or a name from `terminal.parse_keys`."""
    if state.typing:
        return _type_key(state, key)
    if state.help_shown:
        return replace(state, help_shown=False, quit=key == "q")
    if key in _SCROLL_KEYS:
        return replace(state, top_row=max(0, _SCROLL_KEYS[key](state)))
    if key in ("left", "right"):
        place = SORT_COLUMNS.index(state.sort) + (1 if key == "right" else -1)
        return replace(state, sort=SORT_COLUMNS[place % len(SORT_COLUMNS)], reverse=False, top_row=0)
    if key == "f":
        place = GROUPS.index(state.group) + 1
        return replace(state, group=GROUPS[place % len(GROUPS)], top_row=0)
    if key in ("+", "=", "-"):
        return replace(state, interval=_step_interval(state.interval, faster=key != "-"))
    if key in _OTHER_KEYS:
        return _OTHER_KEYS[key](state)
    for column in COLUMNS:
        if key == column.key:
            return replace(state, sort=column.name, reverse=False, top_row=0)
    return state


_SCROLL_KEYS: Final[dict[str, Callable[[ViewState], int]]] = {
    "up": lambda state: state.top_row - 1,
    "k": lambda state: state.top_row - 1,
    "down": lambda state: state.top_row + 1,
    "j": lambda state: state.top_row + 1,
    "page up": lambda state: state.top_row - state.page_rows,
    "page down": lambda state: state.top_row + state.page_rows,
    "home": lambda state: 0,
    "g": lambda state: 0,
    "end": lambda state: _END_ROW,
    "G": lambda state: _END_ROW,
}

_OTHER_KEYS: Final[dict[str, Callable[[ViewState], ViewState]]] = {
    "q": lambda state: replace(state, quit=True),
    "r": lambda state: replace(state, reverse=not state.reverse, top_row=0),
    "/": lambda state: replace(state, typing=True, top_row=0),
    " ": lambda state: replace(state, paused=not state.paused),
    "?": lambda state: replace(state, help_shown=True),
    "escape": lambda state: replace(state, search="", top_row=0),
}


def _type_key(state: ViewState, key: str) -> ViewState:
    if key == "enter":
        return replace(state, typing=False)
    if key == "escape":
        return replace(state, typing=False, search="")
    if key == "backspace":
        return replace(state, search=state.search[:-1])
    return replace(state, search=state.search + key) if len(key) == 1 and key.isprintable() else state


def _step_interval(seconds: float, *, faster: bool) -> float:
    if faster:
        return max((step for step in INTERVALS if step < seconds), default=min(seconds, INTERVALS[0]))
    return min((step for step in INTERVALS if step > seconds), default=max(seconds, INTERVALS[-1]))


def select_workers(view: RunView, state: ViewState) -> list[WorkerLine]:
    """Return the workers to show, in order; those without a value in the sort column come last."""
    selected = [
        line
        for line in view.lines
        if (state.group != "alive" or line.state == "alive")
        and (state.group != "trouble" or line.troubled)
        and _matches(line, state.search.lower())
    ]
    column = next(column for column in COLUMNS if column.name == state.sort)
    with_value = [line for line in selected if column.value(line) is not None]
    with_value.sort(key=column.value, reverse=column.ascending == state.reverse)
    return with_value + [line for line in selected if column.value(line) is None]


def _matches(line: WorkerLine, text: str) -> bool:
    if text.isdecimal():  # probably a worker id, though many pids contain these digits
        return str(line.worker).startswith(text) or line.process.endswith(f":{text}")
    return text in f"{line.state} {line.process}".lower()
