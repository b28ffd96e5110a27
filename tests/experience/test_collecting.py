"""Collecting: each batch is delivered once and in order, and acknowledged; everything else is counted."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Server, wait_until
from lossy import Lossy

from rlbroker import Batch, Closed, Fenced, QueueCounts, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.experience.pending import Takeover

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def counts(comm: WorkerCommunicator, worker_id: int = 0) -> QueueCounts:
    found: QueueCounts = comm.get_queue_info()["counts"][worker_id]
    return found


@pytest.mark.on_every_engine
def test_closing_while_another_thread_collects_is_no_outage(
    learner: Learner, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    comm, client = learner(timeout=2.0), worker()
    client.send_experiences({})
    assert comm.collect_experiences(timeout=5.0)
    errors: list[type[BaseException]] = []

    def collect() -> None:
        try:
            while True:
                comm.collect_experiences(timeout=60.0)
        except Closed as error:
            errors.append(type(error))

    thread = threading.Thread(target=collect)
    thread.start()
    wait_until("it waits", lambda: comm.get_queue_info()["counts"][0].delivered == 1)
    comm.cleanup(stop_workers=False)
    thread.join(20.0)
    assert errors == [Closed]
    assert "collecting" not in caplog.text


def test_batches_of_a_worker_are_collected_in_order_and_once(learner: Learner, worker: Worker) -> None:
    comm, clients = learner(), [worker(), worker()]
    for number in range(200):
        clients[number % 2].send_experiences({"number": number})
    got: dict[int, list[int]] = {0: [], 1: []}
    while pairs := comm.collect_experiences(max_batches=7):
        assert len(pairs) <= 7
        for worker_id, batch in pairs:
            got[worker_id].append(batch["number"])
    assert got == {0: list(range(0, 200, 2)), 1: list(range(1, 200, 2))}


def test_collecting_waits_for_the_first_batch_of_any_worker(learner: Learner, worker: Worker) -> None:
    comm, _, late = learner(), worker(), worker()
    threading.Timer(0.3, late.send_experiences, ({"x": 1},)).start()
    began = time.monotonic()
    pairs = comm.collect_experiences(timeout=10.0)
    assert [worker_id for worker_id, _ in pairs] == [1]
    assert time.monotonic() - began < 5.0


def test_collecting_without_workers_returns_nothing(learner: Learner) -> None:
    assert learner().collect_experiences(timeout=0.1) == []


def test_batches_of_a_worker_that_joins_late_are_collected(learner: Learner, worker: Worker) -> None:
    comm = learner()
    assert comm.collect_experiences(timeout=0.1) == []
    worker(worker_id=7).send_experiences({"x": 1})
    assert [worker_id for worker_id, _ in comm.collect_experiences(timeout=5.0)] == [7]


def test_a_workers_batches_outlive_it(learner: Learner, worker: Worker) -> None:
    comm = learner()
    with worker() as client:
        client.send_experiences({"x": 1})
    assert len(comm.collect_experiences(timeout=5.0)) == 1


@pytest.mark.on_every_engine
def test_a_batch_leaves_the_server_when_it_is_acknowledged(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(acknowledge="manual"), worker()
    client.send_experiences({"x": 1})
    pairs = comm.collect_experiences(timeout=5.0)
    assert server.client.xlen(keys.experiences(0)) == 1
    assert comm.acknowledge(pairs) == 1
    assert comm.acknowledge(pairs) == 0
    assert server.client.xlen(keys.experiences(0)) == 0
    assert counts(comm).delivered == 1


def test_by_default_the_next_collect_acknowledges(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    client.send_experiences({"x": 1})
    comm.collect_experiences(timeout=5.0)
    assert (counts(comm).in_hand, counts(comm).delivered) == (1, 0)
    comm.collect_experiences()
    assert (counts(comm).in_hand, counts(comm).delivered) == (0, 1)


def test_many_batches_are_acknowledged_at_once_in_any_order_and_counted_once(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    number = 1100  # more than one XACK takes
    comm, client = learner(max_queue_size=number, acknowledge="manual"), worker(compression=False)
    for _ in range(number):
        client.send_experiences({"x": 1})
    pairs: list[tuple[int, Batch]] = []
    while len(pairs) < number:
        pairs += comm.collect_experiences(timeout=5.0)
    assert comm.acknowledge([*pairs[:7], *reversed(pairs), *pairs[5:10]]) == number
    assert counts(comm).delivered == number
    assert server.client.xlen(keys.experiences(0)) == 0
    removed = server.client.hget(keys.counts(0), "removed_bytes")
    assert int(removed) == sum(batch.stored_bytes for _, batch in pairs)


@pytest.mark.on_every_engine
def test_a_server_that_forgot_its_scripts_loses_no_batch(
    learner: Learner, worker: Worker, server: Server
) -> None:
    comm, client = learner(), worker()
    for number in range(3):
        server.client.script_flush()
        client.send_experiences({"number": number})
        assert [batch["number"] for _, batch in comm.collect_experiences(timeout=5.0)] == [number]
    comm.collect_experiences()
    assert (counts(comm).delivered, counts(comm).in_hand) == (3, 0)


@pytest.mark.on_every_engine
def test_a_collect_that_does_not_wait_still_acknowledges_over_a_new_connection(
    learner: Learner, worker: Worker, server: Server
) -> None:
    line = Lossy(server.another_client(), lambda: False)
    comm, client = learner(redis_url=None, redis_client=line.client), worker()
    client.send_experiences({"number": 1})
    comm.collect_experiences(timeout=5.0)
    client.send_experiences({"number": 2})
    line.break_connections()
    assert [batch["number"] for _, batch in comm.collect_experiences()] == [2]
    assert (counts(comm).delivered, counts(comm).in_hand) == (1, 1)


def test_the_learner_keeps_no_reference_to_a_collected_batch(learner: Learner, worker: Worker) -> None:
    """Otherwise unacknowledged batches would stay in memory until the next call."""
    comm, client = learner(), worker()
    client.send_experiences({"x": np.arange(100_000)})
    pairs = comm.collect_experiences(timeout=5.0)
    array = weakref.ref(pairs[0][1]["x"])
    assert array() is not None
    del pairs
    gc.collect()
    assert array() is None
    assert counts(comm).in_hand == 1


def test_cleanup_acknowledges_what_was_returned_and_reports_the_rest(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    for number in range(3):
        client.send_experiences({"number": number})
    comm.collect_experiences(timeout=5.0, max_batches=1)
    report = comm.cleanup()
    assert report.waiting[0] + report.unacknowledged[0] == 2
    assert not report
    assert comm.cleanup() is report


def test_after_an_exception_collected_batches_are_delivered_again(learner: Learner, worker: Worker) -> None:
    client = worker()

    def train() -> float:
        with learner() as comm:
            client.send_experiences({"x": 1})
            comm.collect_experiences(timeout=5.0)
            return 1 / 0  # an exception of the user's own code

    with pytest.raises(ZeroDivisionError):
        train()
    assert len(learner().collect_experiences(timeout=5.0)) == 1


def test_one_collect_decodes_a_bounded_number_of_bytes(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of the arrays counts, because a few stored bytes can hold megabytes of zeros."""
    monkeypatch.setattr("rlbroker.experience.collector.COLLECT_BYTES", 2_500_000)
    comm, client = learner(), worker()
    for _ in range(6):
        client.send_experiences({"zeros": np.zeros(1_000_000, np.uint8)})
    assert [len(comm.collect_experiences()) for _ in range(3)] == [3, 3, 0]


def test_stale_batches_are_counted_and_not_delivered(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_staleness=1), worker()
    comm.send_model_weights({})
    client.load_weights({})
    for _ in range(2):
        client.send_experiences({"x": 1})
    comm.send_model_weights({})
    comm.send_model_weights({})
    assert comm.collect_experiences(timeout=0.2) == []
    assert counts(comm).lost == {"stale": 2}


@pytest.mark.on_every_engine
def test_an_unreadable_batch_is_counted_and_later_ones_are_delivered(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker()
    client.send_experiences({"number": 1})
    good = server.client.xrange(keys.experiences(0))[0][1]
    for sequence, fields in (
        (2, {**good, b"data": b"junk"}),
        (3, {b"data": good[b"data"]}),
        (4, {b"a": b"b"}),
    ):
        server.client.xadd(keys.experiences(0), fields, id=f"{client.incarnation}-{sequence}")
    server.client.xadd(keys.experiences(0), {**good, b"sequence": b"5"}, id=f"{client.incarnation}-5")

    got = comm.collect_experiences(timeout=5.0)

    assert [batch.sequence for _, batch in got] == [1, 5]
    assert counts(comm).lost == {"corrupt": 3}


def test_pending_entries_with_ids_beyond_luas_integers_are_renewed(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(acknowledge="manual", take_over_seconds=0.5), worker()
    client.send_experiences({"number": 1})
    entry = server.client.xrange(keys.experiences(0))[0][1]
    server.client.xadd(keys.experiences(0), entry, id=f"{client.incarnation}-9007199254740993")
    comm.collect_experiences(timeout=5.0)
    Takeover(comm._connection, comm._pending, take_over_seconds=0).renew(comm._collector.streams)


def test_an_entry_deleted_while_it_was_pending_is_counted(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    first, client = learner(acknowledge="manual"), worker()
    client.send_experiences({"number": 1})
    client.send_experiences({"number": 2})
    first.collect_experiences(timeout=5.0)
    server.client.xdel(keys.experiences(0), f"{client.incarnation}-1")
    second = learner()
    assert [batch["number"] for _, batch in second.collect_experiences(timeout=5.0)] == [2]
    assert counts(second).lost == {"trimmed": 1}


def test_a_copy_is_not_delivered_after_the_stream_was_reset(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    """DEL resets the stream's last id, so the server accepts the copy, and the learner must recognise it."""
    comm, client = learner(), worker()
    client.send_experiences({"number": 1})
    entry = server.client.xrange(keys.experiences(0))[0][1]
    comm.collect_experiences(timeout=5.0)
    server.client.delete(keys.experiences(0))
    server.client.xgroup_create(keys.experiences(0), GROUP, "0", mkstream=True)
    server.client.xadd(keys.experiences(0), entry, id=f"{client.incarnation}-1")
    assert comm.collect_experiences(timeout=0.3) == []
    assert counts(comm).duplicates == 1


@pytest.mark.on_every_engine
def test_batches_of_a_lost_reply_are_delivered(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    """A client that repeats a lost read by itself skips what the reply held. It shows as a gap."""
    comm, client = learner(), worker()
    client.send_experiences({"number": 1})
    comm.collect_experiences(timeout=5.0)
    client.send_experiences({"number": 2})
    server.client.xreadgroup(GROUP, "learner", {keys.experiences(0): ">"})
    client.send_experiences({"number": 3})
    assert [batch["number"] for _, batch in comm.collect_experiences(timeout=5.0)] == [2, 3]


def test_batches_of_a_lost_reply_are_delivered_in_order_although_the_server_lost_others(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    """After a failover the learner holds entries that are no longer pending on the server."""
    comm, client = learner(acknowledge="manual"), worker()
    client.send_experiences({"number": 1})
    comm.collect_experiences(timeout=5.0)
    server.client.xack(keys.experiences(0), GROUP, f"{client.incarnation}-1")
    client.send_experiences({"number": 2})
    server.client.xreadgroup(GROUP, "learner", {keys.experiences(0): ">"})  # its reply is lost
    client.send_experiences({"number": 3})
    assert [batch["number"] for _, batch in comm.collect_experiences(timeout=5.0)] == [2, 3]


def test_a_replaced_learner_cannot_acknowledge(learner: Learner, worker: Worker) -> None:
    old, client = learner(), worker()
    client.send_experiences({"number": 1})
    new = learner()

    def read_and_acknowledge() -> None:
        for _ in range(2):  # the first call may still read; the second one acknowledges
            old.collect_experiences(timeout=0.1)

    with pytest.raises(Fenced):
        read_and_acknowledge()
    old.cleanup()
    got = wait_until("the new learner has it", lambda: new.collect_experiences(timeout=0.5))
    assert got[0][1]["number"] == 1


def test_acknowledging_does_not_wait_for_a_collect_in_another_thread(
    learner: Learner, worker: Worker
) -> None:
    """Otherwise a queue full of unacknowledged bytes would stop the worker and both threads."""
    comm, client = learner(acknowledge="manual"), worker()
    client.send_experiences({"x": 1})
    pairs = comm.collect_experiences(timeout=5.0)
    waiting = threading.Thread(target=comm.collect_experiences, args=(10.0,))
    waiting.start()
    began = time.monotonic()
    assert comm.acknowledge(pairs) == 1
    assert comm.collect_experiences() == []
    assert time.monotonic() - began < 5.0
    client.send_experiences({"x": 2})  # ends the wait of the thread
    waiting.join()


def test_batches_of_a_lost_reply_come_before_those_of_a_new_incarnation(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm = learner()
    worker(worker_id=0).send_experiences({"number": 1})
    server.client.xgroup_create(keys.experiences(0), "other", "0")
    server.client.xreadgroup(GROUP, "learner", {keys.experiences(0): ">"})  # its reply is lost
    worker(worker_id=0).send_experiences({"number": 2})
    assert [batch["number"] for _, batch in comm.collect_experiences(timeout=5.0)] == [1, 2]


def test_batches_that_a_fenced_learner_read_are_delivered(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may read for a moment after it was replaced; those batches must not wait for a restart."""
    monkeypatch.setattr("rlbroker.experience.watched_streams.RECHECK_SECONDS", 0.2)
    old, client = learner(), worker()
    old._thread.stop(5.0)  # so that it does not know yet
    new = learner()
    new.collect_experiences(timeout=0.1)
    client.send_experiences({"number": 1})
    assert len(old.collect_experiences(timeout=5.0)) == 1
    got = wait_until("the new learner has it", lambda: new.collect_experiences(timeout=0.1))
    assert got[0][1]["number"] == 1
    with pytest.raises(Fenced, match="a newer learner with this name has taken over"):
        wait_until("the old learner knows", lambda: old.collect_experiences(timeout=0.1) and False)


def test_a_deleted_group_is_created_again(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker()
    comm.collect_experiences()
    server.client.xgroup_destroy(keys.experiences(0), GROUP)
    client.send_experiences({"number": 1})
    assert len(comm.collect_experiences(timeout=5.0)) == 1


def test_a_batch_that_an_interrupt_kept_back_comes_after_another_threads_call(
    learner: Callable[..., WorkerCommunicator],
    worker: Callable[..., WorkerClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    comm, client = learner(), worker()
    for number in range(4):
        client.send_experiences({"number": number})
    calls, others = comm._collector._calls, list[Any]()
    run_within = calls.run_within

    def interrupted(*arguments: Any) -> Any:
        run_within(*arguments)
        monkeypatch.undo()  # another thread collects between the end of the call's work and its return
        thread = threading.Thread(target=lambda: others.extend(comm.collect_experiences(5.0, 1)))
        thread.start()
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(calls, "run_within", interrupted)
    with pytest.raises(KeyboardInterrupt):
        comm.collect_experiences(5.0, 2)
    found = [*others, *comm.collect_experiences(5.0, 1), *comm.collect_experiences(5.0)]
    assert [batch["number"] for _, batch in found] == [2, 0, 1, 3]

    def delivered() -> int:
        assert comm.collect_experiences() == []
        counts: QueueCounts = comm.get_queue_info()["counts"][0]
        return counts.delivered

    wait_until("all are acknowledged", lambda: delivered() == 4, 5.0)
