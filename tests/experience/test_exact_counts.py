"""Counts stay exact when the server does what it was asked, and its reply is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Server
from lossy import Lossy

from rlbroker import ConnectionFailed, WorkerClient, WorkerCommunicator
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
