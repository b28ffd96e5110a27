"""Faults with Sentinels at exact moments: learner and worker take turns in one process."""

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


def test_sentinels_that_lost_their_configuration_epoch_are_believed(trio: SentinelTrio) -> None:
    """Sentinels that restart with their first configuration, as containers do, count failovers from 0 again."""
    trio.replace_sentinels(changes=2)
    with _open_run(trio) as (learner, worker):
        trio.replace_sentinels()
        old = trio.master()
        old.kill()
        trio.wait_until_promoted(old)
        worker.send_experiences({"n": 1}, timeout=60.0)
        _collect(learner, [1])


def test_a_replaced_master_is_no_longer_read_though_it_answers(trio: SentinelTrio) -> None:
    """Sentinels and replicas cannot reach it, but the learner's connection to it stays open."""
    with _open_run(trio) as (learner, worker), trio.two_masters() as (old, new):
        worker.send_experiences({"n": 1})  # possibly to the old master
        wait_until("the worker sends to the new master", lambda: _newest_sequence(new) == 2, 60.0)
        worker.send_experiences({"n": 2})
        _collect(learner, [1, 2])
        assert old.is_responsive


def test_hanging_replicas_delay_one_version_but_not_each(
    trio: SentinelTrio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker ignores them for a while, and then tries them again."""
    with (
        WorkerCommunicator(1, redis_url=trio.url, run=RUN, host_cache=False) as learner,
        WorkerClient(trio.url, RUN, 0, host_cache=False, read_from_replicas=True) as worker,
    ):
        calls, replicas_of = list[Server](), worker._connection.replicas_of

        def record_call(master: Server) -> Sequence[Server]:
            calls.append(master)
            return replicas_of(master)

        monkeypatch.setattr(worker._connection, "replicas_of", record_call)

        def count_calls_for_a_version() -> int:
            before, model = len(calls), dict[str, Any]()
            learner.send_model_weights({"w": np.zeros(1_000)})
            wait_until(
                "the version is applied",
                lambda: worker.poll(model) and worker.version == learner.version,
                60.0,
            )
            return len(calls) - before

        assert count_calls_for_a_version()
        replicas = [node for node in trio.nodes if node is not trio.master()]
        for node in replicas:
            node.freeze()
        assert count_calls_for_a_version()
        assert not count_calls_for_a_version()
        for node in replicas:
            node.thaw()
        worker._subscriber._downloader._reader._replicas_away = Deadline(0)  # expired
        assert count_calls_for_a_version()


@contextmanager
def _open_run(trio: SentinelTrio) -> Iterator[tuple[WorkerCommunicator, WorkerClient]]:
    """Yield a learner and a worker whose first batch has arrived."""
    with (
        WorkerCommunicator(1, redis_url=trio.url, run=RUN, host_cache=False) as learner,
        WorkerClient(trio.url, RUN, 0, level="learner", host_cache=False) as worker,
    ):
        worker.send_experiences({"n": 0})
        _collect(learner, [0])
        yield learner, worker


def _collect(learner: WorkerCommunicator, wanted: list[int]) -> None:
    """Wait until exactly these batches arrive."""
    got = list[int]()

    def arrived() -> bool:
        got.extend(batch["n"] for _, batch in learner.collect_experiences(0.2))
        return len(got) >= len(wanted)

    wait_until("the batches arrive", arrived, 60.0)
    assert got == wanted


def _newest_sequence(server: Node) -> int:
    """Return the sequence of the newest batch on a server."""
    return newest_place(server.ask("XINFO", "STREAM", Keys(RUN).experiences(0)))[1]
