"""A URL of the wrong kind of server, or of a server that would lose data, is refused at once with what to write."""

from __future__ import annotations

import logging
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ClusterServer, TrioServer, wait_until
from executable import rlbroker
from nodes import Node

from rlbroker import AccessDenied, RlbrokerError, ServerUnsuitable, WorkerClient, WorkerCommunicator
from rlbroker.backend.connection import Connection

Start = Callable[[str, str], Any]


@pytest.fixture
def trio(start_engine: Start, server_kind: str) -> TrioServer:
    found: TrioServer = start_engine("sentinel", server_kind)
    return found


def learner(url: str) -> WorkerCommunicator:
    return WorkerCommunicator(1, redis_url=url, run="pong", timeout=3.0, host_cache=False)


def worker(url: str) -> WorkerClient:
    return WorkerClient(url, "pong", worker_id=0, timeout=3.0, host_cache=False)


def refusal_message(url: str, kind: type[RlbrokerError] = ServerUnsuitable) -> str:
    """Return the message with which a learner, a worker and the command line refuse a URL."""
    messages = []
    for make in (learner, worker):
        with pytest.raises(kind) as caught:
            make(url)
        messages.append(str(caught.value))
    for command in ("status", "doctor", "runs"):
        done = rlbroker(command, RLBROKER_REDIS_URL=url)
        assert done.returncode in (2, 3), done.stdout
        assert messages[0] in done.stderr
    assert messages[0] == messages[1]
    return messages[0]


def address_of(node: Node) -> str:
    return f"127.0.0.1:{node.port}"


# Servers of another kind


def test_a_single_server_is_refused_as_a_cluster(trio: TrioServer) -> None:
    where = address_of(trio.engine.nodes[0])
    message = refusal_message(f"redis+cluster://{where}/0")
    assert f"is a single server, not a node of a Cluster; write redis://{where}" in message


def test_a_sentinel_is_refused_as_a_server(trio: TrioServer) -> None:
    where = address_of(trio.engine.sentinels[0])
    assert "is a Sentinel; write redis+sentinel://host:port/service" in refusal_message(f"redis://{where}/0")
    assert f"write redis+sentinel://{where}/service" in refusal_message(f"redis+cluster://{where}/0")


def test_a_server_is_refused_as_a_sentinel(trio: TrioServer, cluster: ClusterServer) -> None:
    for node in (trio.engine.nodes[0], cluster.engine.nodes[0]):
        message = refusal_message(f"redis+sentinel://{address_of(node)}/mymaster")
        assert f"{address_of(node)} is not a Sentinel; for a server write redis://host:port" in message


def test_a_master_that_no_sentinel_monitors_is_named_with_the_known_ones(trio: TrioServer) -> None:
    message = refusal_message(trio.url.replace("mymaster", "others"))
    assert "the Sentinels monitor no master 'others', but mymaster; its name comes last in the URL" in message


def test_a_second_database_of_a_cluster_or_sentinel_is_refused(
    cluster: ClusterServer, trio: TrioServer
) -> None:
    for node in (cluster.engine.nodes[0], trio.engine.sentinels[0]):
        message = refusal_message(f"redis://{address_of(node)}/3")
        assert "does not have this database" in message
        assert "a Cluster has the database 0 only" in message


def test_a_cluster_without_assigned_slots_is_refused(binary: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        node = Node(binary, tmp_path / "node", "--cluster-enabled", "yes")
        stack.callback(node.dispose)
        node.start()
        for scheme in ("redis", "redis+cluster"):
            message = refusal_message(f"{scheme}://{address_of(node)}/0")
            assert (
                f"{address_of(node)} is a node of a Cluster that has no slots yet; assign them with redis-cli --cluster"
                in message
            )


@pytest.mark.parametrize("number", [0, -1])
def test_the_url_of_one_node_leads_to_its_whole_cluster(
    cluster: ClusterServer, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """By the URL of a master, and by that of a replica, which accepts no writes."""
    node = cluster.engine.nodes[number]
    assert node.role() == ("master" if number == 0 else "slave")
    url = f"redis://{address_of(node)}/0"
    caplog.set_level(logging.INFO, "rlbroker")
    with learner(url) as comm, worker(url) as client:
        assert f"{url} is a node of a Cluster; its other nodes are used too" in caplog.text
        comm.send_model_weights({"w": np.zeros(10)})
        client.load_weights({})
        client.send_experiences({"x": np.zeros(3)})
        wait_until("the batch came", lambda: comm.collect_experiences(timeout=0.2))
        for command in ("status", "workers", "runs", "weights list", "report --output /dev/null"):
            done = rlbroker(*command.split(), RLBROKER_REDIS_URL=url)
            assert done.returncode == 0, done.stderr
        message = rlbroker("doctor", RLBROKER_REDIS_URL=url).stdout
        assert "3 masters and 3 replicas serve all 16,384 slots; the URL names only one node" in message, (
            message
        )
    done = rlbroker("bench", "--seconds", "0.01", "--megabytes", "0.1", RLBROKER_REDIS_URL=url)
    assert (done.returncode, "batches " in done.stdout) == (0, True), done.stderr
    done = rlbroker("prune", "--run", "pong", "--yes", RLBROKER_REDIS_URL=url)
    assert done.returncode == 0, done.stderr
    assert list(cluster.client.scan_iter("rlb:*", target_nodes="all")) == []


# Servers that would lose data


@pytest.mark.parametrize("number", [1, -1])
def test_an_evicting_policy_is_found_on_any_node_of_a_cluster(cluster: ClusterServer, number: int) -> None:
    """On a master that is not asked first, and on a replica."""
    with evicting(cluster.engine.nodes[number]) as node, pytest.raises(ServerUnsuitable) as caught:
        learner(cluster.url)
    assert f"{address_of(node)} has maxmemory-policy allkeys-lru" in str(caught.value)


def test_an_evicting_policy_is_found_on_a_replica_behind_sentinels(trio: TrioServer) -> None:
    (replica, *_) = trio.engine.replicas()
    with evicting(replica), pytest.raises(ServerUnsuitable, match="maxmemory-policy allkeys-lru"):
        learner(trio.url)


@contextmanager
def evicting(node: Node) -> Iterator[Node]:
    node.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        yield node
    finally:
        node.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")


# A proxy


KNOWN = {
    "PING": b"+PONG\r\n",
    "TIME": b"*2\r\n$1\r\n1\r\n$1\r\n1\r\n",
    "SMEMBERS": b"*0\r\n",
    "HGETALL": b"*0\r\n",
}
KNOWN |= dict.fromkeys(("GET", "HGET"), b"$-1\r\n") | dict.fromkeys(("SET", "AUTH", "SELECT"), b"+OK\r\n")
KNOWN |= {"EXISTS": b":0\r\n", "SCAN": b"*2\r\n$1\r\n0\r\n*0\r\n"}


class _Proxy(socketserver.StreamRequestHandler):
    """A proxy that knows strings and hashes, but no streams, scripts or publish/subscribe."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            words = []
            for _ in range(int(line[1:])):
                words.append(self.rfile.read(int(self.rfile.readline()[1:])))
                self.rfile.readline()
            name = words[0].decode().upper()
            unknown = f"-ERR unknown command '{name}', with args beginning with: \r\n".encode()
            self.wfile.write(KNOWN.get(name, unknown))


@pytest.fixture
def proxy() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Proxy) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_proxy_without_streams_and_scripts_is_refused(proxy: str) -> None:
    url = f"redis://{proxy}/0"
    with pytest.raises(
        ServerUnsuitable, match=r"does not know the command SCRIPT: .* give the URL of the server itself"
    ):
        learner(url)
    with pytest.raises(ServerUnsuitable, match=r"runs no Lua scripts; .* give the URL of the server itself"):
        worker(url)
    with closing(Connection(url)) as connection:
        for command in (("XADD", "x", "*", "a", "b"), ("XREAD", "STREAMS", "x", "0"), ("PUBLISH", "x", "y")):
            with pytest.raises(ServerUnsuitable, match=f"does not know the command {command[0]}"):
                connection.execute(*command)


def test_a_proxy_is_refused_as_a_cluster_and_as_a_sentinel(proxy: str) -> None:
    assert "is not a node of a Cluster, as it does not know CLUSTER SLOTS" in refusal_message(
        f"redis+cluster://{proxy}/0"
    )
    assert "is not a Sentinel" in refusal_message(f"redis+sentinel://{proxy}/mymaster")


# Wrong passwords


def test_a_wrong_password_is_refused_at_once(cluster: ClusterServer, trio: TrioServer) -> None:
    for url in (cluster.url.replace("://", "://me:secret@"), f"{trio.url}?sentinel_password=secret"):
        message = refusal_message(url, AccessDenied)
        assert "check user and password in the server's URL" in message
        assert "secret" not in message
