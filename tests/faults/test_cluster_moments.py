"""Faults that only a Cluster knows, each at its moment: learner and workers are in one process and take turns."""

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

#: So that nobody notices by a heartbeat what is to be noticed without one.
QUIET_SECONDS = 600.0

#: More than the connections that a worker may have to one node.
MANY = 20


class Scene:
    """A run on a Cluster: who takes part, and where things are."""

    def __init__(self, cluster: Cluster, run: str) -> None:
        self.cluster, self._run = cluster, run

    def learner(self, **settings: Any) -> WorkerCommunicator:
        return WorkerCommunicator(3, redis_url=self.cluster.url, run=self._run, host_cache=False, **settings)

    def worker(self, worker_id: int, url: str = "", **settings: Any) -> WorkerClient:
        return WorkerClient(url or self.cluster.url, self._run, worker_id, host_cache=False, **settings)

    @cached_property
    def keys(self) -> Keys:
        """The names of the run's keys; only a learner that opens the run chooses its shards."""
        keys = Keys(self._run)
        with self.cluster.client() as client:
            keys.spread(client.hget(keys.meta, "shards").decode())
        return keys

    @property
    def own(self) -> int:
        """The slot of what is the run's own."""
        return self.cluster.slot_of(self.keys.meta)

    def queue(self, worker_id: int) -> int:
        """Give the slot of a worker's queue."""
        return self.cluster.slot_of(self.keys.experiences(worker_id))

    def worker_whose_queue_is(self, where: str) -> int:
        """Give a worker whose queue is on the node of what is the run's own (`there`), or not (`elsewhere`)."""
        own = self.cluster.owner_of(self.own)
        there = [self.cluster.owner_of(self.queue(number)) is own for number in range(3)]
        return max(number for number in range(3) if there[number] == (where == "there"))


@pytest.fixture(scope="module")
def with_replicas(server_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with _cluster(server_kind, tmp_path_factory, 3, 1) as made:
        yield made


@pytest.fixture(scope="module")
def without_replicas(server_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The others of its masters go on when one is away."""
    with _cluster(server_kind, tmp_path_factory, 3, 0, "--cluster-require-full-coverage", "no") as made:
        yield made


def _cluster(kind: str, folders: pytest.TempPathFactory, *shape: Any) -> Cluster:
    binary = find_server_binary(kind)
    assert binary is not None, f"there is no {kind} here; get it with: {KINDS[kind]}"
    return Cluster(binary, folders.mktemp("cluster"), *shape)


@pytest.mark.parametrize("level", ["learner", "replica"])
def test_what_was_sent_to_where_a_queue_moves_survives_a_failover_there(
    with_replicas: Cluster, run: str, level: Level
) -> None:
    """The worker is connected to the node that still has the slot: nothing breaks that would tell of the loss."""
    cluster, scene = with_replicas, Scene(with_replicas, run)
    with scene.learner(lease_seconds=QUIET_SECONDS) as learner:
        worker_id = scene.worker_whose_queue_is("elsewhere")
        slot = scene.queue(worker_id)
        have_parts = cluster.owner_of(scene.own), cluster.owner_of(slot)
        new = next(node for node in cluster.masters() if node not in have_parts)
        replica = cluster.replica_of(new)
        with scene.worker(worker_id, level=level) as worker:
            _send(worker, range(3))
            assert _collect(learner, 3) == [0, 1, 2]
            cluster.move_keys(slot, new)
            with cluster.without_replication(replica, new):
                taken = _send(worker, range(3, 6), 0.2)
                new.kill()
            cluster.take_over(replica)
            cluster.move_keys(slot, replica)
            taken += _send(worker, range(6, 8), 0.2)
            new.start()
            cluster.wait_until_stable()
            cluster.finish_move(slot, replica)
            taken += _send(worker, range(8, 11), 60.0)
            assert {3, 8, 9, 10} <= set(taken)
            assert _collect(learner, len(taken)) == taken
            learner.collect_experiences()
            assert worker.flush(60.0) == 0
    cluster.wait_until_stable()


def test_workers_that_may_load_no_scripts_wait_for_a_learner_without_using_up_their_connections(
    with_replicas: Cluster, run: str
) -> None:
    """A replica was promoted that has no scripts: each try fails, and the worker goes on when a learner is there."""
    cluster, scene = with_replicas, Scene(with_replicas, run)
    for node in cluster.nodes:
        node.ask("ACL", "SETUSER", "worker", "on", ">secret", "~*", "&*", "+@all", "-script")
    with ExitStack() as stack:
        with scene.learner():
            worker_id = scene.worker_whose_queue_is("there")
            url = cluster.url.replace("://", "://worker:secret@")
            worker = stack.enter_context(scene.worker(worker_id, url))
            sent = _send(worker, [0])
        promoted = cluster.replica_of(cluster.owner_of(scene.own))
        promoted.ask("SCRIPT", "FLUSH")
        cluster.fail_over(promoted)

        def told() -> bool:
            try:
                sent.extend(_send(worker, [1], 0.05))
            except RunLost as error:
                return "does not have rlbroker's scripts" in str(error)
            return False

        for _ in range(MANY):
            wait_until("the worker says what is missing", told, 60.0)
        with scene.learner() as learner:
            sent += _send(worker, [2], 60.0)
            assert _collect(learner, len(sent)) == sent


def test_a_node_that_has_no_scripts_gets_them_with_what_is_redirected_there(
    without_replicas: Cluster, run: str
) -> None:
    """One was just added, and slots move to it key by key: nobody has loaded anything there."""
    cluster, scene = without_replicas, Scene(without_replicas, run)
    with scene.learner(when_full="drop_oldest", max_queue_size=3) as learner:
        worker_id = scene.worker_whose_queue_is("elsewhere")
        with scene.worker(worker_id) as worker:
            _send(worker, range(3))
            _collect(learner, 3)
            learner.collect_experiences()
            for sent, slot in ((8, scene.queue(worker_id)), (13, scene.own)):
                new = cluster.add_node()
                cluster.move_keys(slot, new)
                dropped = [worker.send_experiences({"n": number}).dropped for number in range(5)]
                assert dropped == [0, 0, 0, 1, 1]
                assert _collect(learner, 3) == [2, 3, 4]
                _hear(learner, sent)
                cluster.finish_move(slot, new)
                cluster.wait_until_stable()
                _obey(worker, learner.send_control_command("reset"))


def test_what_a_node_counted_is_written_back_where_its_data_was_lost_and_nothing_else(
    without_replicas: Cluster, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLUSHALL on a shard's node breaks no connection: each batch is still delivered or counted, and none twice."""
    monkeypatch.setattr(watched_streams, "RECHECK_SECONDS", 0.2)
    scene = Scene(without_replicas, run)
    with scene.learner() as learner:
        worker_id = scene.worker_whose_queue_is("elsewhere")
        with scene.worker(worker_id) as worker:
            _send(worker, range(20))
            got = len(_collect(learner, 20))
            learner.collect_experiences()
            _send(worker, range(5))
            scene.cluster.owner_of(scene.queue(worker_id)).ask("FLUSHALL")
            _send(worker, range(5))

            def all_counted() -> bool:
                nonlocal got
                got += len(learner.collect_experiences(0.2))
                counts = learner.get_queue_info()["counts"][worker_id]
                return bool(counts.delivered == got and counts.produced == 30)

            wait_until("30 are delivered or counted", all_counted, 60.0)
            assert got >= 25


def test_a_learner_that_finds_nothing_but_the_shards_of_its_run_keeps_them(
    without_replicas: Cluster, run: str
) -> None:
    """What is the run's own was lost while no learner ran: what waits in other shards is still collected."""
    cluster, scene = without_replicas, Scene(without_replicas, run)
    with ExitStack() as stack:
        with scene.learner():
            worker_id = scene.worker_whose_queue_is("elsewhere")
            worker = stack.enter_context(scene.worker(worker_id))
            sent = _send(worker, range(3))
            with cluster.client() as client:
                wait_until(
                    "each shard says which there are",
                    lambda: all(map(client.exists, scene.keys.one_of_each_shard)),
                )
        cluster.owner_of(scene.own).ask("FLUSHALL")
        with scene.learner(shards=1) as learner:
            assert _collect(learner, 3) == sent
            assert _collect(learner, len(_send(worker, [3]))) == [3]


def test_a_shard_whose_server_is_away_holds_up_nothing_else(without_replicas: Cluster, run: str) -> None:
    """Commands, the ledger, and other workers' batches go on; and so does the shard, once its server is back."""
    cluster, scene = without_replicas, Scene(without_replicas, run)
    with scene.learner(take_over_seconds=1.0) as learner, ExitStack() as stack:
        workers = [stack.enter_context(scene.worker(number, level="learner")) for number in range(3)]
        for worker in workers:
            worker.send_experiences({"n": 0})
        assert _collect(learner, 3) == [0, 0, 0]
        learner.collect_experiences()
        lost = scene.worker_whose_queue_is("elsewhere")
        server = cluster.owner_of(scene.queue(lost))
        server.kill()
        renewed, number = Deadline(1.0), 0  # after that the learner has to say that it goes on
        while not renewed.over:
            number += 1
            for worker in workers:
                if worker is not workers[lost]:
                    worker.send_experiences({"n": number})
            assert _collect(learner, 2) == [number, number]
            _obey(workers[lost], learner.send_control_command("reset", worker_ids=[lost]))
        server.start()
        cluster.wait_until_stable()
        workers[lost].send_experiences({"n": 0}, 60.0)
        assert _collect(learner, 1) == [0]


def _hear(learner: WorkerCommunicator, sent: int) -> None:
    """Wait until the only worker's heartbeat tells how many batches it has sent."""
    wait_until("a heartbeat tells of it", lambda: learner.workers()[0].sent == sent, 60.0)


def _obey(worker: WorkerClient, command: Command) -> None:
    """Wait until a worker does what it is told, and the learner has noted it."""

    def done() -> bool:
        worker.poll()
        return bool(command.outcomes()[worker.worker_id])

    wait_until("the command is done", done, 60.0)


def _send(worker: WorkerClient, numbers: Iterable[int], timeout: float = 60.0) -> list[int]:
    """Send batches, and give those that were taken."""
    taken = []
    for number in numbers:
        try:
            worker.send_experiences({"n": number}, timeout)
        except Unconfirmed:
            pass  # it is kept, and sent again
        except ConnectionFailed:
            continue
        taken.append(number)
    return taken


def _collect(learner: WorkerCommunicator, count: int) -> list[int]:
    """Wait until so many batches arrive, and give them."""
    got = list[int]()

    def arrived() -> bool:
        got.extend(batch["n"] for _, batch in learner.collect_experiences(0.2))
        return len(got) >= count

    wait_until(f"{count} batches arrive", arrived, 60.0)
    return got


def test_a_learner_that_waits_for_batches_sees_no_more_of_planned_failovers_than_a_pause(
    with_replicas: Cluster, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No exception while there is time to wait, whichever of the nodes it is that hands over."""
    cluster, scene = with_replicas, Scene(with_replicas, run)
    with scene.learner() as learner, ExitStack() as stack:
        workers = [stack.enter_context(scene.worker(number)) for number in range(3)]
        got = list[int]()

        def hand_over(master: Node, number: int) -> None:
            cluster.fail_over(cluster.replica_of(master))
            for worker in workers:
                worker.send_experiences({"number": number})

        _send(workers[0], range(1))
        for number, master in enumerate(cluster.masters(), start=1):
            learner.collect_experiences(timeout=0.0)
            handing_over = threading.Timer(0.5, hand_over, [master, number])
            handing_over.start()
            while got.count(number) < len(workers):
                got += [batch["number"] for _, batch in learner.collect_experiences(timeout=20.0)]
            handing_over.join()
    starts, ends = (caplog.text.count(words) for words in ("trying again until it works", "it works again"))
    assert starts == ends
