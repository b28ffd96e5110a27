"""Faults that only a Cluster knows, at chosen moments: learner and workers are in this process, and wait for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from conftest import wait_until
from engines import Cluster

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.config import Level
from rlbroker.errors import ConnectionFailed, Unconfirmed
from rlbroker.keys import Keys

RUN = "moments"

#: So that nobody notices by a heartbeat what is to be noticed without one.
QUIET_SECONDS = 600.0


@pytest.fixture
def cluster(new_cluster: Callable[..., Cluster]) -> Cluster:
    return new_cluster()


@pytest.fixture
def without_replicas(new_cluster: Callable[..., Cluster]) -> Cluster:
    """A Cluster whose masters go on when one of them is away."""
    return new_cluster(3, 0, "--cluster-require-full-coverage", "no")


@pytest.mark.parametrize("level", ["learner", "replica"])
def test_what_was_sent_to_where_a_queue_moves_survives_a_failover_there(cluster: Cluster, level: Level) -> None:
    """The worker is connected to the node that still has the slot: nothing breaks that would tell of the loss."""
    with _learner(cluster, lease_seconds=QUIET_SECONDS) as learner:
        keys = _keys(cluster)
        own = cluster.owner_of(cluster.slot_of(keys.meta))
        worker_id = _workers_elsewhere(cluster, keys)[0]
        slot = cluster.slot_of(keys.experiences(worker_id))
        new = next(node for node in cluster.masters() if node not in (own, cluster.owner_of(slot)))
        replica = cluster.replica_of(new)
        with _worker(cluster, worker_id, level=level) as worker:
            first = _send(worker, range(5))
            assert _collect(learner, 5) == first
            cluster.move_keys(slot, new)
            with cluster.behind(replica, new):
                taken = _send(worker, range(5, 9), 0.5)
                new.kill()
            cluster.take_over(replica)
            cluster.move_keys(slot, replica)
            taken += _send(worker, range(9, 12), 0.5)
            new.start()
            cluster.wait_ok()
            cluster.end_move(slot, replica)
            taken += _send(worker, range(12, 15), 60.0)
            assert {5, 12, 13, 14} <= set(taken)
            assert _collect(learner, len(taken)) == taken
            learner.collect_experiences()
            assert worker.flush(60.0) == 0


def _learner(cluster: Cluster, **settings: Any) -> WorkerCommunicator:
    return WorkerCommunicator(3, redis_url=cluster.url, run=RUN, host_cache=False, **settings)


def _worker(cluster: Cluster, worker_id: int, **settings: Any) -> WorkerClient:
    return WorkerClient(cluster.url, RUN, worker_id, host_cache=False, **settings)


def _keys(cluster: Cluster) -> Keys:
    """Give the names of the keys of the run, which a learner has opened."""
    keys = Keys(RUN)
    with cluster.client() as client:
        keys.spread(client.hget(keys.meta, "shards").decode())
    return keys


def _workers_elsewhere(cluster: Cluster, keys: Keys) -> list[int]:
    """Give the workers whose queues are on other nodes than what is the run's own."""
    own = cluster.owner_of(cluster.slot_of(keys.meta))
    return [
        number
        for number in range(3)
        if cluster.owner_of(cluster.slot_of(keys.experiences(number))) is not own
    ]


def _send(worker: WorkerClient, numbers: Iterable[int], timeout: float = 10.0) -> list[int]:
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
