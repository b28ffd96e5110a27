"""The servers of a connection: which of them a command goes to, and what their errors mean."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import redis
from redis import exceptions as redis_errors

from rlbroker.backend.client import BaseClient, bounded_client
from rlbroker.backend.cluster import ClusterTopology
from rlbroker.backend.error_mapping import ErrorTranslator, breaks_connection
from rlbroker.backend.keys import EVERY_KEY
from rlbroker.backend.resp import Command
from rlbroker.backend.sentinel import SentinelTopology
from rlbroker.backend.topology import Server, SingleServer, Topology
from rlbroker.backend.url import Endpoint
from rlbroker.errors import AccessDenied, ForkedProcess, PeerError, ServerUnsuitable

logger = logging.getLogger("rlbroker")

#: The beginning of every key.
_KEY_PREFIX: Final = EVERY_KEY.rstrip("*")

Result = TypeVar("Result")


class Router:
    """The servers of a connection: which of them has a key, and what their errors mean."""

    def __init__(
        self, base: BaseClient, *, timeout_seconds: float, socket_seconds: float, read_bytes: int
    ) -> None:
        """Create a router; nothing is sent yet.

        Args:
            base: has the settings of the connections.
            timeout_seconds: how long a thread waits for a free connection.
            socket_seconds: how long a connection waits for a reply.
            read_bytes: how much is read from a socket at once.
        """
        pool = base.client.connection_pool
        self._pid = os.getpid()
        # Kept alive here: the connections of redis-py's Sentinel pool refer to that pool only weakly.
        self._base = base
        self._make_client = partial(
            bounded_client, base.client, timeout_seconds, socket_seconds, socket_read_size=read_bytes
        )
        #: The server's name in messages, without a password.
        self.address = base.address
        #: The name with which the connections log in.
        self.user = str(pool.connection_kwargs.get("username") or "default")
        self.errors = ErrorTranslator(base.address, self.user, pool, hint=base.hint)
        #: The servers, and which of them has a key.
        self.servers = _make_topology(base.endpoint, self._make_client, base.address)

    def close(self) -> None:
        """Close the connections, except in a forked child, where they are the parent's."""
        if os.getpid() == self._pid:
            self.servers.close()

    def check_process(self) -> None:
        """Raise `ForkedProcess` in a forked child, where sockets and threads are the parent's."""
        if os.getpid() != self._pid:
            raise ForkedProcess(
                "this client was made before a fork; make a new one in the child process (or use the 'spawn' method)"
            )

    # Servers

    def master_for(self, key: str) -> Server:
        """Return the master that has a key now."""
        return self._ask_servers(lambda servers: servers.master_for(key))

    def masters(self) -> Sequence[Server]:
        """Return every master."""
        return self._ask_servers(lambda servers: servers.masters())

    def replicas_of(self, master: Server) -> Sequence[Server]:
        """Return the replicas of a master; none if this user may not know them."""
        try:
            return self._ask_servers(lambda servers: servers.replicas_of(master), master)
        except AccessDenied:
            return ()

    def _ask_servers(self, question: Callable[[Topology], Result], server: Server | None = None) -> Result:
        self.check_process()
        try:
            return question(self.servers)
        except redis_errors.RedisError as error:
            raise self.failure(error, ("INFO",) if server else (), server) from error

    def group_by_server(self, commands: Sequence[Command]) -> dict[Server, Sequence[int]]:
        """Return the servers to which commands go, each with the indexes of its commands."""
        if not self.servers.several:
            return {self.master_for(""): range(len(commands))}
        first = next(filter(None, map(key_of, commands)), "")  # commands without a key go to its server
        groups: dict[Server, list[int]] = {}
        for index, command in enumerate(commands):
            groups.setdefault(self.master_for(key_of(command) or first), []).append(index)
        return dict(groups)

    def use_cluster_nodes(self) -> None:
        """Use all nodes of the Cluster to which the single server belongs."""
        (one,) = self.servers.masters()
        one.client.connection_pool.disconnect(inuse_connections=False)
        if one.address is None:
            raise ServerUnsuitable(
                f"{self.address} is a node of a Cluster, and its other nodes need a host and port: name some, "
                "as in redis+cluster://host:port,host:port"
            )
        logger.info("%s is a node of a Cluster; its other nodes are used too", self.address)
        self.servers = ClusterTopology(self._make_client, [one.address], self.address)

    # Errors

    def failure(
        self, error: redis_errors.RedisError, command: Command = (), server: Server | None = None
    ) -> PeerError:
        """Return rlbroker's error for one of redis-py's, and note it if the server could not be used."""
        translated = self.translate(error, command, server)
        translated.__cause__ = error
        if breaks_connection(translated):
            self.record_failure(error, server)
        return translated

    def record_failure(self, error: redis_errors.RedisError, server: Server | None) -> None:
        """Note that a server could not be used, and close its idle connections, which are likely broken too."""
        if server is not None:
            server.client.connection_pool.disconnect(inuse_connections=False)
        if isinstance(error, redis_errors.MovedError):
            if isinstance(self.servers, SingleServer):
                self.use_cluster_nodes()
            self.servers.note_moved(error.slot_id, (str(error.host), int(error.port)))
        else:
            self.servers.mark_stale(server)

    def translate(
        self,
        error: redis_errors.RedisError,
        command: Command = (),
        server: Server | None = None,
    ) -> PeerError:
        """Return rlbroker's error for one of redis-py's.

        The command is used if the server does not name the key that it refuses.
        """
        name = "" if server is None or isinstance(self.servers, SingleServer) else server.name
        pool = None if server is None else server.client.connection_pool
        return self.errors.translate(error, command=command, server_name=name, pool=pool)


def _make_topology(endpoint: Endpoint, make_client: Callable[..., redis.Redis], address: str) -> Topology:
    """Return the servers of an endpoint."""
    if endpoint.kind == "cluster":
        return ClusterTopology(make_client, endpoint.hosts, address)
    if endpoint.kind == "sentinel":
        login = {"db": 0, "username": None, "password": None, **endpoint.login}
        sentinels = [make_client(host, **login) for host in endpoint.hosts]
        return SentinelTopology(make_client, sentinels, endpoint.service, address)
    return SingleServer(make_client(), make_client)


def key_of(command: Iterable[Any]) -> str:
    """Return the first of rlbroker's keys in a command; empty if there is none."""
    for part in command:
        if isinstance(part, str) and part.startswith(_KEY_PREFIX):
            return part
    return ""
