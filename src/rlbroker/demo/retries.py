"""Retries during an outage of the server that lasts longer than the timeout of one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from rlbroker.backend.deadline import Deadline
from rlbroker.config import RunSettings
from rlbroker.errors import ConnectionFailed, RunLost

#: A worker that was silent for longer than this has lost its place in the run, so retrying is no use.
OUTAGE_SECONDS: Final = RunSettings.forget_seconds

Result = TypeVar("Result")


def retry_during_outage(call: Callable[[], Result], *, give_up: Callable[[], bool] = lambda: False) -> Result:
    """Return the result of the call; retry it while the server is unreachable or has lost the run.

    Args:
        call: the operation, which must be safe to repeat.
        give_up: returns True once this process was asked to leave; then the next error is raised.

    Raises:
        ConnectionFailed: the server was unreachable for longer than `OUTAGE_SECONDS`.
        RunLost: the server restarted without the run, and the run was not restored in that time.
    """
    outage = Deadline(OUTAGE_SECONDS)
    while True:
        try:
            return call()
        except (ConnectionFailed, RunLost):
            if outage.over or give_up():
                raise
