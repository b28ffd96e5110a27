"""One attempt at a command: it goes to the server that has its key, and its errors are translated."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, Self, TypeVar

import redis
from redis import exceptions as redis_errors

from rlbroker.backend.client import BaseClient, bounded_client
from rlbroker.backend.cluster import ClusterTopology
from rlbroker.backend.error_mapping import AskRedirect, ErrorTranslator, is_ask_redirect
from rlbroker.backend.keys import EVERY_KEY
from rlbroker.backend.resp import Argument, Pieces
from rlbroker.backend.scripts import ScriptLoader
from rlbroker.backend.sentinel import SentinelTopology
from rlbroker.backend.topology import Server, SingleServer, Topology
from rlbroker.backend.url import Endpoint
from rlbroker.errors import AccessDenied, ConnectionFailed, ForkedProcess, PeerError, ServerUnsuitable

logger = logging.getLogger("rlbroker")

#: The beginning of every key.
_KEY_PREFIX: Final = EVERY_KEY.rstrip("*")

Result = TypeVar("Result")


class Router:
    """Sends each command once, to the server that has its key, and keeps the topology and the scripts up to date."""

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
        self.address = base.address
        #: The name with which the connections log in.
        self.user = str(pool.connection_kwargs.get("username") or "default")
        self.errors = ErrorTranslator(base.address, self.user, pool, hint=base.hint)
        self.scripts = ScriptLoader(base.address)
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
        self.check_process()
        with _TranslatedErrors(self):
            return self.servers.master_for(key)

    def masters(self) -> Sequence[Server]:
        """Return every master."""
        self.check_process()
        with _TranslatedErrors(self):
            return self.servers.masters()

    def replicas_of(self, master: Server) -> Sequence[Server]:
        """Return the replicas of a master; none if this user may not know them."""
        try:
            with _TranslatedErrors(self, master, ("INFO",)):
                return self.servers.replicas_of(master)
        except AccessDenied:
            return ()

    def group_by_server(self, commands: Sequence[Sequence[Argument]]) -> list[list[int]]:
        """Return the indexes of the commands that go to the same server, for each server."""
        if not self.servers.several:
            return [list(range(len(commands)))]
        groups: dict[Server, list[int]] = {}
        with _TranslatedErrors(self):
            first = first_key_of(commands)  # commands without a key go to its server
            for index, command in enumerate(commands):
                groups.setdefault(self.servers.master_for(key_of(command) or first), []).append(index)
        return list(groups.values())

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

    # Commands

    def send(
        self, operation: Callable[[redis.Redis], Result], commands: Sequence[Sequence[Argument]]
    ) -> Result:
        """Return the result of an operation on the client of the server that has the commands' first key.

        Args:
            operation: sends the commands with a client.
            commands: commands whose keys are all on one server.

        Raises:
            AskRedirect: the key is being moved; nothing was done.
        """
        self.check_process()
        with _TranslatedErrors(self, command=commands[0]) as attempt:
            key = first_key_of(commands) if self.servers.several else ""
            attempt.server = server = self.servers.master_for(key)
            try:
                result = self._send_with_scripts(operation, server)
            except redis_errors.MovedError as error:
                self.record_failure(error, server)
                attempt.server = server = self.servers.master_for(key)
                result = self._send_with_scripts(operation, server)
        self.errors.record_answer()
        return result

    def _send_with_scripts(self, operation: Callable[[redis.Redis], Result], server: Server) -> Result:
        """Send; if the server lacks a script, as after a failover, load the scripts and send again."""
        try:
            return operation(server.client)
        except redis_errors.NoScriptError:
            self.scripts.reload(partial(self.send_to, server))
            return operation(server.client)

    def send_to(self, server: Server, command: Sequence[Argument]) -> Any:
        """Return the reply to a command from one server."""
        execute: Callable[..., Any] = server.client.execute_command
        with _TranslatedErrors(self, server, command):
            reply = execute(*command)
        self.errors.record_answer()
        return reply

    def shape_reply(self, command: Sequence[Argument], reply: Any) -> Any:
        """Return a raw reply in the shape that redis-py's client would return, such as a dictionary."""
        callbacks: Any = self._base.client.response_callbacks
        shape = callbacks.get(command[0])
        return reply if shape is None else shape(reply, **reply_options(command))

    # Errors

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
        command: Sequence[Argument | Pieces] = (),
        server: Server | None = None,
    ) -> PeerError:
        """Return rlbroker's error for one of redis-py's.

        The command is used if the server does not name the key that it refuses.
        """
        name = "" if server is None or isinstance(self.servers, SingleServer) else server.name
        return self.errors.translate(error, command=command, server_name=name)


class _TranslatedErrors:
    """A block whose redis-py errors become rlbroker's. A class, because a generator would be slower."""

    __slots__ = ("_command", "_router", "server")

    def __init__(
        self, router: Router, server: Server | None = None, command: Sequence[Argument] = ()
    ) -> None:
        self._router, self._command = router, command
        self.server = server  #: the server that is asked

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, redis_errors.RedisError):
            return
        if is_ask_redirect(error):
            raise AskRedirect(error) from error
        translated = self._router.translate(error, self._command, self.server)
        if isinstance(translated, ConnectionFailed):
            self._router.record_failure(error, self.server)
        try:
            raise translated from error
        finally:
            del translated  # otherwise the error refers to this frame and this frame to the error


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
    return next((part for part in command if isinstance(part, str) and part.startswith(_KEY_PREFIX)), "")


def first_key_of(commands: Iterable[Iterable[Any]]) -> str:
    """Return the first key of several commands; empty if none has any."""
    return next(filter(None, map(key_of, commands)), "")


def reply_options(command: Sequence[Argument]) -> dict[str, bool]:
    """Return redis-py's options for parsing a reply: XPENDING with a range lists entries, without one a summary."""
    if command[0] == "XPENDING" and len(command) > 3:
        return {"parse_detail": True}
    return {}
