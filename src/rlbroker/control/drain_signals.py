"""Signals by which a process is told to go: noted once, and then as they were before."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from rlbroker.errors import InvalidArgument, UsageError


class DrainSignals:
    """Calls a function at the first signal of each kind; the next of that kind does what it did before."""

    def __init__(self, told: Callable[[], None]) -> None:
        """Prepare to be told; nothing changes yet.

        Args:
            told: is called from within the signal handler, so wherever the main thread happens to be: it may set
                a variable, and must take no lock.
        """
        self._told = told
        self._before: dict[int, Any] = {}

    def watch(self, *numbers: int) -> None:
        """Take these signals over from whatever handles them now.

        Raises:
            UsageError: this is not the main thread, and only that can take signals.
            InvalidArgument: one of these is no signal that can be taken.
        """
        if threading.current_thread() is not threading.main_thread():
            raise UsageError(
                "only the main thread can take signals over; from another thread, call drain() instead"
            )
        for number in numbers:
            try:
                before = signal.getsignal(number)
                # Noted first, as it may come at once. None: it was not set from Python.
                self._before.setdefault(number, signal.SIG_DFL if before is None else before)
                signal.signal(number, self._note)
            except (OSError, TypeError, ValueError) as error:
                self._before.pop(number, None)
                raise InvalidArgument(f"{number!r} is no signal that can be taken over: {error}") from error

    def restore(self) -> None:
        """Give back what was taken over and has not come; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in list(self._before):
                self._give_back(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._give_back(number)
        self._told()

    def _give_back(self, number: int) -> None:
        if signal.getsignal(number) == self._note:  # else somebody else has it by now
            signal.signal(number, self._before[number])
            self._before.pop(number, None)  # the handler may have been here meanwhile
