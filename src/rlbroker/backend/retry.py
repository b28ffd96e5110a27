"""The only retry policy: an idempotent operation is repeated until it succeeds or the deadline is over."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from rlbroker.backend.deadline import ONE_TRY, Backoff, Deadline, within
from rlbroker.backend.error_mapping import ErrorTranslator
from rlbroker.errors import ConnectionFailed, RunLost, without_frames

logger = logging.getLogger("rlbroker")

Result = TypeVar("Result")


class RetryPolicy:
    """Retries with exponential back-off after a broken connection, and while the run waits for its learner."""

    def __init__(self, timeout_seconds: float, errors: ErrorTranslator) -> None:
        """Set the default timeout of operations; `errors` knows whether the server has ever answered."""
        self._timeout_seconds, self._errors = timeout_seconds, errors
        self._silence_logged = False

    def run(self, operation: Callable[[], Result], deadline: Deadline | None = None) -> Result:
        """Return the result of an operation, repeated until it succeeds or the deadline is over.

        An attempt that hung is not repeated if another one could hang far beyond the deadline. See `Connection.retry`.
        """
        if deadline is ONE_TRY:
            return operation()
        with within(deadline or Deadline(self._timeout_seconds)) as in_force:
            return self._repeat(operation, in_force)

    def _repeat(self, operation: Callable[[], Result], deadline: Deadline) -> Result:
        backoff: Backoff | None = None
        #: The latest error after which an attempt may have been applied.
        unclear: ConnectionFailed | None = None
        while True:
            began = time.monotonic()
            try:
                return operation()
            except (ConnectionFailed, RunLost) as error:
                took_seconds = time.monotonic() - began
                unclear = error if isinstance(error, ConnectionFailed) else unclear
                backoff = backoff or Backoff()
                pause = backoff.next(deadline)
                if deadline.over or deadline.remaining < took_seconds / 2:
                    if unclear not in (None, error):
                        raise unclear from error
                    raise
                # A user who waits for a server that has never answered may have mistyped its address.
                first = not self._errors.has_answered and not self._silence_logged and deadline.remaining > 1
                self._silence_logged |= first
                logger.log(
                    logging.WARNING if first else logging.DEBUG,
                    "%s; trying again for %.0f s",
                    str(error),
                    deadline.remaining,
                )
                without_frames(error)  # `unclear` refers to it, and its frames to `unclear`
                time.sleep(pause)
