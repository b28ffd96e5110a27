"""Servers that form a group, and the group that is started, killed, emptied and frozen as one server."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from servers import FaultyServer

#: The distance of the port of a Cluster node's bus from the node's port.
BUS = 10_000
#: Ports of nodes. Their bus ports are below those that the kernel assigns to outgoing connections.
PORTS = range(11_000, 22_000)


class Node(FaultyServer):
    """A server of a group, which keeps its port and its role when it restarts."""

    def __init__(self, binary: Path, folder: Path, *config: str) -> None:
        """Prepare the server without starting it."""
        super().__init__(binary, folder, *config)
        self.port, self._port_sockets = _reserve_port()
        self._file = self.folder / "server.conf"
        self._file.touch()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.folder.name}, {self.port})"

    def _command(self) -> list[str]:
        program, *options = super()._command()
        return [program, str(self._file), *options]

    def dispose(self) -> None:
        """Kill the server and release its port."""
        self.kill()
        for sockets in self._port_sockets:
            sockets.close()

    def client(self) -> Any:
        return redis.Redis(
            host="127.0.0.1", port=self.port, protocol=2, socket_timeout=5.0, retry=Retry(NoBackoff(), 0)
        )

    def ask(self, *command: Any) -> Any:
        """Run a command on this node and return the raw reply."""
        with self.client() as client:
            # A name in bytes prevents redis-py from parsing the reply.
            return client.execute_command(*(str(part).encode() for part in command))

    def ask_importing(self, *command: Any) -> Any:
        """Run a command after ASKING; this node is importing the slot."""
        with self.client() as client, client.pipeline(transaction=False) as pipeline:
            pipeline.execute_command("ASKING")
            pipeline.execute_command(*command)
            return pipeline.execute()[1]

    def role(self) -> str:
        """Return `master`, `slave` or `sentinel`."""
        role: str = self.ask("ROLE")[0].decode()
        return role

    def is_synced(self) -> bool:
        """Return whether this is a replica whose link to its master is up."""
        return b"\r\nmaster_link_status:up\r\n" in self.ask("INFO", "replication")

    def is_replica_of(self, master: Node) -> bool:
        role, *rest = self.ask("ROLE")
        return bool(role == b"slave" and rest[1] == master.port)


class NodeGroup:
    """Servers that are started, killed, emptied and frozen together."""

    nodes: list[Node]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:  # some nodes may be running
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for node in self._all_nodes():
            node.dispose()

    def start(self) -> None:
        raise NotImplementedError

    def _all_nodes(self) -> list[Node]:
        return self.nodes

    def kill(self) -> None:
        for node in self._all_nodes():
            node.kill()

    def empty(self) -> None:
        """Delete the data of all nodes; they remain members of the group."""
        for node in self.nodes:
            node.empty()

    def freeze(self) -> None:
        for node in self.nodes:
            node.freeze()

    def thaw(self) -> None:
        for node in self.nodes:
            node.thaw()

    @property
    def responsive_nodes(self) -> list[Node]:
        return [node for node in self.nodes if node.is_responsive]


@contextlib.contextmanager
def cut_off(master: Node, others: Sequence[Node]) -> Iterator[None]:
    """Freeze the other nodes during the block, and drop what the master sends to its replicas meanwhile."""
    for node in others:
        node.freeze()
    try:
        # Otherwise the kernel would buffer the data for the frozen replicas.
        master.ask("CLIENT", "KILL", "TYPE", "replica")
        yield
    finally:
        for node in others:
            node.thaw()


def launch_nodes(nodes: Sequence[Node]) -> None:
    for node in nodes:
        node.launch()
    for node in nodes:
        node.wait_ready()


def _reserve_port() -> tuple[int, list[socket.socket]]:
    """Return a port whose bus port is free too, and the sockets that reserve both."""
    while True:
        port, sockets = random.choice(PORTS), list[socket.socket]()
        try:
            for one in (port, port + BUS):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", one))
        except OSError:
            for one_socket in sockets:
                one_socket.close()
            continue
        for one_socket in sockets:
            # Set after both binds: two reservations must not share a port, but the server must be able to bind it.
            one_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return port, sockets


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until a condition holds and return its value; Redis errors count as false."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(redis.RedisError):
            if found := condition():
                return found
        assert time.monotonic() < end, f"timed out after {seconds:g} s waiting until {what}"
        time.sleep(0.02)
