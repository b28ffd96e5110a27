"""Sending: what may be sent, also by several threads, and that each batch is stored and counted once."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import Server, wait_until

from rlbroker import QueueCounts, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.codec.message import decode
from rlbroker.errors import BatchTooLarge, DeadlineExceeded, ServerFault, UnsupportedType

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def counts(comm: WorkerCommunicator, worker_id: int = 0) -> QueueCounts:
    found: QueueCounts = comm.get_queue_info()["counts"][worker_id]
    return found


def test_the_arrays_of_a_batch_may_be_overwritten_after_it_was_sent(learner: Learner, worker: Worker) -> None:
    """At level `learner` too, where the worker keeps the batch and may send it again."""
    comm, client = learner(), worker(level="learner", compression=False)
    array = np.zeros(200_000, np.uint8)
    for number in range(3):
        array[:] = number
        client.send_experiences({"x": array})
    array[:] = 9
    client._sender.mark_stale()
    got = [batch["x"] for _, batch in comm.collect_experiences(timeout=5.0)]
    assert [set(one.tolist()) for one in got] == [{0}, {1}, {2}]
    kept = [decode(one.fields[-1])["x"] for one in client._sender.writer.pending.kept]
    assert [set(one.tolist()) for one in kept] == [{0}, {1}, {2}]


def test_a_batch_too_large_to_decode_is_refused_at_the_worker(learner: Learner, worker: Worker) -> None:
    learner()
    with pytest.raises(BatchTooLarge, match="no more than 1,073,741,824 may travel"):
        worker().send_experiences({"zeros": np.zeros((1 << 30) + 1, np.uint8)})


def test_the_next_send_reports_an_entry_of_another_program(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker(0)
    client.send_experiences({"number": 1})
    server.client.xadd(keys.experiences(0), {"foo": "bar"})  # its id is the server's clock
    with pytest.raises(ServerFault, match="start this worker again"):
        client.send_experiences({"number": 2})
    again = worker(0)
    again.send_experiences({"number": 3})
    assert [batch["number"] for _, batch in comm.collect_experiences(timeout=5.0)] == [1, 3]


def test_a_worker_that_was_replaced_twice_is_not_counted_twice(learner: Learner, worker: Worker) -> None:
    comm, first = learner(), worker(0)
    first.send_experiences({"number": 1})
    worker(0).send_experiences({"number": 2})
    worker(0).send_experiences({"number": 3})
    first._heartbeat._thread.stop(5.0)
    first.close()
    assert (counts(comm).produced, counts(comm).lost) == (3, {})


def test_batches_that_vanished_are_counted_before_the_worker_writes_its_counts(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker()
    client._heartbeat._thread.stop(5.0)  # so that it does not write how many it has sent
    for number in range(3):
        client.send_experiences({"number": number})
    server.client.xdel(keys.experiences(0), f"{client.incarnation}-2")
    found = counts(comm)
    assert (found.produced, found.waiting, found.lost) == (3, 2, {"vanished": 1})


def test_a_batch_sent_twice_is_delivered_once(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker()
    client.send_experiences({"number": 1})
    writer = client._sender.writer
    writer.pending.newest, writer.size = None, writer.size._replace(through=0)  # as if the reply was lost
    client.send_experiences({"number": 1})
    assert len(comm.collect_experiences(timeout=5.0)) == 1
    assert comm.collect_experiences(timeout=0.1) == []


def test_sending_waits_for_the_learner_to_open_the_run(learner: Learner, worker: Worker) -> None:
    client = worker()
    with pytest.raises(DeadlineExceeded, match="no learner has opened the run"):
        client.send_experiences({"x": 1}, timeout=0.2)
    comm = learner()
    client.send_experiences({"x": 1})
    assert len(comm.collect_experiences(timeout=5.0)) == 1


def test_an_unsupported_value_is_refused_with_its_path(learner: Learner, worker: Worker) -> None:
    learner()
    with pytest.raises(UnsupportedType, match=r"info.*env"):
        worker().send_experiences({"obs": torch.zeros(2), "info": {"env": object()}})


def test_the_ancestors_message_travels_unchanged(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    message = {
        "worker_id": 0,
        "experiences": {
            "obs": torch.randn(5, 3),
            "actions": torch.tensor([1, 2, 3, 4, 5]),
            "rewards": torch.randn(5),
            "log_probs": torch.randn(5),
            "values": torch.randn(5),
            "dones": torch.tensor([True, False, False, True, False]),
            "legal_masks": torch.ones(5, 4, dtype=torch.bool),
        },
        "batch_size": 5,
        "timestamp": 1731000000.25,
        "steps_collected": 5,
        "games_played": 2,
    }
    client.send_experiences(message)
    [(_, batch)] = comm.collect_experiences(timeout=5.0)
    assert batch.rows == 5
    assert {key: batch[key] for key in message if key != "experiences"} == {
        key: value for key, value in message.items() if key != "experiences"
    }
    for name, tensor in message["experiences"].items():  # type: ignore[attr-defined]
        assert torch.equal(batch["experiences"][name], tensor)


@pytest.mark.on_every_engine
def test_several_threads_may_send_at_once(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    threads = [
        threading.Thread(target=lambda n=n: [client.send_experiences({"from": n, "i": i}) for i in range(25)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got = [(batch["from"], batch["i"]) for _, batch in comm.collect_experiences()]
    assert sorted(got) == [(n, i) for n in range(4) for i in range(25)]
    wait_until("all are counted", lambda: comm.collect_experiences() == [] and counts(comm).delivered == 100)
