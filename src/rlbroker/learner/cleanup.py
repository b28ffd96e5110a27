"""How a learner leaves its run."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Final

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.keys import Keys
from rlbroker.errors import Fenced, PeerError, raise_again, without_frames
from rlbroker.experience.counts import read_counts
from rlbroker.learner.maintenance import Maintenance
from rlbroker.learner.parts import LearnerParts
from rlbroker.learner.run_end import RunEnd
from rlbroker.types import CleanupReport
from rlbroker.weights.host_cache import ImageStore

logger = logging.getLogger("rlbroker")

#: The fraction of its timeout for which `cleanup` waits for the workers' answers to the `stop`.
ANSWER_FRACTION: Final = 0.25


class Cleanup:
    """Ends one learner: first `finish_work` in the calling thread, then `leave` in the learner's thread.

    Attributes:
        parts, maintenance, run_end: what the learner consists of; None until they are made.
        report: what the learner left in Redis; not `complete` until it could be asked.
    """

    def __init__(self, connection: Connection, keys: Keys, images: ImageStore) -> None:
        """Prepare the end of a learner that is being opened."""
        self._connection, self._keys, self._images = connection, keys, images
        self.parts: LearnerParts | None = None
        self.maintenance: Maintenance | None = None
        self.run_end: RunEnd | None = None
        self._problem: PeerError | None = None
        self.report = CleanupReport(complete=False)

    def finish_work(self, deadline: Deadline, *, acknowledge: bool, stop_workers: bool) -> None:
        """Wait for weights that are being published, acknowledge what was returned last, and stop the workers.

        Only the learner that leads the run stops workers.
        """
        if self.parts is None:
            return
        if not self.parts.publisher.finish(deadline.remaining):
            logger.warning("cleanup of the run %r: the last weights may never be published", self._keys.run)
        try:
            if acknowledge and not deadline.over:
                with within(deadline):
                    self.parts.collector.acknowledge_returned(deadline)
        except PeerError as error:  # `leave` raises it
            self._problem = without_frames(error)
        if stop_workers and self.parts.roster.leads:
            self._stop_workers(deadline)
        if self.run_end and self.run_end.command:
            seconds = self._connection.timeout_seconds * ANSWER_FRACTION
            with suppress(PeerError):
                self.run_end.wait(Deadline(min(seconds, deadline.remaining)), closing=True)

    def _stop_workers(self, deadline: Deadline) -> None:
        try:
            if self.run_end and not self.run_end.command:
                with within(Deadline(deadline.remaining / 2)):  # a full server must not cost the report
                    self.run_end.send()
        except Fenced:
            logger.info(
                "cleanup of the run %r: a newer learner leads it, so no worker is stopped", self._keys.run
            )
        except PeerError as error:
            logger.warning(
                "cleanup of the run %r: its workers may not be stopped: %s", self._keys.run, str(error)
            )

    def leave(self, deadline: Deadline, dropped: bool) -> None:
        """Settle acknowledgements, and report what is left. Log what fails."""
        if self.parts is None or self.maintenance is None:
            return
        if dropped:  # its last batches stay for the next learner: the program may not have used them
            self.finish_work(deadline, acknowledge=False, stop_workers=False)
        self.parts.recorder.end_logs(deadline)
        try:
            if self._problem:
                raise_again(self._problem)
            if not deadline.over:
                with within(deadline):
                    self.report = self._finish(self.parts, self.maintenance, deadline)
        except PeerError as error:
            logger.warning("cleanup of the run %r: %s", self._keys.run, str(error))

    def log_run_goes_on(self, kind: type[BaseException]) -> None:
        """Log that the run goes on after an exception of this type, unless another learner leads it or it has ended."""
        if self.parts is None or self.run_end is None or self.run_end.command is not None:
            return
        roster = self.parts.roster
        if roster.leads and not (roster.ended_by_command or issubclass(kind, Fenced)):
            logger.warning(
                "the run %r goes on after %s: its workers wait; start its learner again, or end it with `rlbroker "
                "control send stop --run %s --force`",
                self._keys.run,
                kind.__name__,
                self._keys.run,
            )

    def release(self) -> None:
        """Close everything without asking the server. May be called several times."""
        if self.maintenance:
            self.maintenance.close()
        if self.parts:
            self.parts.publisher.close()
        self._images.close()
        self._connection.close()

    def _finish(self, parts: LearnerParts, maintenance: Maintenance, deadline: Deadline) -> CleanupReport:
        workers = parts.roster.ids()
        maintenance.settle(workers, deadline)
        counts = read_counts(self._connection, self._keys, workers)
        waiting = {worker: count.waiting for worker, count in counts.items()}
        commands = sum(parts.commands.count_pending().values())
        stopped = self.run_end.outcomes() if self.run_end else {}
        commands -= sum(outcome.state == "waiting" for outcome in stopped.values())
        with suppress(PeerError):  # a failed sample must not cost the report
            maintenance.record(last=True)
        return CleanupReport(waiting, parts.pending.count_by_worker(), max(0, commands), stopped)
