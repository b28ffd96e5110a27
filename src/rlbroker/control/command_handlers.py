"""What a worker does for each command: the built-in ones, and the handlers that its user registered.

A new built-in command is a method of `CommandHandlers` and a line in its table `_built_in`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from rlbroker.control.inbox import Inbox, ReceivedCommand
from rlbroker.errors import InvalidArgument, UnsupportedType

logger = logging.getLogger("rlbroker")

#: Receives a command's data. An exception is reported to the learner as a failed command; the worker continues.
Handler = Callable[[Any], None]


class CommandHandlers:
    """The commands that one worker obeys, and their effects on it. `obey` is not thread-safe."""

    def __init__(self) -> None:
        """Begin with the built-in commands only."""
        self._built_in: dict[str, Handler] = {
            "stop": self._stop,
            "pause": self._pause,
            "resume": self._resume,
            "reset": self._reset,
        }
        self._registered: dict[str, Handler] = {}
        self._stopped = False
        self._paused_until: float | None = None
        self._reset_requested = False

    @property
    def stopped(self) -> bool:
        """Whether a `stop` was obeyed."""
        return self._stopped

    @property
    def paused(self) -> bool:
        """Whether a `pause` is in force."""
        until = self._paused_until
        return until is not None and time.monotonic() < until

    def take_reset(self) -> bool:
        """Return whether a `reset` was obeyed since the last call."""
        requested = self._reset_requested
        try:
            self._reset_requested = False
            return requested
        except BaseException:  # an interrupt: the next call returns it
            self._reset_requested = requested
            raise

    def register(self, name: str, handler: Handler) -> None:
        """Call this handler for each command of the name, after the built-in effect if there is one.

        Raises:
            UnsupportedType: the handler is not callable.
        """
        if not callable(handler):
            raise UnsupportedType(f"the handler of {name!r} must be callable; got {type(handler).__name__}")
        self._registered[name] = handler

    def obey(self, command: ReceivedCommand, inbox: Inbox) -> None:
        """Do `command`, which is the inbox's next one, and acknowledge the outcome.

        An `Exception` of a handler becomes the outcome `failed`. Any other exception, such as `KeyboardInterrupt`,
        is acknowledged too, and raised.

        Raises:
            PeerError: the server's clock, which says whether the command has expired, could not be read. The command
                stays in the inbox.
        """
        expired = inbox.is_expired(command)
        inbox.remove()  # before the steps, so that an interrupted command is not done again
        steps = [table[command.name] for table in (self._built_in, self._registered) if command.name in table]
        if expired:
            inbox.acknowledge_command(command, "expired")
        elif not steps:
            inbox.acknowledge_command(command, "unknown")
        else:
            try:
                for step in steps:
                    step(command.data)
            except Exception as error:
                logger.exception("the command %r failed", command.name)
                inbox.acknowledge_command(command, "failed", f"{type(error).__name__}: {error}")
            except BaseException as error:
                # Ctrl-C or sys.exit: the worker ends, and the learner must not wait for its acknowledgement.
                inbox.acknowledge_command(command, "failed", type(error).__name__)
                raise
            else:
                inbox.acknowledge_command(command, "done")

    def _stop(self, data: Any) -> None:
        self._stopped = True

    def _pause(self, data: Any) -> None:
        duration = data.get("duration") if isinstance(data, dict) else data
        if duration is None:
            self._paused_until = float("inf")
        elif isinstance(duration, (int, float)) and duration >= 0:
            self._paused_until = time.monotonic() + duration
        else:
            raise InvalidArgument(f"pause takes a duration in seconds, or None; got {duration!r}")

    def _resume(self, data: Any) -> None:
        self._paused_until = None

    def _reset(self, data: Any) -> None:
        self._reset_requested = True
