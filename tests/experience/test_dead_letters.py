"""Dead letters: batches that no learner can use are set aside, counted, listed, retried and purged."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from conftest import Server, wait_until

from rlbroker import ConnectionFailed, WorkerClient, WorkerCommunicator
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.codec.message import encode
from rlbroker.experience import dead_letters, watched_streams
from rlbroker.experience.entry_reader import EntryReader

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


@pytest.fixture(autouse=True)
def _recheck_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_streams, "RECHECK_SECONDS", 0.1)


def damage(server: Server, keys: Keys, sequence: int, data: bytes = b"damaged") -> None:
    """Write the next batch of worker 0 as a broken worker does."""
    fields: Any = {"version": 0, "rows": 1, "raw_bytes": 1, "stored_bytes": len(data), "sent_at": 0}
    incarnation = server.client.hget(keys.life(0), "incarnation").decode()
    server.client.xadd(keys.experiences(0), fields | {"data": data}, id=f"{incarnation}-{sequence}")


def let_learners_die(learner: Learner, times: int, **settings: Any) -> WorkerCommunicator:
    """Let learners collect and die, one after the other; return one more that lives."""
    for _ in range(times):
        comm = learner(**settings)
        wait_until("a batch was collected", partial(comm.collect_experiences, 0.1))
        comm._thread.stop(5.0)
    return learner(**settings)


def test_a_corrupt_batch_becomes_a_dead_letter_and_later_batches_are_delivered(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    comm, client = learner(), worker()
    client.send_experiences({"number": 1})
    damage(server, keys, 2)
    damage(server, keys, 3, encode({"number": 3})[:-1])
    comm.collect_experiences(timeout=5.0)
    comm.collect_experiences()
    letters = comm.dead_letters()
    assert [(one.worker_id, one.incarnation, one.sequence, one.reason) for one in letters] == [
        (0, client.incarnation, 2, "corrupt"),
        (0, client.incarnation, 3, "corrupt"),
    ]
    assert all("WireError" in one.detail and one.deliveries == 1 for one in letters)
    assert comm.dead_letters(worker_id=0) == letters
    assert comm.dead_letters(worker_id=5) == []
    counts = comm.get_queue_info()["counts"][0]
    assert (counts.delivered, counts.lost, counts.produced) == (1, {"corrupt": 2}, 3)


@pytest.mark.on_every_engine
def test_a_batch_over_which_learners_died_is_poison(learner: Learner, worker: Worker) -> None:
    client = worker()
    comm = learner(acknowledge="manual", max_deliveries=3)
    client.send_experiences({"number": 1})
    comm.collect_experiences(timeout=5.0)
    comm = let_learners_die(learner, 2, acknowledge="manual", max_deliveries=3)
    wait_until("it is a dead letter", lambda: comm.collect_experiences() or comm.dead_letters())
    (letter,) = comm.dead_letters()
    assert (letter.sequence, letter.reason, letter.deliveries) == (1, "poison", 3)
    assert comm.get_queue_info()["counts"][0].lost == {"poison": 1}


def test_batches_collected_with_a_poison_batch_are_not_blamed(learner: Learner, worker: Worker) -> None:
    client = worker()
    comm = learner(acknowledge="manual", max_deliveries=4)
    for number in range(1, 4):
        client.send_experiences({"number": number})
    comm.collect_experiences(timeout=5.0)
    used: list[int] = []
    for _ in range(12):  # learners that die over batch 2, and acknowledge every other one
        comm = learner(acknowledge="manual", max_deliveries=4)
        while pairs := comm.collect_experiences(timeout=0.3):
            sequences = [batch.sequence for _, batch in pairs]
            if 2 in sequences:
                break
            comm.acknowledge(pairs)
            used += sequences
        if comm.dead_letters():
            break
    assert sorted(used) == [1, 3]
    assert [(one.sequence, one.reason) for one in comm.dead_letters()] == [(2, "poison")]


def test_without_max_deliveries_a_batch_is_never_poison(learner: Learner, worker: Worker) -> None:
    client = worker()
    comm = learner(max_deliveries=None)
    client.send_experiences({"number": 1})
    comm.collect_experiences(timeout=5.0)
    comm = let_learners_die(learner, 12, acknowledge="manual", max_deliveries=None)
    assert wait_until("it was collected", lambda: comm.collect_experiences(timeout=0.1))


def test_a_dead_letter_is_counted_once_if_the_next_read_fails(
    server: Server, learner: Learner, worker: Worker, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, _ = learner(), worker()
    damage(server, keys, 1)
    read, calls = EntryReader.read, itertools.count()

    def fail_later(*arguments: Any) -> bool:
        if next(calls) > 1:
            raise ConnectionFailed("broken on purpose")
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(EntryReader, "read", fail_later)
        with pytest.raises(ConnectionFailed):
            comm.collect_experiences()
    assert len(comm.dead_letters()) == 1
    assert comm.collect_experiences() == []
    counts = comm.get_queue_info()["counts"][0]
    assert (counts.produced, counts.lost) == (1, {"corrupt": 1})


def test_a_retried_batch_stays_retried_when_counts_are_restored(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    comm, _ = learner(), worker()
    damage(server, keys, 1)
    comm.collect_experiences(timeout=0.1)
    comm.retry_dead_letters(comm.dead_letters())
    comm._pending.restore()
    counts = comm.get_queue_info()["counts"][0]
    assert (counts.produced, counts.waiting, counts.lost) == (1, 1, {})


def test_a_learner_remembers_what_others_retried(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    comm, _ = learner(), worker()
    damage(server, keys, 1)
    comm.collect_experiences(timeout=0.1)
    connection = Connection(client=server.another_client())
    assert dead_letters.retry_letters(connection, keys, comm.dead_letters()) == 1
    connection.close()
    wait_until(
        "the learner knows of the retry, and the batch is a dead letter again",
        lambda: comm.collect_experiences(timeout=0.1) or comm._pending._counted[0]["retried_corrupt"],
    )
    server.client.delete(keys.counts(0))
    comm._pending.restore()
    assert server.client.hget(keys.counts(0), "retried_corrupt") == b"1"


@pytest.mark.on_every_engine
def test_a_retried_dead_letter_is_collected_once_more(learner: Learner, worker: Worker) -> None:
    client = worker()
    comm = learner(acknowledge="manual", max_deliveries=1)
    client.send_experiences({"number": 1})
    comm.collect_experiences(timeout=5.0)
    comm = learner(acknowledge="manual", max_deliveries=1)
    wait_until("it is a dead letter", lambda: comm.collect_experiences() or comm.dead_letters())
    letters = comm.dead_letters()
    assert comm.retry_dead_letters(letters) == 1
    assert comm.retry_dead_letters(letters) == 0
    assert comm.get_queue_info()["counts"][0].waiting == 1
    pairs = wait_until("it is collected", lambda: comm.collect_experiences(timeout=0.1))
    assert [(batch.incarnation, batch.sequence) for _, batch in pairs] == [(client.incarnation, 1)]
    assert comm.acknowledge(pairs) == 1
    counts = comm.get_queue_info()["counts"][0]
    assert (counts.produced, counts.delivered, counts.lost) == (1, 1, {})
    assert comm.dead_letters() == []


def test_a_retried_batch_that_is_still_corrupt_is_counted_once(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    comm, _ = learner(), worker()
    damage(server, keys, 1)
    wait_until("it is a dead letter", lambda: comm.collect_experiences() or comm.dead_letters())
    first = comm.dead_letters()
    comm.retry_dead_letters(first)
    assert comm.dead_letters() == []
    wait_until("it is a dead letter again", lambda: comm.collect_experiences() or comm.dead_letters())
    (again,) = comm.dead_letters()
    assert (again.sequence, again.reason, again.entry_id != first[0].entry_id) == (1, "corrupt", True)
    assert comm.get_queue_info()["counts"][0].lost == {"corrupt": 1}


def test_purged_dead_letters_stay_counted(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    comm, _ = learner(), worker()
    for sequence in range(1, 4):
        damage(server, keys, sequence)
    wait_until("they are dead letters", lambda: comm.collect_experiences() or len(comm.dead_letters()) == 3)
    assert comm.purge_dead_letters(comm.dead_letters()[:1]) == 1
    assert [one.sequence for one in comm.dead_letters()] == [2, 3]
    assert comm.purge_dead_letters() == 2
    assert comm.purge_dead_letters() == 0
    assert comm.get_queue_info()["counts"][0].lost == {"corrupt": 3}
    assert server.client.hget(keys.counts(0), "dead_bytes") == b"0"


@pytest.mark.parametrize("bound", ["entries", "bytes"])
def test_the_oldest_dead_letters_are_deleted_beyond_the_bound(
    server: Server,
    learner: Learner,
    worker: Worker,
    keys: Keys,
    bound: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if bound == "entries":
        monkeypatch.setattr(dead_letters, "KEPT", 2)
    comm, _ = learner(max_queue_bytes=2500 if bound == "bytes" else 1 << 20), worker()
    for sequence in range(1, 6):
        damage(server, keys, sequence, b"x" * 900)
        wait_until("it was read", lambda: comm.collect_experiences() or not _length(server, keys))
    assert [one.sequence for one in comm.dead_letters()] == [4, 5]
    assert comm.get_queue_info()["counts"][0].lost == {"corrupt": 5}


def _length(server: Server, keys: Keys) -> int:
    return int(server.client.xlen(keys.experiences(0)))
