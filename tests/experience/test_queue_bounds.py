"""The bounds of a queue: what happens when it is full, and that dropped batches are counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from conftest import Server, wait_until

from rlbroker import Fenced, QueueCounts, QueueFull, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.errors import BatchTooLarge, ConnectionFailed

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def counts(comm: WorkerCommunicator, worker_id: int = 0) -> QueueCounts:
    found: QueueCounts = comm.get_queue_info()["counts"][worker_id]
    return found


def test_a_full_queue_blocks_until_there_is_room(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_queue_size=2), worker()
    got: list[int] = []
    sending = threading.Thread(
        target=lambda: [client.send_experiences({"number": number}) for number in range(20)]
    )
    sending.start()
    while len(got) < 20:
        got += [batch["number"] for _, batch in comm.collect_experiences(timeout=5.0)]
    sending.join()
    assert got == list(range(20))


def test_batches_in_the_learners_hands_do_not_count_as_waiting(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_queue_size=1), worker()
    client.send_experiences({"number": 1})
    comm.collect_experiences(timeout=5.0)
    assert client.send_experiences({"number": 2}, timeout=0.2)


@pytest.mark.on_every_engine
def test_a_full_queue_says_whether_its_learner_is_slow_or_silent(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(max_queue_size=1), worker()
    wait_until("it has a heartbeat", lambda: server.client.hexists(keys.meta, "seen:learner"))
    client.send_experiences({})
    with pytest.raises(QueueFull, match="collects or acknowledges too slowly"):
        client.send_experiences({}, timeout=0.1)
    comm.cleanup(stop_workers=False)
    server.client.hincrbyfloat(keys.meta, "seen:learner", -60)
    with pytest.raises(QueueFull, match=r"; the learner has been silent for 6\d s; start it again"):
        client.send_experiences({}, timeout=0.1)


def test_the_byte_bound_counts_batches_in_the_learners_hands(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_queue_bytes=3000, acknowledge="manual"), worker(compression=False)
    batch = {"obs": np.random.default_rng(1).bytes(1000)}
    assert client.send_experiences(batch)
    assert client.send_experiences(batch)
    pairs = comm.collect_experiences(timeout=5.0)
    with pytest.raises(QueueFull, match=r"1 in the learner's hands|2 in the learner's hands"):
        client.send_experiences(batch, timeout=0.2)
    comm.acknowledge(pairs)
    assert client.send_experiences(batch, timeout=5.0)


def test_a_restarted_worker_counts_the_bytes_of_its_earlier_incarnation(
    learner: Learner, worker: Worker
) -> None:
    comm = learner(max_queue_bytes=3000)
    batch = {"obs": np.random.default_rng(1).bytes(1000)}
    for _ in range(2):
        worker(0).send_experiences(batch)
    with pytest.raises(QueueFull):
        worker(0).send_experiences(batch, timeout=0.2)
    assert len(comm.collect_experiences(timeout=5.0)) == 2


def test_a_batch_larger_than_the_bound_is_refused_at_once(learner: Learner, worker: Worker) -> None:
    learner(max_queue_bytes=3000)
    with pytest.raises(BatchTooLarge, match=r"max_queue_bytes"):
        worker().send_experiences({"obs": np.random.default_rng(1).random(1000)})


@pytest.mark.on_every_engine
@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
def test_dropped_batches_are_counted(learner: Learner, worker: Worker, policy: str) -> None:
    comm, client = learner(max_queue_size=3, when_full=policy), worker()
    receipts = [client.send_experiences({"number": number}) for number in range(10)]
    kept = [batch["number"] for _, batch in comm.collect_experiences()]
    comm.collect_experiences()
    assert kept == ([7, 8, 9] if policy == "drop_oldest" else [0, 1, 2])
    assert counts(comm).lost == {policy.replace("drop_", "dropped_"): 7}
    assert counts(comm).produced == 10
    assert sum(bool(receipt) for receipt in receipts) == (10 if policy == "drop_oldest" else 3)
    assert sum(receipt.dropped for receipt in receipts) == (7 if policy == "drop_oldest" else 0)


def test_a_worker_may_override_when_full(learner: Learner, worker: Worker) -> None:
    learner(max_queue_size=1)
    client = worker(when_full="drop_newest")
    assert client.send_experiences({"x": 1})
    assert not client.send_experiences({"x": 2})


def test_drop_oldest_never_drops_batches_in_the_learners_hands(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_queue_size=2, when_full="drop_oldest", acknowledge="manual"), worker()
    for number in range(2):
        client.send_experiences({"number": number})
    held = comm.collect_experiences()
    for number in range(2, 6):
        client.send_experiences({"number": number})
    assert comm.acknowledge(held) == 2
    assert [batch["number"] for _, batch in comm.collect_experiences()] == [4, 5]


def test_drop_oldest_obeys_the_byte_bound(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_queue_bytes=5000, when_full="drop_oldest"), worker()
    noise = np.random.default_rng(1)
    for number in range(10):
        client.send_experiences({"number": number, "noise": noise.bytes(1000)})
    assert [batch["number"] for _, batch in comm.collect_experiences()] == [6, 7, 8, 9]


def test_a_batch_whose_drop_cannot_be_counted_is_not_counted_as_produced(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, client = learner(max_queue_size=1), worker(when_full="drop_newest")
    client.send_experiences({"number": 1})

    def fail(*arguments: object, **options: object) -> None:
        raise ConnectionFailed("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(client._connection, "run", fail)
        with pytest.raises(ConnectionFailed):
            client.send_experiences({"number": 2})
    assert (counts(comm).produced, counts(comm).lost) == (1, {})


def test_a_sender_in_a_second_thread_keeps_its_own_timeout(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_queue_size=1), worker()
    client.send_experiences({"x": 1})
    first = threading.Thread(target=client.send_experiences, args=({"x": 2},), kwargs={"timeout": 10.0})
    first.start()
    wait_until("the first thread waits", lambda: client._sender.room_seconds > 0)
    began = time.monotonic()
    with pytest.raises(QueueFull, match="another thread"):
        client.send_experiences({"x": 3}, timeout=0.2)
    assert time.monotonic() - began < 5.0

    def makes_room() -> bool:
        comm.collect_experiences()
        return not first.is_alive()

    wait_until("the first thread had room", makes_room)
    assert comm.get_queue_info()["counts"][0].produced == 2


def test_bytes_stay_bounded_after_acknowledging_out_of_order(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm = learner(acknowledge="manual", max_queue_bytes=10_000)
    batch = {"noise": np.random.default_rng(1).bytes(2000)}
    first = worker(worker_id=0)
    for _ in range(4):
        first.send_experiences(batch)
    comm.acknowledge(comm.collect_experiences(timeout=5.0)[2:])
    second = worker(worker_id=0, when_full="drop_newest")
    while second.send_experiences(batch):
        pass
    held = sum(len(fields[b"data"]) for _, fields in server.client.xrange(keys.experiences(0)))
    assert 8_000 < held <= 10_000


def test_a_fenced_worker_drops_no_batch_of_its_successor(learner: Learner, worker: Worker) -> None:
    comm = learner(max_queue_size=1, when_full="drop_oldest")
    old = worker(worker_id=0)
    old.send_experiences({"from": "old"})
    new = worker(worker_id=0)
    new.send_experiences({"from": "new"})
    with pytest.raises(Fenced):
        old.send_experiences({"from": "old again"})
    assert [batch["from"] for _, batch in comm.collect_experiences(timeout=5.0)] == ["new"]


def test_counts_of_earlier_incarnations_are_added_up(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm = learner(max_queue_size=1, when_full="drop_newest")
    for _ in range(6):
        client = worker(worker_id=0)
        for _ in range(3):
            client.send_experiences({"x": 1})
    assert counts(comm).lost == {"dropped_newest": 17}
    names = [name for name in server.client.hkeys(keys.counts(0)) if name.startswith(b"dropped_newest")]
    assert len(names) <= 3


def test_a_stop_ends_the_wait_for_room(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_queue_size=1), worker()
    client.send_experiences({"number": 1})
    threading.Timer(0.2, comm.send_control_command, ("stop",)).start()
    receipt = client.send_experiences({"number": 2}, timeout=10.0)
    assert not receipt
    client.poll()
    assert not client.running
    assert counts(comm).lost == {"stopped": 1}
