"""The repair of a run after a server lost data: the learner writes back what it remembers."""

from __future__ import annotations

from contextlib import suppress

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.errors import ConnectionFailed, ServerOutOfMemory
from rlbroker.learner.parts import LearnerParts
from rlbroker.learner.run_scripts import SCRIPTS


class Restoration:
    """Notices that a server may have lost data, and writes the run back.

    A server loses data when it restarts without persistence, when a replica that lagged behind becomes the master,
    and when it is flushed. The signs are a new connection and `RunLost`. Writing back is idempotent: on a
    server that lost nothing it changes nothing.
    """

    def __init__(self, connection: Connection, keys: Keys, channel: Channel, parts: LearnerParts) -> None:
        """Prepare to watch the servers of an open run.

        Args:
            channel: the background thread's channel to the server of the run's `meta`.
            parts: the learner's parts, which write back what they remember.
        """
        self._connection, self._keys, self._channel = connection, keys, channel
        self._roster, self._publisher, self._pending = parts.roster, parts.publisher, parts.pending
        self._commands, self._ledger = parts.commands, parts.ledger
        self._shards = {key: Channel(connection, key) for key in keys.one_of_each_shard}
        self._reached_shards = set[str]()  #: shards whose server was reached before
        self._connected = False  #: whether the channel was connected before
        self._stale = False  #: whether a server may have lost data
        self._republish = False  #: whether `republish_if_lost` must compare the stored weights

    @property
    def stale(self) -> bool:
        """Whether a server may have lost data, so that `restore` must be called."""
        return self._stale

    def mark_stale(self) -> None:
        """Note that a server may have lost data."""
        self._stale = True

    def check_connection(self) -> None:
        """Connect to the server of `meta` if necessary; a new connection may lead to a server that lost data."""
        if self._channel.connect():
            self._stale = self._connected
            self._connected = True

    def check_shards(self) -> None:
        """Send a command to each shard, so that a new connection is noticed; ignore shards that cannot be reached."""
        for key, channel in self._shards.items():
            with suppress(ConnectionFailed, ServerOutOfMemory):
                is_new, was_reached = channel.connect(), key in self._reached_shards
                channel.execute(*(("SET", key, " ".join(self._keys.shards)) if is_new else ("PING",)))
                self._reached_shards.add(key)
                self._stale |= is_new and was_reached

    def check_weights(self) -> None:
        """Schedule `republish_if_lost` if workers run a newer version than the server has."""
        self._republish |= self._roster.leads and self._publisher.is_behind_workers()

    def verify_weights(self) -> None:
        """Schedule `republish_if_lost` for the next step."""
        self._republish = True

    def restore(self) -> None:
        """Write back everything that the learner remembers.

        `meta` is written after the counts and outcomes, which others may change as soon as it is there, and before the
        weights, which need it.
        """
        self._stale = True  # until all is written: a failure in between is retried from the start
        self._pending.restore()
        if self._roster.leads:
            self._ledger.restore()
            self._commands.restore()
        self._roster.restore()
        self._connection.load(SCRIPTS)
        self._republish = self._roster.leads
        self._stale = False

    def republish_if_lost(self) -> None:
        """Compare the stored weights with the learner's, if scheduled, and publish lost ones under a new version."""
        if self._republish:
            unreadable = self._ledger.failed_version
            self._republish = not self._publisher.restore(unreadable_version=unreadable)
            self._ledger.failed_version = 0
