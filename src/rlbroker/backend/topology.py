"""Which server has a key: the abstract topology, the single server, and what Sentinel and Cluster have in common.

The roles of servers may change at any time. A `Server` is therefore an address with a term: a master that was a replica
in between may lack writes that it had acknowledged before, and counts as another server.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import redis
from redis import exceptions as redis_errors

from rlbroker.backend.deadline import Deadline, try_seconds, within
from rlbroker.backend.exchange import Exchange
from rlbroker.backend.locks import CallLock
from rlbroker.backend.replies import info_fields, shaped
from rlbroker.backend.threads import BackgroundThread

#: How often the roles of the servers are read while nothing seems wrong.
REFRESH_SECONDS: Final = 1.0

#: The longest that one refresh takes, and the longest that it waits for one server. A server that does not answer is
#: asked last at the next refresh.
REFRESH_TIMEOUT_SECONDS: Final = 2.0
QUERY_TIMEOUT_SECONDS: Final = 1.0

#: How long the list of a master's replicas is cached.
REPLICAS_SECONDS: Final = 10.0

#: What a query of a server that cannot be reached raises.
UNREACHABLE: Final = (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError)

#: Chooses a replica. Not Python's global generator, which programs seed for repeatable results.
_random = random.SystemRandom()

Address = tuple[str, int]

#: Makes a client for a server at an address, like those that the user configured.
MakeClient = Callable[[Address], redis.Redis]


@dataclass(frozen=True)
class Server:
    """A server in its present role.

    Attributes:
        client: its pool has the connections to this server.
        address: host and port; None for a user's client that has none.
        term: the config epoch in which the server got its present role; 0 for a single server and for replicas.
    """

    client: redis.Redis = field(compare=False)
    address: Address | None = None
    term: int = 0

    @property
    def name(self) -> str:
        """The server's name in messages."""
        return f"{self.address[0]}:{self.address[1]}" if self.address else "the server"


class Topology(ABC):
    """The servers of a connection, and which of them has a key. Safe to use from several threads."""

    #: Whether there are several masters, each with some of the keys.
    several = False

    @abstractmethod
    def master_for(self, key: str) -> Server:
        """Return the master that has a key; any master for an empty key."""

    @abstractmethod
    def masters(self) -> Sequence[Server]:
        """Return every master."""

    @abstractmethod
    def replicas_of(self, master: Server) -> Sequence[Server]:
        """Return the replicas of a master; their data may lag behind."""

    def lost(self) -> Sequence[Server]:
        """Return the servers that the others consider failed, and the replicas that follow no master."""
        return ()

    def mark_stale(self, server: Server | None = None) -> None:
        """Note that the known roles may be out of date: the connection to this server broke, for example."""
        return

    def note_moved(self, slot: int, address: Address) -> None:
        """Note that a MOVED reply named another node for a slot."""
        return

    @abstractmethod
    def at(self, address: Address) -> Server:
        """Return the server at an address."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""


class SingleServer(Topology):
    """One server. A user's client that finds its master by itself counts as one too."""

    def __init__(self, client: redis.Redis, make_client: MakeClient) -> None:
        """Use this client; `make_client` makes clients of other servers with its settings."""
        settings = client.connection_pool.connection_kwargs
        address = (str(settings["host"]), int(settings.get("port", 6379))) if "host" in settings else None
        self._server, self._clients = Server(client, address), ClientsByAddress(make_client)

    def master_for(self, key: str) -> Server:
        """Return the server."""
        return self._server

    def masters(self) -> Sequence[Server]:
        """Return the server."""
        return [self._server]

    def replicas_of(self, master: Server) -> Sequence[Server]:
        """Return the replicas of a master."""
        return self._clients.replicas_of(master)

    def at(self, address: Address) -> Server:
        """Return another server, with the same settings."""
        return Server(self._clients.at(address), address)

    def close(self) -> None:
        """Close the connections."""
        self._server.client.connection_pool.disconnect()
        self._clients.close()


class DiscoveredTopology(Topology):
    """Servers whose roles are read from Sentinels or nodes: in the background, and at once if they may be stale."""

    def __init__(self, make_client: MakeClient, what: str) -> None:
        """Create a topology; nothing is read yet. `what` names the background thread."""
        self._clients = ClientsByAddress(make_client)
        self._refreshing = CallLock()
        self._stale = True
        self._thread = BackgroundThread(what, self._step)
        self._started = False

    @abstractmethod
    def _refresh(self) -> None:
        """Read the roles; raise redis-py's ConnectionError if no server answers."""

    def mark_stale(self, server: Server | None = None) -> None:
        """Read the roles again before they are next used."""
        self._stale = True

    def at(self, address: Address) -> Server:
        """Return the server at an address."""
        return Server(self._clients.at(address), address)

    def close(self) -> None:
        """Close the connections."""
        if self._started:
            self._thread.request_stop()
        self._clients.close()

    def _ensure_fresh(self) -> None:
        if self._started and not self._stale:
            return
        if self._refreshing.run_within(try_seconds(REFRESH_TIMEOUT_SECONDS), self._refresh_if_stale) is None:
            self._refresh_if_stale()  # the other thread has more time for it than this one
        if not self._started:
            with suppress(RuntimeError):  # an interrupted call, or another thread, has started it
                self._thread.start()
            self._started = True

    def _step(self) -> None:
        self._thread.pause(REFRESH_SECONDS)
        if self._thread.stopping:
            return
        with suppress(redis_errors.RedisError, OSError):
            self._refreshing.run(self._refresh_in_time)

    def _refresh_if_stale(self) -> bool:
        if self._stale:
            self._refresh_in_time()
            self._stale = False
        return True

    def _refresh_in_time(self) -> None:
        with within(Deadline(REFRESH_TIMEOUT_SECONDS)):
            self._refresh()


class ClientsByAddress:
    """The clients of servers by address, each made when it is first needed."""

    def __init__(self, make_client: MakeClient) -> None:
        """Begin without clients."""
        self._make_client = make_client
        self._clients: dict[Address, redis.Redis] = {}
        #: The master whose replicas were read last, until when they are cached, and their addresses.
        self._replicas: tuple[Address | None, Deadline, list[Address]] | None = None

    def at(self, address: Address) -> redis.Redis:
        """Return the client of the server at an address."""
        known = self._clients.get(address)
        return known or self._clients.setdefault(address, self._make_client(address))

    def replicas_of(self, master: Server) -> list[Server]:
        """Return the replicas that a master names in INFO; cached for some seconds."""
        known = self._replicas
        if known is None or known[0] != master.address or known[1].over:
            info = info_fields(query(master.client, "INFO", "replication"))
            rows = [
                dict(pair.partition("=")[::2] for pair in value.split(","))
                for name, value in info.items()
                if re.fullmatch(r"slave\d+", name)
            ]
            online = [(row["ip"], int(row["port"])) for row in rows if row.get("state") == "online"]
            known = self._replicas = master.address, Deadline(REPLICAS_SECONDS), online
        return [Server(self.at(address), address) for address in known[2]]

    def close(self) -> None:
        """Close the connections."""
        for client in list(self._clients.values()):
            client.connection_pool.disconnect()


def query(client: redis.Redis, *command: str) -> Any:
    """Return the reply to a command, in redis-py's shape; raise redis-py's errors."""
    exchange = Exchange(client.connection_pool)
    try:
        exchange.put([command])
        (reply,) = exchange.get(1)
    finally:
        exchange.give_back()
    if isinstance(reply, Exception):
        raise reply
    return shaped(client, command, reply)


def discovery_error(
    what: str, problems: Sequence[redis_errors.RedisError | OSError | str]
) -> redis_errors.ConnectionError:
    """Return the error for roles that no server could report; a refusal takes precedence, as it is not an outage."""
    plain = redis_errors.ConnectionError
    for one in problems:
        if isinstance(one, plain) and type(one) is not plain:
            return one
    error = redis_errors.ConnectionError(f"{what}: {'; '.join(map(str, problems))}")
    errors = [one for one in problems if isinstance(one, Exception)]
    error.__cause__ = errors[0] if errors else None
    return error


def pick_server(servers: Sequence[Server]) -> Server:
    """Return one of several servers at random."""
    return _random.choice(servers)


def as_text(value: Any) -> str:
    """Return a value of a reply as text; empty for None."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")
