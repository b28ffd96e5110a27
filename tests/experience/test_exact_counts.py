"""Counts stay exact when the server does what it was asked, and its reply is lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from conftest import Server
from lossy import Lossy

from rlbroker import ConnectionFailed, Fenced, Unconfirmed, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.experience import watched_streams

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def test_an_acknowledgement_whose_replies_are_lost_is_counted_once(
    server: Server, learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next `collect_experiences` reads the server's counts before it repeats the acknowledgement."""
    monkeypatch.setattr(watched_streams, "RECHECK_SECONDS", 0.0)
    losing = False
    lossy = Lossy(server.another_client(), lambda: losing)
    comm, client = learner(1, redis_client=lossy.client, redis_url=None, timeout=0.5), worker(0)
    for number in range(5):
        client.send_experiences({"number": number})
    got = comm.collect_experiences(timeout=5.0)
    losing = True
    for _ in range(2):
        with pytest.raises(ConnectionFailed):
            comm.collect_experiences()
    losing = False
    for number in range(5, 10):
        client.send_experiences({"number": number})
    while len(got) < 10:
        got += comm.collect_experiences(timeout=0.5)
    comm.collect_experiences()
    counts = comm.get_queue_info()["counts"][0]
    assert [batch["number"] for _, batch in got] == list(range(10))
    assert (counts.delivered, counts.produced, counts.waiting, counts.in_hand) == (10, 10, 0, 0)
    assert lossy.lost


@pytest.mark.parametrize("lost", range(1, 26))
def test_the_byte_bound_holds_whichever_reply_is_lost(
    server: Server, learner: Learner, worker: Worker, lost: int
) -> None:
    """The worker knows how many bytes its queue has, also those that its predecessor sent."""
    comm = learner(1, max_queue_bytes=4_500)
    batch = {"bytes": np.random.default_rng(0).bytes(1_000)}
    with worker(0) as client:
        for _ in range(2):
            client.send_experiences(batch)
    replies = itertools.count(1)
    lossy = Lossy(server.another_client(), lambda: next(replies) == lost)
    client = worker(0, redis_client=lossy.client, redis_url=None, when_full="drop_newest")
    receipts = [client.send_experiences(batch) for _ in range(4)]
    assert [receipt.accepted for receipt in receipts] == [True, True, False, False]
    assert len(comm.collect_experiences(timeout=5.0)) == 4
    comm.collect_experiences()
    counts = comm.get_queue_info()["counts"][0]
    assert (counts.delivered, counts.produced, counts.lost) == (4, 6, {"dropped_newest": 2})
    assert all(client.send_experiences(batch) for _ in range(4))


def test_only_batches_that_were_not_stored_are_counted_as_fenced(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    """The newer process has joined, and has not yet noted what this one stored."""
    comm, losing = learner(1), False
    lossy = Lossy(server.another_client(), lambda: losing)
    client = worker(0, redis_client=lossy.client, redis_url=None, timeout=0.5)
    client._heartbeat._thread.stop(5.0)  # so that it does not write how many it has sent
    client.send_experiences({"number": 1})
    losing = True
    with pytest.raises(Unconfirmed):
        client.send_experiences({"number": 2})
    losing = False
    server.client.hset(keys.life(0), "incarnation", client.incarnation + 1)
    with pytest.raises(Fenced):
        client.send_experiences({"number": 3})
    counts = comm.get_queue_info()["counts"][0]
    assert (counts.waiting, counts.lost) == (2, {"fenced": 1})
