"""A worker may write anything into its own keys: it spoils its own record, and nobody else's run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Server, wait_until

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.ops.inspect.snapshot import take_snapshot

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def goes_on(comm: WorkerCommunicator, client: WorkerClient) -> None:
    """The run works for everybody else."""
    client.send_experiences({"still": "here"})
    wait_until("the batch came", lambda: any("still" in batch for _, batch in comm.collect_experiences(0.1)))
    command = comm.send_control_command("reset", worker_ids=[client.worker_id])
    wait_until("it answered", lambda: client.poll() or command.outcomes()[client.worker_id])
    assert comm.get_queue_info()["counts"][client.worker_id].produced >= 1


def test_thousands_of_entries_without_a_batch(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, good, bad = learner(), worker(), worker()
    # Beyond what a script or a recursion can hold; on fakeredis each entry costs a millisecond.
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
    goes_on(comm, good)


def test_an_answer_from_the_future(learner: Learner, worker: Worker, server: Server, keys: Keys) -> None:
    comm, good = learner(lease_seconds=0.3, forget_seconds=0.6), worker()
    bad = worker()
    server.client.xadd(
        keys.acknowledgements(bad.worker_id),
        {"event": "version", "version": "1", "outcome": "applied"},
        id="18446744073709551615-5",
    )
    bad._heartbeat._thread.stop(5.0)
    wait_until("it is struck", lambda: [one.worker_id for one in comm.workers()] == [good.worker_id])
    assert worker(worker_id=bad.worker_id).incarnation > bad.incarnation + 1  # being struck was one more
    goes_on(comm, good)


def test_more_fields_than_a_script_can_pass_on(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, good, bad = learner(), worker(), worker()
    fields = {"data": "junk", "version": "1"} | {f"field-{number}": "x" for number in range(5000)}
    server.client.xadd(keys.experiences(bad.worker_id), fields, id=f"{bad.incarnation}-1")
    wait_until("it is dead", lambda: not comm.collect_experiences() and comm.dead_letters())
    (letter,) = comm.dead_letters()
    assert (letter.worker_id, letter.reason) == (bad.worker_id, "corrupt")
    assert comm.retry_dead_letters([letter]) == 1
    wait_until("it is dead again", lambda: not comm.collect_experiences() and comm.dead_letters())
    goes_on(comm, good)


def test_answers_that_are_no_stream(learner: Learner, worker: Worker, server: Server, keys: Keys) -> None:
    if server.kind == "fake":
        pytest.skip("fakeredis itself fails when it is to read a string as a stream")
    comm, good, bad = learner(), worker(), worker()
    server.client.delete(keys.acknowledgements(bad.worker_id))
    server.client.set(keys.acknowledgements(bad.worker_id), "mine")
    wait_until("it is gone", lambda: server.client.type(keys.acknowledgements(bad.worker_id)) == b"none")
    goes_on(comm, good)


def test_workers_and_lives_that_are_none(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, good = learner(), worker()
    server.client.set(keys.life(7), "mine")
    server.client.hset(keys.life(8), mapping={"incarnation": "1e300", "member": "1", "seen": "-1"})
    server.client.sadd(keys.workers, "evil", "01", "-1", 2**64, 7, 8, 9)
    assert [info.worker_id for info in comm.workers()] == [0]
    goes_on(comm, good)
    wait_until("they are removed", lambda: server.client.smembers(keys.workers) == {b"0"})
    assert server.client.exists(keys.life(7)) == 0
    assert worker(8).incarnation < 2**52


def test_a_worker_cannot_have_numbers_of_versions_run_out(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, bad = learner(), worker()
    server.client.hset(keys.life(bad.worker_id), "known_version", 2**51)
    comm._roster.heartbeat(comm._channel)
    assert comm.send_model_weights({"x": 1}).version == 1


def test_counts_that_are_no_numbers(learner: Learner, worker: Worker, server: Server, keys: Keys) -> None:
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
    goes_on(comm, good)


def test_counts_that_are_no_hash(learner: Learner, worker: Worker, server: Server, keys: Keys) -> None:
    comm, good, bad = learner(), worker(), worker()
    bad.send_experiences({"x": 1})
    server.client.set(keys.counts(bad.worker_id), "x")
    assert len(comm.collect_experiences(timeout=5.0)) == 1
    comm.collect_experiences()
    goes_on(comm, good)


@pytest.mark.parametrize("kind", ["heartbeat", "counts", "experiences", "life"])
def test_a_key_of_a_wrong_type_hides_nobody_else(
    learner: Learner, worker: Worker, server: Server, keys: Keys, kind: str
) -> None:
    if server.kind == "fake" and kind in ("counts", "experiences"):
        pytest.skip("fakeredis itself fails when a script, or a read, finds a string in their place")
    comm, good, bad = learner(), worker(), worker()
    bad._heartbeat._thread.stop(5.0)  # it would write it anew
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
    goes_on(comm, good)


def test_long_texts_are_cut(learner: Learner, worker: Worker, server: Server, keys: Keys) -> None:
    comm, good, bad = learner(), worker(), worker()
    comm.send_model_weights({})
    server.client.xadd(
        keys.acknowledgements(bad.worker_id),
        {"event": "version", "version": 1, "outcome": "failed", "detail": "x" * 1_000_000},
        id=f"{bad.incarnation}-1",
    )
    assert len(comm.missed_updates()[bad.worker_id].records[0].detail) == 500
    goes_on(comm, good)


def test_a_heartbeat_that_makes_no_sense(
    learner: Learner, worker: Worker, server: Server, keys: Keys
) -> None:
    comm, good, bad = learner(), worker(), worker()
    bad._heartbeat._thread.stop(5.0)
    server.client.hset(
        keys.heartbeat(bad.worker_id), mapping={"version": "x", "pid": "9" * 400, "sent": "-1"}
    )
    assert [info.version for info in comm.workers()] == [0, 0]
    goes_on(comm, good)
