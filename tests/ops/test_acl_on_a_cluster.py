"""The rights of each role on a Cluster: all that it needs on every node, and nothing of another worker in any shard."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from conftest import ClusterServer, wait_until
from executable import rlbroker
from nodes import Node
from redis_cluster import Cluster

from rlbroker import AccessDenied, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.backend.missing_rights import is_missing_right

RUN = "pong"
ROLES = (f"{RUN}-learner", f"{RUN}-worker-0", f"{RUN}-worker-1", f"{RUN}-observer")


class GuardedCluster:
    """A Cluster whose nodes all have the users that `rlbroker acl` prints for it."""

    def __init__(self, engine: Cluster, folder: Path) -> None:
        self.engine, self._folder = engine, folder
        options = ("--run", RUN, "--workers", "2", "--secrets", str(folder), "--setuser")
        printed = rlbroker("acl", *options, RLBROKER_REDIS_URL=engine.url)
        assert printed.returncode == 0, printed.stderr
        assert "add these to every node" in printed.stderr
        for node in engine.nodes:
            for line in printed.stdout.splitlines():
                node.ask(*shlex.split(line))
            node.ask("CONFIG", "RESETSTAT")

    def password(self, user: str) -> str:
        return (self._folder / user).read_text().strip()

    def url(self, user: str) -> str:
        return self.engine.url.replace("://", f"://{user}:{self.password(user)}@")

    def at(self, node: Node, user: str) -> Any:
        return redis.Redis(
            host="127.0.0.1", port=node.port, protocol=2, username=user, password=self.password(user)
        )

    def refused(self) -> dict[str, Any]:
        """Return the commands that any node has refused to any user."""
        found = dict[str, Any]()
        for node in self.engine.nodes:
            with node.client() as client:
                found |= {
                    name: one
                    for name, one in client.info("commandstats").items()
                    if one.get("rejected_calls") and name not in _MAY_BE_REFUSED
                }
        return found


#: Commands whose refusal is ignored: CLIENT SETINFO, which redis-py sends to every server; and SCRIPT LOAD, which a
#: worker tries on a node that the learner has not used yet.
_MAY_BE_REFUSED = {"cmdstat_client|setinfo", "cmdstat_client", "cmdstat_script|load", "cmdstat_script"}

#: Commands that doctor tries; it reports their refusal.
_ONLY_FOR_DOCTOR = {"cmdstat_config|get", "cmdstat_config", "cmdstat_acl|whoami", "cmdstat_acl"}


@pytest.fixture
def guarded(
    start_engine: Callable[[str, str], ClusterServer], server_kind: str, tmp_path: Path
) -> Iterator[GuardedCluster]:
    server = start_engine("cluster", server_kind)
    server.client.flushall()
    try:
        yield GuardedCluster(server.engine, tmp_path / "secrets")
    finally:
        for node in server.engine.nodes:
            node.ask("ACL", "DELUSER", *ROLES)
        server.client.flushall()


def test_each_role_has_the_rights_that_it_needs_on_every_node(guarded: GuardedCluster) -> None:
    weights = {"w": np.arange(40_000, dtype=np.float32)}
    learner_url, observer = guarded.url(ROLES[0]), {"RLBROKER_REDIS_URL": guarded.url(ROLES[3])}
    with WorkerCommunicator(
        2, redis_url=learner_url, run=RUN, host_cache=False, acknowledge="manual"
    ) as comm:
        workers = [
            WorkerClient(
                guarded.url(ROLES[1 + number]),
                RUN,
                worker_id=number,
                host_cache=False,
                level="learner",
                read_from_replicas=number == 1,
            )
            for number in range(2)
        ]
        for _ in range(3):  # full, and as deltas
            weights["w"][::1000] += 1.0
            comm.send_model_weights(weights)
        models: list[dict[str, Any]] = [{}, {}]
        for client, model in zip(workers, models, strict=True):
            client.load_weights(model)
            client.send_experiences({"number": np.full(3, client.worker_id)})
        command = comm.send_control_command("reset")
        pairs = list[Any]()

        def is_done() -> bool:
            for client, model in zip(workers, models, strict=True):
                client.poll(model)
            pairs.extend(comm.collect_experiences(timeout=0.1))
            return len(pairs) == 2 and all(one.state == "done" for one in command.outcomes().values())

        wait_until("batches arrive, and the command is done", is_done)
        comm.acknowledge(pairs)
        bad = {"data": b"?", "version": 1, "rows": 1, "raw_bytes": 1, "stored_bytes": 1, "sent_at": 0}
        key = _keys(guarded).experiences(1)
        guarded.engine.client().xadd(key, bad, id=f"{workers[1].incarnation}-100")

        def dead() -> Any:
            comm.acknowledge(comm.collect_experiences(timeout=0.1))
            return comm.dead_letters()

        comm.retry_dead_letters(wait_until("a batch is dead", dead))
        comm.purge_dead_letters(wait_until("it is dead again", dead))
        for node in guarded.engine.masters():
            node.ask("SCRIPT", "FLUSH")
        comm.send_model_weights(weights)

        def is_applied() -> bool:
            for client, model in zip(workers, models, strict=True):
                client.poll(model)
            return all(client.version == 4 for client in workers)

        wait_until("both workers run version 4", is_applied)
        for words in (
            ["status"],
            ["doctor"],
            ["runs"],
            ["weights", "list"],
            ["workers"],
            ["control", "list"],
        ):
            options = () if words == ["runs"] else ("--run", RUN)
            done = rlbroker(*words, *options, **observer)
            output = done.stdout + done.stderr
            assert "lacks rights" not in output
            assert done.returncode < 2, output
        for client in workers:
            client.close()
        comm._check()
    pruned = rlbroker("prune", "--run", RUN, "--yes", RLBROKER_REDIS_URL=learner_url)
    assert pruned.returncode == 0, pruned.stdout + pruned.stderr
    assert list(guarded.engine.client().scan_iter("rlb:*")) == []
    assert guarded.refused().keys() <= _ONLY_FOR_DOCTOR


def test_a_worker_has_no_rights_in_the_shard_of_another(guarded: GuardedCluster) -> None:
    with WorkerCommunicator(2, redis_url=guarded.url(ROLES[0]), run=RUN, host_cache=False) as comm:
        comm.send_model_weights({"w": np.zeros(10)})
        keys = _keys(guarded)
        assert len(keys.shards) == 3
        tried = [
            ("XADD", keys.experiences(1), "*", "data", "1"),
            ("XRANGE", keys.experiences(1), "-", "+"),
            ("HSET", keys.counts(1), "delivered", "9"),
            ("HSET", keys.epochs(0), "epoch", "9"),
            ("XADD", keys.again(0), "*", "data", "1"),
            ("XRANGE", keys.dead(1), "-", "+"),
            ("SET", keys.chunk("1-1-1", 1), "mine"),
            ("DEL", keys.chunk("1-1-1", 1)),
            ("HSET", keys.life(1), "incarnation", "9"),
            ("HSET", keys.weights, "version", "99"),
            ("HSET", "rlb:{other/s0}:counts:0", "delivered", "9"),
            ("CLUSTER", "RESET"),
            ("CLUSTER", "FAILOVER"),
            ("CLUSTER", "SETSLOT", "1", "STABLE"),
            ("CLUSTER", "FORGET", "1"),
            ("CONFIG", "SET", "maxmemory", "1"),
        ]
        for node in guarded.engine.nodes:
            with guarded.at(node, ROLES[1]) as client:
                for command in tried:
                    with pytest.raises(redis.ResponseError) as caught:
                        client.execute_command(*command)
                    assert isinstance(caught.value, redis.exceptions.NoPermissionError) or is_missing_right(
                        str(caught.value)
                    ), command
        with pytest.raises(AccessDenied):
            WorkerClient(guarded.url(ROLES[1]), RUN, worker_id=1)


def test_missing_cluster_rights_are_named(guarded: GuardedCluster) -> None:
    for node in guarded.engine.nodes:
        node.ask("ACL", "SETUSER", ROLES[1], "-cluster|slots")
    with pytest.raises(AccessDenied, match=r"may not run CLUSTER SLOTS; .*rlbroker acl --cluster"):
        WorkerClient(guarded.url(ROLES[1]), RUN, worker_id=0, timeout=2.0)


def _keys(guarded: GuardedCluster) -> Keys:
    keys = Keys(RUN)
    keys.use_shards(guarded.engine.client().hget(keys.meta, "shards").decode())
    return keys
