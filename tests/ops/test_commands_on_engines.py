"""The command line on a Cluster and with Sentinels: every node is read, and hints lead to the right node."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from conftest import ClusterServer, TrioServer, wait_until
from executable import rlbroker
from redis_cluster import Cluster
from servers import find_server_binary

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.errors import ServerUnsuitable
from rlbroker.ops.prune import BACK_SECONDS

Start = Callable[[str, str], Any]
RUN = "pong"


@pytest.fixture(params=["cluster", "sentinel"])
def several(request: pytest.FixtureRequest, start_engine: Start, server_kind: str) -> Iterator[Any]:
    found: ClusterServer | TrioServer = start_engine(request.param, server_kind)
    found.client.flushall()
    yield found
    found.client.flushall()


def plant(url: str) -> None:
    """Leave a run whose learner has ended, with a waiting batch of each worker, a version and a command."""
    with WorkerCommunicator(3, redis_url=url, run=RUN, host_cache=False) as learner:
        learner.send_model_weights({"w": np.zeros(10, np.float32)})
        for number in range(3):
            with WorkerClient(url, RUN, worker_id=number, host_cache=False) as worker:
                worker.send_experiences({"x": np.zeros(3, np.float32)})
        learner.send_control_command("noop")


# Every node


def test_every_command_that_reads_works(several: Any) -> None:
    plant(several.url)
    for command in (
        *(
            "status",
            "workers",
            "workers 1",
            "missed",
            "report --output /dev/null",
            "weights list",
            "weights show",
        ),
        *(
            "control list",
            "dead list",
            "experiences peek --worker 1",
            "runs",
            "acl --json",
            "check",
            "prune --dry-run --run pong",
        ),
    ):
        done = rlbroker(*command.split(), RLBROKER_REDIS_URL=several.url)
        assert done.returncode < 2, f"{command}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr, command


def test_status_shows_the_memory_of_the_fullest_node(cluster: ClusterServer) -> None:
    plant(cluster.url)
    for node in cluster.engine.masters():
        slot = min(cluster.engine._slots(node))
        name = next(
            f"filler-{number}" for number in range(100_000) if _slot(f"filler-{number}") in (slot, slot + 1)
        )
        with node.client() as client:
            before = client.info("memory")["used_memory"]
            client.set(name, bytes(20_000_000))
            data = json.loads(rlbroker("status", "--json", RLBROKER_REDIS_URL=cluster.url).stdout)["server"]
            client.delete(name)
        assert (data["node"], data["used_bytes"] > before + 15_000_000) == (f"127.0.0.1:{node.port}", True)


def test_a_node_that_evicts_keys_is_named(cluster: ClusterServer) -> None:
    plant(cluster.url)
    node = cluster.engine.masters()[-1]
    node.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        data = json.loads(rlbroker("status", "--json", RLBROKER_REDIS_URL=cluster.url).stdout)
    finally:
        node.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    (evicts,) = [one for one in data["findings"] if one["code"] == "server_evicts"]
    assert data["server"]["evicting_node"] == f"127.0.0.1:{node.port}"
    assert evicts["what"].startswith(f"127.0.0.1:{node.port} has maxmemory-policy allkeys-lru: ")


def test_a_learner_refuses_a_replica_that_would_evict_keys_as_a_master(several: Any) -> None:
    engine = several.engine
    node = engine.replicas()[0] if several.kind == "sentinel" else engine.replica_of(engine.masters()[0])
    node.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(
            ServerUnsuitable, match=f"^127.0.0.1:{node.port} has maxmemory-policy allkeys-lru"
        ):
            WorkerCommunicator(1, redis_url=several.url, run=RUN)
    finally:
        node.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")


def _slot(key: str) -> int:
    from rlbroker.backend.cluster import slot_of

    return slot_of(key)


def test_doctor_names_a_misconfigured_node_with_a_command_that_fixes_it(several: Any) -> None:
    node = several.engine.nodes[-1]
    node.ask("CONFIG", "SET", "timeout", "30")
    try:
        (idle,) = [one for one in points(several.url, "idle") if one["state"] == "warning"]
        assert idle["what"].startswith(f"127.0.0.1:{node.port}: it closes clients that are idle for 30 s")
        assert shlex.split(idle["hint"])[1:5] == ["-h", "127.0.0.1", "-p", str(node.port)]
        node.ask(*shlex.split(idle["hint"])[5:])
        assert [one["state"] for one in points(several.url, "idle")] == ["ok"]
    finally:
        node.ask("CONFIG", "SET", "timeout", "0")


def test_doctor_names_a_node_that_does_not_answer(several: Any) -> None:
    node = several.engine.replicas()[0] if several.kind == "sentinel" else several.engine.nodes[-1]
    node.freeze()
    try:
        (silent,) = points(several.url, "nodes")
        assert (silent["state"], f"127.0.0.1:{node.port} does not answer" in silent["what"]) == (
            "critical",
            True,
        )
        assert "ok" in [one["state"] for one in points(several.url, "version")]
    finally:
        node.thaw()


def test_doctor_names_a_node_that_the_others_have_marked_as_failed(several: Any) -> None:
    engine = several.engine
    node = engine.replicas()[0] if several.kind == "sentinel" else engine.replica_of(engine.masters()[0])
    with short_timeouts(several):
        node.kill()
        try:
            wait_until("the others mark it as failed", lambda: str(node.port) in failed_ports(several), 30.0)
            (silent,) = points(several.url, "nodes")
        finally:
            node.launch()
            node.wait_ready()
            engine.wait_until_stable()
    name, _, others = silent["what"].partition(" does not answer: ")
    assert (silent["state"], name) == ("critical", f"127.0.0.1:{node.port}")
    assert "continue without it" in others
    assert "nodes" not in [one["code"] for one in examine(several.url)]


@contextmanager
def short_timeouts(several: Any) -> Iterator[None]:
    """Make the other servers mark an unreachable one as failed soon."""
    if several.kind == "sentinel":
        servers, change = (
            several.engine.sentinels,
            f"SENTINEL SET {several.engine.service} down-after-milliseconds",
        )
    else:
        servers, change = several.engine.nodes, "CONFIG SET cluster-node-timeout"
    for server in servers:
        server.ask(*change.split(), "1000")
    yield
    for server in servers:
        server.ask(*change.split(), "60000")


def failed_ports(several: Any) -> set[str]:
    """Return the ports of the servers that the others have marked as failed."""
    if several.kind == "sentinel":
        rows = several.engine.sentinels[0].ask("SENTINEL", "REPLICAS", several.engine.service)
        fields = [dict(zip(row[::2], row[1::2], strict=True)) for row in rows]
        return {one[b"port"].decode() for one in fields if b"s_down" in one[b"flags"]}
    rows = several.engine.responsive_nodes[0].ask("CLUSTER", "NODES").decode().splitlines()
    return {
        line.split()[1].partition("@")[0].rpartition(":")[2]
        for line in rows
        if "fail" in line.split()[2].split(",")
    }


def test_missing_rights_are_granted_on_every_node(
    several: Any,
) -> None:
    nodes = several.engine.nodes
    for node in nodes:
        node.ask("ACL", "SETUSER", "poor", "on", ">secret", "~*", "+@all", "-memory|usage")
    try:
        scheme, _, places = several.url.partition("://")
        (rights,) = points(f"{scheme}://poor:secret@{places}", "rights")
    finally:
        for node in nodes:
            node.ask("ACL", "DELUSER", "poor")
    lines = [line.partition(" ACL ")[0] for line in rights["hint"].splitlines()]
    there = {f"redis-cli -h 127.0.0.1 -p {node.port}" for node in nodes}
    assert (set(lines), len(lines)) == (
        (there, len(nodes)) if several.kind == "sentinel" else ({"redis-cli"}, 1)
    )


def test_doctor_counts_the_sentinels_and_names_those_that_do_not_answer(
    start_engine: Start, server_kind: str
) -> None:
    trio = start_engine("sentinel", server_kind)
    _, *others = trio.engine.sentinels
    seen = [points(trio.url, "sentinels")]
    try:
        for sentinel in others:
            sentinel.kill()
            seen.append(points(trio.url, "sentinels"))
    finally:
        trio.engine.start_sentinels()
        trio.engine.wait_until_stable()
    well, fewer, too_few = (one for (one,) in seen)
    first, second = (f"127.0.0.1:{one.port}" for one in others)
    assert (well["state"], well["what"].partition(" answer, ")[0]) == ("ok", "3 of 3 Sentinels")
    assert fewer["state"] == "warning"
    assert fewer["what"].startswith(f"{first} does not answer: 2 of 3 Sentinels answer, and 2 are enough")
    assert too_few["state"] == "critical"
    assert set(too_few["what"].partition(" do not answer: ")[0].split(", ")) == {first, second}
    assert "1 of 3 Sentinels answers, but 2 must agree" in too_few["what"]


def test_doctor_finds_sentinels_that_the_url_does_not_name(start_engine: Start, server_kind: str) -> None:
    trio = start_engine("sentinel", server_kind)
    engine = trio.engine
    host, _, rest = trio.url.partition("://")
    named = f"{host}://{rest.split(',')[0]}/{engine.service}"
    with short_timeouts(trio):
        for sentinel in engine.sentinels[1:]:
            sentinel.freeze()
        try:
            wait_until("the remaining Sentinel has no quorum", lambda: lacks_quorum(engine), 30.0)
            (too_few,) = points(named, "sentinels")
        finally:
            for sentinel in engine.sentinels[1:]:
                sentinel.thaw()
            engine.wait_until_stable()
    assert too_few["state"] == "critical"
    assert "1 of 3 Sentinels answers" in too_few["what"]
    assert "NOQUORUM" in too_few["what"]


def lacks_quorum(engine: Any) -> bool:
    try:
        engine.sentinels[0].ask("SENTINEL", "CKQUORUM", engine.service)
    except redis.ResponseError:
        return True
    return False


def test_doctor_warns_of_a_cluster_with_too_few_masters_for_a_failover(
    cluster: ClusterServer, server_kind: str, tmp_path: Path
) -> None:
    binary = find_server_binary(server_kind)
    assert binary is not None
    with Cluster(binary, tmp_path, 2, 1) as small:
        (too_few,) = points(small.url, "cluster")
    (enough,) = points(cluster.url, "cluster")
    assert (too_few["state"], too_few["what"].partition(":")[0]) == ("warning", "only 2 masters have slots")
    assert (enough["state"], enough["what"].partition(" serve ")[0]) == ("ok", "3 masters and 3 replicas")


def points(url: str, code: str) -> list[dict[str, str]]:
    return [one for one in examine(url) if one["code"] == code]


def examine(url: str) -> list[dict[str, str]]:
    done = rlbroker("doctor", "--json", "--timeout", "20", RLBROKER_REDIS_URL=url)
    found: list[dict[str, str]] = json.loads(done.stdout)["points"]
    return found


# Pruning


def test_prune_deletes_keys_in_shards_that_the_run_no_longer_has(cluster: ClusterServer) -> None:
    wait_until("no node has just started", lambda: _uptime(cluster) >= BACK_SECONDS, 15.0)
    plant(cluster.url)
    client, keys = cluster.client, Keys(RUN)
    before = set(client.scan_iter("rlb:*", target_nodes="all"))
    assert len({key.partition(b"}")[0] for key in before}) == 4
    client.hset(keys.meta, "shards", "9999")
    client.xadd(keys.experiences(7), {"data": "from before the run had shards"})
    client.set("rlb:{pong/s3}:meta", "of no run")
    done = rlbroker("prune", "--run", RUN, "--yes", "--json", RLBROKER_REDIS_URL=cluster.url)
    (data,) = json.loads(done.stdout)["runs"]
    assert list(client.scan_iter("rlb:*", target_nodes="all")) == []
    assert (done.returncode, data["kept"]) == (0, "")
    assert data["deleted_keys"] >= len(before) - 4  # some have expired


def test_prune_keeps_a_queue_in_an_old_shard_that_is_used_meanwhile(
    cluster: ClusterServer, monkeypatch: pytest.MonkeyPatch
) -> None:

    from rlbroker.backend.connection import Connection
    from rlbroker.ops.prune import OPENED, PRUNE, judge_runs, prune

    wait_until("no node has just started", lambda: _uptime(cluster) >= BACK_SECONDS, 15.0)
    plant(cluster.url)
    keys = Keys(RUN)
    keys.use_shards(cluster.client.hget(keys.meta, "shards").decode())
    cluster.client.hset(keys.meta, "shards", "9999")
    run = Connection.run

    def watched(self: Connection, script: Any, names: Any, *arguments: Any, **options: Any) -> Any:
        if script is PRUNE and names[0] == keys.experiences(1):
            cluster.client.xadd(keys.experiences(1), {"data": "new"})
        return run(self, script, names, *arguments, **options)

    monkeypatch.setattr(Connection, "run", watched)
    connection = Connection(cluster.url)
    (found,) = judge_runs(connection, older_than_seconds=3600.0, run=RUN, named=True)
    done = prune(connection, RUN, found.names, older_than_seconds=3600.0, named=True)
    connection.close()
    assert done.kept == OPENED
    left = {key.decode() for key in cluster.client.scan_iter("rlb:*", target_nodes="all")}
    assert left == set(keys.queue(1)) & left
    assert keys.experiences(1) in left


def _uptime(cluster: ClusterServer) -> float:
    replies = [node.ask("INFO", "server").decode() for node in cluster.engine.nodes]
    return min(float(text.partition("uptime_in_seconds:")[2].split()[0]) for text in replies)
