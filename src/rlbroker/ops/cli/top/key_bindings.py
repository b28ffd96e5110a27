"""What was typed into `rlbroker top`: which workers to show, and in which order. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from rlbroker.ops.cli.top.table import COLUMNS, SORTS
from rlbroker.ops.inspect.watch import RunView, WorkerLine

#: How often to look can be chosen from these, seconds.
INTERVALS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

#: Which workers to show, as `f` goes through them.
SHOWN: Final = ("all", "alive", "trouble")


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


def chosen(view: RunView, state: State) -> list[WorkerLine]:
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
