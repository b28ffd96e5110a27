"""The background work of a learner: heartbeats, the ledger, the history, and housekeeping."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import BLOCK_SECONDS, Connection
from rlbroker.backend.deadline import ONE_TRY, Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.threads import BackgroundThread
from rlbroker.errors import Fenced, RunLost
from rlbroker.learner.parts import LearnerParts
from rlbroker.learner.restoration import Restoration
from rlbroker.learner.run_scripts import SCRIPTS

logger = logging.getLogger("rlbroker")

#: Seconds between two heartbeats of the learner.
HEARTBEAT_SECONDS: Final = 1.0

#: The longest time between two rounds of housekeeping.
HOUSEKEEPING_SECONDS: Final = 10.0

#: How long acknowledgements are gathered before they are settled, for each worker of the run: about 20 times what it
#: takes to read one stream.
GATHER_SECONDS: Final = 0.0001

#: The longest time for which acknowledgements are gathered.
LONGEST_GATHER_SECONDS: Final = 0.1


class Maintenance:
    """Keeps one run in order, in a background thread.

    `run_once` is one step of the thread. It settles acknowledgements as they arrive. Every second it sends the
    learner's heartbeat and records a sample of the history. At least every ten seconds it forgets silent workers and
    deletes what is no longer needed. Each step begins with `Restoration`, which repairs a run that a server lost.

    Attributes:
        thread: the background thread; its `check` raises the error that ended it.
    """

    def __init__(
        self, connection: Connection, keys: Keys, parts: LearnerParts, *, forget_seconds: float
    ) -> None:
        """Prepare the thread; the caller starts and stops it.

        Args:
            parts: the learner's parts, of an open run.
            forget_seconds: how soon a silent worker leaves the run; housekeeping is at least twice as frequent.
        """
        self._connection, self._roster, self._publisher = connection, parts.roster, parts.publisher
        self._commands, self._ledger = parts.commands, parts.ledger
        self._takeover, self._collector, self._recorder = parts.takeover, parts.collector, parts.recorder
        self._channel = Channel(connection, keys.meta)
        self._restoration = Restoration(connection, keys, self._channel, parts)
        self._housekeeping_seconds = min(HOUSEKEEPING_SECONDS, forget_seconds / 2)
        self._next_housekeeping = Deadline(self._housekeeping_seconds)
        self._next_heartbeat = Deadline(0)
        self.thread = BackgroundThread(f"ledger of {keys.run!r}", self.run_once)

    def close(self) -> None:
        """Close the channel, unless the thread still uses it."""
        if self.thread.wait_for_end(0):
            self._channel.close()

    def run_once(self) -> None:
        """Do one step of the background work."""
        self._restoration.check_connection()
        try:
            if self._restoration.stale:
                self.restore()
            self._restoration.republish_if_lost()
            if self._next_heartbeat.over:
                self.send_heartbeat()
                self._restoration.check_shards()
                self._connection.load(SCRIPTS, deadline=ONE_TRY)
                self._restoration.check_weights()
                self._next_heartbeat = Deadline(HEARTBEAT_SECONDS)
                self.record()
            self._takeover.renew(self._collector.streams)
            self._settle_as_they_arrive()
        except RunLost as error:
            logger.warning("%s", str(error))
            if self._restoration.stale:  # it could not be restored
                self.thread.pause(BLOCK_SECONDS)
            self._restoration.mark_stale()
        except Fenced:
            # If a newer learner of this name has taken over, the heartbeat raises `Fenced` again. If a newer one only
            # publishes instead, the heartbeat notes that, and this learner continues to collect.
            self.send_heartbeat()
            self.thread.pause(BLOCK_SECONDS)
        if self._next_housekeeping.over:
            self.housekeep()
            self._next_housekeeping = Deadline(self._housekeeping_seconds)

    def restore(self) -> None:
        """Write back what a server may have lost; the next heartbeat is due at once."""
        self._restoration.restore()
        self._next_heartbeat = Deadline(0)

    def send_heartbeat(self) -> None:
        """Send the learner's heartbeat, and read which workers are alive.

        Raises:
            Fenced: a newer learner of this name has taken over.
            RunLost: the server has lost the run, or a part of it.
        """
        self._roster.heartbeat(self._channel)

    def record(self, *, last: bool = False) -> None:
        """Record a sample of the run's history.

        Args:
            last: whether no sample follows, so that the coarser streams get this one too.
        """
        self._recorder.record(write=self._roster.leads, last=last)

    def settle(self, workers: Sequence[int], deadline: Deadline) -> None:
        """Settle the acknowledgements that have arrived, if this learner leads the run."""
        if self._roster.leads:
            self._ledger.settle(workers, deadline)

    def housekeep(self) -> None:
        """Forget silent workers, trim the control stream, let old chunks expire, and check the stored weights."""
        for worker in self._roster.forget_silent():
            logger.warning("worker %d was silent for too long and no longer belongs to the run", worker)
        if self._roster.leads:
            self._roster.count_hosts()
            self._commands.trim()
            self._publisher.enforce_retention()
            self._restoration.verify_weights()

    def _settle_as_they_arrive(self) -> None:
        workers = self._roster.ids()
        if not workers or not self._roster.leads:
            self.thread.pause(BLOCK_SECONDS)
        elif self._ledger.wait(workers, self._connection.block_seconds):
            self.thread.pause(min(LONGEST_GATHER_SECONDS, len(workers) * GATHER_SECONDS))
            self.settle(workers, ONE_TRY)
