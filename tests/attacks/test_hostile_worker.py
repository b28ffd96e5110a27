"""A worker may write anything into its own keys: it spoils its own data, and no other worker's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Server, wait_until

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.ops.inspect.snapshot import take_snapshot

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def check_works(comm: WorkerCommunicator, client: WorkerClient) -> None:
    """Check that the run works for an honest worker."""
    client.send_experiences({"still": "here"})
    wait_until(
        "the batch is collected", lambda: any("still" in batch for _, batch in comm.collect_experiences(0.1))
    )
    command = comm.send_control_command("reset", worker_ids=[client.worker_id])
    wait_until("the command is done", lambda: client.poll() or command.outcomes()[client.worker_id])
    assert comm.get_queue_info()["counts"][client.worker_id].produced >= 1


def test_thousands_of_entries_without_a_batch_are_counted_as_corrupt(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, good, bad = learner(), worker(), worker()
    # More than a script or a recursion can hold. On fakeredis each entry costs a millisecond.
    entries = 8000 if server.kind == "real" else 2000
    pipeline = server.client.pipeline()
    for sequence in range(1, entries + 1):
        pipeline.xadd(keys.experiences(bad.worker_id), {"x": ""}, id=f"{bad.incarnation}-{sequence}")
    pipeline.execute()
    wait_until(
        "all are counted",
        lambda: (
            comm.collect_experiences() == []
            and comm.get_queue_info()["counts"][bad.worker_id].lost.get("corrupt") == entries
        ),
    )
    check_works(comm, good)


def test_an_acknowledgement_from_the_future_blocks_no_successor(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, good = learner(lease_seconds=0.3, forget_seconds=0.6), worker()
    bad = worker()
    server.client.xadd(
        keys.acknowledgements(bad.worker_id),
        {"event": "version", "version": "1", "outcome": "applied"},
        id="18446744073709551615-5",
    )
    bad._heartbeat._thread.stop(5.0)
    wait_until("it is forgotten", lambda: [one.worker_id for one in comm.workers()] == [good.worker_id])
    assert worker(worker_id=bad.worker_id).incarnation > bad.incarnation + 1  # forgetting it took one more
    check_works(comm, good)


def test_a_batch_with_too_many_fields_for_a_script_becomes_a_dead_letter(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, good, bad = learner(), worker(), worker()
    fields = {"data": "junk", "version": "1"} | {f"field-{number}": "x" for number in range(5000)}
    server.client.xadd(keys.experiences(bad.worker_id), fields, id=f"{bad.incarnation}-1")
    wait_until("it is a dead letter", lambda: not comm.collect_experiences() and comm.dead_letters())
    (letter,) = comm.dead_letters()
    assert (letter.worker_id, letter.reason) == (bad.worker_id, "corrupt")
    assert comm.retry_dead_letters([letter]) == 1
    wait_until("it is a dead letter again", lambda: not comm.collect_experiences() and comm.dead_letters())
    check_works(comm, good)


def test_acknowledgements_of_a_wrong_type_are_deleted(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    if server.kind == "fake":
        pytest.skip("fakeredis itself fails when it reads a string as a stream")
    comm, good, bad = learner(), worker(), worker()
    server.client.delete(keys.acknowledgements(bad.worker_id))
    server.client.set(keys.acknowledgements(bad.worker_id), "mine")
    wait_until(
        "the key is deleted", lambda: server.client.type(keys.acknowledgements(bad.worker_id)) == b"none"
    )
    check_works(comm, good)


def test_invalid_worker_names_and_lives_are_removed(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, good = learner(), worker()
    server.client.set(keys.life(7), "mine")
    server.client.hset(keys.life(8), mapping={"incarnation": "1e300", "member": "1", "seen": "-1"})
    server.client.sadd(keys.workers, "evil", "01", "-1", 2**64, 7, 8, 9)
    assert [info.worker_id for info in comm.workers()] == [0]
    check_works(comm, good)
    wait_until("they are removed", lambda: server.client.smembers(keys.workers) == {b"0"})
    assert server.client.exists(keys.life(7)) == 0
    assert worker(8).incarnation < 2**52


def test_an_incredible_version_of_a_worker_is_ignored(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, bad = learner(), worker()
    server.client.hset(keys.life(bad.worker_id), "known_version", 2**51)
    comm._maintenance.send_heartbeat()
    assert comm.send_model_weights({"x": 1}).version == 1


def test_invalid_counts_are_ignored(learner: Learner, worker: Worker, server: Server, keys: Keys) -> None:
    comm, good, bad = learner(), worker(), worker()
    bad.send_experiences({"x": 1})
    for field, value in (
        ("delivered", "abc"),
        ("removed_bytes", 2**63 - 1),
        (f"fenced:{bad.incarnation}", "-7"),
        ("epoch", "x"),
        ("epoch:learner", str(2**60)),
    ):
        server.client.hset(keys.counts(bad.worker_id), field, value)
    assert len(comm.collect_experiences(timeout=5.0)) == 1
    comm.collect_experiences()
    assert comm.get_queue_info()["counts"][bad.worker_id].delivered == 1
    check_works(comm, good)


def test_counts_of_a_wrong_type_stop_no_delivery(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, good, bad = learner(), worker(), worker()
    bad.send_experiences({"x": 1})
    server.client.set(keys.counts(bad.worker_id), "x")
    assert len(comm.collect_experiences(timeout=5.0)) == 1
    comm.collect_experiences()
    check_works(comm, good)


@pytest.mark.parametrize("kind", ["heartbeat", "counts", "experiences", "life"])
def test_a_key_of_a_wrong_type_hides_no_other_worker(
    learner: Learner, worker: Worker, server: Server, keys: Keys, kind: str
) -> None:
    if server.kind == "fake" and kind in ("counts", "experiences"):
        pytest.skip("fakeredis itself fails when a script or a read finds a string instead")
    comm, good, bad = learner(), worker(), worker()
    bad._heartbeat._thread.stop(5.0)  # a heartbeat would write the key again
    for client in (good, bad):
        client.send_experiences({"x": 1})
    wait_until(
        "both are delivered",
        lambda: [
            comm.collect_experiences(0.1),
            [counts.delivered for counts in comm.get_queue_info()["counts"].values()] == [1, 1],
        ][1],
    )
    for _ in range(20):  # the learner deletes some of them
        key = getattr(keys, kind)(bad.worker_id)
        server.client.delete(key)
        server.client.set(key, "mine")
        counts = take_snapshot(comm._connection, keys.run).workers[0].counts
        assert counts is not None
        assert counts.delivered == 1
        assert comm.workers()[0].worker_id == 0
        assert comm.get_queue_info()["counts"][0].delivered == 1
        comm._collector._discovery.recheck(comm._collector._streams.watched.values())
    check_works(comm, good)


def test_long_texts_of_a_worker_are_cut(learner: Learner, worker: Worker, server: Server, keys: Keys) -> None:
    comm, good, bad = learner(), worker(), worker()
    comm.send_model_weights({})
    server.client.xadd(
        keys.acknowledgements(bad.worker_id),
        {"event": "version", "version": 1, "outcome": "failed", "detail": "x" * 1_000_000},
        id=f"{bad.incarnation}-1",
    )
    assert len(comm.missed_updates()[bad.worker_id].records[0].detail) == 500
    check_works(comm, good)


def test_an_invalid_heartbeat_is_read_as_zeros(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, good, bad = learner(), worker(), worker()
    bad._heartbeat._thread.stop(5.0)
    server.client.hset(
        keys.heartbeat(bad.worker_id), mapping={"version": "x", "pid": "9" * 400, "sent": "-1"}
    )
    assert [info.version for info in comm.workers()] == [0, 0]
    check_works(comm, good)
