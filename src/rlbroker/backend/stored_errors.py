"""Errors that are stored, to be raised later.

A traceback refers to the frames that an error passed, and so to the client whose method was called. A stored error with
a traceback would keep that client alive; an error that one of its own frames refers to waits for the garbage collector.
"""

from __future__ import annotations

import copy
from typing import NoReturn, TypeVar

Error = TypeVar("Error", bound=BaseException)


def without_frames(error: Error) -> Error:
    """Return an error after removing the tracebacks of it and of its causes."""
    error.__traceback__ = None
    for other in (error.__cause__, error.__context__):
        if other is not None and other.__traceback__ is not None:
            without_frames(other)
    return error


def raise_again(error: Exception) -> NoReturn:
    """Raise a copy of a stored error, so that the stored one gets no traceback."""
    raise _copy(error) from error.__cause__  # no variable: this frame must not refer to what it raises


def _copy(error: Exception) -> Exception:
    try:
        return copy.copy(error)
    except Exception:  # noqa: BLE001 # its class takes other arguments than it keeps
        return error.with_traceback(None)
