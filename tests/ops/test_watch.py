"""A run over time: rates of workers, and the last minute of the learner's history."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from conftest import Reachable, Server, wait_until

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.connection import Connection
from rlbroker.ops.inspect.snapshot import SnapshotReader
from rlbroker.ops.inspect.watch import SERIES, RunWatch

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


@pytest.fixture
def new_watch(server: Server, run: str) -> Iterator[Callable[[], RunWatch]]:
    with ExitStack() as stack:

        def make() -> RunWatch:
            where = server.connection_settings()
            connection = Connection(
                where.get("redis_url"), client=where.get("redis_client"), timeout_seconds=5.0
            )
            stack.callback(connection.close)
            return RunWatch(connection, run)

        yield make


@pytest.mark.on_every_engine
def test_rates_are_computed_between_two_reads(
    new_watch: Callable[[], RunWatch], learner: Learner, worker: Worker
) -> None:
    comm, client, idle = learner(), worker(), worker()
    watch = new_watch()
    first = watch.read()
    for number in range(20):
        client.send_experiences({"x": np.full(3, number)})
    comm.collect_experiences(timeout=5.0, max_batches=5)
    second = watch.read()
    assert [line.batches_per_second for line in first.lines] == [None, None]
    seconds = second.snapshot.at - first.snapshot.at
    rates = {line.worker: line.batches_per_second for line in second.lines}
    assert rates[client.worker_id] == 20 / seconds
    assert not rates[idle.worker_id]
    line = second.lines[client.worker_id]
    assert (line.waiting + line.in_hand, line.in_hand >= 5) == (20, True)
    assert line.room_share == 0.0


def test_the_first_read_has_the_last_minute(
    new_watch: Callable[[], RunWatch], learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()

    def collected() -> bool:
        client.send_experiences({"x": np.zeros((4, 3))})
        comm.collect_experiences(timeout=0.1)
        watch = new_watch()
        watch.read()
        view = watch.read()
        fresh = new_watch().read()
        assert view.series.keys() == SERIES.keys()
        # An earlier watch has no sample twice, and lacks at most the one that was written since its last read.
        assert len(fresh.series["waiting"]) - len(view.series["waiting"]) in (0, 1)
        return bool(view.newest("rows_per_second")) and view.current

    wait_until("there are current values", collected)


def test_a_snapshot_takes_three_round_trips_and_survives_a_broken_connection(
    reachable: Reachable, run: str
) -> None:
    with (
        WorkerCommunicator(2, redis_url=reachable.url, run=run) as comm,
        WorkerClient(reachable.url, run),
    ):
        comm.send_model_weights({"w": np.zeros(3)})
        connection = Connection(reachable.url, timeout_seconds=5.0)
        reader = SnapshotReader(connection, run)
        trips = record_round_trips(connection)
        assert reader.read().members[0].state == "alive"
        assert len(trips) == 3
        on_each = {"target_nodes": "primaries"} if reachable.kind == "cluster" else {}
        reachable.client.client_kill_filter(_type="normal", skipme=True, **on_each)
        assert reader.read().manifest is not None
        connection.close()


def record_round_trips(connection: Connection) -> list[Any]:
    trips: list[Any] = []
    execute_all = connection.execute_all

    def recorded(commands: Any, **options: Any) -> Any:
        trips.append(commands)
        return execute_all(commands, **options)

    connection.execute_all = recorded  # type: ignore[method-assign]
    return trips
