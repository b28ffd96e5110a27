"""Keys by name, from what a terminal sends for them. Pure."""

from __future__ import annotations

from typing import Final

#: What follows ESC [ or ESC O, in the various habits of terminals.
_NAMED: Final = {
    "A": "up",
    "B": "down",
    "C": "right",
    "D": "left",
    "H": "home",
    "F": "end",
    "1~": "home",
    "4~": "end",
    "5~": "page up",
    "6~": "page down",
    "7~": "home",
    "8~": "end",
}

_SINGLE: Final = {"\r": "enter", "\n": "enter", "\x7f": "backspace", "\b": "backspace"}


def keys(sent: str, *, more: bool = False) -> tuple[list[str], str]:
    """Give the keys that were pressed, and the beginning of one whose rest has not come.

    Args:
        sent: what the terminal sent.
        more: whether there may be more to come: a lone ESC is a key of its own only if nothing follows.

    >>> keys("q\\x1b[A\\x1b[6~ä\\r")
    (['q', 'up', 'page down', 'ä', 'enter'], '')
    >>> keys("\\x1b[", more=True), keys("\\x1b")
    (([], '\\x1b['), (['escape'], ''))
    """
    found, at = list[str](), 0
    while at < len(sent):
        if sent[at] != "\x1b":
            found.append(_SINGLE.get(sent[at], sent[at]))
            at += 1
            continue
        end = _end(sent, at)
        if end is None:
            if more:
                return found, sent[at:]
            end = len(sent)
        name = _NAMED.get(sent[at + 2 : end], "") if end > at + 1 else "escape"
        found += [name] if name else []
        at = end
    return found, ""


def _end(sent: str, at: int) -> int | None:
    """Give where the sequence ends that begins here with ESC; None if its rest has not come."""
    if at + 1 == len(sent):
        return None
    if sent[at + 1] not in "[O":
        return at + 1  # ESC, and another key
    for place in range(at + 2, len(sent)):
        if "@" <= sent[place] <= "~":
            return place + 1
    return None
