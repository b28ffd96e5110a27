"""The subscription to the channel on which the learner announces new versions."""

from __future__ import annotations

import socket
from typing import Any, Final

import redis
from redis import exceptions as redis_errors

from rlbroker.backend.client import STALL_SECONDS
from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import whole_number
from rlbroker.backend.threads import BackgroundThread
from rlbroker.errors import ConnectionFailed

#: How often the server is pinged over the subscription, as a broken connection is otherwise just silent. The server
#: must answer before the next ping.
PING_SECONDS: Final = STALL_SECONDS / 2


class VersionChannel:
    """The subscription of one worker. For one thread."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        """Create a channel that is not subscribed yet."""
        self._connection, self._name = connection, keys.notify
        self._pubsub: redis.client.PubSub | None = None
        self._next_ping, self._answered = Deadline(0), True

    @property
    def subscribed(self) -> bool:
        """Whether there is a subscription."""
        return self._pubsub is not None

    def subscribe(self) -> None:
        """Subscribe to the channel."""
        pubsub = self._connection.pubsub(self._name)
        try:
            pubsub.subscribe(self._name)
        except redis_errors.RedisError as error:
            pubsub.close()
            raise self._connection.translate(error) from error
        self._pubsub = pubsub
        self._next_ping, self._answered = Deadline(PING_SECONDS), True

    def close(self) -> None:
        """End the subscription."""
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            pubsub.close()

    def wait(self, until: Deadline, thread: BackgroundThread) -> int:
        """Wait for an announcement until the deadline, or until the thread is woken or stopped.

        Return the announced version, or 0. An error ends the subscription.
        """
        pubsub = self._pubsub
        assert pubsub is not None
        try:
            message = pubsub.get_message(timeout=0) or self._wait_for_message(pubsub, until, thread)
        except (redis_errors.RedisError, OSError) as error:
            self.close()
            if isinstance(error, redis_errors.RedisError):
                raise self._connection.translate(error) from error
            raise
        if message is None:
            return 0
        self._answered = True
        # The confirmation of the subscription is a message too. It must end the wait: an announcement may have come
        # with it in one read, and the socket would not become readable again for that.
        if message["type"] != "message":
            return 0
        return whole_number(str(message["data"], "ascii", "replace")) or 0

    def _wait_for_message(
        self, pubsub: redis.client.PubSub, until: Deadline, thread: BackgroundThread
    ) -> Any:
        if self._next_ping.over:
            if not self._answered:
                raise ConnectionFailed(f"the subscription to {self._connection.address} does not answer")
            pubsub.ping()
            self._next_ping, self._answered = Deadline(PING_SECONDS), False
        seconds = min(until.remaining, self._next_ping.remaining)
        sock = getattr(pubsub.connection, "_sock", None)
        if not isinstance(sock, socket.socket):
            return pubsub.get_message(timeout=min(seconds, self._connection.block_seconds))
        return pubsub.get_message(timeout=0) if thread.wait_for(sock, seconds) else None
