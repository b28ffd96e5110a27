"""Clients of redis-py as we use them: no retries of their own, and no wait beyond the deadline that holds."""

from __future__ import annotations

import copy
import math
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import FALSE_STRINGS, AbstractConnection
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from rlbroker.backend.deadline import try_seconds
from rlbroker.backend.tls import Setting, Tls, TlsConnection
from rlbroker.config import (
    TLS_CA_VARIABLE,
    TLS_CERTIFICATE_VARIABLE,
    TLS_KEY_VARIABLE,
    choice,
    redacted_url,
    redis_password,
    redis_username,
    tls_files,
    unusable_url,
)
from rlbroker.errors import InvalidArgument

#: A connection that is silent for longer than this, with an answer due, counts as broken.
STALL_SECONDS: Final = 4.0

#: A deadline is kept to within this time, which saves setting a timeout for each command of a short operation.
TOLERATED_SECONDS: Final = 0.02

#: Connections that one client may hold open at the same time.
MAX_CONNECTIONS: Final = 16

#: Bytes read from a socket at once: each connection has a buffer of this size, and a host may have many workers.
SOCKET_READ_BYTES: Final = 1 << 16

#: The same for who reads batches; weights come without such a buffer.
LARGE_READ_BYTES: Final = 1 << 20

#: What a URL may say besides user, server and database; as redis-py names it.
PARAMETERS: Final = (
    *("db", "username", "password", "client_name", "protocol", "max_connections", "socket_timeout"),
    *("socket_connect_timeout", "socket_keepalive", "health_check_interval"),
)
TLS_PARAMETERS: Final = (
    *("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "ssl_cert_reqs"),
)


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


@cache
def _driver() -> redis.DriverInfo:
    """Give what is told to servers of redis-py: each connection would look for its version in the file system."""
    return redis.DriverInfo()


def bounded_client(
    client: redis.Redis,
    timeout_seconds: float,
    socket_seconds: float,
    address: tuple[str, int] | None = None,
    **other: Any,
) -> redis.Redis:
    """Give a client like this one with connections of our own, which keep deadlines and do not try again.

    Args:
        client: whose settings it gets.
        timeout_seconds: how long a thread waits for a connection.
        socket_seconds: how long a connection may be silent, with an answer due.
        address: host and port, where they are others.
        other: settings of its connections that are others.
    """
    pool = client.connection_pool
    settings = {
        name: value
        for name, value in pool.connection_kwargs.items()
        if not name.startswith(("maint_notifications", "orig_", "retry", "lib_"))
    }
    settings |= {
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": socket_seconds,
        "socket_connect_timeout": socket_seconds,
        "socket_read_size": SOCKET_READ_BYTES,
        **other,
    }
    if not settings.keys() & {"driver_info", "lib_name", "lib_version"}:
        settings["driver_info"] = _driver()
    if address is not None:
        settings["host"], settings["port"] = address
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
    """Give a client for a server's URL; what the URL does not say of user and TLS, the environment may.

    Raises:
        InvalidArgument: the URL, or a setting of the environment, cannot be used; says which.
    """
    try:
        pool = redis.ConnectionPool.from_url(url, protocol=2)
    except ValueError as error:
        raise unusable_url(url, error) from None
    parameters = _parameters(url)
    secure = url.startswith("rediss:")
    settings = pool.connection_kwargs
    if "username" not in settings and (username := redis_username()):
        settings["username"] = username
    if "password" not in settings and (password := redis_password()):
        settings["password"] = password
    if secure:
        for name in TLS_PARAMETERS:
            settings.pop(name, None)
        settings["tls"] = _tls(url, parameters)
        pool.connection_class = TlsConnection
    elif url.startswith("redis:") and (unused := next(iter(tls_files()), None)):
        raise InvalidArgument(
            f"{unused} is set, but the server's URL {redacted_url(url)} is one without TLS, by which passwords and "
            f"weights would travel in the open; write rediss://, or unset {unused}"
        )
    return redis.Redis.from_pool(pool)


def tls_settings(parameters: Mapping[str, str]) -> tuple[Setting | None, Setting | None, Setting | None]:
    """Give the files of the authority, the certificate and its key: of the URL's parameters, else the environment."""
    variables = tls_files()

    def named(parameter: str, variable: str) -> Setting | None:
        if parameter in parameters:
            return Setting(parameter, parameters[parameter])
        return Setting(variable, variables[variable]) if variable in variables else None

    authority = named("ssl_ca_certs", TLS_CA_VARIABLE)
    if "ssl_certfile" in parameters or "ssl_keyfile" in parameters:
        variables = {}  # a certificate and its key come from one place
    return (
        authority,
        named("ssl_certfile", TLS_CERTIFICATE_VARIABLE),
        named("ssl_keyfile", TLS_KEY_VARIABLE),
    )


def _parameters(url: str) -> dict[str, str]:
    """Give the parameters of a URL, of which redis-py would only say when it connects that it does not know one."""
    secure = url.startswith("rediss:")
    query = urlsplit(url).query
    found = dict(reversed(parse_qsl(query, keep_blank_values=True)))  # the first one counts
    for name, value in found.items():
        if name in TLS_PARAMETERS and not secure:
            raise InvalidArgument(
                f"{name} in the server's URL {redacted_url(url)} is for TLS; write rediss:// to use TLS"
            )
        if name not in PARAMETERS + TLS_PARAMETERS:
            known = ", ".join(PARAMETERS + TLS_PARAMETERS if secure else PARAMETERS)
            # Behind a ? that is part of a password stands the rest of it.
            shown = "parameters (write ? in a password as %3F)" if "@" in query else f"a parameter {name!r}"
            raise InvalidArgument(
                f"the server's URL {redacted_url(url)} has {shown} that rlbroker does not know; it knows {known}"
            )
        if not value:
            raise InvalidArgument(f"{name} in the server's URL {redacted_url(url)} has no value")
    return found


def _tls(url: str, parameters: Mapping[str, str]) -> Tls:
    wanted = parameters.get("ssl_cert_reqs", "required")
    choice("ssl_cert_reqs in the server's URL", wanted, ("required", "optional", "none"))
    tls = Tls(
        *tls_settings(parameters),
        check_certificate=wanted != "none",
        check_name=parameters.get("ssl_check_hostname", "yes").upper() not in FALSE_STRINGS,
    )
    tls.warn_if_unchecked(redacted_url(url))
    return tls
