"""Where a key lives: on the only server, on the master that Sentinels name, or on a node of a Cluster.

Who that is may change at any time. A `Server` is therefore not only an address: it has a term, as a master that was
something else meanwhile may lack what it had acknowledged before, and counts as another server.
"""

from __future__ import annotations

import logging
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import redis
from redis import exceptions as redis_errors
from redis.crc import key_slot

from rlbroker.backend.deadline import Deadline, try_seconds, within
from rlbroker.backend.keys import EVERY_KEY
from rlbroker.backend.threads import BackgroundThread
from rlbroker.config import Endpoint
from rlbroker.errors import ServerUnsuitable

logger = logging.getLogger("rlbroker")

#: How often somebody is asked who is master, while nothing seems wrong.
LOOK_SECONDS: Final = 1.0

#: And the longest that asking takes, however many do not answer: who did not is asked last the next time.
LONGEST_LOOK_SECONDS: Final = 2.0
LONGEST_ASK_SECONDS: Final = 1.0

#: For so long it holds which replicas a master has.
REPLICAS_SECONDS: Final = 10.0

#: Slots of a Cluster.
SLOTS: Final = 16_384

#: What every key begins with.
_PREFIX: Final = EVERY_KEY.rstrip("*")

Address = tuple[str, int]

#: Chooses which replica is read: not Python's own generator, which programs seed to repeat their results.
_random = random.SystemRandom()

_AWAY: Final = (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError)


@dataclass(frozen=True)
class Server:
    """A server as it is reached now.

    Attributes:
        client: with a pool of connections to it.
        address: host and port; None for the one that was given without.
        term: since when, in the count of those who decide it, it has had what it has.
    """

    client: redis.Redis = field(compare=False)
    address: Address | None = None
    term: int = 0

    @property
    def name(self) -> str:
        """How errors call it."""
        return f"{self.address[0]}:{self.address[1]}" if self.address else "the server"


@dataclass(frozen=True)
class SentinelView:
    """How the Sentinels of a master stand to one another.

    Attributes:
        silent: names of those that do not, of the URL's and of the others that these know.
        total: how many there are, as those know that answer.
        alive: how many of these are there.
        needed: how many have to agree before another master is chosen: the quorum, and most of them.
        refusal: what one says that sees too few; empty if all see enough.
    """

    silent: Sequence[str]
    total: int
    alive: int
    needed: int
    refusal: str


class Topology(ABC):
    """Says on which server a key lives. Safe to use from several threads."""

    #: Whether there are several masters, each with a part of the keys.
    several = False

    @abstractmethod
    def holding(self, key: str) -> Server:
        """Give the master that has a key; any master for an empty one."""

    @abstractmethod
    def masters(self) -> Sequence[Server]:
        """Give every master."""

    @abstractmethod
    def replicas_of(self, master: Server) -> Sequence[Server]:
        """Give the replicas of a master; they may lag behind it."""

    def lost(self) -> Sequence[Server]:
        """Give the servers that the others know and do without: held for dead, or following no master."""
        return ()

    def mark_stale(self, server: Server | None = None) -> None:
        """Be told that what is known may be wrong: a server broke off, say."""
        return

    def moved(self, slot: int, address: Address) -> None:
        """Be told by a node of a Cluster that a slot is on another one."""
        return

    @abstractmethod
    def at(self, address: Address) -> Server:
        """Give the server at an address."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""


class SingleServer(Topology):
    """The only server; where a client was given that finds its own way, whatever that leads to."""

    def __init__(self, client: redis.Redis, at: Callable[[Address], redis.Redis]) -> None:
        """Take a client, and what makes further ones with its settings."""
        settings = client.connection_pool.connection_kwargs
        address = (str(settings["host"]), int(settings["port"])) if "host" in settings else None
        self._server, self._pools = Server(client, address), _Pools(at)

    def holding(self, key: str) -> Server:
        """Give the master that has a key; any master for an empty one."""
        return self._server

    def masters(self) -> Sequence[Server]:
        """Give every master."""
        return [self._server]

    def replicas_of(self, master: Server) -> Sequence[Server]:
        """Give the replicas of a master."""
        return self._pools.replicas_of(master)

    def at(self, address: Address) -> Server:
        """Give another server, with the same settings."""
        return Server(self._pools.at(address), address)

    def close(self) -> None:
        """Close the connections."""
        self._server.client.connection_pool.disconnect()
        self._pools.close()


class _Watched(Topology):
    """Servers whose roles change: looked at regularly in the background, and at once when there is doubt."""

    def __init__(self, at: Callable[[Address], redis.Redis], what: str) -> None:
        self._pools = _Pools(at)
        self._looking = threading.Lock()
        self._doubt = True
        self._thread = BackgroundThread(what, self._step)
        self._started = False

    @abstractmethod
    def _look(self) -> None:
        """Find out who is master. With nobody to ask, raise redis-py's error for that."""

    def mark_stale(self, server: Server | None = None) -> None:
        """Look again before the next answer; at this server last."""
        self._doubt = True

    def at(self, address: Address) -> Server:
        return Server(self._pools.at(address), address)

    def close(self) -> None:
        """Close the connections."""
        if self._started:
            self._thread.request_stop()
        self._pools.close()

    def _make_sure(self) -> None:
        if not self._doubt:
            return
        if not self._looking.acquire(timeout=try_seconds(LONGEST_LOOK_SECONDS)):
            raise redis_errors.ConnectionError("nobody has said in time who is master")
        try:
            if self._doubt:
                with within(Deadline(LONGEST_LOOK_SECONDS)):
                    self._look()
                self._doubt = False
                if not self._started:
                    self._started = True
                    self._thread.start()
        finally:
            self._looking.release()

    def _step(self) -> None:
        self._thread.pause(LOOK_SECONDS)
        if self._thread.stopping:
            return
        with (
            suppress(redis_errors.RedisError, OSError),
            self._looking,
            within(Deadline(LONGEST_LOOK_SECONDS)),
        ):
            self._look()


class SentinelTopology(_Watched):
    """The master that Sentinels name, of those that they watch."""

    def __init__(
        self,
        at: Callable[[Address], redis.Redis],
        sentinels: Iterable[redis.Redis],
        service: str,
        address: str,
    ) -> None:
        """Prepare; nobody is asked yet.

        Args:
            at: makes clients for masters and replicas.
            sentinels: clients of each Sentinel.
            service: name of the master.
            address: what the Sentinels are called in errors.
        """
        super().__init__(at, f"master of {service!r}")
        self._sentinels, self._address = list(sentinels), address
        self.service = service  #: what they call the master
        self._master: Server | None = None
        self._said_silent = False

    def holding(self, key: str) -> Server:
        """Give the master that has a key; any master for an empty one."""
        self._make_sure()
        assert self._master is not None
        return self._master

    def masters(self) -> Sequence[Server]:
        """Give every master."""
        return [self.holding("")]

    def replicas_of(self, master: Server) -> Sequence[Server]:
        """Give the replicas of a master."""
        return self._pools.replicas_of(master)

    def lost(self) -> Sequence[Server]:
        """Give the replicas that a Sentinel knows, and that are away or have lost their master."""
        for sentinel in list(self._sentinels):
            with suppress(*_AWAY, redis_errors.ResponseError), within(Deadline(LONGEST_ASK_SECONDS)):
                # redis-py cannot read SENTINEL REPLICAS.
                rows = _ask(sentinel, "SENTINEL SLAVES", self.service)
                return [
                    self.at((str(row["ip"]), int(row["port"])))
                    for row in rows
                    if _is_away(row) or row.get("master-link-status") == "err"
                ]
        return ()

    @property
    def sentinels(self) -> Sequence[Server]:
        """Those of the URL, first the one that answered last."""
        return [Server(sentinel, _place(sentinel)) for sentinel in self._sentinels]

    def watch(self) -> SentinelView:
        """Ask each Sentinel whether it is there, and whether it sees enough others to choose another master."""
        answering, silent = set[str](), list[str]()
        others, quorum, refusal = dict[str, dict[str, Any]](), 0, ""
        for sentinel in list(self._sentinels):
            if _name(sentinel) in {_named(row) for row in others.values() if _is_away(row)}:
                silent.append(_name(sentinel))  # it would only take time
                continue
            try:
                with within(Deadline(LONGEST_ASK_SECONDS)):
                    answering.add(_text(_ask(sentinel, "SENTINEL MYID")))
                    quorum = max(quorum, int(_ask(sentinel, "SENTINEL MASTER", self.service)["quorum"]))
                    others |= {
                        row["runid"]: row for row in _ask(sentinel, "SENTINEL SENTINELS", self.service)
                    }
                    _ask(sentinel, "SENTINEL CKQUORUM", self.service)
            except _AWAY:
                silent.append(_name(sentinel))
            except redis_errors.NoPermissionError:
                continue
            except redis_errors.ResponseError as error:
                refusal = f"{_name(sentinel)} says {error}"
        known = {one: _named(row) for one, row in others.items() if one not in answering}
        away = {one: name for one, name in known.items() if name in silent or _is_away(others[one])}
        total = len(answering) + len(known)
        return SentinelView(
            silent=list(dict.fromkeys((*silent, *away.values()))),
            total=total,
            alive=total - len(away),
            needed=max(quorum, total // 2 + 1),
            refusal=refusal,
        )

    def close(self) -> None:
        """Close the connections."""
        super().close()
        for sentinel in self._sentinels:
            sentinel.connection_pool.disconnect()

    def _look(self) -> None:
        """Ask one Sentinel after the other; while all are silent, the master that they named last stays."""
        problems: list[redis_errors.RedisError | OSError | str] = []
        older: list[Server] = []
        others: set[str] = set()
        for sentinel in list(self._sentinels):
            try:
                with within(Deadline(LONGEST_ASK_SECONDS)):
                    watched = _ask(sentinel, "SENTINEL MASTERS")
            except _AWAY as error:
                problems.append(error)
                self._sentinels.remove(sentinel)  # the next look begins with one that answers
                self._sentinels.append(sentinel)
                continue
            except redis_errors.ResponseError as error:
                if "unknown command" in str(error).lower():
                    raise ServerUnsuitable(
                        f"{self._address}: {_name(sentinel)} is no Sentinel; for a server write redis://host:port, for "
                        "Sentinels their own port (26379 as a rule)"
                    ) from error
                raise
            state = watched.get(self.service)
            others.update(watched)
            if state is None or not state["is_master"] or state["is_sdown"] or state["is_odown"]:
                problems.append(f"{_name(sentinel)} has no master {self.service!r} that answers")
                continue
            place = str(state["ip"]), int(state["port"])
            found = Server(self._pools.at(place), place, int(state["config-epoch"]))
            if self._master is None or found.term >= self._master.term:
                self._become(found)
                return
            older.append(found)  # it may not have heard of the newest
        if len({one.address for one in older}) == 1 and 2 * len(older) > len(self._sentinels):
            self._become(older[0])  # they have begun to count anew
            return
        if others and self.service not in others:
            raise ServerUnsuitable(
                f"{self._address}: the Sentinels watch no master {self.service!r}, but {', '.join(sorted(others))}; "
                "its name comes last in the URL, as in redis+sentinel://host:26379/mymaster"
            )
        if self._master is None:
            raise _nobody("no Sentinel knows the master now", problems)
        if not self._said_silent:
            logger.warning(
                "%s: no Sentinel knows the master now (%s); the last one is used",
                self._address,
                "; ".join(map(str, problems)),
            )
        self._said_silent = True

    def _become(self, master: Server) -> None:
        before, self._master, self._said_silent = self._master, master, False
        if before is not None and before.address != master.address:
            logger.warning("%s: the master is now %s:%d", self._address, *(master.address or ()))
            before.client.connection_pool.disconnect(inuse_connections=False)


class ClusterTopology(_Watched):
    """The nodes of a Cluster; see https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/."""

    several = True

    def __init__(self, at: Callable[[Address], redis.Redis], seeds: Iterable[Address], address: str) -> None:
        """Prepare; nobody is asked yet.

        Args:
            at: makes clients for nodes.
            seeds: nodes that are asked first for the others.
            address: what the Cluster is called in errors.
        """
        super().__init__(at, "nodes of the Cluster")
        self._seeds, self._address = tuple(seeds), address
        self._order: list[Address] = list(self._seeds)  #: in which nodes are asked
        self._owners: list[Server | None] = [None] * SLOTS
        self._masters: list[Server] = []  #: the same, each once
        self._replicas: dict[Address, list[Address]] = {}
        self._lost: list[Address] = []
        self._newest = 0  #: the latest change of roles that any node knew of

    def holding(self, key: str) -> Server:
        """Give the master that has a key; any master for an empty one."""
        self._make_sure()
        if not key:
            return self.masters()[0]
        slot = slot_of(key)
        found = self._owners[slot]
        if found is None:
            self._doubt = True
            raise redis_errors.ConnectionError(f"no node of the Cluster has the slot {slot} now")
        return found

    def masters(self) -> Sequence[Server]:
        """Give every master."""
        self._make_sure()
        return self._masters

    def replicas_of(self, master: Server) -> Sequence[Server]:
        """Give the replicas of a master."""
        return [self.at(one) for one in self._replicas.get(master.address or ("", 0), ())]

    def lost(self) -> Sequence[Server]:
        """Give the nodes without slots that the others hold for dead: replicas, and masters that were replaced."""
        return [self.at(one) for one in self._lost]

    def mark_stale(self, server: Server | None = None) -> None:
        """Look again before the next answer; at this server last."""
        if server is not None and server.address is not None:
            self._ask_last(server.address)
        super().mark_stale()

    def _ask_last(self, address: Address) -> None:
        self._order = [*(one for one in self._order if one != address), address]

    def moved(self, slot: int, address: Address) -> None:
        """Believe the node that says it, until the next look."""
        known = self._owners[slot]
        if known is None or known.address != address:
            self._owners[slot] = owner = self.at(address)
            if all(one.address != address for one in self._masters):
                self._masters = [*self._masters, owner]

    def _look(self) -> None:
        """Ask nodes until one answers that knows of all changes, and is not cut off from the others."""
        best: _View | None = None
        without_slots: Address | None = None
        problems: list[redis_errors.RedisError | OSError | str] = []
        for address in list(dict.fromkeys((*self._order, *self._seeds))):
            try:
                with within(Deadline(LONGEST_ASK_SECONDS)):
                    view = _View(self._pools.at(address), address)
            except _AWAY as error:
                problems.append(error)
                self._ask_last(address)
                continue
            except redis_errors.ResponseError as error:
                where = f"{address[0]}:{address[1]}"
                if "cluster support disabled" in str(error):
                    raise ServerUnsuitable(
                        f"{self._address}: {where} is a single server and no node of a Cluster; write redis://{where}"
                    ) from error
                if "unknown command" in str(error).lower():
                    raise ServerUnsuitable(
                        f"{self._address}: {where} is no node of a Cluster, as it does not know CLUSTER SLOTS; for a "
                        f"Sentinel write redis+sentinel://{where}/service, for a proxy the URL of the servers behind it"
                    ) from error
                raise
            if not view.parts:
                problems.append(f"{address[0]}:{address[1]} knows of no node with slots")
                self._ask_last(address)
                without_slots = address
                continue
            if best is None or view.newest > best.newest:
                best = view
            if best is view and view.newest >= self._newest and not view.is_cut_off:
                break
        if best is None and without_slots and not self._masters:
            raise ServerUnsuitable(
                f"{self._address}: {without_slots[0]}:{without_slots[1]} is a node of a Cluster that has no slots yet; "
                "redis-cli --cluster create HOST:PORT HOST:PORT HOST:PORT gives them out"
            )
        if best is None:
            raise _nobody("no node of the Cluster answers", problems)
        self._adopt(best)

    def _adopt(self, view: _View) -> None:
        owners: list[Server | None] = [None] * SLOTS
        masters = {
            part.master: Server(self._pools.at(part.master), part.master, part.term) for part in view.parts
        }
        for part in view.parts:
            size = part.last - part.first + 1
            owners[part.first : part.last + 1] = [masters[part.master]] * size
        self._owners, self._masters, self._newest = owners, list(masters.values()), view.newest
        self._replicas = {part.master: part.replicas for part in view.parts}
        self._lost = view.lost
        known = [address for part in view.parts for address in (part.master, *part.replicas)]
        answered = [one for one in self._order if one in known]
        self._order = list(
            dict.fromkeys((*([view.address] if view.address in known else []), *answered, *known))
        )


@dataclass(frozen=True)
class _Part:
    """A range of slots with its nodes."""

    first: int
    last: int
    master: Address
    term: int
    replicas: list[Address]


class _View:
    """What one node knows of its Cluster."""

    def __init__(self, client: redis.Redis, address: Address) -> None:
        """Ask the node."""
        self.address = address
        ranges = _ask(client, "CLUSTER SLOTS")
        by_place = _ask(client, "CLUSTER NODES")
        rows = list(by_place.values())
        terms = {row["node_id"]: int(row["epoch"]) for row in rows}
        masters = [row for row in rows if row["slots"]]
        self.newest = max(terms.values(), default=0)
        self.parts = [
            _Part(
                int(first),
                int(last),
                _address(nodes[0], address),
                terms.get(_text(nodes[0][2]), 0),
                [_address(node, address) for node in nodes[1:]],
            )
            for first, last, *nodes in ranges
        ]
        shown = {_text(node[2]) for _, _, *nodes in ranges for node in nodes}
        places = [
            place.rpartition(":")
            for place, row in by_place.items()
            if row["node_id"] not in shown and "fail" in row["flags"] and "noaddr" not in row["flags"]
        ]
        #: Nodes that it holds for dead, and so does not name with any slots.
        self.lost = [_address((host, port), address) for host, _, port in places]
        #: Whether it cannot reach most of the others: then they may have decided something else.
        self.is_cut_off = 2 * sum("fail" in row["flags"] for row in masters) >= max(1, len(masters))


class _Pools:
    """Clients by address, made when they are wanted first."""

    def __init__(self, make: Callable[[Address], redis.Redis]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: dict[Address, redis.Redis] = {}
        self._replicas: tuple[Address | None, Deadline, list[Address]] | None = None

    def at(self, address: Address) -> redis.Redis:
        with self._lock:
            if address not in self._made:
                self._made[address] = self._make(address)
            return self._made[address]

    def replicas_of(self, server: Server) -> list[Server]:
        """Ask a master for its replicas, now and then."""
        known = self._replicas
        if known is None or known[0] != server.address or known[1].over:
            info = _ask(server.client, "INFO", "replication")
            rows = [
                value for name, value in info.items() if name.startswith("slave") and isinstance(value, dict)
            ]
            online = [(str(row["ip"]), int(row["port"])) for row in rows if row.get("state") == "online"]
            known = self._replicas = server.address, Deadline(REPLICAS_SECONDS), online
        return [Server(self.at(address), address) for address in known[2]]

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            for client in self._made.values():
                client.connection_pool.disconnect()


def topology_for(way: Endpoint, make: Callable[..., redis.Redis], address: str) -> Topology:
    """Give the servers that a URL names.

    Args:
        way: what the URL says.
        make: makes clients, for another `address` and with other settings of their connections where they are given.
        address: what the servers are called in errors.
    """
    if way.kind == "cluster":
        return ClusterTopology(make, way.hosts, address)
    if way.kind == "sentinel":
        login = {"db": 0, "username": None, "password": None, **way.login}
        return SentinelTopology(make, [make(place, **login) for place in way.hosts], way.service, address)
    return SingleServer(make(), make)


def any_of(servers: Sequence[Server]) -> Server:
    """Give one of several servers, each as often as the others."""
    return _random.choice(servers)


def _ask(client: redis.Redis, *command: str, **options: Any) -> Any:
    send: Callable[..., Any] = client.execute_command
    return send(*command, **options)


def _nobody(
    what: str, problems: Sequence[redis_errors.RedisError | OSError | str]
) -> redis_errors.ConnectionError:
    """Give the error where nobody could be asked: a refusal as such, so that it is seen to be no outage."""
    plain = redis_errors.ConnectionError
    for one in problems:
        if isinstance(one, plain) and type(one) is not plain:
            return one
    error = redis_errors.ConnectionError(f"{what}: {'; '.join(map(str, problems))}")
    error.__cause__ = next((one for one in problems if isinstance(one, Exception)), None)
    return error


def _place(client: redis.Redis) -> Address:
    settings = client.connection_pool.connection_kwargs
    return str(settings["host"]), int(settings["port"])


def _name(client: redis.Redis) -> str:
    host, port = _place(client)
    return f"{host}:{port}"


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['ip']}:{row['port']}"


def _is_away(row: Mapping[str, Any]) -> bool:
    """Whether a Sentinel cannot reach the one of whom it says this."""
    return bool(row["is_sdown"] or row["is_disconnected"])


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")


def _address(node: Sequence[Any], asked: Address) -> Address:
    """Give where a node is, as another one says; it may not know by which name it is reached itself."""
    host = _text(node[0])
    return (asked[0] if host in ("", "?") else host), int(node[1])


def key_of(command: Iterable[Any]) -> str:
    """Give the first key of a command; empty if it has none of ours."""
    return next((part for part in command if isinstance(part, str) and part.startswith(_PREFIX)), "")


def first_key_of(commands: Iterable[Iterable[Any]]) -> str:
    """Give the first key of several commands; empty if none of them has any."""
    return next(filter(None, map(key_of, commands)), "")


@lru_cache(maxsize=SLOTS)
def slot_of(key: str) -> int:
    """Give the slot of a key in a Cluster."""
    return key_slot(key.encode())
