"""The end of a run: its learner stops all workers, also those that join later."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from rlbroker.backend.deadline import Deadline, within
from rlbroker.codec.message import encode
from rlbroker.control.commands import Command
from rlbroker.control.settlements import POLL_SECONDS
from rlbroker.errors import ConnectionFailed
from rlbroker.learner.parts import LearnerParts
from rlbroker.types import Outcome

#: What the outcome says of a worker that was not waited for.
AWAY: Final = Outcome("waiting", "the worker is away; it stops if it returns")


class RunEnd:
    """Ends the run of one learner.

    The end is a field of `meta`, which every heartbeat returns to its worker. The `stop` command beside it reaches the
    present workers at once, and is acknowledged.

    Attributes:
        command: the `stop` that was sent; None before.
    """

    def __init__(self, parts: LearnerParts, check: Callable[[], None]) -> None:
        """Prepare the end of a run that is open; `check` raises if the learner was closed or replaced."""
        self._check = check
        self._roster, self._commands, self._collector = parts.roster, parts.commands, parts.collector
        self.command: Command | None = None

    def send(self, data: Any = None) -> Command:
        """End the run, and return the `stop` that was sent to its present workers.

        Raises:
            UnsupportedType: the data contains a value that cannot be encoded.
            Fenced: a newer learner leads the run.
        """
        encode(data, compression=False)  # refuses what cannot be sent, before the run has ended
        self._roster.end_run()
        self.command = self._commands.send("stop", data, None, expires_seconds=None)
        return self.command

    def outcomes(self) -> dict[int, Outcome]:
        """Return the present workers' answers to the `stop`; none if it was not sent."""
        return self._name_away(self.command.outcomes()) if self.command else {}

    def wait(self, deadline: Deadline, *, closing: bool = False) -> dict[int, Outcome]:
        """Return the workers' answers to the `stop` that was sent, after waiting for those that are not away.

        Meanwhile batches are read for the next `collect`, which makes room in the queues, unless the learner is
        `closing`.
        """
        assert self.command is not None
        while True:
            if not closing:
                self._check()
                self._read_ahead(deadline)
            outcomes = self._name_away(self.command.wait(min(POLL_SECONDS, deadline.remaining)))
            if deadline.over or all(one.state != "waiting" or one is AWAY for one in outcomes.values()):
                return outcomes

    def _name_away(self, outcomes: dict[int, Outcome]) -> dict[int, Outcome]:
        away = self._roster.away
        return {
            worker: AWAY if outcome.state == "waiting" and worker in away else outcome
            for worker, outcome in outcomes.items()
        }

    def _read_ahead(self, deadline: Deadline) -> None:
        with suppress(ConnectionFailed), within(deadline):  # if it lasts, the next `collect` raises it
            if not deadline.over:
                self._collector.read_ahead()
