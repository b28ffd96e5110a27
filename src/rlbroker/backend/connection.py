"""The connection of one client to a server, or to the nodes of a Cluster: commands with retries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import redis

from rlbroker.backend.channel import Channel
from rlbroker.backend.client import LARGE_READ_BYTES, SOCKET_READ_BYTES, BaseClient, stall_seconds
from rlbroker.backend.cluster import slot_of
from rlbroker.backend.deadline import ONE_TRY, Deadline, within
from rlbroker.backend.error_mapping import SlotMigrating
from rlbroker.backend.replies import info_fields, raise_first_error, server_seconds, shaped
from rlbroker.backend.resp import Argument as Argument
from rlbroker.backend.resp import Command
from rlbroker.backend.retry import RetryPolicy
from rlbroker.backend.router import Router
from rlbroker.backend.scripts import Script
from rlbroker.backend.suitability import is_cluster_node, refuse_unsuitable
from rlbroker.backend.topology import Server, SingleServer
from rlbroker.config import check_positive_seconds
from rlbroker.errors import AccessDenied, ConnectionFailed, ServerFault

logger = logging.getLogger("rlbroker")

#: The longest time for which one blocking command waits on the server, so that a client soon notices that it is closed.
BLOCK_SECONDS: Final = 0.2

Result = TypeVar("Result")


class Connection(Router):
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
        super().__init__(
            base,
            timeout_seconds=self.timeout_seconds,
            socket_seconds=self.socket_seconds,
            read_bytes=LARGE_READ_BYTES if reads_batches else SOCKET_READ_BYTES,
        )
        self._retries = RetryPolicy(self.timeout_seconds, self.errors)

    @property
    def block_seconds(self) -> float:
        """How long one blocking command may wait: well within the socket's timeout."""
        return min(BLOCK_SECONDS, self.timeout_seconds / 4, self.socket_seconds / 2)

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

    # Commands

    def execute(self, *command: Argument, deadline: Deadline | None = None) -> Any:
        """Return the reply to one command, with retries until the deadline."""
        return self.retry(partial(self._attempt, [command], True), deadline)[0]

    def execute_all(
        self, commands: Sequence[Command], *, strict: bool = True, deadline: Deadline | None = None
    ) -> list[Any]:
        """Return the replies to many commands in one round trip, with retries until the deadline.

        Args:
            commands: those of one call may go to several servers.
            strict: whether the first refusal is raised; otherwise each is returned as a `PeerError`.
        """
        return self.retry(partial(self._attempt, commands, strict), deadline) if commands else []

    def run(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[Argument] = (),
        *,
        deadline: Deadline | None = None,
    ) -> Any:
        """Return the reply of a script, with retries until the deadline."""
        return self.execute(*script.call(keys, arguments), deadline=deadline)

    def execute_at(self, server: Server, commands: Sequence[Command], *, strict: bool = False) -> list[Any]:
        """Return one server's replies to many commands, sent once; the first refusal is raised if `strict`."""
        replies = self._exchange(commands, {server: range(len(commands))})
        return raise_first_error(replies) if strict else replies

    def execute_where_reachable(
        self, commands: Sequence[Command], *, deadline: Deadline | None = None
    ) -> None:
        """Run commands whose replies are not needed; on a Cluster once, without servers that cannot be reached."""
        if not self.servers.several:
            self.execute_all(commands, deadline=deadline)
            return
        for indexes in self.group_by_server(commands).values():
            try:
                self.execute_all([commands[index] for index in indexes], deadline=ONE_TRY)
            except ConnectionFailed as error:
                logger.warning("%s; writes to it are postponed", str(error))

    def _attempt(self, commands: Sequence[Command], strict: bool) -> list[Any]:
        try:
            replies = self._exchange(commands, self.group_by_server(commands))
        except SlotMigrating:  # MOVED: the topology knows the new owner now
            replies = self._exchange(commands, self.group_by_server(commands))
        return raise_first_error(replies) if strict else replies

    def _exchange(
        self, commands: Sequence[Command], indexes_by_server: Mapping[Server, Sequence[int]]
    ) -> list[Any]:
        """Return the replies to commands, each sent once to its server, in redis-py's shapes."""
        parts = [(Channel(self, server=server), indexes) for server, indexes in indexes_by_server.items()]
        replies: list[Any] = [None] * len(commands)
        try:
            for channel, indexes in parts:
                channel.send([commands[index] for index in indexes])
            for channel, indexes in parts:
                for index, reply in zip(indexes, channel.receive_all(), strict=True):
                    replies[index] = shaped(self._base.client, commands[index], reply)
        finally:
            for channel, _ in parts:
                channel.give_back()
        return replies

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
            cursor = 0
            while True:
                command = ("SCAN", cursor, "MATCH", pattern, "COUNT", count)
                ((cursor, found),) = self.retry(partial(self.execute_at, server, [command], strict=True))
                yield found
                if cursor == 0:
                    break

    def clock(self, key: str) -> float:
        """Return the time of the server that has a key, in seconds since the Unix epoch."""
        return server_seconds(self.execute_all([("EXISTS", key), ("TIME",)])[1])

    def load(self, scripts: Sequence[Script], *, deadline: Deadline | None = None) -> None:
        """Load scripts into the cache of each server that lacks one, for processes whose users may not load them.

        With `ONE_TRY`, a server that does not answer must not delay the other ones: a later call tries again.
        """
        for server in self.retry(self.masters, deadline):
            try:
                self.retry(partial(self._load, server, scripts), deadline)
            except ConnectionFailed:
                if deadline is not ONE_TRY or not self.servers.several:
                    raise

    def _load(self, server: Server, scripts: Sequence[Script]) -> None:
        shas = [script.sha for script in scripts]
        (known,) = self.execute_at(server, [("SCRIPT EXISTS", *shas)], strict=True)
        missing = [script for script, is_known in zip(scripts, known, strict=True) if not is_known]
        self.execute_at(server, [("SCRIPT LOAD", script.text) for script in missing], strict=True)

    # Servers

    def pubsub(self, channel: str) -> redis.client.PubSub:
        """Return a subscriber with its own connection to the server of a publish/subscribe channel."""
        make: Callable[..., redis.client.PubSub] = self.master_for(channel).client.pubsub
        return make()

    def find_nodes(self) -> None:
        """If the single server is a node of a Cluster, use all nodes; raise `ServerUnsuitable` for a Sentinel."""
        if isinstance(self.servers, SingleServer) and is_cluster_node(self.address, self.server_info()):
            self.use_cluster_nodes()

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
                    logger.warning("%s: %s does not answer: %s", self.address, name, str(error))

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
            found = self.execute_at(server, [command], strict=True)[0] if server else self.execute(*command)
            return info_fields(found)
        except AccessDenied:
            logger.info("%s does not let this user read INFO", self.address)
        except ServerFault as error:  # fakeredis has no INFO
            if "unknown command" not in str(error).lower():
                raise
        return {}


def flat(fields: Mapping[str, Any]) -> list[Any]:
    """Return fields as the arguments of a command: name, value, name, value."""
    return [part for pair in fields.items() for part in pair]
