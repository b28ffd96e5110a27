"""The one boundary to Redis: channels, retries, scripts, and redis-py's errors turned into ours."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, Self, TypeVar

import redis
from redis import exceptions as redis_errors

from rlbroker.backend.client import (
    LARGE_READ_BYTES,
    SOCKET_READ_BYTES,
    bounded_client,
    client_from_url,
    stall_seconds,
)
from rlbroker.backend.deadline import Backoff, Deadline, within
from rlbroker.backend.error_mapping import (
    KeyMoves,
    is_moving,
    is_refusal,
    script_is_unknown,
    scripts_missing,
    translated,
)
from rlbroker.backend.keys import shard_of
from rlbroker.backend.resp import Argument as Argument
from rlbroker.backend.resp import Pieces, packed
from rlbroker.backend.scripts import Script
from rlbroker.backend.tls import answers_only_tls, refusal_of
from rlbroker.backend.topology import (
    ClusterTopology,
    Server,
    SingleServer,
    Topology,
    first_key_of,
    key_of,
    slot_of,
    topology_for,
)
from rlbroker.config import DEFAULT_URL, Endpoint, parse_endpoint, positive_seconds, redacted_url, redis_url
from rlbroker.errors import (
    AccessDenied,
    ConnectionFailed,
    ForkedProcess,
    InvalidArgument,
    PeerError,
    RunLost,
    ServerFault,
    ServerUnsuitable,
    TlsFailed,
)

logger = logging.getLogger("rlbroker")

#: The oldest server that is supported.
MIN_SERVER_VERSION: Final = (6, 2)

#: Longest that one blocking command waits on the server, so that a closing client is never far from noticing.
BLOCK_SECONDS: Final = 0.2

#: Connections that one client cannot do without.
MIN_CONNECTIONS: Final = 6

#: Bytes that are given to a socket at once: the stall timeout speaks of each such piece.
SEND_BYTES: Final = 1 << 20

#: How long a server that has accepted this user may refuse it: users may be set up only after a restart.
REFUSED_SECONDS: Final = 10.0

Result = TypeVar("Result")


class Connection:
    """One client's way to the server, or to the several of a Cluster: each command goes to where its first key lives.

    Every operation that rlbroker sends is harmless to repeat (explicit ids, compare-and-set scripts, plain
    writes of the same value), so a broken connection is answered by trying again until the deadline.
    redis-py's own retries are off, also for a client that was given: they repeat commands that we must look at
    first. No try waits for longer than what is left of the deadline that holds.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        client: redis.Redis | redis.RedisCluster | None = None,
        timeout_seconds: float = 10.0,
        reads_batches: bool = False,
    ) -> None:
        """Prepare a connection; nothing is sent yet.

        Args:
            url: `redis://`, `rediss://` or `unix://`, or `redis+cluster://host:port,host:port` or
                `redis+sentinel://host:port,host:port/service`; defaults to the environment, then localhost.
            client: a ready client instead of a URL, a fakeredis one or one of a Cluster too; it gives the way to the
                server, and itself stays untouched.
            timeout_seconds: how long any one operation may take, retries included.
            reads_batches: whether large replies are to come fast, for more memory.

        Raises:
            InvalidArgument: the URL, the client or the timeout cannot work.
        """
        self.timeout_seconds = positive_seconds("timeout", timeout_seconds)
        self._pid = os.getpid()
        self._scripts: dict[str, Script] = {}
        self._told = False  #: whether it was told that nobody answers
        self._worked, self._hint = False, ""
        self._refused: Deadline | None = None
        way = None
        base: redis.Redis
        if client is None:
            found = redis_url(url)
            self.address = redacted_url(found)
            if url is None and found == DEFAULT_URL:
                self._hint = (
                    "; this is the default: start `rlbroker server`, or name a server with RLBROKER_REDIS_URL"
                )
            way = parse_endpoint(found)
            base = client_from_url(way.url)
        elif url is not None:
            raise InvalidArgument("give either redis_url or redis_client, not both")
        elif isinstance(client, redis.RedisCluster):
            of_cluster: Any = client
            way = Endpoint(
                "cluster", "", tuple((str(node.host), int(node.port)) for node in of_cluster.get_nodes())
            )
            base = of_cluster.get_redis_connection(of_cluster.get_default_node())
            self.address = f"the Cluster of {way.hosts[0][0]}:{way.hosts[0][1]}"
        elif not isinstance(client, redis.Redis):
            raise InvalidArgument(
                f"redis_client must be a redis.Redis or a redis.RedisCluster; got {type(client).__name__}"
            )
        else:
            base = client
            settings = base.connection_pool.connection_kwargs
            host = f"{settings['host']}:{settings.get('port')}" if "host" in settings else ""
            self.address = str(settings.get("path") or host or "the given redis_client")
        pool = base.connection_pool
        if pool.connection_kwargs.get("decode_responses"):
            raise InvalidArgument("the client must not decode responses: batches and weights are bytes")
        if pool.max_connections < MIN_CONNECTIONS:
            raise InvalidArgument(
                f"the client's pool holds {pool.max_connections} connections; {MIN_CONNECTIONS} are needed, "
                "as the background waits on some of them"
            )
        stall = stall_seconds(self.timeout_seconds)
        #: Who this is to the server, as far as it was said.
        self.user = str(pool.connection_kwargs.get("username") or "default")
        #: How long a connection may be silent with an answer due.
        self.socket_seconds = min(stall, float(pool.connection_kwargs.get("socket_timeout") or stall))
        self._given = base  # a pool of Sentinel's is only remembered weakly by its connections
        self._make_client = partial(
            bounded_client,
            base,
            self.timeout_seconds,
            self.socket_seconds,
            socket_read_size=LARGE_READ_BYTES if reads_batches else SOCKET_READ_BYTES,
        )
        self.servers: Topology = topology_for(way or Endpoint("one", ""), self._make_client, self.address)

    @property
    def block_seconds(self) -> float:
        """How long one blocking command may wait: well within the socket's timeout."""
        return min(BLOCK_SECONDS, self.timeout_seconds / 4, self.socket_seconds / 2)

    def close(self) -> None:
        """Close the connections; those of a client that the user gave are not among them."""
        if os.getpid() == self._pid:
            self.servers.close()

    def check_process(self) -> None:
        """Refuse to work in a forked child, where sockets and threads are the parent's.

        Raises:
            ForkedProcess: this is not the process that made the client.
        """
        if os.getpid() != self._pid:
            raise ForkedProcess(
                "this client was made before a fork; make a new one in the child process (or use the 'spawn' method)"
            )

    def execute(self, *command: Argument, deadline: Deadline | None = None) -> Any:
        """Run one command, again and again while the connection is broken, until the deadline.

        Raises:
            PeerError: the server refused, or could not be reached within the deadline.
        """
        return self.retry(lambda: self.execute_once(*command), deadline)

    def execute_once(self, *command: Argument) -> Any:
        """Run one command whose loss the caller handles, such as a blocking read.

        Raises:
            PeerError: the server refused or could not be reached.
        """

        def send(client: redis.Redis) -> Any:
            run: Callable[..., Any] = client.execute_command
            return run(*command, **_options(command))

        try:
            return self._translated(send, [command])
        except KeyMoves as moving:
            return self._shaped(command, self.follow(moving.said, command))

    def run(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[Argument] = (),
        *,
        deadline: Deadline | None = None,
    ) -> Any:
        """Run a script, loading it first where the server does not know it.

        Raises:
            Fenced: the script found that a newer process took over.
            PeerError: the server refused, or could not be reached within the deadline.
        """
        self.remember(script)
        return self.execute(*script.call(keys, arguments), deadline=deadline)

    def run_all(
        self,
        calls: Sequence[tuple[Script, Sequence[str], Sequence[Argument]]],
        *,
        deadline: Deadline | None = None,
    ) -> list[Any]:
        """Run many scripts in one round trip and give their results; the first error is raised."""
        self._scripts.update((script.sha, script) for script, _, _ in calls)
        return self.execute_all(
            [script.call(keys, arguments) for script, keys, arguments in calls], deadline=deadline
        )

    def execute_all(
        self, commands: Sequence[Sequence[Argument]], *, deadline: Deadline | None = None
    ) -> list[Any]:
        """Run many commands in one round trip and give their results; the first error is raised.

        Raises:
            PeerError: the server refused one of them, or could not be reached within the deadline.
        """
        if not commands:
            return []

        def send(client: redis.Redis) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            add: Callable[..., Any] = pipeline.execute_command
            for command in commands:
                add(*command, **_options(command))
            return pipeline.execute()

        def once() -> list[Any]:
            if len(self._by_server(commands)) > 1:
                return self._execute_on_many(commands)
            try:
                return self._translated(send, commands)
            except KeyMoves:
                return [self.execute_once(*command) for command in commands]

        return self.retry(once, deadline)

    def _execute_on_many(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        problem: PeerError | None = None
        for _ in range(2):
            results = self.ask_once(commands)
            problem = next((one for one in results if isinstance(one, PeerError)), None)
            if problem is None:
                return list(map(self._shaped, commands, results))
            if not script_is_unknown(problem):
                break
            for server in self.masters():
                self._load_known(server)
        assert problem is not None
        raise problem

    def _shaped(self, command: Sequence[Argument], reply: Any) -> Any:
        """Give a reply as redis-py's client would: for some commands it makes dictionaries, say."""
        known: Any = self._given.response_callbacks
        shape = known.get(command[0])
        return reply if shape is None else shape(reply, **_options(command))

    def ask(self, commands: Sequence[Sequence[Argument]], *, deadline: Deadline | None = None) -> list[Any]:
        """Run many commands in one round trip; what the server refused is given as a `PeerError`.

        Raises:
            ConnectionFailed: the server could not be reached in time.
        """
        return self.retry(lambda: self.ask_once(commands), deadline) if commands else []

    def ask_once(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Run many commands in one round trip, once; what the server refused is given as a `PeerError`.

        Raises:
            ConnectionFailed: the server could not be reached, or the connection broke.
        """
        channels: list[Channel] = []
        results: list[Any] = [None] * len(commands)
        try:
            groups = self._by_server(commands)
            for places in groups:
                some = [commands[place] for place in places]
                channels.append(Channel(self, first_key_of(some)))
                channels[-1].send(some)
            for channel, places in zip(channels, groups, strict=True):
                for place, result in zip(places, channel.receive(len(places)), strict=True):
                    results[place] = result
                channel.give_back()
        finally:
            for channel in channels:
                channel.close()
        return results

    def _by_server(self, commands: Sequence[Sequence[Argument]]) -> list[list[int]]:
        """Give which of these commands go to the same server, for each server."""
        if not self.servers.several:
            return [list(range(len(commands)))]
        groups: dict[Server, list[int]] = {}
        with self._care():
            first = first_key_of(commands)  # where it lives, what has no key goes too
            for place, command in enumerate(commands):
                groups.setdefault(self.servers.holding(key_of(command) or first), []).append(place)
        return list(groups.values())

    def clock(self, key: str) -> float:
        """Give the time of the server that has a key, in seconds since the epoch.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        seconds, microseconds = self.execute_all([("EXISTS", key), ("TIME",)])[1]
        return float(int(seconds) + int(microseconds) / 1e6)

    def on_each(self, command: str, keys: Sequence[str], *, deadline: Deadline | None = None) -> int:
        """Run a command that takes any number of keys and counts, such as UNLINK; give the sum.

        Raises:
            PeerError: the server refused, or could not be reached within the deadline.
        """
        places: dict[int, list[str]] = {}
        for key in keys:
            places.setdefault(slot_of(key) if self.servers.several else 0, []).append(key)
        return sum(self.execute_all([(command, *some) for some in places.values()], deadline=deadline))

    def scan(self, pattern: str, *, count: int = 1000) -> Iterator[list[bytes]]:
        """Give the keys that match a pattern, some at a time, of every server.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        self.find_nodes()
        for server in self.retry(self.masters):
            cursor: bytes | int = b"0"
            while True:
                command = ("SCAN", cursor, "MATCH", pattern, "COUNT", count)
                cursor, found = self.retry(partial(self._on, server, command))
                yield found
                if int(cursor) == 0:
                    break

    def run_where_there(
        self,
        calls: Sequence[tuple[Script, Sequence[str], Sequence[Argument]]],
        *,
        deadline: Deadline | None = None,
    ) -> None:
        """Run scripts whose results nobody needs; on a Cluster once, leaving out servers that are away.

        Raises:
            PeerError: a server refused; or the only one could not be reached within the deadline.
        """
        if not self.servers.several:
            self.run_all(calls, deadline=deadline)
            return
        shards: dict[str, list[tuple[Script, Sequence[str], Sequence[Argument]]]] = {}
        for call in calls:
            shards.setdefault(shard_of(call[1][0]), []).append(call)
        for some in shards.values():
            try:
                self.run_all(some, deadline=Deadline(0))
            except ConnectionFailed as error:
                logger.warning("%s; what is to be written there waits", error)

    def append(
        self, key: str, entry_id: str, fields: Sequence[Argument], *, deadline: Deadline | None = None
    ) -> bool:
        """Add an entry with an explicit id to a stream; give False if the stream has passed that id.

        A sender whose reply was lost and which sends again, and one that was replaced, both get False.

        Raises:
            PeerError: the server refused, or could not be reached within the deadline.
        """
        try:
            self.execute("XADD", key, entry_id, *fields, deadline=deadline)
        except ServerFault as error:
            if "equal or smaller" in str(error):
                return False
            raise
        return True

    def pubsub(self, channel: str) -> redis.client.PubSub:
        """Give a subscriber with a connection of its own to where a channel of this name can be heard."""
        with self._care():
            client = self.servers.holding(channel).client
        make: Callable[..., redis.client.PubSub] = client.pubsub
        return make(ignore_subscribe_messages=True)

    def load(self, scripts: Sequence[Script]) -> None:
        """Put scripts into the cache of every server, for processes that have no right to do so."""
        for server in self.retry(self.masters):
            self.retry(partial(self._load, server, scripts))

    def load_missing(self, scripts: Sequence[Script]) -> None:
        """Put scripts back that a server's cache has lost, if it has lost any."""
        for server in self.retry(self.masters):
            try:
                if not all(self._on(server, ("SCRIPT EXISTS", *(script.sha for script in scripts)))):
                    self._load(server, scripts)
            except ConnectionFailed:  # the others are not to wait for it, nor is who asks for the next time
                if not self.servers.several:
                    raise

    def _load(self, server: Server, scripts: Iterable[Script]) -> None:
        for script in scripts:
            self._on(server, ("SCRIPT LOAD", script.text))

    def holding(self, key: str) -> Server:
        """Give the master that has a key, as it is now.

        Raises:
            ConnectionFailed: there is none, or nobody who knows it answers.
        """
        self.check_process()
        with self._care():
            return self.servers.holding(key)

    def replicas_of(self, master: Server) -> Sequence[Server]:
        """Give the replicas of a master, as far as this user may know them.

        Raises:
            ConnectionFailed: nobody who knows them answers.
        """
        try:
            with self._care(master, ("INFO",)):
                return self.servers.replicas_of(master)
        except AccessDenied:
            return ()

    def masters(self) -> Sequence[Server]:
        """Give every master, as they are now.

        Raises:
            ConnectionFailed: nobody who knows them answers.
        """
        self.check_process()
        with self._care():
            return self.servers.masters()

    def _on(self, server: Server, command: Sequence[Argument]) -> Any:
        """Run a command on one server, once."""
        run: Callable[..., Any] = server.client.execute_command
        with self._care(server, command):
            result = run(*command)
        self.note_answer()
        return result

    def ask_at(self, server: Server, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Run many commands on one server in one round trip, once; what it refused is given as a `PeerError`.

        Raises:
            ConnectionFailed: it could not be reached, or the connection broke.
        """
        channel = Channel(self, server=server)
        try:
            results = channel.execute_all(commands)
            channel.give_back()
        finally:
            channel.close()
        return results

    def check_server(self, *, allow_eviction: bool = False) -> None:
        """Refuse servers that are too old or would evict keys; those that do not tell are taken.

        Raises:
            ServerUnsuitable: with what to change.
            PeerError: the server cannot be reached, or refuses the user.
        """
        self.execute("PING")
        self.find_nodes()
        with within(Deadline(self.timeout_seconds)):
            for server in self.retry(self._everyone):
                at = self.address if isinstance(self.servers, SingleServer) else server.name
                try:
                    _check_info(at, self.server_info(server), allow_eviction=allow_eviction)
                except ConnectionFailed as error:
                    logger.warning("%s: %s does not answer: %s", self.address, at, error)

    def find_nodes(self) -> None:
        """Find out whether the one server that was named is a node of a Cluster, and then use all of its nodes.

        Raises:
            ServerUnsuitable: it is a Sentinel.
            PeerError: the server could not be reached in time.
        """
        if not isinstance(self.servers, SingleServer):
            return
        found = self.server_info()
        mode = found.get("redis_mode", found.get("server_mode"))  # Valkey's own name for it
        if mode == "cluster":
            self._use_nodes()
        elif mode == "sentinel":
            raise ServerUnsuitable(
                f"{self.address} is a Sentinel; write redis+sentinel://host:port/service, with the name of the master "
                "that it watches (SENTINEL MASTERS shows it)"
            )

    def _use_nodes(self) -> None:
        (one,) = self.servers.masters()
        one.client.connection_pool.disconnect(inuse_connections=False)
        if one.address is None:
            raise ServerUnsuitable(
                f"{self.address} is a node of a Cluster, and its others are reached by host and port: name some, as in "
                "redis+cluster://host:port,host:port"
            )
        logger.info("%s is a node of a Cluster; its others are used too", self.address)
        self.servers = ClusterTopology(self._make_client, [one.address], self.address)

    def _everyone(self) -> list[Server]:
        masters = self.masters()
        if isinstance(self.servers, SingleServer):
            return list(masters)
        return [*masters, *(one for each in masters for one in self.replicas_of(each))]

    def server_version(self, found: Mapping[str, str] | None = None) -> str:
        """Give the name and version of the server, as its `server_info` has them; empty if it does not tell."""
        found = self.server_info() if found is None else found
        if "valkey_version" in found:
            return f"Valkey {found['valkey_version']}"
        return f"Redis {found['redis_version']}" if "redis_version" in found else ""

    def server_info(self, server: Server | None = None) -> dict[str, str]:
        """Give what a server says of itself (INFO), by default any; nothing where it does not tell this user.

        Raises:
            PeerError: the server could not be reached in time.
        """
        command = ("INFO",)
        try:
            found = self._on(server, command) if server else self.execute(*command)
            return {str(name): str(value) for name, value in dict(found).items()}
        except AccessDenied:
            logger.info("%s does not let this user read INFO", self.address)
        except ServerFault as error:  # fakeredis has no INFO
            if "unknown command" not in str(error).lower():
                raise
        return {}

    def retry(self, operation: Callable[[], Result], deadline: Deadline | None = None) -> Result:
        """Do what may be repeated until it is done or the deadline is over: the only retry policy there is.

        A broken connection, and a run that its learner has yet to restore, are waited for in growing pauses. After
        a try that hung, none follows that would hang far beyond the deadline.

        Args:
            operation: raises our errors; doing it again must be harmless.
            deadline: the connection's timeout by default.

        Raises:
            ConnectionFailed: in the end it was not done, and of one of the tries nobody knows what it did.
            RunLost: the server lost the run, and no learner restored it in time.
            PeerError: the server refused.
        """
        with within(deadline or Deadline(self.timeout_seconds)) as holds:
            return self._retry(operation, holds)

    def _retry(self, operation: Callable[[], Result], deadline: Deadline) -> Result:
        backoff: Backoff | None = None
        unknown: ConnectionFailed | None = None
        while True:
            began = time.monotonic()
            try:
                return operation()
            except (ConnectionFailed, RunLost) as error:
                took_seconds = time.monotonic() - began
                unknown = error if isinstance(error, ConnectionFailed) else unknown
                backoff = backoff or Backoff()
                pause = backoff.next(deadline)
                if deadline.over or deadline.remaining < took_seconds / 2:
                    if unknown not in (None, error):
                        raise unknown from error
                    raise
                # Who waits for a server that has never answered may have mistyped its address.
                first = not self._worked and not self._told and deadline.remaining > 1
                self._told |= first
                logger.log(
                    logging.WARNING if first else logging.DEBUG,
                    "%s; trying again for %.0f s",
                    error,
                    deadline.remaining,
                )
                time.sleep(pause)

    def _translated(
        self, send: Callable[[redis.Redis], Result], commands: Sequence[Sequence[Argument]]
    ) -> Result:
        """Send commands to the server that has their keys, and speak our errors."""
        self.check_process()
        with self._care(command=commands[0]) as care:
            key = first_key_of(commands) if self.servers.several else ""
            care.server = server = self.servers.holding(key)
            try:
                result = self._send(send, server)
            except redis_errors.MovedError as error:
                self.failed(error, server)
                care.server = server = self.servers.holding(key)
                result = self._send(send, server)
        self.note_answer()
        return result

    def _send(self, send: Callable[[redis.Redis], Result], server: Server) -> Result:
        """Send to a server; once more with the scripts, which a replica that was just promoted lacks."""
        try:
            return send(server.client)
        except redis_errors.NoScriptError:
            self._load_known(server)
            return send(server.client)

    def _load_known(self, server: Server) -> None:
        try:
            self._load(server, list(self._scripts.values()))
        except AccessDenied as error:
            raise scripts_missing(self.address) from error

    def follow(self, moving: redis_errors.AskError, command: Sequence[Argument | Pieces]) -> Any:
        """Run a command on the node of a Cluster to which its key is just being moved, once.

        Raises:
            PeerError: that node refused, or could not be reached.
        """
        channel = Channel(self, server=self.servers.at((str(moving.host), int(moving.port))))
        try:
            for _ in range(2):
                asked, result = channel.execute_all([("ASKING",), command])
                if not isinstance(result, PeerError) or not script_is_unknown(result):
                    break
                channel.execute_all([("SCRIPT LOAD", script.text) for script in self._scripts.values()])
            for one in (asked, result):
                if isinstance(one, PeerError):
                    raise one
            return result
        finally:
            channel.give_back()

    def remember(self, script: Script) -> None:
        """Be told of a script that nodes may lack: one that a slot is just being moved to, say."""
        self._scripts[script.sha] = script

    def note_answer(self) -> None:
        """Be told that the server has answered this user."""
        self._worked, self._refused = True, None

    def _care(self, server: Server | None = None, command: Sequence[Argument] = ()) -> _Translating:
        return _Translating(self, server, command)

    def failed(self, error: redis_errors.RedisError, server: Server | None) -> None:
        """Be told that a server could not be used: what broke one connection has broken the idle ones too."""
        if server is not None:
            server.client.connection_pool.disconnect(inuse_connections=False)
        if isinstance(error, redis_errors.MovedError):
            if isinstance(self.servers, SingleServer):
                self._use_nodes()
            self.servers.moved(error.slot_id, (str(error.host), int(error.port)))
        else:
            self.servers.mark_stale(server)

    def to_rlbroker_error(
        self,
        error: redis_errors.RedisError,
        command: Sequence[Argument | Pieces] = (),
        server: Server | None = None,
    ) -> PeerError:
        """Give our error for one of redis-py's; a user that was accepted before is refused only after a while.

        Args:
            error: what redis-py raised.
            command: what was sent; a server that refuses a key does not say which.
            server: which was asked, if that is known.
        """
        address = self.address
        if server is not None and not isinstance(self.servers, SingleServer):
            address = f"{server.name} of {address}"
        insecure = refusal_of(error)
        if self._worked and (insecure or is_refusal(error)):
            self._refused = self._refused or Deadline(REFUSED_SECONDS)
            if not self._refused.over:
                what = "can be reached by TLS no" if insecure else "does not accept this user any"
                return ConnectionFailed(f"{address} {what} more: {error}; was it restarted?")
        ours = translated(error, address, command=command, user=self.user)
        if not self._worked and isinstance(ours, ConnectionFailed):
            if answers_only_tls(self._given.connection_pool, error):
                return TlsFailed(f"{address} speaks TLS, and the URL says redis://: write rediss://")
            return ConnectionFailed(f"{ours}{self._hint}")
        return ours


class _Translating:
    """Has redis-py's errors in its block turned into ours. (A generator would be slower.)"""

    __slots__ = ("_command", "_connection", "server")

    def __init__(self, connection: Connection, server: Server | None, command: Sequence[Argument]) -> None:
        self._connection, self._command = connection, command
        self.server = server  #: which is asked

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, redis_errors.RedisError):
            return
        if is_moving(error):
            raise KeyMoves(error) from error
        ours = self._connection.to_rlbroker_error(error, self._command, self.server)
        if isinstance(ours, ConnectionFailed):
            self._connection.failed(error, self.server)
        raise ours from error


class _Care:
    """Has a function called with each error in its block. (A generator would be slower.)"""

    __slots__ = ("_failed",)

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._failed(error)


class Channel:
    """One physical connection of its own, for what must be ordered after a look at the server's state.

    A server can lose what it has acknowledged only by breaking its connections: it was restarted, or another
    one took its place. So whoever looks (`connect` gave True) and then writes over the same channel writes to
    the state that it looked at. Not safe to use from several threads at once.
    """

    def __init__(self, connection: Connection, key: str = "", *, server: Server | None = None) -> None:
        """Prepare a channel; nothing is connected yet.

        Args:
            connection: way to the servers.
            key: it leads to where this key lives.
            server: or to this one.
        """
        self._connection, self._key, self._fixed = connection, key, server
        self._server = server
        self._wire: Any = None
        self._unanswered: deque[Sequence[Argument | Pieces]] = deque()
        #: Whether another node has answered, to which a Cluster was just moving a key; for who sets it back.
        self.strayed = False
        self.care = _Care(self._break)

    def connect(self) -> bool:
        """Make sure that there is a connection; give whether it is a new one.

        Raises:
            ConnectionFailed: the server cannot be reached.
            AccessDenied: it refuses this user.
        """
        self._connection.check_process()
        with self.care:
            if self._wire is not None:
                if self._fixed or self._connection.servers.holding(self._key) == self._server:
                    return False
                self.close()
            self._open()
        return True

    def _open(self) -> None:
        self._server = self._fixed or self._connection.servers.holding(self._key)
        self._wire = self._server.client.connection_pool.get_connection()

    def execute(self, *command: Argument) -> Any:
        """Run one command, once.

        Raises:
            PeerError: the server refused. After `ConnectionFailed` the next `connect` makes a new connection.
        """
        (result,) = self.execute_all([command])
        if isinstance(result, PeerError):
            raise result
        return result

    def execute_all(
        self, commands: Sequence[Sequence[Argument | Pieces]], *, strict: bool = False
    ) -> list[Any]:
        """Run many commands in one round trip, once; what the server refused is given as a `PeerError`.

        Args:
            commands: what to run, in order; a last argument may be in pieces: large ones are not copied.
            strict: whether the first of these errors is raised instead.

        Raises:
            ConnectionFailed: the connection broke; what was done is not known.
        """
        self.send(commands)
        results = self.receive(len(commands))
        if strict:
            for result in results:
                if isinstance(result, PeerError):
                    raise result
        return results

    def send(self, commands: Sequence[Sequence[Argument | Pieces]]) -> None:
        """Send commands, and leave the answers to `receive`; who does not want them any more has to `close`.

        Raises:
            ConnectionFailed: the connection broke; what was done is not known.
        """
        self._connection.check_process()
        with self.care:
            if self._wire is None:
                self._open()
            self._unanswered.extend(commands)
            for piece in packed(commands, piece_bytes=SEND_BYTES):
                self._wire.send_packed_command([piece], check_health=False)

    def receive(self, answers: int) -> list[Any]:
        """Give the next answers to what was sent; what the server refused is given as a `PeerError`.

        Raises:
            ConnectionFailed: the connection broke; what was done is not known.
        """
        results = []
        with self.care:
            for _ in range(answers):
                command = self._unanswered.popleft()
                try:
                    results.append(self._wire.read_response())
                except redis_errors.ResponseError as error:
                    if is_moving(error):
                        results.append(self._follow(error, command))
                        continue
                    refusal = self._ours(error, command)
                    if isinstance(refusal, ConnectionFailed):  # it must not be used now: a replica, say
                        raise refusal from error
                    results.append(refusal)
        self._connection.note_answer()
        return results

    def _follow(self, moving: redis_errors.AskError, command: Sequence[Argument | Pieces]) -> Any:
        self.strayed = True
        try:
            return self._connection.follow(moving, command)
        except ConnectionFailed:
            raise
        except PeerError as error:
            return error

    def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument] = ()) -> Any:
        """Run a script, once, loading it first where the server does not know it.

        Raises:
            PeerError: as `execute`.
        """
        self._connection.remember(script)
        try:
            return self.execute(*script.call(keys, arguments))
        except ServerFault as error:
            if not script_is_unknown(error):
                raise
        try:
            self.execute("SCRIPT LOAD", script.text)
        except AccessDenied as error:
            raise scripts_missing(self._connection.address) from error
        return self.execute(*script.call(keys, arguments))

    @property
    def server(self) -> Server | None:
        """Where it leads, or led last; None if it was never connected."""
        return self._server

    @property
    def raw_socket(self) -> socket.socket | None:
        """The connection's own socket, no byte of which is read ahead; None where redis-py must be used.

        There is none with fakeredis, behind redis-py's cache, and in releases that we do not know.
        """
        found = getattr(self._wire, "_sock", None)
        parser = getattr(self._wire, "_parser", None)
        return found if isinstance(found, socket.socket) and hasattr(parser, "parse_error") else None

    def refusal(self, line: bytes) -> PeerError:
        """Give the error for a reply of the server that was read from the socket; without its `-`."""
        return self._ours(self._wire._parser.parse_error(line.decode(errors="replace")))

    def give_back(self) -> None:
        """Leave the connection to others: every answer was read."""
        wire, self._wire = self._wire, None
        if wire is not None:
            self._connection.note_answer()
            self._pool.release(wire)

    def close(self) -> None:
        """Give the connection up. May be called again."""
        wire, self._wire = self._wire, None
        self._unanswered.clear()
        if wire is not None:
            wire.disconnect()
            self._pool.release(wire)

    @property
    def _pool(self) -> Any:
        assert self._server is not None
        return self._server.client.connection_pool

    def _break(self, error: BaseException) -> None:
        """Leave no half-read answer behind, and speak our errors."""
        self.close()
        if isinstance(error, PeerError) or not isinstance(error, (redis_errors.RedisError, OSError)):
            return  # ours; or Ctrl-C in the middle of an answer
        if not isinstance(error, redis_errors.RedisError):
            error = redis_errors.ConnectionError(str(error))
        ours = self._ours(error)
        if not isinstance(ours, ConnectionFailed):
            self._connection.failed(error, self._server)
        raise ours from error

    def _ours(self, error: redis_errors.RedisError, command: Sequence[Argument | Pieces] = ()) -> PeerError:
        ours = self._connection.to_rlbroker_error(error, command, self._server)
        ours.__cause__ = error
        if isinstance(ours, ConnectionFailed):
            self._connection.failed(error, self._server)
        return ours


def _options(command: Sequence[Argument]) -> dict[str, bool]:
    """Tell redis-py which of two replies will come: XPENDING with a range lists entries."""
    if command[0] == "XPENDING" and len(command) > 3:
        return {"parse_detail": True}
    return {}


def _check_info(address: str, found: Mapping[str, str], *, allow_eviction: bool) -> None:
    """Refuse a server that is too old or that would evict keys, by its INFO."""
    if "redis_version" not in found:
        return
    version = found["redis_version"]
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < MIN_SERVER_VERSION:
        wanted = ".".join(map(str, MIN_SERVER_VERSION))
        raise ServerUnsuitable(f"{address} runs Redis {version}; rlbroker needs {wanted} or newer")
    policy = found.get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys") and not allow_eviction:
        raise ServerUnsuitable(
            f"{address} has maxmemory-policy {policy}, which deletes weights and experiences when memory is "
            "short; set its maxmemory-policy to noeviction (see `rlbroker doctor`), or pass allow_eviction=True"
        )


def flat(fields: Mapping[str, Any]) -> list[Any]:
    """Give fields as commands take them: name, value, name, value."""
    return [part for pair in fields.items() for part in pair]
