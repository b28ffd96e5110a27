"""The connection of one client to a server, or to the nodes of a Cluster: commands with retries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import redis
from redis import exceptions as redis_errors

from rlbroker.backend.channel import Channel, follow_redirect
from rlbroker.backend.client import LARGE_READ_BYTES, SOCKET_READ_BYTES, BaseClient, stall_seconds
from rlbroker.backend.cluster import slot_of
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.error_mapping import AskRedirect, script_is_unknown
from rlbroker.backend.keys import shard_of
from rlbroker.backend.replies import server_seconds
from rlbroker.backend.resp import Argument as Argument
from rlbroker.backend.retry import RetryPolicy
from rlbroker.backend.router import Router, first_key_of, reply_options
from rlbroker.backend.scripts import Script
from rlbroker.backend.suitability import is_cluster_node, name_and_version, refuse_unsuitable
from rlbroker.backend.topology import Server, SingleServer, Topology
from rlbroker.config import check_positive_seconds
from rlbroker.errors import AccessDenied, ConnectionFailed, PeerError, ServerFault

logger = logging.getLogger("rlbroker")

#: The longest time for which one blocking command waits on the server, so that a client soon notices that it is closed.
BLOCK_SECONDS: Final = 0.2

Result = TypeVar("Result")

#: A script with its keys and arguments.
ScriptCall = tuple[Script, Sequence[str], Sequence[Argument]]


class Connection:
    """One client's connection to a server, or to the nodes of a Cluster; a command goes to the node of its first key.

    Every operation that rlbroker sends is idempotent (explicit ids, compare-and-set scripts, plain writes of the same
    value), so a broken connection is handled by retrying until the deadline. redis-py's own retries are off, also for
    a user's client: they would repeat commands whose errors must be handled here first. No attempt waits beyond the
    thread's deadline.

    A deadline that is not given is the connection's timeout from now. Every method that sends raises `PeerError` if
    the server refuses, or cannot be reached before the deadline.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        client: redis.Redis | redis.RedisCluster | None = None,
        timeout_seconds: float = 10.0,
        reads_batches: bool = False,
    ) -> None:
        """Create a connection; nothing is sent yet.

        Args:
            url: `redis://`, `rediss://` or `unix://`, or `redis+cluster://host:port,host:port` or
                `redis+sentinel://host:port,host:port/service`; by default from the environment, else localhost.
            client: a ready client instead of a URL; may be fakeredis's or a Cluster's. Only its settings are used.
            timeout_seconds: how long an operation may take, retries included.
            reads_batches: whether to read large replies faster, at the cost of memory.

        Raises:
            InvalidArgument: the URL, the client or the timeout cannot be used.
        """
        self.timeout_seconds = check_positive_seconds("timeout", timeout_seconds)
        base = BaseClient.make(url, client)
        stall = stall_seconds(self.timeout_seconds)
        socket_timeout = base.client.connection_pool.connection_kwargs.get("socket_timeout")
        #: How long a connection waits for a reply before it counts as broken.
        self.socket_seconds = min(stall, float(socket_timeout or stall))
        #: Sends commands once each; for channels.
        self.router = Router(
            base,
            timeout_seconds=self.timeout_seconds,
            socket_seconds=self.socket_seconds,
            read_bytes=LARGE_READ_BYTES if reads_batches else SOCKET_READ_BYTES,
        )
        self._retries = RetryPolicy(self.timeout_seconds, self.router.errors)

    @property
    def address(self) -> str:
        """The server's name in messages, without a password."""
        return self.router.address

    @property
    def user(self) -> str:
        """The name with which the connections log in."""
        return self.router.user

    @property
    def servers(self) -> Topology:
        """The servers, and which of them has a key."""
        return self.router.servers

    @property
    def block_seconds(self) -> float:
        """How long one blocking command may wait: well within the socket's timeout."""
        return min(BLOCK_SECONDS, self.timeout_seconds / 4, self.socket_seconds / 2)

    def close(self) -> None:
        """Close the connections; a client that the user gave stays open."""
        self.router.close()

    def check_process(self) -> None:
        """Raise `ForkedProcess` in a forked child, where sockets and threads are the parent's."""
        self.router.check_process()

    def retry(self, operation: Callable[[], Result], deadline: Deadline | None = None) -> Result:
        """Return the result of an operation, repeated until it succeeds or the deadline is over.

        Args:
            operation: raises rlbroker's errors, and must be idempotent.

        Raises:
            ConnectionFailed: no attempt succeeded, and one of them may have been applied.
            RunLost: the server lost the run, and no learner restored it in time.
            PeerError: the server refused.
        """
        return self._retries.run(operation, deadline)

    # Single commands

    def execute(self, *command: Argument, deadline: Deadline | None = None) -> Any:
        """Return the reply to one command, with retries until the deadline."""
        return self.retry(lambda: self.execute_once(*command), deadline)

    def execute_once(self, *command: Argument) -> Any:
        """Return the reply to one command, sent once, such as a blocking read; the caller handles its loss."""

        def send(client: redis.Redis) -> Any:
            execute: Callable[..., Any] = client.execute_command
            return execute(*command, **reply_options(command))

        try:
            return self.router.send(send, [command])
        except AskRedirect as ask:
            return self.router.shape_reply(command, follow_redirect(self, ask.redirect, command))

    def clock(self, key: str) -> float:
        """Return the time of the server that has a key, in seconds since the Unix epoch."""
        return server_seconds(self.execute_all([("EXISTS", key), ("TIME",)])[1])

    # Many commands

    def execute_all(
        self, commands: Sequence[Sequence[Argument]], *, deadline: Deadline | None = None
    ) -> list[Any]:
        """Return the replies to many commands in one round trip, with retries; the first refusal is raised."""
        if not commands:
            return []

        def send(client: redis.Redis) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            add: Callable[..., Any] = pipeline.execute_command
            for command in commands:
                add(*command, **reply_options(command))
            return pipeline.execute()

        def attempt() -> list[Any]:
            if len(self.router.group_by_server(commands)) > 1:
                return self._execute_on_many(commands)
            try:
                return self.router.send(send, commands)
            except AskRedirect:
                return [self.execute_once(*command) for command in commands]

        return self.retry(attempt, deadline)

    def _execute_on_many(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Return the replies from several servers; if one lacks a script, load the scripts and send again."""
        problem: PeerError | None = None
        for _ in range(2):
            results = self.ask_once(commands)
            problem = next((one for one in results if isinstance(one, PeerError)), None)
            if problem is None:
                return list(map(self.router.shape_reply, commands, results))
            if not script_is_unknown(problem):
                break
            for server in self.masters():
                self.router.scripts.reload(partial(self.router.send_to, server))
        assert problem is not None
        raise problem

    def ask(self, commands: Sequence[Sequence[Argument]], *, deadline: Deadline | None = None) -> list[Any]:
        """Return the replies to many commands in one round trip, with retries; return a refusal as a `PeerError`."""
        return self.retry(lambda: self.ask_once(commands), deadline) if commands else []

    def ask_once(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Return the replies to many commands, sent once in one round trip; return a refusal as a `PeerError`."""
        channels: list[Channel] = []
        results: list[Any] = [None] * len(commands)
        try:
            groups = self.router.group_by_server(commands)
            for indexes in groups:
                some = [commands[index] for index in indexes]
                channels.append(Channel(self, first_key_of(some)))
                channels[-1].send(some)
            for channel, indexes in zip(channels, groups, strict=True):
                for index, result in zip(indexes, channel.receive(len(indexes)), strict=True):
                    results[index] = result
                channel.give_back()
        finally:
            for channel in channels:
                channel.close()
        return results

    def ask_at(self, server: Server, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Return one server's replies to many commands, sent once; return a refusal as a `PeerError`."""
        channel = Channel(self, server=server)
        try:
            results = channel.execute_all(commands)
            channel.give_back()
        finally:
            channel.close()
        return results

    def execute_on_keys(self, command: str, keys: Sequence[str], *, deadline: Deadline | None = None) -> int:
        """Run a command that takes many keys and returns a count, such as UNLINK; return the sum of the counts."""
        by_slot: dict[int, list[str]] = {}
        for key in keys:
            by_slot.setdefault(slot_of(key) if self.servers.several else 0, []).append(key)
        return sum(self.execute_all([(command, *some) for some in by_slot.values()], deadline=deadline))

    def scan(self, pattern: str, *, count: int = 1000) -> Iterator[list[bytes]]:
        """Yield the keys of every server that match a pattern, some at a time."""
        self.find_nodes()
        for server in self.retry(self.masters):
            cursor: bytes | int = b"0"
            while True:
                command = ("SCAN", cursor, "MATCH", pattern, "COUNT", count)
                cursor, found = self.retry(partial(self.router.send_to, server, command))
                yield found
                if int(cursor) == 0:
                    break

    # Scripts

    def run(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[Argument] = (),
        *,
        deadline: Deadline | None = None,
    ) -> Any:
        """Return the reply of a script, with retries; it is loaded first if the server lacks it."""
        self.router.scripts.remember(script)
        return self.execute(*script.call(keys, arguments), deadline=deadline)

    def run_all(self, calls: Sequence[ScriptCall], *, deadline: Deadline | None = None) -> list[Any]:
        """Return the replies of many scripts in one round trip, with retries; the first refusal is raised."""
        for script, _, _ in calls:
            self.router.scripts.remember(script)
        commands = [script.call(keys, arguments) for script, keys, arguments in calls]
        return self.execute_all(commands, deadline=deadline)

    def run_where_reachable(self, calls: Sequence[ScriptCall], *, deadline: Deadline | None = None) -> None:
        """Run scripts whose replies are not needed; on a Cluster once, without the servers that cannot be reached."""
        if not self.servers.several:
            self.run_all(calls, deadline=deadline)
            return
        by_shard: dict[str, list[ScriptCall]] = {}
        for call in calls:
            by_shard.setdefault(shard_of(call[1][0]), []).append(call)
        for some in by_shard.values():
            try:
                self.run_all(some, deadline=Deadline(0))
            except ConnectionFailed as error:
                logger.warning("%s; writes to it are postponed", error)

    def load(self, scripts: Sequence[Script]) -> None:
        """Load scripts into the cache of every server, for processes whose users may not load them."""
        for server in self.retry(self.masters):
            send = partial(self.router.send_to, server)
            self.retry(partial(self.router.scripts.load, send, scripts))

    def load_missing(self, scripts: Sequence[Script]) -> None:
        """Load scripts again into the cache of each server that lacks any of them."""
        for server in self.retry(self.masters):
            try:
                self.router.scripts.load_missing(partial(self.router.send_to, server), scripts)
            except ConnectionFailed:
                # One of several servers must not delay the others; a later call tries again.
                if not self.servers.several:
                    raise

    # Servers

    def pubsub(self, channel: str) -> redis.client.PubSub:
        """Return a subscriber with its own connection to the server of a publish/subscribe channel."""
        make: Callable[..., redis.client.PubSub] = self.router.master_for(channel).client.pubsub
        return make()

    def master_for(self, key: str) -> Server:
        """Return the master that has a key now."""
        return self.router.master_for(key)

    def masters(self) -> Sequence[Server]:
        """Return every master."""
        return self.router.masters()

    def replicas_of(self, master: Server) -> Sequence[Server]:
        """Return the replicas of a master; none if this user may not know them."""
        return self.router.replicas_of(master)

    def find_nodes(self) -> None:
        """If the single server is a node of a Cluster, use all nodes; raise `ServerUnsuitable` for a Sentinel."""
        if isinstance(self.servers, SingleServer) and is_cluster_node(self.address, self.server_info()):
            self.router.use_cluster_nodes()

    def check_server(self, *, allow_eviction: bool = False) -> None:
        """Refuse servers that are too old or would evict keys; accept those that hide their INFO.

        Raises:
            ServerUnsuitable: a server cannot be used; the message says what to change.
        """
        self.execute("PING")
        self.find_nodes()
        with within(Deadline(self.timeout_seconds)):
            for server in self.retry(self._all_servers):
                name = self.address if isinstance(self.servers, SingleServer) else server.name
                try:
                    refuse_unsuitable(name, self.server_info(server), allow_eviction=allow_eviction)
                except ConnectionFailed as error:
                    logger.warning("%s: %s does not answer: %s", self.address, name, error)

    def _all_servers(self) -> list[Server]:
        """Return the single server, or every master and replica."""
        masters = self.masters()
        if isinstance(self.servers, SingleServer):
            return list(masters)
        return [*masters, *(replica for master in masters for replica in self.replicas_of(master))]

    def server_info(self, server: Server | None = None) -> dict[str, str]:
        """Return the fields of a server's INFO, by default any server's; empty if it hides them from this user."""
        command = ("INFO",)
        try:
            found = self.router.send_to(server, command) if server else self.execute(*command)
            return {str(name): str(value) for name, value in dict(found).items()}
        except AccessDenied:
            logger.info("%s does not let this user read INFO", self.address)
        except ServerFault as error:  # fakeredis has no INFO
            if "unknown command" not in str(error).lower():
                raise
        return {}

    def server_version(self, info: Mapping[str, str] | None = None) -> str:
        """Return the server's name and version from its `server_info`; empty if it hides them."""
        return name_and_version(self.server_info() if info is None else info)

    def to_rlbroker_error(self, error: redis_errors.RedisError) -> PeerError:
        """Return rlbroker's error for one that redis-py raised outside of this connection's methods."""
        return self.router.translate(error)


def flat(fields: Mapping[str, Any]) -> list[Any]:
    """Return fields as the arguments of a command: name, value, name, value."""
    return [part for pair in fields.items() for part in pair]
