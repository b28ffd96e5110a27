"""Faults of a Cluster at exact moments: learner and workers take turns in one process."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import pytest
from conftest import wait_until
from nodes import Node
from redis_cluster import Cluster
from servers import KINDS, find_server_binary

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.config import Level
from rlbroker.control.commands import Command
from rlbroker.errors import ConnectionFailed, RunLost, Unconfirmed
from rlbroker.experience import watched_streams

#: A lease so long that no heartbeat detects a fault; the tests check the other ways.
LONG_LEASE_SECONDS = 600.0

#: More attempts than a worker may have connections to one node.
ATTEMPTS = 20


class ClusterRun:
    """A run on a Cluster: its learner and workers, and the slots of its keys."""

    def __init__(self, cluster: Cluster, run: str) -> None:
        self.cluster, self._run = cluster, run

    def learner(self, **settings: Any) -> WorkerCommunicator:
        return WorkerCommunicator(3, redis_url=self.cluster.url, run=self._run, host_cache=False, **settings)

    def worker(self, worker_id: int, url: str = "", **settings: Any) -> WorkerClient:
        return WorkerClient(url or self.cluster.url, self._run, worker_id, host_cache=False, **settings)

    @cached_property
    def keys(self) -> Keys:
        """The run's keys; a learner must have opened the run, because it chooses the shards."""
        keys = Keys(self._run)
        with self.cluster.client() as client:
            keys.use_shards(client.hget(keys.meta, "shards").decode())
        return keys

    @property
    def own_slot(self) -> int:
        """The slot of the run's own keys, which are outside the shards."""
        return self.cluster.slot_of(self.keys.meta)

    def queue_slot(self, worker_id: int) -> int:
        """Return the slot of a worker's queue."""
        return self.cluster.slot_of(self.keys.experiences(worker_id))

    def find_worker(self, where: str) -> int:
        """Return a worker whose queue is on the node of the run's own keys (`there`), or not (`elsewhere`)."""
        own = self.cluster.owner_of(self.own_slot)
        there = [self.cluster.owner_of(self.queue_slot(number)) is own for number in range(3)]
        return max(number for number in range(3) if there[number] == (where == "there"))


@pytest.fixture(scope="module")
def with_replicas(server_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with _cluster(server_kind, tmp_path_factory, 3, 1) as made:
        yield made


@pytest.fixture(scope="module")
def without_replicas(server_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Cluster whose other masters keep serving when one is down."""
    with _cluster(server_kind, tmp_path_factory, 3, 0, "--cluster-require-full-coverage", "no") as made:
        yield made


def _cluster(kind: str, folders: pytest.TempPathFactory, *shape: Any) -> Cluster:
    binary = find_server_binary(kind)
    assert binary is not None, f"{kind} is missing; install it: {KINDS[kind]}"
    return Cluster(binary, folders.mktemp("cluster"), *shape)


@pytest.mark.parametrize("level", ["learner", "replica"])
def test_batches_sent_to_the_importing_node_survive_its_failover(
    with_replicas: Cluster, run: str, level: Level
) -> None:
    """The worker is connected to the node that still owns the slot: no broken connection reveals the loss."""
    cluster, cluster_run = with_replicas, ClusterRun(with_replicas, run)
    with cluster_run.learner(lease_seconds=LONG_LEASE_SECONDS) as learner:
        worker_id = cluster_run.find_worker("elsewhere")
        slot = cluster_run.queue_slot(worker_id)
        owners = cluster.owner_of(cluster_run.own_slot), cluster.owner_of(slot)
        new = next(node for node in cluster.masters() if node not in owners)
        replica = cluster.replica_of(new)
        with cluster_run.worker(worker_id, level=level) as worker:
            _send(worker, range(3))
            assert _collect(learner, 3) == [0, 1, 2]
            cluster.move_keys(slot, new)
            with cluster.without_replication(replica, new):
                accepted = _send(worker, range(3, 6), 0.2)
                new.kill()
            cluster.take_over(replica)
            cluster.move_keys(slot, replica)
            accepted += _send(worker, range(6, 8), 0.2)
            new.start()
            cluster.wait_until_stable()
            cluster.finish_move(slot, replica)
            accepted += _send(worker, range(8, 11), 60.0)
            assert {3, 8, 9, 10} <= set(accepted)
            assert _collect(learner, len(accepted)) == accepted
            learner.collect_experiences()
            assert worker.flush(60.0) == 0
    cluster.wait_until_stable()


def test_workers_without_the_right_to_load_scripts_wait_for_a_learner_and_leak_no_connections(
    with_replicas: Cluster, run: str
) -> None:
    """The promoted replica has no scripts: each attempt fails until a learner has loaded them."""
    cluster, cluster_run = with_replicas, ClusterRun(with_replicas, run)
    for node in cluster.nodes:
        node.ask("ACL", "SETUSER", "worker", "on", ">secret", "~*", "&*", "+@all", "-script")
    with ExitStack() as stack:
        with cluster_run.learner():
            worker_id = cluster_run.find_worker("there")
            url = cluster.url.replace("://", "://worker:secret@")
            worker = stack.enter_context(cluster_run.worker(worker_id, url))
            sent = _send(worker, [0])
        promoted = cluster.replica_of(cluster.owner_of(cluster_run.own_slot))
        promoted.ask("SCRIPT", "FLUSH")
        cluster.fail_over(promoted)

        def is_reported() -> bool:
            try:
                sent.extend(_send(worker, [1], 0.05))
            except RunLost as error:
                return "does not have rlbroker's scripts" in str(error)
            return False

        for _ in range(ATTEMPTS):
            wait_until("the worker reports that the scripts are missing", is_reported, 60.0)
        with cluster_run.learner() as learner:
            sent += _send(worker, [2], 60.0)
            assert _collect(learner, len(sent)) == sent


def test_a_node_without_scripts_gets_them_with_the_first_redirected_command(
    without_replicas: Cluster, run: str
) -> None:
    """Slots move key by key to a node that was just added: no client has loaded scripts on it."""
    cluster, cluster_run = without_replicas, ClusterRun(without_replicas, run)
    with cluster_run.learner(when_full="drop_oldest", max_queue_size=3) as learner:
        worker_id = cluster_run.find_worker("elsewhere")
        with cluster_run.worker(worker_id) as worker:
            _send(worker, range(3))
            _collect(learner, 3)
            learner.collect_experiences()
            for sent, slot in ((8, cluster_run.queue_slot(worker_id)), (13, cluster_run.own_slot)):
                new = cluster.add_node()
                cluster.move_keys(slot, new)
                dropped = [worker.send_experiences({"n": number}).dropped for number in range(5)]
                assert dropped == [0, 0, 0, 1, 1]
                assert _collect(learner, 3) == [2, 3, 4]
                _wait_for_heartbeat(learner, sent)
                cluster.finish_move(slot, new)
                cluster.wait_until_stable()
                _wait_until_done(worker, learner.send_control_command("reset"))


def test_only_the_counts_of_the_node_that_lost_its_data_are_restored(
    without_replicas: Cluster, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLUSHALL on a shard's node breaks no connection: each batch is still delivered or counted once."""
    monkeypatch.setattr(watched_streams, "RECHECK_SECONDS", 0.2)
    cluster_run = ClusterRun(without_replicas, run)
    with cluster_run.learner() as learner:
        worker_id = cluster_run.find_worker("elsewhere")
        with cluster_run.worker(worker_id) as worker:
            _send(worker, range(20))
            got = len(_collect(learner, 20))
            learner.collect_experiences()
            _send(worker, range(5))
            cluster_run.cluster.owner_of(cluster_run.queue_slot(worker_id)).ask("FLUSHALL")
            _send(worker, range(5))

            def all_counted() -> bool:
                nonlocal got
                got += len(learner.collect_experiences(0.2))
                counts = learner.get_queue_info()["counts"][worker_id]
                return bool(counts.delivered == got and counts.produced == 30)

            wait_until("30 are delivered or counted", all_counted, 60.0)
            assert got >= 25


def test_a_learner_that_finds_only_the_shards_of_its_run_keeps_them(
    without_replicas: Cluster, run: str
) -> None:
    """The run's own keys were lost while no learner ran: the batches in other shards are still collected."""
    cluster, cluster_run = without_replicas, ClusterRun(without_replicas, run)
    with ExitStack() as stack:
        with cluster_run.learner():
            worker_id = cluster_run.find_worker("elsewhere")
            worker = stack.enter_context(cluster_run.worker(worker_id))
            sent = _send(worker, range(3))
            with cluster.client() as client:
                wait_until(
                    "each shard has the list of shards",
                    lambda: all(map(client.exists, cluster_run.keys.one_of_each_shard)),
                )
        cluster.owner_of(cluster_run.own_slot).ask("FLUSHALL")
        with cluster_run.learner(shards=1) as learner:
            assert _collect(learner, 3) == sent
            assert _collect(learner, len(_send(worker, [3]))) == [3]


def test_a_shard_whose_server_is_down_delays_nothing_else(without_replicas: Cluster, run: str) -> None:
    """Commands, the ledger and the other workers' batches continue; the shard recovers with its server."""
    cluster, cluster_run = without_replicas, ClusterRun(without_replicas, run)
    with cluster_run.learner(take_over_seconds=1.0) as learner, ExitStack() as stack:
        workers = [stack.enter_context(cluster_run.worker(number, level="learner")) for number in range(3)]
        for worker in workers:
            worker.send_experiences({"n": 0})
        assert _collect(learner, 3) == [0, 0, 0]
        learner.collect_experiences()
        affected = cluster_run.find_worker("elsewhere")
        server = cluster.owner_of(cluster_run.queue_slot(affected))
        server.kill()
        deadline, number = Deadline(1.0), 0  # long enough that the learner must renew its claim
        while not deadline.over:
            number += 1
            for worker in workers:
                if worker is not workers[affected]:
                    worker.send_experiences({"n": number})
            assert _collect(learner, 2) == [number, number]
            _wait_until_done(workers[affected], learner.send_control_command("reset", worker_ids=[affected]))
        server.start()
        cluster.wait_until_stable()
        workers[affected].send_experiences({"n": 0}, 60.0)
        assert _collect(learner, 1) == [0]


def _wait_for_heartbeat(learner: WorkerCommunicator, sent: int) -> None:
    """Wait until the heartbeat of the only worker reports the number of sent batches."""
    wait_until("the heartbeat reports the batches", lambda: learner.workers()[0].sent == sent, 60.0)


def _wait_until_done(worker: WorkerClient, command: Command) -> None:
    """Wait until a worker has run a command and the learner has recorded the outcome."""

    def done() -> bool:
        worker.poll()
        return bool(command.outcomes()[worker.worker_id])

    wait_until("the command is done", done, 60.0)


def _send(worker: WorkerClient, numbers: Iterable[int], timeout: float = 60.0) -> list[int]:
    """Send batches, and return the numbers of those that were accepted."""
    accepted = []
    for number in numbers:
        try:
            worker.send_experiences({"n": number}, timeout)
        except Unconfirmed:
            pass  # the worker keeps the batch and sends it again
        except ConnectionFailed:
            continue
        accepted.append(number)
    return accepted


def _collect(learner: WorkerCommunicator, count: int) -> list[int]:
    """Wait until so many batches arrive, and return their numbers."""
    got = list[int]()

    def arrived() -> bool:
        got.extend(batch["n"] for _, batch in learner.collect_experiences(0.2))
        return len(got) >= count

    wait_until(f"{count} batches arrive", arrived, 60.0)
    return got


def test_a_learner_that_waits_for_batches_sees_planned_failovers_only_as_a_pause(
    with_replicas: Cluster, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No exception within the timeout, for a planned failover of any node."""
    cluster, cluster_run = with_replicas, ClusterRun(with_replicas, run)
    with cluster_run.learner() as learner, ExitStack() as stack:
        workers = [stack.enter_context(cluster_run.worker(number)) for number in range(3)]
        got = list[int]()

        def fail_over_and_send(master: Node, number: int) -> None:
            cluster.fail_over(cluster.replica_of(master))
            for worker in workers:
                worker.send_experiences({"number": number})

        _send(workers[0], range(1))
        for number, master in enumerate(cluster.masters(), start=1):
            learner.collect_experiences(timeout=0.0)
            timer = threading.Timer(0.5, fail_over_and_send, [master, number])
            timer.start()
            while got.count(number) < len(workers):
                got += [batch["number"] for _, batch in learner.collect_experiences(timeout=20.0)]
            timer.join()
    starts, ends = (caplog.text.count(words) for words in ("trying again until it works", "it works again"))
    assert starts == ends
