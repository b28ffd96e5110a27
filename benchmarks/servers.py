"""The server of the benchmarks, its metrics, and Clusters of embedded servers."""

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

#: Of a Cluster: its slots, the ports of its nodes, and the offset of the ports for the Cluster bus.
_SLOTS, _PORTS, _BUS = 16_384, range(11_000, 22_000), 10_000

#: How long a Cluster may take to start, and a node to end.
_START_SECONDS, _STOP_SECONDS = 30.0, 5.0

#: The number of keys that are deleted with one command.
_KEYS_PER_COMMAND = 500


@contextlib.contextmanager
def open_server(url: str | None) -> Iterator[str]:
    """Yield the given URL, or that of an embedded server that ends with the block."""
    if url is not None:
        yield url
        return
    with RedisServer() as embedded:
        yield embedded.url


@contextlib.contextmanager
def scratch_name(url: str) -> Iterator[str]:
    """Yield a new name for runs and keys, and delete all keys that begin with it at the end.

    On a Cluster the keys stay, because the benchmark that started the Cluster also ends it.
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
            keys = [key for pattern in ("", "rlb:{") for key in client.scan_iter(f"{pattern}{name}*", 1000)]
            for batch in (
                keys[first : first + _KEYS_PER_COMMAND] for first in range(0, len(keys), _KEYS_PER_COMMAND)
            ):
                client.unlink(*batch)
        finally:
            client.close()


@dataclass(frozen=True)
class ServerMetrics:
    """The metrics of a server: totals since its start, and current memory and connections."""

    cpu_seconds: float
    received_bytes: int  #: from clients
    sent_bytes: int  #: to clients
    replicated_bytes: int  #: sent to replicas
    commands: Mapping[str, int]  #: calls by name
    memory_bytes: int
    peak_memory_bytes: int
    connections: int

    def since(self, before: ServerMetrics) -> ServerMetrics:
        """Return the totals since `before`, with the current memory and connections."""
        calls = {name: count - before.commands.get(name, 0) for name, count in self.commands.items()}
        return replace(
            self,
            cpu_seconds=self.cpu_seconds - before.cpu_seconds,
            received_bytes=self.received_bytes - before.received_bytes,
            sent_bytes=self.sent_bytes - before.sent_bytes,
            replicated_bytes=self.replicated_bytes - before.replicated_bytes,
            commands={name: count for name, count in calls.items() if count},
        )

    def __add__(self, other: ServerMetrics) -> ServerMetrics:
        """Return the sum for two servers."""
        names = self.commands.keys() | other.commands.keys()
        return ServerMetrics(
            self.cpu_seconds + other.cpu_seconds,
            self.received_bytes + other.received_bytes,
            self.sent_bytes + other.sent_bytes,
            self.replicated_bytes + other.replicated_bytes,
            {name: self.commands.get(name, 0) + other.commands.get(name, 0) for name in names},
            self.memory_bytes + other.memory_bytes,
            self.peak_memory_bytes + other.peak_memory_bytes,
            self.connections + other.connections,
        )


class ServerMeter:
    """Reads the metrics of one server over its own connection, which is not counted."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url)

    def read(self) -> ServerMetrics:
        info = self._client.info("everything")
        replicated = info.get("total_net_repl_output_bytes", 0)
        return ServerMetrics(
            cpu_seconds=info["used_cpu_sys"] + info["used_cpu_user"],
            received_bytes=info["total_net_input_bytes"] - info.get("total_net_repl_input_bytes", 0),
            sent_bytes=info["total_net_output_bytes"] - replicated,
            replicated_bytes=replicated,
            commands={
                name.removeprefix("cmdstat_"): statistics["calls"]
                for name, statistics in info.items()
                if name.startswith("cmdstat_")
            },
            memory_bytes=info["used_memory"],
            peak_memory_bytes=info["used_memory_peak"],
            connections=info["connected_clients"] - 1,
        )

    def close(self) -> None:
        self._client.close()


# A Cluster


@dataclass(frozen=True)
class Cluster:
    """A Cluster of embedded servers on the loopback device, without a password."""

    url: str
    masters: Sequence[str]  #: their URLs
    replicas: Sequence[str]  #: their URLs

    @property
    def nodes(self) -> Sequence[str]:
        return [*self.masters, *self.replicas]


@contextlib.contextmanager
def start_cluster(masters: int, replicas: int = 0) -> Iterator[Cluster]:
    """Start a Cluster with the given number of masters, and of replicas of each; it ends with the block."""
    binary = find_binary().path
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(_start_node(binary)) for _ in range(masters * (1 + replicas))]
        for number, client in enumerate(clients[:masters]):
            first, end = _SLOTS * number // masters, _SLOTS * (number + 1) // masters
            _execute(client, "CLUSTER ADDSLOTS", *range(first, end))
        for client in clients[1:]:
            _execute(client, "CLUSTER MEET", "127.0.0.1", _port_of(clients[0]))
        _wait(lambda: all(len(client.cluster("nodes")) == len(clients) for client in clients))
        for number, client in enumerate(clients[masters:]):
            _execute(client, "CLUSTER REPLICATE", clients[number % masters].cluster("myid").decode())
        _wait(lambda: all(client.cluster("info")["cluster_state"] == "ok" for client in clients))
        _wait(lambda: all(_is_connected_replica(client) for client in clients[masters:]))
        addresses = [f"127.0.0.1:{_port_of(client)}" for client in clients]
        urls = [f"redis://{address}/0" for address in addresses]
        yield Cluster(f"redis+cluster://{','.join(addresses[:masters])}/0", urls[:masters], urls[masters:])


@contextlib.contextmanager
def _start_node(binary: Path) -> Iterator[redis.Redis]:
    """Start a server in cluster mode; yield a client of it."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as parent, Path(os.devnull).open("wb") as null_device:
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
            output=null_device.fileno(),
            stop_steps=[(signal.SIGTERM, _STOP_SECONDS)],
        )
        client = redis.Redis(port=port, protocol=2)
        try:
            _wait(lambda: _answers(client))
            yield client
        finally:
            client.close()
            process.stop()


def _execute(client: redis.Redis, *command: str | int) -> None:
    execute: Callable[..., object] = client.execute_command
    execute(*command)


def _free_port() -> int:
    """Return a port that is free, and whose port for the Cluster bus is free too."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with contextlib.suppress(OSError):
            for number in (port, port + _BUS):
                socket.create_server(("127.0.0.1", number)).close()
            return port
    raise RuntimeError("found no free port for a node of the Cluster")


def _port_of(client: redis.Redis) -> int:
    return int(client.connection_pool.connection_kwargs["port"])


def _is_connected_replica(client: redis.Redis) -> bool:
    return bool(client.info("replication")["master_link_status"] == "up")


def _answers(client: redis.Redis) -> bool:
    with contextlib.suppress(redis.ConnectionError):
        return bool(client.ping())
    return False


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"the Cluster did not start within {_START_SECONDS:g} s")
        time.sleep(0.05)
