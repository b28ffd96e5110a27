"""Rounds: the same number of batches of one version from each worker, and who is missing if there are not enough."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
from conftest import Server, wait_until
from crashed import end_at_once
from lossy import Lossy

from rlbroker import (
    Batch,
    ConnectionFailed,
    Fenced,
    InvalidArgument,
    QueueCounts,
    RoundIncomplete,
    SamplesPerInsert,
    WorkerClient,
    WorkerCommunicator,
)
from rlbroker.backend.keys import Keys

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]

WEIGHTS = {"w": np.zeros(3)}


def publish(comm: WorkerCommunicator, *clients: WorkerClient) -> int:
    """Publish a version, and have workers load it."""
    version = comm.send_model_weights(WEIGHTS).version
    for client in clients:
        assert client.load_weights({}, timeout=5.0) == version
    return version


def send(client: WorkerClient, *numbers: int) -> None:
    for number in numbers:
        client.send_experiences({"number": number})


def numbers(pairs: list[tuple[int, Batch]]) -> list[tuple[int, int]]:
    return [(worker_id, batch["number"]) for worker_id, batch in pairs]


def counts(comm: WorkerCommunicator, worker_id: int = 0) -> QueueCounts:
    found: QueueCounts = comm.get_queue_info()["counts"][worker_id]
    return found


def wait_until_alive(comm: WorkerCommunicator, *worker_ids: int) -> None:
    wait_until(f"workers {worker_ids} are alive", lambda: comm._roster.alive == set(worker_ids), 10.0)


def silence(client: WorkerClient) -> None:
    """Stop a worker's heartbeats, as if its process had died."""
    client._heartbeat._thread.stop(5.0)


@contextmanager
def meanwhile(what: Callable[[], Any], *, after: float = 0.2) -> Iterator[None]:
    """Do something in another thread a moment after the block has begun, and wait for it at the end."""
    errors: list[BaseException] = []

    def do() -> None:
        try:
            what()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    timer = threading.Timer(after, do)
    timer.start()
    try:
        yield
    finally:
        timer.join()
    if errors:
        raise errors[0]


# What a round consists of


@pytest.mark.on_every_engine
def test_a_round_has_one_batch_of_the_latest_version_from_each_worker(
    learner: Learner, worker: Worker
) -> None:
    comm, clients = learner(), [worker(), worker(), worker()]
    for step in range(3):
        publish(comm, *clients)
        for client in reversed(clients):
            send(client, 10 * step + client.worker_id)
        pairs = comm.collect_round()
        assert numbers(pairs) == [(one, 10 * step + one) for one in range(3)]
        assert [batch.version for _, batch in pairs] == [step + 1] * 3


def test_each_worker_sends_as_many_batches_as_are_asked_for(learner: Learner, worker: Worker) -> None:
    comm, clients = learner(), [worker(), worker()]
    publish(comm, *clients)
    send(clients[1], 1, 2)
    send(clients[0], 3)
    with meanwhile(lambda: send(clients[0], 4)):
        assert numbers(comm.collect_round(per_worker=2)) == [(0, 3), (0, 4), (1, 1), (1, 2)]


@pytest.mark.on_every_engine
def test_older_batches_are_stale_and_further_ones_stay(learner: Learner, worker: Worker) -> None:
    comm, clients = learner(), [worker(), worker()]
    publish(comm, *clients)
    for client in clients:
        send(client, 1, 2, 3)
    publish(comm, *clients)
    for client in clients:
        send(client, 4, 5)
    assert numbers(comm.collect_round()) == [(0, 4), (1, 4)]
    for one in (0, 1):
        assert counts(comm, one).lost == {"stale": 3}
        assert counts(comm, one).produced == 5
    assert numbers(comm.collect_round()) == [(0, 5), (1, 5)]
    comm.collect_experiences()
    for one in (0, 1):
        found = counts(comm, one)
        assert (found.delivered, found.lost, found.waiting, found.in_hand) == (2, {"stale": 3}, 0, 0)


def test_newer_batches_stay_for_later_calls(learner: Learner, worker: Worker) -> None:
    comm, first, second = learner(), worker(), worker()
    publish(comm, first, second)
    send(first, 1)
    send(second, 1)
    publish(comm, first, second)
    send(first, 2)
    send(second, 2)
    assert numbers(comm.collect_round(version=1)) == [(0, 1), (1, 1)]
    assert numbers(comm.collect_round(version=2)) == [(0, 2), (1, 2)]


def test_what_no_round_takes_comes_with_collect_experiences(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    publish(comm, client)
    send(client, 1, 2)
    publish(comm, client)
    send(client, 3)
    assert numbers(comm.collect_round(version=1)) == [(0, 1)]
    assert numbers(comm.collect_experiences()) == [(0, 2), (0, 3)]


def test_only_the_workers_of_a_round_are_read(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    """The batches of others, and more of one's own than the round needs, do not pile up in the learner's memory."""
    comm, clients = learner(), [worker(), worker()]
    publish(comm, *clients)
    send(clients[0], *range(300))
    for _ in range(3):
        with meanwhile(lambda: send(clients[1], 1), after=0.05):
            assert len(comm.collect_round()) == 2
    assert len(comm._pending.of_stream(comm._collector._streams.stream("0"))) <= 10
    assert counts(comm).waiting >= 290


def test_batches_from_before_the_first_version_are_a_round(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    send(client, 1)
    assert numbers(comm.collect_round()) == [(0, 1)]


def test_a_version_in_the_background_is_the_latest(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    publish(comm, client)
    send(client, 1)
    comm.send_model_weights(WEIGHTS, wait=False)

    def follow() -> None:
        wait_until("version 2 is loaded", lambda: client.poll({}))
        send(client, 2)

    with meanwhile(follow, after=0.0):
        assert numbers(comm.collect_round()) == [(0, 2)]


def test_a_version_that_failed_in_the_background_has_no_round(
    learner: Learner, worker: Worker, server: Server
) -> None:
    away = False
    line = Lossy(server.another_client(), lambda: away)
    comm, client = learner(redis_url=None, redis_client=line.client, timeout=0.5), worker()
    publish(comm, client)
    send(client, 1, 2, 3)
    away = True
    receipt = comm.send_model_weights(WEIGHTS, wait=False)
    wait_until("it has failed", lambda: receipt.done)
    away = False
    for _ in range(2):
        with pytest.raises(ConnectionFailed):
            comm.collect_round(timeout=5.0)
    assert numbers(comm.collect_round(version=1, timeout=5.0)) == [(0, 1)]
    away = True
    with pytest.raises(ConnectionFailed):
        comm.send_model_weights(WEIGHTS)
    away = False
    assert numbers(comm.collect_round(timeout=5.0)) == [(0, 2)]  # the caller has the error


def test_a_round_takes_its_version_whatever_max_staleness_is(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_staleness=0), worker()
    publish(comm, client)
    send(client, 1, 2)
    publish(comm, client)
    pairs = comm.collect_round(version=1)
    assert numbers(pairs) == [(0, 1)]
    assert pairs[0][1].staleness == 1
    assert comm.collect_experiences() == []
    assert counts(comm).lost == {"stale": 1}


def test_a_damaged_batch_does_not_count_for_a_round(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker()
    publish(comm, client)
    send(client, 1)
    fields: Any = {
        "version": 1,
        "rows": 1,
        "raw_bytes": 1,
        "stored_bytes": 7,
        "sent_at": 0,
        "data": b"damaged",
    }
    server.client.xadd(keys.experiences(0), fields, id=f"{client.incarnation}-2")
    with pytest.raises(RoundIncomplete, match="has sent 1 of 2"):
        comm.collect_round(per_worker=2, timeout=0.3)
    assert [letter.reason for letter in comm.dead_letters()] == ["corrupt"]
    assert numbers(comm.collect_round()) == [(0, 1)]


# Acknowledging


def test_the_next_round_acknowledges(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    publish(comm, client)
    send(client, 1, 2)
    comm.collect_round()
    assert counts(comm).delivered == 0
    comm.collect_round()
    assert counts(comm).delivered == 1
    comm.collect_experiences()
    assert counts(comm).delivered == 2


@pytest.mark.on_every_engine
def test_with_manual_the_caller_acknowledges_a_round(learner: Learner, worker: Worker) -> None:
    comm, clients = learner(acknowledge="manual"), [worker(), worker()]
    publish(comm, *clients)
    for client in clients:
        send(client, 1)
    publish(comm, *clients)
    for client in clients:
        send(client, 2, 3)
    pairs = comm.collect_round()
    assert counts(comm).lost == {"stale": 1}
    comm.collect_round()
    assert counts(comm).delivered == 0
    assert comm.acknowledge(pairs) == 2
    assert counts(comm).delivered == 1


def test_a_learner_that_dies_over_a_round_loses_none_of_it(learner: Learner, worker: Worker) -> None:
    first, clients = learner(), [worker(), worker()]
    publish(first, *clients)
    for client in clients:
        send(client, 1)
    assert len(first.collect_round()) == 2
    end_at_once(first)
    second = learner()
    assert numbers(second.collect_round(version=1)) == [(0, 1), (1, 1)]


def test_learners_that_die_over_a_round_have_all_of_it_in_suspicion(learner: Learner, worker: Worker) -> None:
    """A batch over which learners died is not returned alone, as it belongs to a round."""
    comm, clients = learner(max_deliveries=3), [worker(), worker()]
    publish(comm, *clients)
    for client in clients:
        send(client, 1)
    for _ in range(3):
        assert numbers(comm.collect_round(version=1)) == [(0, 1), (1, 1)]
        end_at_once(comm)
        comm = learner(max_deliveries=3)
    with pytest.raises(RoundIncomplete):
        comm.collect_round(version=1, timeout=0.3)
    assert [letter.reason for letter in comm.dead_letters()] == ["poison", "poison"]


def test_marks_cover_the_rounds_that_were_returned(learner: Learner, worker: Worker) -> None:
    first, client = learner(acknowledge="manual"), worker()
    publish(first, client)
    send(client, 1, 2)
    first.collect_round()
    marks = first.marks()
    end_at_once(first)
    second = learner(acknowledge="manual")
    second.restore(marks)
    assert numbers(second.collect_round(version=1)) == [(0, 2)]
    with pytest.raises(InvalidArgument, match="before the first collect"):
        second.restore(marks)


# Who is missing


@pytest.mark.on_every_engine
def test_at_the_timeout_the_error_says_who_is_missing_and_why(learner: Learner, worker: Worker) -> None:
    comm = learner(lease_seconds=1.0)
    gone, dead, slow, idle, good = (worker(number) for number in range(5))
    publish(comm, slow)
    publish(comm, idle, good)
    wait_until("the roster shows version 1", lambda: comm.workers()[2].version == 1)
    wait_until("the roster shows version 2", lambda: comm.workers()[3].version == 2)
    gone.close()
    silence(dead)
    send(good, 1)
    wait_until("worker 1 is away", lambda: comm.workers()[0].state == "away", 10.0)
    with pytest.raises(RoundIncomplete, match="has 1 of 6 batches") as raised:
        comm.collect_round(workers=[0, 1, 2, 3, 4, 7], timeout=0.5)
    missing = raised.value.missing
    assert missing.pop(1).startswith("away, last seen")
    assert missing == {
        0: "it left the run",
        2: "at its last heartbeat it still ran version 1",
        3: "its queue is empty",
        7: "it never joined",
    }


@pytest.mark.on_every_engine
def test_what_was_gathered_comes_with_the_next_round(learner: Learner, worker: Worker) -> None:
    comm, first, second = learner(), worker(), worker()
    publish(comm, first, second)
    send(second, 1)
    for _ in range(2):
        with pytest.raises(RoundIncomplete) as raised:
            comm.collect_round(timeout=0.1)
        assert list(raised.value.missing) == [0]
    send(first, 2)
    assert numbers(comm.collect_round()) == [(0, 2), (1, 1)]


def test_a_smaller_round_leaves_what_a_larger_one_has_gathered(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    publish(comm, client)
    send(client, 1, 2)
    with pytest.raises(RoundIncomplete):
        comm.collect_round(per_worker=3, timeout=0.1)
    assert numbers(comm.collect_round()) == [(0, 1)]
    assert numbers(comm.collect_round()) == [(0, 2)]


def test_or_with_collect_experiences(learner: Learner, worker: Worker) -> None:
    comm, first, _ = learner(), worker(), worker()
    publish(comm, first)
    send(first, 1, 2)
    with pytest.raises(RoundIncomplete):
        comm.collect_round(timeout=0.1)
    assert numbers(comm.collect_experiences()) == [(0, 1), (0, 2)]


def test_what_was_gathered_is_stale_for_a_newer_round(learner: Learner, worker: Worker) -> None:
    comm, first, second = learner(), worker(), worker()
    publish(comm, first, second)
    send(first, 1)
    with pytest.raises(RoundIncomplete):
        comm.collect_round(timeout=0.1)
    publish(comm, first, second)
    send(first, 2)
    send(second, 2)
    assert numbers(comm.collect_round()) == [(0, 2), (1, 2)]
    comm.collect_experiences()
    assert (counts(comm).lost, counts(comm).delivered, counts(comm).produced) == ({"stale": 1}, 1, 2)


def test_a_partial_round_is_what_there_is(learner: Learner, worker: Worker) -> None:
    comm, first, _ = learner(), worker(), worker()
    publish(comm, first)
    assert comm.collect_round(timeout=0.1, partial=True) == []
    send(first, 1)
    assert numbers(comm.collect_round(per_worker=2, timeout=0.1, partial=True)) == [(0, 1)]


def test_a_worker_that_keeps_sending_older_batches_does_not_delay_the_timeout(
    learner: Learner, worker: Worker, server: Server
) -> None:
    """There is an older batch at each read."""
    end = time.monotonic()

    def send_one_more() -> bool:
        if time.monotonic() < end:
            send(client, 1)
        return False

    line = Lossy(server.another_client(), send_one_more)
    comm, client = learner(redis_url=None, redis_client=line.client, when_full="drop_newest"), worker()
    publish(comm, client)
    publish(comm)
    end = time.monotonic() + 5.0
    with pytest.raises(RoundIncomplete):
        comm.collect_round(timeout=0.3)
    assert time.monotonic() < end
    end = time.monotonic()
    assert counts(comm).lost["stale"] > 1


def test_a_worker_that_has_moved_on_is_not_waited_for(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    publish(comm)
    publish(comm, client)
    send(client, 1)
    began = time.monotonic()
    with pytest.raises(RoundIncomplete) as raised:
        comm.collect_round(version=1, timeout=60.0)
    assert raised.value.missing == {0: "it has moved on, its next batch is of version 2"}
    assert time.monotonic() - began < 30.0
    assert numbers(comm.collect_round()) == [(0, 1)]


# Workers that come and go


def test_a_round_waits_for_a_first_worker(learner: Learner, worker: Worker) -> None:
    comm = learner()
    publish(comm)
    with pytest.raises(RoundIncomplete, match="no worker was alive") as raised:
        comm.collect_round(timeout=0.1)
    assert raised.value.missing == {}

    def join() -> None:
        client = worker()
        client.load_weights({})
        send(client, 1)

    with meanwhile(join):
        assert numbers(comm.collect_round(timeout=20.0)) == [(0, 1)]


def test_a_worker_that_joins_during_a_round_is_in_the_next_one(learner: Learner, worker: Worker) -> None:
    comm, first = learner(), worker()
    publish(comm, first)

    def join_and_end_the_round() -> None:
        client = worker()
        client.load_weights({})
        send(client, 1)
        wait_until_alive(comm, 0, 1)
        send(first, 1, 2)

    with meanwhile(join_and_end_the_round):
        assert numbers(comm.collect_round(timeout=20.0)) == [(0, 1)]
    assert numbers(comm.collect_round()) == [(0, 2), (1, 1)]


def test_a_worker_that_leaves_during_a_round_is_not_waited_for(
    learner: Learner, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    comm, first, second = learner(), worker(), worker()
    publish(comm, first, second)
    send(first, 1)
    with meanwhile(second.close):
        assert numbers(comm.collect_round(timeout=20.0)) == [(0, 1)]
    assert "goes on without workers 1 (left)" in caplog.text


def test_a_worker_that_dies_during_a_round_is_not_waited_for(
    learner: Learner, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    comm = learner(lease_seconds=1.0)
    first, second = worker(), worker()
    publish(comm, first, second)
    send(first, 1)
    with meanwhile(partial(silence, second)):
        assert numbers(comm.collect_round(timeout=20.0)) == [(0, 1)]
    assert "goes on without workers 1 (away)" in caplog.text


def test_a_worker_that_dies_is_waited_for_if_it_was_named(learner: Learner, worker: Worker) -> None:
    comm = learner(lease_seconds=1.0)
    first, second = worker(0), worker(1)
    publish(comm, first, second)
    send(first, 1)
    silence(second)

    def come_back() -> None:
        client = worker(1)
        client.load_weights({})
        send(client, 2)

    wait_until_alive(comm, 0)
    with meanwhile(come_back):
        assert numbers(comm.collect_round(workers=(0, 1), timeout=20.0)) == [(0, 1), (1, 2)]


def test_what_a_worker_sent_before_it_left_belongs_to_the_round(learner: Learner, worker: Worker) -> None:
    comm, first, second = learner(), worker(), worker()
    publish(comm, first, second)

    def leave_and_end_the_round() -> None:
        send(first, 1)
        first.drain()
        first.close()
        wait_until_alive(comm, 1)
        send(second, 2)

    with meanwhile(leave_and_end_the_round):
        assert numbers(comm.collect_round(timeout=20.0)) == [(0, 1), (1, 2)]


def test_a_worker_that_left_between_two_rounds_is_not_missing(learner: Learner, worker: Worker) -> None:
    comm, first, second = learner(), worker(), worker()
    publish(comm, first, second)
    for client in (first, second):
        send(client, 1)
    assert numbers(comm.collect_round(timeout=10.0)) == [(0, 1), (1, 1)]
    second.close()
    wait_until_alive(comm, 0)
    wait_until(
        "another call has searched for streams",
        lambda: (comm._collector._discovery.is_due, comm.collect_experiences())[0],
    )
    send(first, 2)
    assert numbers(comm.collect_round(timeout=0)) == [(0, 2)]


def test_batches_of_a_worker_that_left_before_a_round_stay(learner: Learner, worker: Worker) -> None:
    comm, first, second = learner(), worker(), worker()
    publish(comm, first, second)
    send(first, 1, 2)
    send(second, 1)
    second.close()
    wait_until_alive(comm, 0)
    assert numbers(comm.collect_round(timeout=10.0)) == [(0, 1)]
    assert numbers(comm.collect_round(workers=(0, 1), timeout=10.0)) == [(0, 2), (1, 1)]


def test_what_was_gathered_from_a_worker_that_left_since_comes_with_the_next_round(
    learner: Learner, worker: Worker
) -> None:
    comm, first, second = learner(), worker(), worker()
    publish(comm, first, second)
    send(first, 1)
    with pytest.raises(RoundIncomplete):
        comm.collect_round(timeout=0.1)
    first.close()
    wait_until_alive(comm, 1)
    send(second, 2)
    assert numbers(comm.collect_round()) == [(0, 1), (1, 2)]


def test_a_stopped_run_has_no_one_to_wait_for(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    publish(comm, client)
    command = comm.send_control_command("stop")
    wait_until("the worker stops", lambda: client.poll() or not client.running)
    client.close()
    assert command.wait(timeout=5.0)[0]
    wait_until_alive(comm)
    with pytest.raises(RoundIncomplete, match="no worker was alive"):
        comm.collect_round(timeout=0.1)


# Other learners, other threads, and what cannot work


def test_a_newer_learner_ends_the_rounds_of_an_older_one(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    publish(comm, client)
    with meanwhile(learner), pytest.raises(Fenced):
        comm.collect_round(timeout=30.0)


def test_learners_that_share_batches_cannot_share_rounds(learner: Learner, worker: Worker) -> None:
    """What the other learner has is missing in the round, and not lost."""
    comm, other, client = learner(), learner(learner_name="other", publishes=False), worker()
    publish(comm, client)
    send(client, 1)
    assert numbers(other.collect_round(version=1)) == [(0, 1)]
    wait_until("the roster shows version 1", lambda: comm.workers()[0].version == 1)
    with pytest.raises(RoundIncomplete, match="its queue is empty"):
        comm.collect_round(timeout=0.1)
    other.collect_experiences()
    assert counts(comm).delivered == 1


def test_a_learner_that_does_not_publish_names_the_version(learner: Learner, worker: Worker) -> None:
    comm = learner(publishes=False)
    with pytest.raises(InvalidArgument, match="name the version"):
        comm.collect_round()


def test_one_thread_at_a_time_gathers_rounds(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    publish(comm, client)

    def gather() -> None:
        with pytest.raises(RoundIncomplete, match="another thread"):
            comm.collect_round(timeout=0.2)
        assert comm.collect_round(timeout=0.1, partial=True) == []
        send(client, 1)

    with meanwhile(gather):
        assert numbers(comm.collect_round(timeout=20.0)) == [(0, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"version": 2}, "version 2 is not published, the latest is 1"),
        ({"version": -1}, "version must be"),
        ({"version": "1"}, "version must be"),
        ({"workers": []}, "workers is empty"),
        ({"workers": 3}, "workers must be a list of worker ids"),
        ({"workers": "01"}, "worker_id must be"),
        ({"workers": [-1]}, "worker_id must be"),
        ({"per_worker": 0}, "per_worker must be"),
        ({"timeout": -1.0}, "timeout must be"),
    ],
)
def test_a_round_that_cannot_be_is_refused(learner: Learner, arguments: Any, message: str) -> None:
    comm = learner()
    publish(comm)
    with pytest.raises(InvalidArgument, match=message):
        comm.collect_round(**arguments)


def test_the_first_argument_is_the_timeout(learner: Learner) -> None:
    with pytest.raises(RoundIncomplete, match=r"no worker was alive within 0\.1 s"):
        learner().collect_round(0.1)


def test_a_round_takes_the_numbers_of_numpy(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    publish(comm, client)
    send(client, 1)
    pairs = comm.collect_round(
        np.float32(3),  # type: ignore[arg-type]
        version=np.int64(1),  # type: ignore[arg-type]
        workers=np.array([0]),
        per_worker=np.int8(1),  # type: ignore[arg-type]
    )
    assert numbers(pairs) == [(0, 1)]


def test_samples_per_insert_cannot_limit_rounds(learner: Learner) -> None:
    comm = learner(samples_per_insert=SamplesPerInsert(1.0, min_size=1, error_buffer=10.0))
    with pytest.raises(InvalidArgument, match="samples_per_insert cannot limit"):
        comm.collect_round()


# Faults


def test_an_outage_during_a_round_loses_nothing(learner: Learner, worker: Worker, server: Server) -> None:
    away = False
    line = Lossy(server.another_client(), lambda: away)
    comm = learner(redis_url=None, redis_client=line.client, timeout=1.0)
    first, second = worker(), worker()
    publish(comm, first, second)
    send(first, 0)
    publish(comm, first, second)
    send(first, 1)
    with pytest.raises(RoundIncomplete):
        comm.collect_round(timeout=0.2)
    away = True
    for partly in (False, True):
        with pytest.raises(ConnectionFailed):
            comm.collect_round(timeout=0.2, partial=partly)
    away = False
    send(second, 1)
    assert numbers(comm.collect_round(timeout=10.0)) == [(0, 1), (1, 1)]
    comm.collect_experiences()
    lost: dict[int, dict[str, int]] = {0: {"stale": 1}, 1: {}}
    for one in lost:
        assert (counts(comm, one).delivered, counts(comm, one).lost) == (1, lost[one])


@pytest.mark.on_every_engine
def test_an_outage_longer_than_the_lease_takes_no_worker_out_of_a_round(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    away = False
    line = Lossy(server.another_client(), lambda: away)
    comm = learner(redis_url=None, redis_client=line.client, timeout=1.0, lease_seconds=2.0)
    first, second = worker(), worker()
    publish(comm, first, second)
    send(first, 1)
    with pytest.raises(RoundIncomplete):
        comm.collect_round(timeout=0.2)
    wait_until_alive(comm, 0, 1)
    away = True
    silence(second)

    def seconds_since(key: str, field: str, unit: float) -> float:
        seconds, microseconds = server.client.time()
        return float(seconds + microseconds / 1e6 - float(server.client.hget(key, field)) / unit)

    wait_until("its lease is over", lambda: seconds_since(keys.life(1), "seen", 1000) > 2.5)
    away = False

    def come_back() -> None:
        wait_until("the learner is back", lambda: seconds_since(keys.meta, "learner_seen", 1) < 1)
        time.sleep(0.7)  # the learner looks who is alive a few times
        assert [info.state for info in comm.workers()] == ["alive", "alive"]
        second._heartbeat._beat()
        send(second, 2)

    with meanwhile(come_back):
        assert numbers(comm.collect_round(timeout=20.0)) == [(0, 1), (1, 2)]


@pytest.mark.parametrize("lost", range(1, 12))
def test_counts_of_rounds_are_exact_whichever_reply_is_lost(
    learner: Learner, worker: Worker, server: Server, lost: int
) -> None:
    replies = 0

    def loses() -> bool:
        nonlocal replies
        replies += losing
        return losing and replies == lost

    losing = False
    line = Lossy(server.another_client(), loses)
    comm, clients = learner(redis_url=None, redis_client=line.client), [worker(), worker()]
    publish(comm, *clients)
    for client in clients:
        send(client, 0, 1)
    losing = True
    assert numbers(comm.collect_round(timeout=10.0)) == [(0, 0), (1, 0)]
    losing = False
    publish(comm, *clients)
    for client in clients:
        send(client, 2)
    losing = True
    assert numbers(comm.collect_round(timeout=10.0)) == [(0, 2), (1, 2)]
    losing = False
    comm.collect_experiences()
    for one in (0, 1):
        found = counts(comm, one)
        assert (found.delivered, found.lost, found.produced) == (2, {"stale": 1}, 3)


@pytest.mark.single_server("FLUSHALL of one node of several is another fault")
def test_a_round_after_a_loss_is_of_the_version_that_was_published_again(
    learner: Learner, worker: Worker, server: Server
) -> None:
    comm, client = learner(), worker(level="learner")
    publish(comm, client)
    server.client.flushall()
    wait_until("the weights are published again", lambda: comm.version == 2, 10.0)
    wait_until("the worker has them", lambda: client.poll({}), 10.0)
    send(client, 1)
    with pytest.raises(RoundIncomplete, match="moved on"):
        comm.collect_round(version=1, timeout=10.0)
    assert numbers(comm.collect_round(timeout=10.0)) == [(0, 1)]
