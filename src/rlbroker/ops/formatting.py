"""Numbers and names as text for people. The library needs some too: these are in `backend.text`."""

from __future__ import annotations

from collections.abc import Sequence


def format_bytes(count: float) -> str:
    """Return a number of bytes with three digits, in powers of 1000.

    >>> [format_bytes(count) for count in (0, 999, 1500, 123_456_789, 5e12)]
    ['0 B', '999 B', '1.5 kB', '123 MB', '5 TB']
    """
    return _shorten(count, (" B", " kB", " MB", " GB", " TB"))


def format_number(value: float | None) -> str:
    """Return a number with three digits; None is unknown.

    >>> [format_number(value) for value in (None, 0, 0.25, 42.42, 123.4, 52_700, 999_999)]
    ['-', '0', '0.25', '42.4', '123', '52.7k', '1M']
    """
    return "-" if value is None else _shorten(value, ("", "k", "M", "G"))


def _shorten(value: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}{units[-1]}"


def format_share(value: float | None) -> str:
    """Return a fraction as a percentage; None is unknown.

    >>> [format_share(value) for value in (None, 0, 0.005, 0.5, 1)]
    ['-', '0 %', '0.5 %', '50 %', '100 %']
    """
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if 0 < value < 0.0995 else f"{100 * value:.0f} %"


def sanitize(text: str) -> str:
    """Replace characters that could control the terminal: the text comes from workers, which are not trusted."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def describe_other_workers(workers: Sequence[int]) -> str:
    """Return a phrase that names the other workers with the same finding.

    >>> describe_other_workers([3, 4]), describe_other_workers(range(3, 30))
    ('the same for workers 3, 4', 'the same for 27 more workers: 3, 4, 5, 6, 7, 8, 9, 10 …')
    """
    if len(workers) == 1:
        return f"the same for worker {workers[0]}"
    shown = ", ".join(map(str, workers[:8]))
    if len(workers) <= 8:
        return f"the same for workers {shown}"
    return f"the same for {len(workers):,} more workers: {shown} …"
