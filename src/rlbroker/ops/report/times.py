"""Times and durations of the report, in one named time zone."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

_STEPS = (
    *(1, 2, 5, 10, 15, 30),
    *(60, 120, 300, 600, 900, 1800),
    *(3600, 7200, 10_800, 21_600, 43_200),
    *(86_400, 172_800, 345_600, 604_800),
)


class Clock:
    """Formats times in this machine's time zone, with one UTC offset."""

    def __init__(self, at: float) -> None:
        """Use the UTC offset of the time `at`, so that all times of a page have the same offset."""
        local = datetime.fromtimestamp(at).astimezone()
        self._offset = local.utcoffset() or timedelta()
        self._zone = timezone(self._offset)
        hours = local.strftime("%z")
        name = local.tzname() or "UTC"
        #: The name of the zone with its UTC offset.
        self.zone = name if name == "UTC" else f"{name}, UTC{hours[:3]}:{hours[3:]}"

    def full(self, at: float) -> str:
        """Return date and time without the zone, which the page names once."""
        return self._format(at, "%-d %b %Y, %H:%M:%S")

    def iso(self, at: float) -> str:
        """Return date and time in ISO format."""
        return datetime.fromtimestamp(at, self._zone).isoformat(timespec="seconds")

    def ticks(self, begin: float, end: float, count: int) -> tuple[list[float], Callable[[float], str]]:
        """Return at most `count` round times of a span, and the function that formats them."""
        span = max(end - begin, 1.0)
        step = next(
            (step for step in _STEPS if span / step <= count), math.ceil(span / count / 604_800) * 604_800
        )
        shift = self._offset.total_seconds()
        first = math.ceil((begin + shift) / step) * step - shift
        pattern = "%-d %b" if step >= 86_400 else "%-d %b %H:%M" if span > 86_400 else "%H:%M"
        if step < 60:
            pattern = "%H:%M:%S"
        ticks = []
        while first <= end:
            ticks.append(first)
            first += step
        return ticks, lambda at: self._format(at, pattern)

    def _format(self, at: float, pattern: str) -> str:
        return datetime.fromtimestamp(at, self._zone).strftime(pattern)


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units.

    >>> [format_duration(seconds) for seconds in (0.4, 48, 124, 7380, 90_000)]
    ['0.4 s', '48 s', '2 min 4 s', '2 h 3 min', '1 d 1 h']
    """
    if seconds < 59.5:
        return f"{seconds:.1f} s" if 0 < seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    for small, names in ((1, ("min", "s")), (60, ("h", "min")), (3600, ("d", "h"))):
        large = {1: 60, 60: 3600, 3600: 86_400}[small]
        if whole < {1: 3600, 60: 86_400, 3600: math.inf}[small]:
            rest = whole % large // small
            return f"{whole // large:,} {names[0]}" + (f" {rest} {names[1]}" if rest else "")
    raise AssertionError("the largest unit has no limit")
