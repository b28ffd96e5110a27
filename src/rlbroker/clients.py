"""Clients of redis-py as we use them: no retries of their own, and no wait beyond the deadline that holds."""

from __future__ import annotations

import copy
import math
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from rlbroker.config import unusable_url
from rlbroker.deadline import try_seconds

#: A connection that is silent for longer than this, with an answer due, counts as broken.
STALL_SECONDS: Final = 4.0

#: A deadline is kept to within this time, which saves setting a timeout for each command of a short operation.
TOLERATED_SECONDS: Final = 0.02

#: Connections that one client may hold open at the same time.
MAX_CONNECTIONS: Final = 16

#: Bytes read from a socket at once; redis-py's own default is slow for chunks of weights.
SOCKET_READ_BYTES: Final = 1 << 20


def stall_seconds(timeout_seconds: float) -> float:
    """Give how long a connection may be silent, so that whole tries fill the time of an operation.

    >>> stall_seconds(10.0)
    3.333
    """
    return max(0.001, round(timeout_seconds / math.ceil(timeout_seconds / STALL_SECONDS), 3))


class _Bounded(AbstractConnection):
    """A connection that is not waited for beyond the deadline that holds for the thread which uses it."""

    @property
    def socket_timeout(self) -> float:
        return try_seconds(self._socket_timeout or STALL_SECONDS)

    @socket_timeout.setter
    def socket_timeout(self, value: float) -> None:
        self._socket_timeout = value

    @property
    def socket_connect_timeout(self) -> float:
        return try_seconds(self._socket_connect_timeout or STALL_SECONDS)

    @socket_connect_timeout.setter
    def socket_connect_timeout(self, value: float) -> None:
        self._socket_connect_timeout = value

    def send_packed_command(self, *arguments: Any, **options: Any) -> Any:
        self._bound()
        send: Callable[..., Any] = super().send_packed_command
        return send(*arguments, **options)

    def read_response(self, *arguments: Any, **options: Any) -> Any:
        self._bound()
        return super().read_response(*arguments, **options)

    def _bound(self) -> None:
        sock, limit = self._sock, self.socket_timeout
        if not isinstance(sock, socket.socket):
            return
        now = sock.gettimeout()
        if now is None or abs(now - limit) > TOLERATED_SECONDS:
            with suppress(OSError):  # another thread has closed it, which the next step will find
                self.update_current_socket_timeout(limit)


@cache
def _bounded(connection_class: type) -> type:
    return type(f"Bounded{connection_class.__name__}", (_Bounded, connection_class), {})


def bounded_client(client: redis.Redis, timeout_seconds: float, socket_seconds: float) -> redis.Redis:
    """Give a client like this one with connections of our own, which keep deadlines and do not try again."""
    pool = client.connection_pool
    settings = {
        name: value
        for name, value in pool.connection_kwargs.items()
        if not name.startswith(("maint_notifications", "orig_", "retry"))
    }
    settings |= {
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": socket_seconds,
        "socket_connect_timeout": socket_seconds,
        "socket_read_size": SOCKET_READ_BYTES,
    }
    make_pool: Callable[..., redis.BlockingConnectionPool] = redis.BlockingConnectionPool
    own = copy.copy(client)
    own.connection = None
    own.connection_pool = make_pool(
        connection_class=_bounded(pool.connection_class),
        max_connections=min(MAX_CONNECTIONS, pool.max_connections),
        timeout=timeout_seconds,
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
        **settings,
    )
    return own


def client_from_url(url: str) -> redis.Redis:
    """Give a client for a server's URL.

    Raises:
        InvalidArgument: the URL cannot be used.
    """
    try:
        return redis.Redis.from_url(url, protocol=2)
    except ValueError as error:
        raise unusable_url(url, error) from None
