"""Makes redis-py clients that do not retry, and do not wait beyond the thread's deadline."""

from __future__ import annotations

import copy
import math
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import FALSE_STRINGS, AbstractConnection
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from rlbroker.backend.deadline import try_seconds
from rlbroker.backend.pool import ConnectionPool
from rlbroker.backend.tls import TlsConnection, TlsFile, TlsSettings
from rlbroker.backend.url import Endpoint, invalid_url_error, parse_endpoint, redis_url
from rlbroker.config import (
    DEFAULT_URL,
    TLS_CA_VARIABLE,
    TLS_CERTIFICATE_VARIABLE,
    TLS_KEY_VARIABLE,
    check_choice,
    redacted_url,
    redis_password,
    redis_username,
    tls_files,
)
from rlbroker.errors import InvalidArgument

#: A connection counts as broken if a reply takes longer than this.
STALL_SECONDS: Final = 4.0

#: A socket's timeout may differ from the deadline by this much, which saves a system call for each command.
TOLERATED_SECONDS: Final = 0.02

#: The most connections that one client may have open.
MAX_CONNECTIONS: Final = 16

#: The fewest that the pool of a user's client must allow: background threads occupy some.
MIN_CONNECTIONS: Final = 6

#: Bytes read from a socket at once. Each connection has a buffer of this size, and a host may have many workers.
SOCKET_READ_BYTES: Final = 1 << 16

#: The same for a client that reads batches. Chunks of weights bypass this buffer.
LARGE_READ_BYTES: Final = 1 << 20

#: The parameters that a URL may have, by redis-py's names.
PARAMETERS: Final = (
    *("db", "username", "password", "client_name", "protocol", "max_connections", "socket_timeout"),
    *("socket_connect_timeout", "socket_keepalive", "health_check_interval"),
)
TLS_PARAMETERS: Final = (
    *("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "ssl_cert_reqs"),
)

#: How the values of some parameters are written: redis-py takes others, and fails when it connects.
_FORMS: Final = {
    **dict.fromkeys(("db", "max_connections", "health_check_interval"), "[0-9]{1,9}"),
    **dict.fromkeys(("socket_timeout", "socket_connect_timeout"), r"[0-9]{1,9}(\.[0-9]{1,9})?|\.[0-9]{1,9}"),
    "protocol": "[23]",
}


def stall_seconds(timeout_seconds: float) -> float:
    """Return how long to wait for a reply, so that a whole number of attempts fills an operation's timeout.

    >>> stall_seconds(10.0)
    3.333
    """
    return max(0.001, round(timeout_seconds / math.ceil(timeout_seconds / STALL_SECONDS), 3))


class _Bounded(AbstractConnection):
    """A connection that observes the deadline of the thread that uses it."""

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
        self._apply_deadline()
        send: Callable[..., Any] = super().send_packed_command
        return send(*arguments, **options)

    def read_response(self, *arguments: Any, **options: Any) -> Any:
        self._apply_deadline()
        return super().read_response(*arguments, **options)

    def __del__(self) -> None:
        delete: Callable[[], None] = super().__del__
        delete()
        # redis-py's parser refers to itself: its buffer would stay until the garbage collector runs.
        vars(getattr(self, "_parser", self)).clear()

    def _apply_deadline(self) -> None:
        sock, limit = self._sock, self.socket_timeout
        if not isinstance(sock, socket.socket):
            return
        now = sock.gettimeout()
        if now is None or abs(now - limit) > TOLERATED_SECONDS:
            with suppress(OSError):  # another thread has closed it; the next step finds that
                self.update_current_socket_timeout(limit)


def _bounded(connection_class: type) -> type:
    # Classes know their subclasses weakly. A cache would keep a user's own class, and what it refers to, for ever.
    subclasses: list[type] = connection_class.__subclasses__()
    for known in subclasses:
        if known.__bases__ == (_Bounded, connection_class):
            return known
    return type(f"Bounded{connection_class.__name__}", (_Bounded, connection_class), {})


@cache
def _driver() -> redis.DriverInfo:
    """Return redis-py's name and version, cached: otherwise each connection would read them from the file system."""
    return redis.DriverInfo()


def bounded_client(
    client: redis.Redis,
    timeout_seconds: float,
    socket_seconds: float,
    address: tuple[str, int] | None = None,
    **other: Any,
) -> redis.Redis:
    """Return a client with another client's settings, whose connections observe deadlines and do not retry.

    Args:
        timeout_seconds: how long a thread waits for a free connection.
        socket_seconds: how long a connection waits for a reply.
        address: host and port to connect to instead.
        other: further settings of its connections.
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
    own = copy.copy(client)
    own.connection = None
    own.connection_pool = ConnectionPool(
        connection_class=_bounded(pool.connection_class),
        max_connections=min(MAX_CONNECTIONS, pool.max_connections),
        timeout=timeout_seconds,
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
        **settings,
    )
    return own


@dataclass(frozen=True)
class BaseClient:
    """The client whose settings all clients of a connection share, and its endpoint.

    Attributes:
        client: the client; it is never used to send.
        endpoint: one server, the nodes of a Cluster, or Sentinels.
        address: its name in messages, without a password.
        hint: what to add to an error while the server has never answered.
    """

    client: redis.Redis
    endpoint: Endpoint
    address: str
    hint: str = ""

    @classmethod
    def make(cls, url: str | None, client: redis.Redis | redis.RedisCluster | None) -> BaseClient:
        """Return the base for a URL or for a client that the user gave.

        Raises:
            InvalidArgument: both were given, or the one that was given cannot be used.
        """
        if client is not None and url is not None:
            raise InvalidArgument("give either redis_url or redis_client, not both")
        base = _base_of_url(url) if client is None else _base_of_client(client)
        pool = base.client.connection_pool
        if pool.connection_kwargs.get("decode_responses"):
            raise InvalidArgument("the client must not decode responses: batches and weights are bytes")
        if pool.max_connections < MIN_CONNECTIONS:
            raise InvalidArgument(
                f"the client's pool holds {pool.max_connections} connections; {MIN_CONNECTIONS} are needed, "
                "as background threads occupy some"
            )
        return base


def _base_of_url(url: str | None) -> BaseClient:
    found = redis_url(url)
    hint = ""
    if url is None and found == DEFAULT_URL:
        hint = "; this is the default: start `rlbroker server`, or name a server with RLBROKER_REDIS_URL"
    endpoint = parse_endpoint(found)
    return BaseClient(client_from_url(endpoint.url), endpoint, redacted_url(found), hint)


def _base_of_client(client: redis.Redis | redis.RedisCluster) -> BaseClient:
    if isinstance(client, redis.RedisCluster):
        cluster: Any = client
        hosts = tuple((str(node.host), int(node.port)) for node in cluster.get_nodes())
        node_client = cluster.get_redis_connection(cluster.get_default_node())
        address = f"the Cluster of {hosts[0][0]}:{hosts[0][1]}"
        return BaseClient(node_client, Endpoint("cluster", "", hosts), address)
    if not isinstance(client, redis.Redis):
        raise InvalidArgument(
            f"redis_client must be a redis.Redis or a redis.RedisCluster; got {type(client).__name__}"
        )
    settings = client.connection_pool.connection_kwargs
    if re.search("://|@", str(settings.get("host", ""))):
        raise InvalidArgument("the host of redis_client is a URL; make it with redis.Redis.from_url")
    host = f"{settings['host']}:{settings.get('port', 6379)}" if "host" in settings else ""
    address = str(settings.get("path") or host or "the given redis_client")
    return BaseClient(client, Endpoint("one", ""), address)


def client_from_url(url: str) -> redis.Redis:
    """Return a client for a server's URL; user, password and TLS files that it lacks come from the environment.

    Raises:
        InvalidArgument: the URL or an environment variable cannot be used; the message says which.
    """
    parameters = _parameters(url)
    problem: ValueError | None = None
    try:
        pool = redis.ConnectionPool.from_url(url, protocol=2)
    except ValueError as error:
        problem = error
    if problem is not None:
        raise invalid_url_error(url, problem)
    secure = url.startswith("rediss:")
    settings = pool.connection_kwargs
    if not url.startswith("unix:"):
        settings.setdefault("host", "localhost")
        settings.setdefault("port", 6379)
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
            f"{unused} is set, but the server's URL {redacted_url(url)} is without TLS: passwords and weights would be "
            f"sent unencrypted; write rediss://, or unset {unused}"
        )
    return redis.Redis.from_pool(pool)


def tls_settings(parameters: Mapping[str, str]) -> tuple[TlsFile | None, TlsFile | None, TlsFile | None]:
    """Return the files of the authority, the certificate and its key, from the URL's parameters or the environment."""
    variables = tls_files()

    def named(parameter: str, variable: str) -> TlsFile | None:
        if parameter in parameters:
            return TlsFile(parameter, parameters[parameter])
        return TlsFile(variable, variables[variable]) if variable in variables else None

    authority = named("ssl_ca_certs", TLS_CA_VARIABLE)
    if "ssl_certfile" in parameters or "ssl_keyfile" in parameters:
        variables = {}  # a certificate and its key come from the same source
    return (
        authority,
        named("ssl_certfile", TLS_CERTIFICATE_VARIABLE),
        named("ssl_keyfile", TLS_KEY_VARIABLE),
    )


def _parameters(url: str) -> dict[str, str]:
    """Return the parameters of a URL, checked now: redis-py would refuse an unknown one only when it connects."""
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
            # If a password contains a ?, the supposed name is the rest of that password.
            shown = "parameters (write ? in a password as %3F)" if "@" in query else f"a parameter {name!r}"
            raise InvalidArgument(
                f"the server's URL {redacted_url(url)} has {shown} that rlbroker does not know; it knows {known}"
            )
        if not value:
            raise InvalidArgument(f"{name} in the server's URL {redacted_url(url)} has no value")
        if (form := _FORMS.get(name)) and not re.fullmatch(form, value):
            raise InvalidArgument(f"{name} in the server's URL {redacted_url(url)} cannot have this value")
    return found


def _tls(url: str, parameters: Mapping[str, str]) -> TlsSettings:
    wanted = parameters.get("ssl_cert_reqs", "required")
    check_choice("ssl_cert_reqs in the server's URL", wanted, ("required", "optional", "none"))
    tls = TlsSettings(
        *tls_settings(parameters),
        check_certificate=wanted != "none",
        check_name=parameters.get("ssl_check_hostname", "yes").upper() not in FALSE_STRINGS,
    )
    tls.warn_if_unchecked(redacted_url(url))
    return tls
