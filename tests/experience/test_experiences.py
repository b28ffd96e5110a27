"""Experiences: each batch once and in order, within bounds, and all loss counted."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import Server, wait_until
from lossy import Lossy

from rlbroker import Batch, Fenced, QueueCounts, QueueFull, WorkerClient, WorkerCommunicator
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import GROUP, Keys
from rlbroker.codec.message import decode
from rlbroker.errors import BatchTooLarge, ConnectionFailed, DeadlineExceeded, ServerFault, UnsupportedType

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def counts(comm: WorkerCommunicator, worker_id: int = 0) -> QueueCounts:
    found: QueueCounts = comm.get_queue_info()["counts"][worker_id]
    return found


def test_batches_of_a_worker_come_in_order_and_once(learner: Learner, worker: Worker) -> None:
    comm, clients = learner(), [worker(), worker()]
    for number in range(200):
        clients[number % 2].send_experiences({"number": number})
    got: dict[int, list[int]] = {0: [], 1: []}
    while pairs := comm.collect_experiences(max_batches=7):
        assert len(pairs) <= 7
        for worker_id, batch in pairs:
            got[worker_id].append(batch["number"])
    assert got == {0: list(range(0, 200, 2)), 1: list(range(1, 200, 2))}


def test_collecting_waits_for_whoever_comes_first(learner: Learner, worker: Worker) -> None:
    comm, _, late = learner(), worker(), worker()
    threading.Timer(0.3, late.send_experiences, ({"x": 1},)).start()
    began = time.monotonic()
    pairs = comm.collect_experiences(timeout=10.0)
    assert [worker_id for worker_id, _ in pairs] == [1]
    assert time.monotonic() - began < 5.0


def test_collecting_from_nobody_gives_nothing(learner: Learner) -> None:
    assert learner().collect_experiences(timeout=0.1) == []


def test_a_worker_that_joins_late_is_heard(learner: Learner, worker: Worker) -> None:
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
    number = 1100  # more than one command takes
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
def test_scripts_that_the_server_forgot_cost_no_batch(
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
def test_acknowledging_outlasts_a_broken_connection_also_where_collecting_does_not_wait(
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


def test_a_batch_that_was_handed_out_is_only_the_callers(learner: Learner, worker: Worker) -> None:
    """What is not acknowledged yet would otherwise stay in memory until the next call."""
    comm, client = learner(), worker()
    client.send_experiences({"x": np.arange(100_000)})
    pairs = comm.collect_experiences(timeout=5.0)
    array = weakref.ref(pairs[0][1]["x"])
    assert array() is not None
    del pairs
    gc.collect()
    assert array() is None
    assert counts(comm).in_hand == 1


def test_the_arrays_of_a_batch_may_be_written_to_once_it_was_sent(learner: Learner, worker: Worker) -> None:
    """At level `learner` too, where the worker keeps the batch and may send it again."""
    comm, client = learner(), worker(level="learner", compression=False)
    array = np.zeros(200_000, np.uint8)
    for number in range(3):
        array[:] = number
        client.send_experiences({"x": array})
    array[:] = 9
    client._sender.mark_stale()  # type: ignore[union-attr]
    got = [batch["x"] for _, batch in comm.collect_experiences(timeout=5.0)]
    assert [set(one.tolist()) for one in got] == [{0}, {1}, {2}]
    kept = [decode(parcel.fields[-1])["x"] for parcel in client._sender.queue.pending.kept]  # type: ignore[union-attr]
    assert [set(one.tolist()) for one in kept] == [{0}, {1}, {2}]


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


def test_after_an_error_what_was_returned_comes_again(learner: Learner, worker: Worker) -> None:
    client = worker()

    def train() -> float:
        with learner() as comm:
            client.send_experiences({"x": 1})
            comm.collect_experiences(timeout=5.0)
            return 1 / 0  # the user's own mistake

    with pytest.raises(ZeroDivisionError):
        train()
    assert len(learner().collect_experiences(timeout=5.0)) == 1


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


def test_what_the_learner_holds_does_not_fill_the_queue(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_queue_size=1), worker()
    client.send_experiences({"number": 1})
    comm.collect_experiences(timeout=5.0)
    assert client.send_experiences({"number": 2}, timeout=0.2)


def test_the_byte_bound_counts_what_the_learner_holds(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_queue_bytes=3000, acknowledge="manual"), worker(compression=False)
    batch = {"obs": np.random.default_rng(1).bytes(1000)}
    assert client.send_experiences(batch)
    assert client.send_experiences(batch)
    pairs = comm.collect_experiences(timeout=5.0)
    with pytest.raises(QueueFull, match=r"1 in the learner's hands|2 in the learner's hands"):
        client.send_experiences(batch, timeout=0.2)
    comm.acknowledge(pairs)
    assert client.send_experiences(batch, timeout=5.0)


def test_a_restarted_worker_counts_the_bytes_that_it_left(learner: Learner, worker: Worker) -> None:
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


def test_one_collect_takes_no_more_than_its_share_of_memory(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the size of the arrays: a few stored bytes can hold megabytes of zeros."""
    monkeypatch.setattr("rlbroker.experience.collector.COLLECT_BYTES", 2_500_000)
    comm, client = learner(), worker()
    for _ in range(6):
        client.send_experiences({"zeros": np.zeros(1_000_000, np.uint8)})
    assert [len(comm.collect_experiences()) for _ in range(3)] == [3, 3, 0]


def test_a_batch_that_no_learner_would_decode_is_refused(learner: Learner, worker: Worker) -> None:
    learner()
    with pytest.raises(BatchTooLarge, match="no more than 1,073,741,824 may travel"):
        worker().send_experiences({"zeros": np.zeros((1 << 30) + 1, np.uint8)})


@pytest.mark.on_every_engine
@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
def test_what_is_dropped_is_counted(learner: Learner, worker: Worker, policy: str) -> None:
    comm, client = learner(max_queue_size=3, when_full=policy), worker()
    receipts = [client.send_experiences({"number": number}) for number in range(10)]
    kept = [batch["number"] for _, batch in comm.collect_experiences()]
    comm.collect_experiences()
    assert kept == ([7, 8, 9] if policy == "drop_oldest" else [0, 1, 2])
    assert counts(comm).lost == {policy.replace("drop_", "dropped_"): 7}
    assert counts(comm).produced == 10
    assert sum(bool(receipt) for receipt in receipts) == (10 if policy == "drop_oldest" else 3)
    assert sum(receipt.dropped for receipt in receipts) == (7 if policy == "drop_oldest" else 0)


def test_a_worker_may_choose_its_own_policy(learner: Learner, worker: Worker) -> None:
    learner(max_queue_size=1)
    client = worker(when_full="drop_newest")
    assert client.send_experiences({"x": 1})
    assert not client.send_experiences({"x": 2})


def test_drop_oldest_never_takes_what_the_learner_holds(learner: Learner, worker: Worker) -> None:
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


def test_stale_batches_are_counted_and_not_given_out(learner: Learner, worker: Worker) -> None:
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
def test_a_batch_that_cannot_be_read_is_counted_and_the_next_ones_come(
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


def test_an_entry_that_no_worker_wrote_is_noticed_by_the_next_send(
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


def test_a_process_that_was_replaced_twice_counts_nothing_a_second_time(
    learner: Learner, worker: Worker
) -> None:
    comm, first = learner(), worker(0)
    first.send_experiences({"number": 1})
    worker(0).send_experiences({"number": 2})
    worker(0).send_experiences({"number": 3})
    first._heartbeat._thread.stop(5.0)
    first.close()
    assert (counts(comm).produced, counts(comm).lost) == (3, {})


def test_a_dropped_batch_that_could_not_be_counted_stays_with_the_caller(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, client = learner(max_queue_size=1), worker(when_full="drop_newest")
    client.send_experiences({"number": 1})

    def fail(*arguments: object, **options: object) -> None:
        raise ConnectionFailed("the server is away")

    with monkeypatch.context() as patch:
        patch.setattr(client._connection, "run", fail)
        with pytest.raises(ConnectionFailed):
            client.send_experiences({"number": 2})
    assert (counts(comm).produced, counts(comm).lost) == (1, {})


def test_ids_that_lua_cannot_count_are_renewed_too(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(acknowledge="manual", take_over_seconds=0.5), worker()
    client.send_experiences({"number": 1})
    entry = server.client.xrange(keys.experiences(0))[0][1]
    server.client.xadd(keys.experiences(0), entry, id=f"{client.incarnation}-9007199254740993")
    comm.collect_experiences(timeout=5.0)
    comm._ownership._next_renewal = Deadline(0)
    comm._ownership.renew(comm._collector.streams)


def test_what_was_sent_is_known_at_once(learner: Learner, worker: Worker, server: Server, keys: Keys) -> None:
    comm, client = learner(), worker()
    client._heartbeat._thread.stop(5.0)  # so it does not say how much it has sent
    for number in range(3):
        client.send_experiences({"number": number})
    server.client.xdel(keys.experiences(0), f"{client.incarnation}-2")
    found = counts(comm)
    assert (found.produced, found.waiting, found.lost) == (3, 2, {"vanished": 1})


def test_an_entry_that_vanished_while_it_was_held_is_counted(
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


def test_a_batch_sent_twice_is_delivered_once(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker()
    client.send_experiences({"number": 1})
    client._sender.queue.sequence = 0  # type: ignore[union-attr] # as if the reply had been lost
    client.send_experiences({"number": 1})
    assert len(comm.collect_experiences(timeout=5.0)) == 1
    assert comm.collect_experiences(timeout=0.1) == []


def test_a_copy_after_the_stream_was_reset_is_dropped(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    """DEL resets a stream's last id, so the learner's own memory is the second guard."""
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
def test_a_read_whose_reply_was_lost_is_found_again(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    """A client that repeats a lost read by itself skips what the reply held; it shows as a gap."""
    comm, client = learner(), worker()
    client.send_experiences({"number": 1})
    comm.collect_experiences(timeout=5.0)
    client.send_experiences({"number": 2})
    server.client.xreadgroup(GROUP, "learner", {keys.experiences(0): ">"})
    client.send_experiences({"number": 3})
    assert [batch["number"] for _, batch in comm.collect_experiences(timeout=5.0)] == [2, 3]


def test_a_replaced_learner_cannot_acknowledge(learner: Learner, worker: Worker) -> None:
    old, client = learner(), worker()
    client.send_experiences({"number": 1})
    new = learner()

    def read_and_acknowledge() -> None:
        for _ in range(2):  # it may still read, and would acknowledge with the second call
            old.collect_experiences(timeout=0.1)

    with pytest.raises(Fenced):
        read_and_acknowledge()
    old.cleanup()
    got = wait_until("the new learner has it", lambda: new.collect_experiences(timeout=0.5))
    assert got[0][1]["number"] == 1


def test_acknowledging_does_not_wait_for_another_threads_collect(learner: Learner, worker: Worker) -> None:
    """Else a queue that is full of unacknowledged bytes would stall all three."""
    comm, client = learner(acknowledge="manual"), worker()
    client.send_experiences({"x": 1})
    pairs = comm.collect_experiences(timeout=5.0)
    waiting = threading.Thread(target=comm.collect_experiences, args=(10.0,))
    waiting.start()
    began = time.monotonic()
    assert comm.acknowledge(pairs) == 1
    assert comm.collect_experiences() == []
    assert time.monotonic() - began < 5.0
    client.send_experiences({"x": 2})  # ends its wait
    waiting.join()


def test_a_sender_in_a_second_thread_keeps_its_own_timeout(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_queue_size=1), worker()
    client.send_experiences({"x": 1})
    first = threading.Thread(target=client.send_experiences, args=({"x": 2},), kwargs={"timeout": 10.0})
    first.start()
    wait_until("the first one waits", client._sender._lock.locked)  # type: ignore[union-attr]
    began = time.monotonic()
    with pytest.raises(QueueFull, match="another thread"):
        client.send_experiences({"x": 3}, timeout=0.2)
    assert time.monotonic() - began < 5.0

    def makes_room() -> bool:
        comm.collect_experiences()
        return not first.is_alive()

    wait_until("the first one had room", makes_room)
    assert comm.get_queue_info()["counts"][0].produced == 2


def test_what_was_read_for_a_dead_call_comes_before_a_new_life(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm = learner()
    worker(worker_id=0).send_experiences({"number": 1})
    server.client.xgroup_create(keys.experiences(0), "other", "0")
    server.client.xreadgroup(GROUP, "learner", {keys.experiences(0): ">"})  # nobody got the reply
    worker(worker_id=0).send_experiences({"number": 2})
    assert [batch["number"] for _, batch in comm.collect_experiences(timeout=5.0)] == [1, 2]


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


def test_a_replaced_worker_drops_nothing_of_its_successor(learner: Learner, worker: Worker) -> None:
    comm = learner(max_queue_size=1, when_full="drop_oldest")
    old = worker(worker_id=0)
    old.send_experiences({"from": "old"})
    new = worker(worker_id=0)
    new.send_experiences({"from": "new"})
    with pytest.raises(Fenced):
        old.send_experiences({"from": "old again"})
    assert [batch["from"] for _, batch in comm.collect_experiences(timeout=5.0)] == ["new"]


def test_counts_of_earlier_lives_become_one_sum(
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


def test_what_a_replaced_learner_still_read_is_found(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may read for a moment after it was replaced; what it then holds must not wait for a restart."""
    monkeypatch.setattr("rlbroker.experience.discovery.RECHECK_SECONDS", 0.2)
    old, client = learner(), worker()
    old._thread.stop(5.0)  # so that it does not notice yet
    new = learner()
    new.collect_experiences(timeout=0.1)
    client.send_experiences({"number": 1})
    assert len(old.collect_experiences(timeout=5.0)) == 1
    got = wait_until("the new learner has it", lambda: new.collect_experiences(timeout=0.1))
    assert got[0][1]["number"] == 1
    with pytest.raises(Fenced, match="a newer learner has taken over"):
        wait_until("the old learner knows", lambda: old.collect_experiences(timeout=0.1) and False)


def test_a_group_that_was_deleted_is_made_again(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, client = learner(), worker()
    comm.collect_experiences()
    server.client.xgroup_destroy(keys.experiences(0), GROUP)
    client.send_experiences({"number": 1})
    assert len(comm.collect_experiences(timeout=5.0)) == 1


def test_sending_waits_for_the_learner_to_open_the_run(learner: Learner, worker: Worker) -> None:
    client = worker()
    with pytest.raises(DeadlineExceeded, match="no learner has opened the run"):
        client.send_experiences({"x": 1}, timeout=0.2)
    comm = learner()
    client.send_experiences({"x": 1})
    assert len(comm.collect_experiences(timeout=5.0)) == 1


def test_a_stop_ends_the_wait_for_room(learner: Learner, worker: Worker) -> None:
    comm, client = learner(max_queue_size=1), worker()
    client.send_experiences({"number": 1})
    threading.Timer(0.2, comm.send_control_command, ("stop",)).start()
    receipt = client.send_experiences({"number": 2}, timeout=10.0)
    assert not receipt
    client.poll()
    assert not client.running
    assert counts(comm).lost == {"stopped": 1}


def test_the_path_of_what_cannot_travel_is_named(learner: Learner, worker: Worker) -> None:
    learner()
    with pytest.raises(UnsupportedType, match=r"info.*env"):
        worker().send_experiences({"obs": torch.zeros(2), "info": {"env": object()}})


def test_the_ancestors_message_travels_as_it_is(learner: Learner, worker: Worker) -> None:
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
def test_a_sender_is_safe_in_several_threads(learner: Learner, worker: Worker) -> None:
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
