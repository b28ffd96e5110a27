"""Why a value cannot travel, and where in its tree it is."""

from __future__ import annotations

from collections.abc import Sequence

from rlbroker.errors import UnsupportedType

Path = Sequence[object]


class RefusedError(Exception):
    """The reason why a value cannot travel; collects the path of the value while it propagates up the tree."""

    def __init__(self, reason: str) -> None:
        """Keep the reason, which follows the path in the message."""
        super().__init__(reason)
        self.reason = reason
        self.keys: list[object] = []

    def unsupported(self) -> UnsupportedType:
        """Return the error for the caller, which names the path."""
        return UnsupportedType(f"{format_path(self.keys[::-1])}: {self.reason}")


def format_path(keys: Path) -> str:
    """Write a path as Python would index it.

    >>> format_path(["experiences", "obs", 0])
    "['experiences']['obs'][0]"
    """
    if not keys:
        return "the top level"
    if len(keys) > 12:
        return f"{format_path(keys[:10])}…"
    return "".join(f"[{shorten_object(key)}]" for key in keys)


def type_name(value: object) -> str:
    """Return the name of a value's type, with its module unless it is a builtin; in short, whatever its metaclass does.

    >>> type_name(3), type_name(RefusedError("no"))
    ('int', 'rlbroker.codec.refusals.RefusedError')
    """
    kind = type(value)
    try:
        name = f"{kind.__module__}.{kind.__qualname__}"
    except Exception:  # noqa: BLE001 - its metaclass may raise whatever it likes
        name = type.__dict__["__name__"].__get__(kind)
    return _readable(name.removeprefix("builtins."), 200)


def shorten_object(value: object) -> str:
    """Return an object of any library as short text: the beginning of its repr, or its type if it has none.

    >>> shorten_object((1, "a")), shorten_object(RefusedError)
    ("(1, 'a')", "<class 'rlbroker.codec.refusals.RefusedError'>")
    """
    try:
        return _readable("".join([repr(value)]), 80)
    except Exception:  # noqa: BLE001 - its `__repr__` may raise whatever it likes
        return f"<{type_name(value)}>"


def first_line(error: BaseException) -> str:
    """Return the beginning of an error's text, or its type if it cannot be shown or is empty."""
    try:
        lines = "".join([str(error)]).strip().splitlines()
    except Exception:  # noqa: BLE001 - another library's error may raise whatever it likes
        lines = []
    return _readable(lines[0], 200) if lines else type_name(error).rpartition(".")[2]


def _readable(text: str, length: int) -> str:
    return text[:length].encode(errors="backslashreplace").decode()[:length]
