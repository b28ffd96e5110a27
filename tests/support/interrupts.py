"""Raise an exception at a chosen point of a call, as a signal handler does: Ctrl-C, or a timeout by SIGALRM."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import rlbroker

PACKAGE = str(Path(rlbroker.__file__).parent) + "/"

#: What is counted: functions of rlbroker that the thread enters, or lines of rlbroker that it reaches.
Points = Literal["function", "line"]


class Alarm(Exception):
    """What a handler of SIGALRM raises. Unlike KeyboardInterrupt, `except Exception` catches it."""


@dataclass
class Interrupt:
    """An interrupt that is to come.

    Attributes:
        place: the function and line where it was raised; empty if the block ended before.
        ignored: whether Python itself ignored it, as it ignores all errors where an object or generator is deleted.
    """

    place: str = ""
    ignored: bool = False


def _is_deletion(frame: FrameType) -> bool:
    """Return whether this deletes an object or, maybe, a generator expression."""
    names, caller = [frame.f_code.co_name], frame.f_back
    while caller:
        names.append(caller.f_code.co_name)
        caller = caller.f_back
    return names[0] == "<genexpr>" or "__del__" in names


@contextmanager
def interrupt_at(
    point: int, points: Points, error: type[BaseException] = KeyboardInterrupt
) -> Iterator[Interrupt]:
    """A block in which this thread is interrupted once, and whose error is caught.

    Args:
        point: at which function or line, counted from 1.
        points: what to count.
        error: what to raise.
    """
    interrupt, count = Interrupt(), 0

    def step(frame: FrameType) -> None:
        nonlocal count
        count += 1
        if count == point:
            sys.setprofile(None)
            sys.settrace(None)
            name = frame.f_code.co_filename.removeprefix(PACKAGE)
            interrupt.place = f"{name}:{frame.f_lineno} {frame.f_code.co_qualname}"
            interrupt.ignored = _is_deletion(frame)
            raise error

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            step(frame)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            step(frame)
        return trace

    # Python swallows an interrupt of a finalizer. pytest would keep it, and its frames: dropped clients would live on.
    previous, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        if points == "function":
            sys.setprofile(profile)
        else:
            sys.settrace(trace)
        yield interrupt
    except error:
        if not interrupt.place:
            raise
    finally:
        sys.setprofile(None)
        sys.settrace(None)
        sys.unraisablehook = previous
