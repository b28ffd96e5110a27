"""The objects that a worker consists of, and how they join a run and leave it."""

from __future__ import annotations

import logging
from typing import SupportsIndex

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.keys import Keys
from rlbroker.backend.text import counted
from rlbroker.codec.limits import FORMAT_VERSION
from rlbroker.codec.signing import SigningKey
from rlbroker.config import Level, WhenFull
from rlbroker.control.drain_signals import DrainSignals
from rlbroker.control.inbox import Inbox
from rlbroker.errors import DeadlineExceeded, PeerError, raise_again, without_frames
from rlbroker.experience.sender import Sender
from rlbroker.membership.heartbeat import Heartbeat, LastPoll
from rlbroker.weights.applier import WeightsApplier
from rlbroker.weights.host_cache import ImageStore
from rlbroker.weights.subscriber import Subscriber

logger = logging.getLogger("rlbroker")

#: The fraction of its timeout for which a worker that leaves waits for batches that have not reached their level.
CONFIRM_FRACTION = 0.75


class WorkerParts:
    """The objects that one worker consists of.

    They live until the worker has left the run, and refer neither to the client nor to what its user gave it, such as
    handlers of commands: those may refer to the client, and would keep it alive.

    Attributes:
        heartbeat: the worker's membership. Its thread runs from before the worker joins until after it has left.
        subscriber: follows the latest weights.
        weights: loads weights.
        inbox: the commands that have arrived; None before the worker has joined.
        sender: sends batches; None before the worker has joined.
        last_poll: when the worker polled last.
        draining: whether the worker was asked to finish.
        signals: the signals that ask it.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        images: ImageStore,
        *,
        key: SigningKey | None,
        from_replicas: bool,
        keep_dtype: bool,
    ) -> None:
        """Create the parts; nothing is sent yet."""
        self._connection, self._keys, self._key = connection, keys, key
        self.last_poll = LastPoll()
        self.draining = False
        self.signals = DrainSignals(self.drain)
        self.heartbeat = heartbeat = Heartbeat(
            connection,
            keys,
            wire_format=FORMAT_VERSION,
            key=key,
            describe=self._describe,
            newest_seen=lambda: subscriber.newest_seen,
            maintain=self._maintain,
        )
        self.subscriber = subscriber = Subscriber(
            connection,
            keys,
            images,
            key=key,
            from_replicas=from_replicas,
            run_size=lambda: heartbeat.run_size,
        )
        self.weights = WeightsApplier(subscriber, keep_dtype=keep_dtype)
        self.inbox: Inbox | None = None
        self.sender: Sender | None = None
        self._problem: PeerError | None = None  #: why sending could not be finished

    def join(
        self, worker_id: SupportsIndex | None, *, when_full: WhenFull | None, compression: bool, level: Level
    ) -> tuple[Inbox, Sender]:
        """Register in the run, make the parts that need the registration, and start the background threads."""
        connection, heartbeat = self._connection, self.heartbeat
        heartbeat.start()
        connection.check_server(allow_eviction=True)  # whether to accept eviction is the learner's decision
        registration = heartbeat.register(worker_id)
        self.inbox = inbox = Inbox(
            connection,
            self._keys,
            registration,
            key=self._key,
            notice_version=self.subscriber.announce,
            rejoin=heartbeat.rejoin,
        )
        self.weights.acknowledge = inbox.acknowledge_version
        self.sender = sender = Sender(
            connection,
            self._keys,
            registration,
            settings=heartbeat.settings,
            learner_silent_seconds=heartbeat.learner_silent_seconds,
            rejoin=heartbeat.rejoin,
            when_full=when_full,
            compression=compression,
            level=level,
            shards_known=heartbeat.knows_run or not connection.servers.several,
        )
        heartbeat.begin()
        self.subscriber.start()
        inbox.start()
        connection.errors.joined = True
        return inbox, sender

    def drain(self) -> None:
        """Ask the worker to finish. Takes no lock: a signal handler may run while its thread holds it."""
        self.draining = True

    def finish_sending(self, deadline: Deadline) -> None:
        """Wait for batches that have not reached their level, and write the counts.

        An `Unconfirmed` batch is waited for; if the worker drains, so are all batches that have not reached their
        level.
        """
        sender = self.sender
        if sender is None:
            return
        try:
            if sender.unsafe:
                self._confirm(sender, deadline.remaining * CONFIRM_FRACTION)
            with within(deadline):
                sender.close(deadline)
        except PeerError as error:  # `leave` raises it, as a fenced worker leaves too
            self._problem = without_frames(error)

    def _confirm(self, sender: Sender, seconds: float) -> None:
        try:
            with within(Deadline(seconds)):
                (sender.flush if self.draining else sender.confirm)(seconds)
        except PeerError as error:
            logger.debug("%s leaves: %s", self._name, str(error))  # `leave` warns of what remains

    def leave(self, deadline: Deadline, dropped: bool) -> None:
        """Leave the run, after `finish_sending`; a worker that was dropped does that here. Log what fails."""
        try:
            self._leave(deadline, dropped)
        except PeerError as error:
            # A constructor that fails raises an error of its own.
            level = logging.WARNING if self.sender else logging.DEBUG
            logger.log(
                level, "%s could not leave the run %r properly: %s", self._name, self._keys.run, str(error)
            )
        finally:
            sender = self.sender
            if sender and sender.unsafe:
                logger.warning(
                    "%s leaves with %s not reached level %r: %s",
                    self._name,
                    counted(sender.unsafe, "batch that has", "batches that have"),
                    sender.level,
                    sender.unconfirmed or "call flush() to wait for it",
                )

    def _leave(self, deadline: Deadline, dropped: bool) -> None:
        if dropped:
            self.finish_sending(deadline)
            if self.inbox:
                self.inbox.finish_interrupted()
        if self.sender is None:  # the constructor failed: an interrupt may have left a reply unread
            self._connection.close()
        self.subscriber.request_stop()
        if self.inbox:
            self.inbox.request_stop()
        self.subscriber.stop(deadline.remaining)
        with within(deadline):
            try:
                if self.inbox:
                    self.inbox.stop(deadline.remaining)
            finally:
                late = deadline.over
                if not late:
                    self.heartbeat.leave(deadline.remaining)
        if self._problem:
            raise_again(self._problem)
        if late:
            raise DeadlineExceeded("the server did not answer in time")

    def release(self) -> None:
        """Close everything without asking the server. May be called several times."""
        self.signals.restore()
        self.subscriber.stop(0)
        if self.inbox:
            self.inbox.request_stop()
        self.heartbeat.release()
        self._connection.close()

    @property
    def _name(self) -> str:
        return f"worker {self.heartbeat.registration.worker_id}"

    def _maintain(self, returned: bool) -> None:
        """Retry pending batches. Called after each heartbeat; `returned` says that the server may have lost data."""
        if self.inbox is None or self.sender is None:
            return
        if returned:
            self.inbox.mark_stale()
            self.sender.mark_stale()
        self.sender.maintain()

    def _describe(self) -> dict[str, str | int]:
        """Return the fields that each heartbeat reports. The first heartbeat is sent before the sender exists."""
        sender = self.sender
        return {
            "version": self.weights.version,
            "sent": sender.sent if sender else 0,
            "problem": self.subscriber.problem or self.weights.problem,
            "unconfirmed": sender.unconfirmed if sender else "",
            "room_seconds": f"{sender.room_seconds if sender else 0.0:.3f}",
            "unpolled_seconds": f"{self.last_poll.unpolled_seconds:.3f}",
        }
