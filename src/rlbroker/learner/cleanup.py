"""How a learner leaves its run."""

from __future__ import annotations

import logging
from contextlib import suppress

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.keys import Keys
from rlbroker.errors import PeerError, raise_again, without_frames
from rlbroker.experience.counts import read_counts
from rlbroker.learner.maintenance import Maintenance
from rlbroker.learner.parts import LearnerParts
from rlbroker.types import CleanupReport
from rlbroker.weights.image_store import ImageStore

logger = logging.getLogger("rlbroker")


class Cleanup:
    """Ends one learner: first `finish_work` in the calling thread, then `leave` in the learner's thread.

    Attributes:
        parts, maintenance: what the learner consists of; None until they are made.
        report: what the learner left in Redis; not `complete` until it could be asked.
        over: whether the run is over.
    """

    def __init__(self, connection: Connection, keys: Keys, images: ImageStore) -> None:
        """Prepare the end of a learner that is being opened."""
        self._connection, self._keys, self._images = connection, keys, images
        self.parts: LearnerParts | None = None
        self.maintenance: Maintenance | None = None
        self._problem: PeerError | None = None
        self.report, self.over = CleanupReport(complete=False), False

    def finish_work(self, deadline: Deadline, *, acknowledge: bool) -> None:
        """Wait for weights that are being published, and acknowledge the batches that were returned last."""
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

    def leave(self, deadline: Deadline, dropped: bool) -> None:
        """Settle acknowledgements, report what is left, and mark the run as over if it is. Log what fails."""
        if self.parts is None or self.maintenance is None:
            return
        if dropped:  # its last batches stay for the next learner: the program may not have used them
            self.finish_work(deadline, acknowledge=False)
        self.parts.recorder.end_logs(deadline)
        try:
            if self._problem:
                raise_again(self._problem)
            if not deadline.over:
                with within(deadline):
                    self.report = self._finish(self.parts, self.maintenance, deadline, dropped)
        except PeerError as error:
            logger.warning("cleanup of the run %r: %s", self._keys.run, str(error))

    def release(self) -> None:
        """Close everything without asking the server. May be called several times."""
        if self.maintenance:
            self.maintenance.close()
        if self.parts:
            self.parts.publisher.close()
        self._images.close()
        self._connection.close()

    def _finish(
        self, parts: LearnerParts, maintenance: Maintenance, deadline: Deadline, dropped: bool
    ) -> CleanupReport:
        workers = parts.roster.ids()
        maintenance.settle(workers, deadline)
        counts = read_counts(self._connection, self._keys, workers)
        waiting = {worker: count.waiting for worker, count in counts.items()}
        commands = sum(parts.commands.count_pending().values())
        if self.over and not dropped:
            parts.roster.close()
        with suppress(PeerError):  # a failed sample must not cost the report
            maintenance.record(last=True)
        return CleanupReport(waiting, parts.pending.count_by_worker(), commands)
