"""Time spans, counts and errors as text for people."""

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


def readable(text: str, length: int = 500) -> str:
    """Return a text cut to a length, and with escapes in place of what UTF-8 cannot express.

    >>> readable("caf\\udce9.txt"), readable("long text", 4)
    ('caf\\\\udce9.txt', 'long')
    """
    return text[:length].encode(errors="backslashreplace").decode()[:length]


def describe_error(error: BaseException, length: int = 500) -> str:
    """Return an error's type and text, whatever its `__str__` does; for a group, those of its first errors too.

    >>> describe_error(ExceptionGroup("two", [ValueError("a"), KeyError(1)]))
    'ExceptionGroup: two (2 sub-exceptions): ValueError: a; KeyError: 1'
    """
    kind = type(error)  # `isinstance` would ask its `__class__`
    name = type.__dict__["__name__"].__get__(kind)
    try:
        text = "".join([str(error)])[:length]
        if issubclass(kind, BaseExceptionGroup):
            errors = error.exceptions[:3]  # type: ignore[attr-defined] # `kind` says that it is a group
            text += ": " + "; ".join(describe_error(one, length // 4) for one in errors)
    except Exception:  # noqa: BLE001 - it may do anything
        text = "its text cannot be shown"
    return readable(f"{name}: {text}" if text else name, length)
