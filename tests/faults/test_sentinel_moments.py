"""Faults that only Sentinels know, each at its moment: learner and worker are in one process and take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from conftest import wait_until
from nodes import Node
from sentinel_trio import SentinelTrio

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import newest_place
from rlbroker.backend.topology import Server

RUN = "moments"


@pytest.fixture
def trio(new_trio: Callable[..., SentinelTrio]) -> SentinelTrio:
    return new_trio()


def test_sentinels_that_forgot_how_often_the_master_changed_are_believed(trio: SentinelTrio) -> None:
    """Those that come back with nothing but their first configuration, as containers do, count changes anew."""
    trio.replace_sentinels(changes=2)
    with _both(trio) as (learner, worker):
        trio.replace_sentinels()
        old = trio.master()
        old.kill()
        trio.wait_until_promoted(old)
        worker.send_experiences({"n": 1}, timeout=60.0)
        _collect(learner, [1])


def test_a_master_that_was_replaced_is_read_no_more_though_it_answers(trio: SentinelTrio) -> None:
    """It is cut off from Sentinels and replicas, but not from the learner, whose connection to it holds."""
    with _both(trio) as (learner, worker), trio.two_masters() as (old, new):
        worker.send_experiences({"n": 1})  # perhaps to the old one
        wait_until("the worker is at the new one", lambda: _newest(new) == 2, 60.0)
        worker.send_experiences({"n": 2})
        _collect(learner, [1, 2])
        assert old.is_responsive


def test_replicas_that_hang_hold_up_one_version_and_not_each(
    trio: SentinelTrio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker leaves them alone for a while, and then tries them again."""
    with (
        WorkerCommunicator(1, redis_url=trio.url, run=RUN, host_cache=False) as learner,
        WorkerClient(trio.url, RUN, 0, host_cache=False, read_from_replicas=True) as worker,
    ):
        asked, replicas_of = list[Server](), worker._connection.replicas_of

        def counted(master: Server) -> Sequence[Server]:
            asked.append(master)
            return replicas_of(master)

        monkeypatch.setattr(worker._connection, "replicas_of", counted)

        def asked_for_a_version() -> int:
            before, model = len(asked), dict[str, Any]()
            learner.send_model_weights({"w": np.zeros(1_000)})
            wait_until(
                "it is applied", lambda: worker.poll(model) and worker.version == learner.version, 60.0
            )
            return len(asked) - before

        assert asked_for_a_version()
        replicas = [node for node in trio.nodes if node is not trio.master()]
        for node in replicas:
            node.freeze()
        assert asked_for_a_version()
        assert not asked_for_a_version()
        for node in replicas:
            node.thaw()
        worker._subscriber._downloader._reader._replicas_away = Deadline(0)  # it is over
        assert asked_for_a_version()


@contextmanager
def _both(trio: SentinelTrio) -> Iterator[tuple[WorkerCommunicator, WorkerClient]]:
    """Give a learner and a worker, whose first batch has arrived."""
    with (
        WorkerCommunicator(1, redis_url=trio.url, run=RUN, host_cache=False) as learner,
        WorkerClient(trio.url, RUN, 0, level="learner", host_cache=False) as worker,
    ):
        worker.send_experiences({"n": 0})
        _collect(learner, [0])
        yield learner, worker


def _collect(learner: WorkerCommunicator, wanted: list[int]) -> None:
    """Wait until these batches arrive, and no others."""
    got = list[int]()

    def arrived() -> bool:
        got.extend(batch["n"] for _, batch in learner.collect_experiences(0.2))
        return len(got) >= len(wanted)

    wait_until("the batches arrive", arrived, 60.0)
    assert got == wanted


def _newest(server: Node) -> int:
    """Give the number of the newest batch there."""
    return newest_place(server.ask("XINFO", "STREAM", Keys(RUN).experiences(0)))[1]
