"""What a worker does for each command: the built-in ones, and the handlers that its user registered.

A new built-in command is a method of `CommandHandlers` and a line in its table `_BUILT_IN`.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Final

from rlbroker.backend.text import describe_error, readable
from rlbroker.config import check_timeout_seconds
from rlbroker.control.inbox import Inbox, ReceivedCommand
from rlbroker.errors import InvalidArgument, UnsupportedType

logger = logging.getLogger("rlbroker")

#: How long a `pause` without a duration lasts.
PAUSE_SECONDS: Final = 1.0

#: Characters of a handler's traceback that are logged.
TRACEBACK_LENGTH: Final = 10_000

#: The result of a command whose handler was interrupted: it may have been done in part.
INTERRUPTED: Final = ("failed", "interrupted; it may have been done in part")

#: Receives a command's data; what it returns is ignored. An exception is reported to the learner as a failed command,
#: and the worker continues.
Handler = Callable[[Any], object]


def _describe_traceback() -> str:
    """Return the traceback of the exception that is being handled, whatever that exception's own code does."""
    try:
        return readable(traceback.format_exc(), TRACEBACK_LENGTH)
    except Exception:  # noqa: BLE001 - it may do anything
        return "(its traceback cannot be shown)"


class CommandHandlers:
    """The commands that one worker obeys, and their effects on it. `obey` is not thread-safe."""

    def __init__(self) -> None:
        """Begin with the built-in commands only."""
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
            UnsupportedType: the name is not text, or the handler is not callable.
        """
        if not isinstance(name, str):
            raise UnsupportedType(f"the name of a command is text; got a {type(name).__name__}")
        if not callable(handler):
            raise UnsupportedType(f"the handler of {name!r} must be callable; got {type(handler).__name__}")
        self._registered[name] = handler

    def obey(self, command: ReceivedCommand, inbox: Inbox) -> None:
        """Do `command`, which is the inbox's next one, and acknowledge the outcome.

        An `Exception` of a handler becomes the outcome `failed`. Any other exception, such as `KeyboardInterrupt`,
        is acknowledged too, and raised. A handler is called at most once: a command that was interrupted after that,
        by an exception of a signal handler, is acknowledged as failed. One that was interrupted before is done by the
        next call.

        Raises:
            PeerError: the server's clock, which says whether the command has expired, could not be read. The command
                stays in the inbox.
        """
        if command.result is None:
            self._do(command, inbox)
        inbox.finish()

    @property
    def is_calling(self) -> bool:
        """Whether this thread is in a handler, which has called the client.

        The call stack says so: after an interrupt, an attribute might say it for ever.
        """
        frame = sys._getframe()
        while frame := frame.f_back:  # type: ignore[assignment]  # None after the last one
            if frame.f_code is CommandHandlers._do.__code__ and frame.f_locals["self"] is self:
                return True
        return False

    def _do(self, command: ReceivedCommand, inbox: Inbox) -> None:
        """Do a command and set its result."""
        built_in, registered = self._BUILT_IN.get(command.name), self._registered.get(command.name)
        if inbox.is_expired(command):
            command.result = ("expired", "")
            return
        if not built_in and not registered:
            command.result = ("unknown", "")
            return
        command.begun = True
        try:
            if built_in:
                built_in(self, command.data)  # repeated after an interrupt
        except InvalidArgument as error:
            command.result = ("failed", describe_error(error))
            return
        if registered:
            command.result = INTERRUPTED  # if the handler does not return
            try:
                registered(command.data)
            except Exception as error:  # noqa: BLE001 - it may raise anything
                command.result = ("failed", describe_error(error))
                logger.error("the command %r failed\n%s", command.name, _describe_traceback())
                return
            except BaseException as error:
                # Ctrl-C or sys.exit: the worker ends, and the learner must not wait for its acknowledgement.
                command.result = ("failed", describe_error(error))
                inbox.finish()
                raise
        command.result = ("done", "")

    def _stop(self, data: Any) -> None:
        self._stopped = True

    def _pause(self, data: Any) -> None:
        duration = data.get("duration", PAUSE_SECONDS) if isinstance(data, Mapping) else data
        if duration is None:
            self._paused_until = float("inf")
        else:
            self._paused_until = time.monotonic() + check_timeout_seconds("duration", duration)

    def _resume(self, data: Any) -> None:
        self._paused_until = None

    def _reset(self, data: Any) -> None:
        self._reset_requested = True

    #: Plain functions: methods of this object would keep it in a circle.
    _BUILT_IN: Final = {"stop": _stop, "pause": _pause, "resume": _resume, "reset": _reset}
