"""The end of a run: its learner stops all workers, also those that join later."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from rlbroker.backend.deadline import Deadline, within
from rlbroker.codec.message import encode
from rlbroker.control.commands import Command
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
        self._settlements = parts.settlements
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

    def send_once(self) -> None:
        """End the run, and send the `stop` unless it was sent before.

        Raises:
            Fenced: a newer learner leads the run.
        """
        self._roster.end_run()
        if self.command is None:
            self.command = self._commands.send("stop", None, None, expires_seconds=None)

    def outcomes(self) -> dict[int, Outcome]:
        """Return the present workers' answers to the `stop`; none if it was not sent."""
        return self._name_away(self.command.outcomes()) if self.command else {}

    def wait(self, deadline: Deadline, *, closing: bool = False) -> dict[int, Outcome]:
        """Return the workers' answers to the `stop` that was sent, after waiting for those that are not away.

        Meanwhile batches are read for the next `collect`, which makes room in the queues, unless the learner is
        `closing`. A server that does not answer is waited for too.

        Raises:
            PeerError: the server refused, or did not answer until the deadline.
        """
        assert self.command is not None

        def read() -> dict[int, Outcome]:
            if not closing:
                self._check()
                self._read_ahead(deadline)
            return self.outcomes()

        while True:
            try:
                return self._settlements.wait(read, deadline)
            except ConnectionFailed:
                if deadline.over:
                    raise

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
