"""The server that everyone uses, and names on it that are removed afterwards."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import redis

from rlbroker.local import RedisServer
from rlbroker.local.child_process import GuardedProcess
from rlbroker.local.embedded_server import find_binary

_numbers = itertools.count(1)

#: Of a Cluster: its slots, ports that its nodes take, and how far above those they listen for each other.
_SLOTS, _PORTS, _BUS = 16_384, range(11_000, 22_000), 10_000

#: So long a Cluster may take to be there, and a node to end.
_START_SECONDS, _STOP_SECONDS = 30.0, 5.0

#: Keys that are deleted with one command.
_AT_ONCE = 500


@contextlib.contextmanager
def server(url: str | None) -> Iterator[str]:
    """Give the URL of the given server, or of an embedded one that ends with the block."""
    if url is not None:
        yield url
        return
    with RedisServer() as embedded:
        yield embedded.url


@contextlib.contextmanager
def scratch(url: str) -> Iterator[str]:
    """Give a name that nobody uses, for runs and keys; all that begins with it is deleted in the end.

    On a Cluster it stays: that ends with who started it.
    """
    name = f"bench-{os.getpid()}-{next(_numbers)}"
    if url.startswith("redis+cluster:"):
        yield name
        return
    try:
        yield name
    finally:
        client = redis.Redis.from_url(url)
        try:
            found = [key for pattern in ("", "rlb:{") for key in client.scan_iter(f"{pattern}{name}*", 1000)]
            for batch in (found[first : first + _AT_ONCE] for first in range(0, len(found), _AT_ONCE)):
                client.unlink(*batch)
        finally:
            client.close()


@dataclass(frozen=True)
class ServerFigures:
    """What a server has done and holds; `since` gives what it did between two readings."""

    cpu_seconds: float
    received_bytes: int  #: from clients
    sent_bytes: int  #: to clients
    replicated_bytes: int  #: sent to replicas
    commands: Mapping[str, int]  #: by name: calls
    memory_bytes: int
    peak_memory_bytes: int
    connections: int

    def since(self, before: ServerFigures) -> ServerFigures:
        """Give what was done after `before`; what it holds is that of now."""
        calls = {name: count - before.commands.get(name, 0) for name, count in self.commands.items()}
        return replace(
            self,
            cpu_seconds=self.cpu_seconds - before.cpu_seconds,
            received_bytes=self.received_bytes - before.received_bytes,
            sent_bytes=self.sent_bytes - before.sent_bytes,
            replicated_bytes=self.replicated_bytes - before.replicated_bytes,
            commands={name: count for name, count in calls.items() if count},
        )

    def __add__(self, other: ServerFigures) -> ServerFigures:
        """Give what both did and hold together."""
        names = self.commands.keys() | other.commands.keys()
        return ServerFigures(
            self.cpu_seconds + other.cpu_seconds,
            self.received_bytes + other.received_bytes,
            self.sent_bytes + other.sent_bytes,
            self.replicated_bytes + other.replicated_bytes,
            {name: self.commands.get(name, 0) + other.commands.get(name, 0) for name in names},
            self.memory_bytes + other.memory_bytes,
            self.peak_memory_bytes + other.peak_memory_bytes,
            self.connections + other.connections,
        )


class Meter:
    """Reads the figures of one server, over a connection of its own that is not counted."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url)

    def read(self) -> ServerFigures:
        found = self._client.info("everything")
        replicated = found.get("total_net_repl_output_bytes", 0)
        return ServerFigures(
            cpu_seconds=found["used_cpu_sys"] + found["used_cpu_user"],
            received_bytes=found["total_net_input_bytes"] - found.get("total_net_repl_input_bytes", 0),
            sent_bytes=found["total_net_output_bytes"] - replicated,
            replicated_bytes=replicated,
            commands={
                name.removeprefix("cmdstat_"): said["calls"]
                for name, said in found.items()
                if name.startswith("cmdstat_")
            },
            memory_bytes=found["used_memory"],
            peak_memory_bytes=found["used_memory_peak"],
            connections=found["connected_clients"] - 1,
        )

    def close(self) -> None:
        self._client.close()


# A Cluster


@dataclass(frozen=True)
class Cluster:
    """A Cluster of embedded servers, without a password, on the loopback device."""

    url: str
    masters: Sequence[str]  #: URL of each
    replicas: Sequence[str]

    @property
    def nodes(self) -> Sequence[str]:
        return [*self.masters, *self.replicas]


@contextlib.contextmanager
def cluster(masters: int, replicas: int = 0) -> Iterator[Cluster]:
    """Give a Cluster of so many masters, each with so many replicas; all end with the block."""
    binary = find_binary().path
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(_node(binary)) for _ in range(masters * (1 + replicas))]
        for number, client in enumerate(clients[:masters]):
            first, end = _SLOTS * number // masters, _SLOTS * (number + 1) // masters
            _ask(client, "CLUSTER ADDSLOTS", *range(first, end))
        for client in clients[1:]:
            _ask(client, "CLUSTER MEET", "127.0.0.1", _port_of(clients[0]))
        _wait(lambda: all(len(client.cluster("nodes")) == len(clients) for client in clients))
        for number, client in enumerate(clients[masters:]):
            _ask(client, "CLUSTER REPLICATE", clients[number % masters].cluster("myid").decode())
        _wait(lambda: all(client.cluster("info")["cluster_state"] == "ok" for client in clients))
        _wait(lambda: all(one.info("replication")["master_link_status"] == "up" for one in clients[masters:]))
        places = [f"127.0.0.1:{_port_of(client)}" for client in clients]
        urls = [f"redis://{place}/0" for place in places]
        yield Cluster(f"redis+cluster://{','.join(places[:masters])}/0", urls[:masters], urls[masters:])


@contextlib.contextmanager
def _node(binary: Path) -> Iterator[redis.Redis]:
    """Start a server that is to be part of a Cluster; give a client of it."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as parent, Path(os.devnull).open("wb") as nowhere:
        folder = Path(parent) / "node"
        lines = (
            "bind 127.0.0.1",
            f"port {port}",
            f'dir "{folder}"',
            'save ""',
            "cluster-enabled yes",
            "repl-diskless-sync-delay 0",
        )
        process = GuardedProcess(
            [str(binary), "-"],
            input_text="\n".join(lines) + "\n",
            directory=folder,
            output=nowhere.fileno(),
            stop_steps=[(signal.SIGTERM, _STOP_SECONDS)],
        )
        client = redis.Redis(port=port, protocol=2)
        try:
            _wait(lambda: _answers(client))
            yield client
        finally:
            client.close()
            process.stop()


def _ask(client: redis.Redis, *command: str | int) -> None:
    execute: Callable[..., object] = client.execute_command
    execute(*command)


def _free_port() -> int:
    """Give a port that is free, and whose node may listen for the others ten thousand above."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with contextlib.suppress(OSError):
            for one in (port, port + _BUS):
                socket.create_server(("127.0.0.1", one)).close()
            return port
    raise RuntimeError("no port is free for a node of a Cluster")


def _port_of(client: redis.Redis) -> int:
    return int(client.connection_pool.connection_kwargs["port"])


def _answers(client: redis.Redis) -> bool:
    with contextlib.suppress(redis.ConnectionError):
        return bool(client.ping())
    return False


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"the Cluster was not there within {_START_SECONDS:g} s")
        time.sleep(0.05)
