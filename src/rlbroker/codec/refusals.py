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
    return "".join(f"[{key!r:.80}]" for key in keys)


def type_name(value: object) -> str:
    """Return the name of a value's type, with its module unless it is a builtin."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def first_line(error: BaseException) -> str:
    """Return the beginning of an error's text, or its type if it cannot be shown or is empty."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # noqa: BLE001 - another library's error may raise whatever it likes
        lines = []
    return lines[0][:200] if lines else type(error).__name__
