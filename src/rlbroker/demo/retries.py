"""How long the demo's processes bear a server that is away: each call gives up after its timeout, and is repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from rlbroker.backend.deadline import Deadline
from rlbroker.config import RunSettings
from rlbroker.errors import ConnectionFailed, RunLost

#: A worker that was silent for so long has to be started again anyway.
OUTAGE_SECONDS: Final = RunSettings.forget_seconds

Result = TypeVar("Result")


def outlast(call: Callable[[], Result], *, leaving: Callable[[], bool] = lambda: False) -> Result:
    """Call again and again while the server is away.

    Args:
        call: what to do.
        leaving: whether this process was told to go, and waits no longer.

    Raises:
        ConnectionFailed: the server was away for longer than `OUTAGE_SECONDS`.
        RunLost: the server came back without the run, and it took longer than that.
    """
    outage = Deadline(OUTAGE_SECONDS)
    while True:
        try:
            return call()
        except (ConnectionFailed, RunLost):
            if outage.over or leaving():
                raise
