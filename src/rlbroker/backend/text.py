"""Time spans and counts as text for people."""

from __future__ import annotations


def age(seconds: float) -> str:
    """Return a time span in short form.

    >>> [age(seconds) for seconds in (0.25, 75, 300, 7200, 260000)]
    ['0.2 s', '75 s', '5 min', '2 h', '3 days']
    """
    for limit, unit_seconds, unit in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds:.1f} s" if seconds < 10 else f"{seconds / unit_seconds:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def counted(count: int, one: str, many: str = "") -> str:
    """Return a number with its noun in the singular or plural.

    >>> counted(1, "version"), counted(2000, "version"), counted(0, "batch", "batches")
    ('1 version', '2,000 versions', '0 batches')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"
