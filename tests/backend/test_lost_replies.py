"""Lost replies: the server ran a command, and its reply was lost. All is sent again, and nothing is applied twice."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Server, wait_until
from lossy import Lossy

from rlbroker import WorkerClient, WorkerCommunicator

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def lossy(server: Server, seed: int) -> Lossy:
    chance, lock = random.Random(seed), threading.Lock()

    def loses_reply() -> bool:
        with lock:
            return chance.random() < 0.05

    return Lossy(server.another_client(), loses_reply)


@pytest.mark.on_every_engine
@pytest.mark.parametrize("seed", [1, 2])
def test_with_one_reply_in_twenty_lost_nothing_is_lost_or_applied_twice(
    server: Server, learner: Learner, worker: Worker, seed: int
) -> None:
    batches, versions, commands = 150, 20, 10
    worker_link, learner_link = lossy(server, seed), lossy(server, seed + 100)
    comm = learner(redis_url=None, redis_client=learner_link.client)
    client = worker(redis_url=None, redis_client=worker_link.client)
    done: list[int] = []
    client.on_command("note", done.append)
    got: list[int] = []
    applied: list[int] = []
    sent = [comm.send_control_command("note", number) for number in range(commands)]
    for number in range(batches):
        if number < versions:
            assert comm.send_model_weights({"number": number}).version == number + 1
        if client.poll({}):
            applied.append(client.version)
        assert client.send_experiences({"number": number})
        got += [batch["number"] for _, batch in _collect(comm)]

    def all_final() -> bool:
        if client.poll({}):
            applied.append(client.version)
        info = comm.get_queue_info()
        return not any(info["model_queue_sizes"]) and not any(info["control_queue_sizes"])

    wait_until("every version and command has a final outcome", all_final, timeout_seconds=30)
    while pairs := _collect(comm):
        got += [batch["number"] for _, batch in pairs]

    assert got == list(range(batches))
    assert done == list(range(commands))
    assert all(command.wait(5.0)[0] for command in sent)
    records = [record for record in comm.missed_updates()[0].records if record.what == "weights"]
    missed = [version for record in records for version in range(record.first, record.last + 1)]
    assert sorted(applied + missed) == list(range(1, versions + 1))
    counts = comm.get_queue_info()["counts"][0]
    assert (counts.produced, counts.delivered, counts.lost, counts.duplicates) == (batches, batches, {}, 0)
    assert worker_link.lost > 10
    assert learner_link.lost > 10


def _collect(comm: WorkerCommunicator) -> list[Any]:
    """Collect until a call succeeds: a read that does not wait raises if its reply is lost."""
    while True:
        try:
            return comm.collect_experiences()
        except ConnectionError:
            continue


@pytest.mark.on_every_engine
def test_connections_that_broke_while_idle_fail_no_collect_that_does_not_wait(
    server: Server, learner: Learner, worker: Worker
) -> None:
    link = Lossy(server.another_client(), lambda: False)
    comm = learner(redis_url=None, redis_client=link.client, acknowledge="manual")
    client = worker()
    comm.send_model_weights({"w": 1})
    client.send_experiences({"number": 1})
    wait_until("the learner reads the stream", lambda: comm.collect_experiences(1.0))
    for number in (2, 3):
        client.send_experiences({"number": number})
        link.break_connections()
        found = comm.collect_experiences(0.0) or wait_until(
            "it arrives", lambda: comm.collect_experiences(0.0)
        )
        assert [batch["number"] for _, batch in found] == [number]
