"""A tour of rlbroker, in the order of a first use. Each stop runs on fakeredis and on a real server."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import wait_until

from rlbroker import Command, Fenced, Outcome, QueueFull, RoundIncomplete, WorkerClient, WorkerCommunicator

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def test_1_weights_reach_a_worker(learner: Learner, worker: Worker) -> None:
    """The learner publishes a state dict once. Each worker loads it, bit by bit the same."""
    trained, acting = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)

    receipt = learner().send_model_weights(trained.state_dict())
    version = worker().load_weights(acting, timeout=5.0)

    assert receipt.version == version == 1
    assert torch.equal(trained.weight, acting.weight)


def test_2_a_worker_polls_for_newer_weights(learner: Learner, worker: Worker) -> None:
    """`poll` is cheap until there is something to apply. Then it applies the newest version."""
    comm, client = learner(), worker()
    model = torch.nn.Linear(4, 2)
    comm.send_model_weights(model.state_dict())
    client.load_weights(model)
    assert not client.poll(model)

    comm.send_model_weights(model.state_dict())

    wait_until("the worker runs version 2", lambda: client.poll(model))
    assert client.version == 2


def test_3_experiences_arrive_unchanged(learner: Learner, worker: Worker) -> None:
    """A batch is a dictionary of tensors, arrays and plain values, nested or not."""
    comm, client = learner(), worker(worker_id=1)
    client.send_experiences(
        {
            "obs": torch.arange(6, dtype=torch.bfloat16).reshape(3, 2),
            "actions": np.array([0, 1, 1]),
            "info": {"episode_return": 17.5, "env": "CartPole-v1"},
        }
    )

    [(worker_id, batch)] = comm.collect_experiences(timeout=5.0)

    assert worker_id == 1
    assert batch["obs"].dtype == torch.bfloat16
    assert batch["actions"].tolist() == [0, 1, 1]
    assert batch["info"] == {"episode_return": 17.5, "env": "CartPole-v1"}


def test_4_a_batch_knows_its_worker_and_version(learner: Learner, worker: Worker) -> None:
    """They are attributes of the batch, so they cannot collide with your keys."""
    comm, client = learner(), worker()
    comm.send_model_weights({"w": np.zeros(3)})
    client.load_weights({})
    client.send_experiences({"version": "my own", "obs": np.zeros((128, 4))})
    comm.send_model_weights({"w": np.ones(3)})

    [(_, batch)] = comm.collect_experiences(timeout=5.0)

    assert batch["version"] == "my own"
    assert (batch.worker_id, batch.version, batch.staleness, batch.rows, batch.sequence) == (0, 1, 1, 128, 1)


def test_5_an_unacknowledged_batch_is_delivered_again(learner: Learner, worker: Worker) -> None:
    """A learner that dies before it acknowledges its batches loses none of them: the next learner gets them first."""
    first, client = learner(acknowledge="manual"), worker()
    for number in range(3):
        client.send_experiences({"number": number})
    pairs = first.collect_experiences(timeout=5.0)
    first.acknowledge(pairs[:1])

    second = learner(acknowledge="manual")

    assert [batch["number"] for _, batch in second.collect_experiences(timeout=5.0)] == [1, 2]


def test_6_a_full_queue_blocks_and_then_raises(learner: Learner, worker: Worker) -> None:
    """By default `send_experiences` waits for room. After the timeout it raises `QueueFull`; the batch was not sent."""
    learner(max_queue_size=2)
    client = worker()
    client.send_experiences({"number": 1})
    client.send_experiences({"number": 2})

    with pytest.raises(QueueFull, match="2 batches waiting"):
        client.send_experiences({"number": 3}, timeout=0.2)


def test_7_or_it_drops_batches_and_counts_them(learner: Learner, worker: Worker) -> None:
    """The number of produced batches is always that of the delivered ones plus the lost ones, by reason."""
    comm, client = learner(max_queue_size=2, when_full="drop_oldest"), worker()
    for number in range(5):
        client.send_experiences({"number": number})

    assert [batch["number"] for _, batch in comm.collect_experiences()] == [3, 4]
    comm.collect_experiences()
    counts = comm.get_queue_info()["counts"][0]
    assert counts.produced == 5
    assert (counts.delivered, counts.lost) == (2, {"dropped_oldest": 3})


def test_8_commands_have_an_outcome(learner: Learner, worker: Worker) -> None:
    """Every worker acknowledges every command: done, failed with the error's text, unknown, or expired."""
    comm = learner()
    good, bad = worker(), worker()
    good.on_command("set_lr", lambda lr: None)
    bad.on_command("set_lr", lambda lr: 1 / lr)

    command = comm.send_control_command("set_lr", 0)
    wait_until("the good worker has run the command", lambda: good.poll() or not _is_waiting(command, good))
    wait_until("the bad worker has run the command", lambda: bad.poll() or not _is_waiting(command, bad))

    outcomes = command.wait(timeout=5.0)
    assert outcomes[0].state == "done"
    assert str(outcomes[1]) == "failed: ZeroDivisionError: division by zero"


def test_9_stop_ends_the_loop(learner: Learner, worker: Worker) -> None:
    """A worker's loop is `while worker.running`."""
    comm, client = learner(), worker()

    command = comm.send_control_command("stop")
    while client.running:
        client.poll()

    assert command.wait(timeout=5.0)[0]


def test_10_every_missed_version_is_recorded(learner: Learner, worker: Worker) -> None:
    """A worker that is busy while versions are published applies the newest one. The others are recorded as missed."""
    comm, client = learner(), worker()
    for _ in range(4):
        comm.send_model_weights({"w": np.zeros(2)})
    model, applied = {"w": np.ones(2)}, set()
    while client.version < 4:
        if client.poll(model):
            applied.add(client.version)

    def missed() -> set[int]:
        records = comm.missed_updates()[0].records
        return {version for record in records for version in range(record.first, record.last + 1)}

    wait_until("the others are recorded", lambda: missed() == {1, 2, 3, 4} - applied)
    assert comm.missed_updates()[0].total == 4 - len(applied)


def test_11_one_process_for_each_worker_id(learner: Learner, worker: Worker) -> None:
    """A second process with the same id fences the first: its batches are refused from then on."""
    comm = learner()
    old = worker(worker_id=3)
    new = worker(worker_id=3)

    with pytest.raises(Fenced):
        old.send_experiences({"from": "old"})
    new.send_experiences({"from": "new"})

    assert [batch["from"] for _, batch in comm.collect_experiences(timeout=5.0)] == ["new"]
    assert new.incarnation > old.incarnation


def test_12_the_roster_lists_the_members(learner: Learner, worker: Worker) -> None:
    """A worker without an id gets the lowest free one. A worker that leaves is removed from the roster."""
    comm = learner()
    first, second = worker(), worker()
    assert [info.worker_id for info in comm.workers()] == [first.worker_id, second.worker_id] == [0, 1]

    first.close()

    assert [info.worker_id for info in comm.workers()] == [1]
    assert worker().worker_id == 0


def test_13_a_round_is_one_batch_of_one_version_from_each_worker(learner: Learner, worker: Worker) -> None:
    """For synchronous training. Older batches are counted as stale; further ones wait for the next round."""
    comm, first, second = learner(), worker(), worker()
    first.send_experiences({"from": "before the first version"})
    comm.send_model_weights({"w": np.zeros(3)})
    for client in (first, second):
        client.load_weights({}, timeout=5.0)
        client.send_experiences({"from": client.worker_id})

    pairs = comm.collect_round()

    assert [(worker_id, batch["from"], batch.version) for worker_id, batch in pairs] == [(0, 0, 1), (1, 1, 1)]
    assert comm.get_queue_info()["counts"][0].lost == {"stale": 1}

    first.send_experiences({"from": 0})
    with pytest.raises(RoundIncomplete) as raised:
        comm.collect_round(timeout=0.2)
    assert list(raised.value.missing) == [1]

    second.send_experiences({"from": 1})
    assert [worker_id for worker_id, _ in comm.collect_round()] == [0, 1]


def test_14_the_end_of_a_run_reaches_workers_that_join_later(learner: Learner, worker: Worker) -> None:
    """`stop_workers`, `cleanup` and leaving the `with` block end the run. A new learner opens it again."""
    comm, present = learner(), worker()

    assert comm.stop_workers(timeout=0) == {0: Outcome("waiting")}
    wait_until("the worker stops", lambda: present.poll() or not present.running)

    assert comm.stop_workers() == {0: Outcome("done")}
    assert not worker().running

    learner()
    assert worker().running


def _is_waiting(command: Command, client: WorkerClient) -> bool:
    return command.outcomes()[client.worker_id].state == "waiting"
