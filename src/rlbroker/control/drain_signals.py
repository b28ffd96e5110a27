"""Signals that ask a process to drain; a second signal of the same kind has its previous effect."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from rlbroker.config import shown
from rlbroker.errors import InvalidArgument, UsageError


class DrainSignals:
    """Calls a function at the first signal of each kind, and then restores that signal's handler."""

    def __init__(self, on_signal: Callable[[], None]) -> None:
        """Prepare to watch signals; no handler is changed yet.

        Args:
            on_signal: called in the signal handler, at any point of the main thread. It may set a variable, and must
                not take a lock.
        """
        self._on_signal: Callable[[], None] | None = on_signal  #: None after `restore`
        self._previous: dict[int, Any] = {}  #: handlers to restore, by signal

    def watch(self, *numbers: int) -> None:
        """Replace the handlers of these signals.

        Raises:
            UsageError: called outside the main thread, which alone can handle signals.
            InvalidArgument: one of these is not a signal that can be handled.
        """
        if threading.current_thread() is not threading.main_thread():
            raise UsageError(
                "only the main thread can handle signals; from another thread, call drain() instead"
            )
        for number in numbers:
            try:
                previous = signal.getsignal(number)
                # Stored first, because the signal may arrive at once. Python returns None for a handler that it did not
                # set.
                self._previous.setdefault(number, signal.SIG_DFL if previous is None else previous)
                signal.signal(number, self._handle)
            except (OSError, OverflowError, TypeError, ValueError) as error:
                self._previous.pop(number, None)
                raise InvalidArgument(
                    f"{shown(number)} is not a signal that can be handled: {error}"
                ) from error

    def restore(self) -> None:
        """Restore the handlers of the signals that did not arrive. `on_signal` is not called any more.

        Outside the main thread, which alone can restore handlers, a signal is passed on when it arrives.
        """
        self._on_signal = None
        if threading.current_thread() is threading.main_thread():
            for number in list(self._previous):
                self._restore(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._restore(number)
        if self._on_signal is None:
            signal.raise_signal(number)
        else:
            self._on_signal()

    def _restore(self, number: int) -> None:
        if signal.getsignal(number) == self._handle:  # otherwise other code has replaced it since
            signal.signal(number, self._previous[number])
            self._previous.pop(number, None)  # the handler may have run in between
