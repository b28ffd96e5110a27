"""The command line on a Cluster and on what Sentinels watch: every node is looked at, and what is typed leads there."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import ClusterServer, TrioServer, wait_until
from executable import rlbroker

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.keys import Keys
from rlbroker.observer.leftovers import BACK_SECONDS

Start = Callable[[str, str], Any]
RUN = "pong"


@pytest.fixture(params=["cluster", "sentinel"])
def several(request: pytest.FixtureRequest, started: Start, server_kind: str) -> Iterator[Any]:
    found: ClusterServer | TrioServer = started(request.param, server_kind)
    found.client.flushall()
    yield found
    found.client.flushall()


def plant(url: str) -> None:
    """Leave a run behind: its learner has ended, a batch of each worker waits, a version and a command are there."""
    with WorkerCommunicator(3, redis_url=url, run=RUN, host_cache=False) as learner:
        learner.send_model_weights({"w": np.zeros(10, np.float32)})
        for number in range(3):
            with WorkerClient(url, RUN, worker_id=number, host_cache=False) as worker:
                worker.send_experiences({"x": np.zeros(3, np.float32)})
        learner.send_control_command("noop")


# Every node


def test_every_command_that_looks_works(several: Any) -> None:
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


def test_the_memory_that_is_shown_is_that_of_the_fullest_node(cluster: ClusterServer) -> None:
    plant(cluster.url)
    for node in cluster.engine.masters():
        slot = min(cluster.engine._slots(node))
        name = next(
            f"filler-{number}" for number in range(100_000) if _slot(f"filler-{number}") in (slot, slot + 1)
        )
        with node.client() as client:
            before = client.info("memory")["used_memory"]
            client.set(name, bytes(20_000_000))
            said = json.loads(rlbroker("status", "--json", RLBROKER_REDIS_URL=cluster.url).stdout)["server"]
            client.delete(name)
        assert (said["node"], said["used_bytes"] > before + 15_000_000) == (f"127.0.0.1:{node.port}", True)


def _slot(key: str) -> int:
    from rlbroker.servers import slot_of

    return slot_of(key)


def test_doctor_names_the_node_that_is_not_well_and_what_it_says_to_type_leads_there(several: Any) -> None:
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


def points(url: str, code: str) -> list[dict[str, str]]:
    done = rlbroker("doctor", "--json", "--timeout", "20", RLBROKER_REDIS_URL=url)
    return [one for one in json.loads(done.stdout)["points"] if one["code"] == code]


# Pruning


def test_what_a_run_left_in_shards_that_it_knows_no_more_goes_too(cluster: ClusterServer) -> None:
    wait_until("no node has just started", lambda: _uptime(cluster) >= BACK_SECONDS, 15.0)
    plant(cluster.url)
    client, keys = cluster.client, Keys(RUN)
    before = set(client.scan_iter("rlb:*", target_nodes="all"))
    assert len({key.partition(b"}")[0] for key in before}) == 4
    client.hset(keys.meta, "shards", "9999")
    client.xadd(keys.experiences(7), {"data": "from when there were no shards"})
    client.set("rlb:{pong/s3}:meta", "of no run")
    with_others = rlbroker("prune", "--run", RUN, "--yes", "--json", RLBROKER_REDIS_URL=cluster.url)
    (said,) = json.loads(with_others.stdout)["runs"]
    assert list(client.scan_iter("rlb:*", target_nodes="all")) == []
    assert (with_others.returncode, said["kept"]) == (0, "")
    assert said["deleted_keys"] >= len(before) - 4  # some had a lifetime


def test_a_queue_in_an_old_shard_that_is_used_meanwhile_stays(
    cluster: ClusterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlbroker.connection import Connection
    from rlbroker.observer.leftovers import find_leftovers
    from rlbroker.pruning import OPENED, PRUNE_QUEUE, prune

    wait_until("no node has just started", lambda: _uptime(cluster) >= BACK_SECONDS, 15.0)
    plant(cluster.url)
    keys = Keys(RUN)
    keys.spread(cluster.client.hget(keys.meta, "shards").decode())
    cluster.client.hset(keys.meta, "shards", "9999")
    run = Connection.run

    def watched(self: Connection, script: Any, names: Any, *arguments: Any, **options: Any) -> Any:
        if script is PRUNE_QUEUE and names[0] == keys.experiences(1):
            cluster.client.xadd(keys.experiences(1), {"data": "new"})
        return run(self, script, names, *arguments, **options)

    monkeypatch.setattr(Connection, "run", watched)
    connection = Connection(cluster.url)
    (found,) = find_leftovers(connection, older_than_seconds=3600.0, run=RUN, named=True)
    done = prune(connection, RUN, found.names, older_than_seconds=3600.0, named=True)
    connection.close()
    assert done.kept == OPENED
    left = {key.decode() for key in cluster.client.scan_iter("rlb:*", target_nodes="all")}
    assert left == set(keys.queue(1)) & left
    assert keys.experiences(1) in left


def _uptime(cluster: ClusterServer) -> float:
    told = [node.ask("INFO", "server").decode() for node in cluster.engine.nodes]
    return min(float(text.partition("uptime_in_seconds:")[2].split()[0]) for text in told)
