"""The connections to one server, with no count and no lock that an interrupt could leave wrong."""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from contextlib import suppress
from typing import Any, Final

import redis
from redis import exceptions as redis_errors
from redis.connection import CacheProxyConnection

from rlbroker.backend.deadline import Deadline, try_seconds

#: How often a thread looks for a free connection while all are in use.
_LOOK_SECONDS: Final = 0.005


class ConnectionPool(redis.ConnectionPool):
    """The connections to one server; those that exist and are not idle are in use.

    redis-py's pools count connections and wait behind locks: an exception of a signal handler at the wrong place loses
    a connection for ever, or hangs the next call. Here, a connection that an interrupted call drops is closed by its
    finalizer, and then it no longer exists.
    """

    def __init__(self, *, timeout: float, **settings: Any) -> None:
        """Create a pool without connections; a thread waits up to `timeout` seconds for one."""
        self.timeout = timeout
        initialize: Any = super().__init__
        initialize(**settings)

    def reset(self) -> None:
        """Forget all connections."""
        self._idle: deque[Any] = deque()
        #: Without callbacks: those would keep the set in a circle.
        self._made: set[weakref.ref[Any]] = set()
        self.pid = os.getpid()

    @property
    def in_use(self) -> int:
        """The number of connections in use."""
        return self._count_existing() - len(self._idle)

    def get_connection(self, command_name: Any = None, *keys: Any, **options: Any) -> Any:
        """Return a connection that is open and has no unread reply.

        Raises:
            redis.ConnectionError: the server cannot be reached, or all connections stay in use.
        """
        connection = self._take()
        try:
            if connection.is_connected and self._has_unread(connection):
                connection.disconnect()
            if not connection.is_connected:
                connection.connect()
            connection.check_health()
        except Exception:
            connection.disconnect()
            self.release(connection)
            raise
        return connection

    def release(self, connection: Any) -> None:
        """Take back a connection; every reply must have been read, or it must be closed."""
        self._idle.append(connection)

    def disconnect(self, inuse_connections: bool = True) -> None:
        """Close all connections, or only the idle ones; they open again when they are used."""
        if inuse_connections:
            for reference in tuple(self._made):
                if (connection := reference()) is not None:
                    with suppress(OSError, ValueError):  # ValueError: fakeredis, while another thread uses it
                        connection.disconnect()
            return
        with suppress(IndexError):  # another thread has taken the last one
            for _ in range(len(self._idle)):
                connection = self._idle.popleft()
                connection.disconnect()
                self._idle.append(connection)

    def make_connection(self) -> Any:
        """Return a new connection, which is not open yet."""
        make: Any = self.connection_class
        connection = make(**self.connection_kwargs)
        if self.cache is not None:
            wrap: Any = CacheProxyConnection
            connection = wrap(connection, self.cache, self._lock)
        self._made.add(weakref.ref(connection))
        return connection

    def _take(self) -> Any:
        deadline: Deadline | None = None
        while True:
            with suppress(IndexError):  # another thread has taken the last one
                if self._idle:
                    return self._idle.pop()
            if self._count_existing() < self.max_connections:
                connection = self.make_connection()
                if self._count_existing() <= self.max_connections:
                    return connection
                del connection  # another thread has made one at the same time
            deadline = deadline or Deadline(try_seconds(self.timeout))
            if deadline.over:
                raise redis_errors.ConnectionError("all connections are in use")
            time.sleep(_LOOK_SECONDS)

    def _count_existing(self) -> int:
        for reference in tuple(self._made):
            if reference() is None:
                self._made.discard(reference)
        return len(self._made)

    def _has_unread(self, connection: Any) -> bool:
        """Return whether a connection has something to read: then the server has closed it, or it is out of step."""
        try:
            return bool(connection.can_read()) and self.cache is None  # a cache gets notices at any time
        except (redis_errors.RedisError, OSError):
            return True
