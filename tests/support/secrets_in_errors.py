"""A password that no error may show, and all that an error shows."""

from __future__ import annotations

SECRET = "hunter2"


def texts(error: BaseException | None) -> str:
    """Return the messages and notes of an error and of all that it was raised from."""
    found = ""
    while error is not None:
        found += f"{error!r} {error} {getattr(error, '__notes__', '')}\n"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found
