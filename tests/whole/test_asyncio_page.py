"""The code of docs/asyncio.md runs, and its claims about cancelled calls and notebooks hold."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import re
import signal
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RealServer, Server, wait_until

from rlbroker import Fenced, WorkerClient, WorkerCommunicator

PAGE = Path(__file__).parents[2] / "docs" / "asyncio.md"
COLLECTING, LOOPS, FOLLOW, CREATE, USE, CLOSE = re.findall(
    r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S
)

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


@pytest.fixture
def page() -> dict[str, Any]:
    """What the asyncio part of the page defines."""
    names: dict[str, Any] = {}
    exec(COLLECTING + LOOPS + FOLLOW, names)
    return names


def numbers(pairs: list[Any]) -> list[int]:
    return [batch["n"] for _, batch in pairs]


def test_a_cancelled_collect_comes_with_the_next_one(
    page: dict[str, Any], learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()

    async def main() -> None:
        collect = page["Collecting"](comm.collect_experiences)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(collect(timeout=30.0), 0.1)
        await asyncio.to_thread(client.send_experiences, {"n": 1})
        async with asyncio.timeout(10.0):
            assert numbers(await collect(timeout=1.0)) == [1]
            assert numbers(await collect(timeout=0.0)) == []  # a call of its own again
        assert (await asyncio.to_thread(comm.get_queue_info))["counts"][0].delivered == 1

    asyncio.run(main())


def test_a_cancelled_round_comes_with_the_next_one(
    page: dict[str, Any], learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    comm.send_model_weights({"w": np.zeros(3)})
    client.load_weights({}, timeout=10.0)

    async def main() -> None:
        collect = page["Collecting"](comm.collect_round)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(collect(timeout=30.0), 0.1)
        await asyncio.to_thread(client.send_experiences, {"n": 1})
        await asyncio.to_thread(
            wait_until, "the thread has the round", lambda: comm.marks()["batches"].values()
        )
        assert numbers(await collect(timeout=1.0)) == [1]

    asyncio.run(main())


def test_weights_that_a_cancelled_take_had_come_with_the_next_one(
    page: dict[str, Any], learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()

    async def main() -> None:
        take = page["Collecting"](client.take_weights)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(take(timeout=30.0), 0.1)
        comm.send_model_weights({"w": np.zeros(3)})
        await asyncio.to_thread(wait_until, "the thread has them", lambda: client.version == 1)
        version, tree = await take(timeout=1.0)
        assert (version, tree["w"].tolist()) == (1, [0.0, 0.0, 0.0])
        assert await take(timeout=0.0) is None

    asyncio.run(main())


def test_newer_than_finds_what_a_cancelled_wait_has_loaded(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker()
    weights: dict[str, Any] = {}

    async def main() -> None:
        wait = asyncio.create_task(asyncio.to_thread(client.wait_for_weights, weights, timeout=30.0))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wait, 0.1)
        comm.send_model_weights({"w": np.zeros(3)})
        await asyncio.to_thread(wait_until, "the thread has loaded them", lambda: client.version == 1)
        assert await asyncio.to_thread(client.wait_for_weights, weights, newer_than=0, timeout=10.0)
        assert (client.version, weights["w"].tolist()) == (1, [0.0, 0.0, 0.0])

    asyncio.run(main())


def test_a_wait_without_a_timeout_ends_with_the_block_inside_the_loop(
    page: dict[str, Any], learner: Learner, run: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, played = learner(), []
    monkeypatch.setitem(
        page, "WorkerClient", lambda run: WorkerClient(run=run, **server.connection_settings())
    )

    def play(weights: dict[str, Any]) -> dict[str, Any]:
        played.append(weights["w"].tolist())
        return {"n": len(played)}

    comm.send_model_weights({"w": np.zeros(1)})
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(page["follow"](run, play, 2.0))
    assert time.monotonic() - began < 20.0
    assert played == [[0.0]]
    assert numbers(comm.collect_experiences(timeout=5.0)) == [1]


def test_collects_that_are_cancelled_at_any_moment_lose_nothing(
    page: dict[str, Any], learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    total, delays = 200, random.Random(0)

    def send() -> None:
        for number in range(total):
            client.send_experiences({"n": number})

    async def main() -> list[int]:
        found: list[int] = []
        collect, cancelled = page["Collecting"](comm.collect_experiences), 0
        sending = asyncio.create_task(asyncio.to_thread(send))
        while len(found) < total or not cancelled:
            call = asyncio.create_task(collect(timeout=0.05))
            await asyncio.sleep(delays.choice([0, 0.001, 0.003]))
            if not call.cancel():
                found += numbers(call.result())
                continue
            try:
                found += numbers(await call)
            except asyncio.CancelledError:
                cancelled += 1
        await sending
        return found

    assert asyncio.run(asyncio.wait_for(main(), 60.0)) == list(range(total))


def test_a_collect_that_fails_raises_once_also_after_a_cancellation(
    page: dict[str, Any], learner: Learner
) -> None:
    comm = learner()

    async def main() -> None:
        collect = page["Collecting"](comm.collect_experiences)
        call = asyncio.create_task(collect(timeout=-1.0))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        with pytest.raises(ValueError, match="timeout"):
            await collect(timeout=1.0)
        assert await collect(timeout=0.0) == []

    asyncio.run(main())


def test_what_a_cancelled_program_did_not_get_goes_to_the_next_learner(
    page: dict[str, Any], learner: Learner, worker: Worker
) -> None:
    client = worker()

    async def main() -> None:
        with learner() as comm:
            call = asyncio.create_task(page["Collecting"](comm.collect_experiences)(timeout=5.0))
            await asyncio.to_thread(client.send_experiences, {"n": 1})
            await asyncio.to_thread(
                wait_until, "the thread has the batch", lambda: comm.marks()["batches"].values()
            )
            call.cancel()
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert numbers(learner().collect_experiences(timeout=5.0)) == [1]


@pytest.mark.parametrize("there_is_room", [True, False])
def test_the_next_receipt_tells_whether_a_cancelled_send_was_accepted(
    there_is_room: bool, learner: Learner, worker: Worker
) -> None:
    comm, client = learner(max_queue_size=3 if there_is_room else 1), worker(timeout=0.5)
    began, cancelled, ended = threading.Event(), threading.Event(), threading.Event()

    def send() -> None:
        began.set()
        try:
            client.send_experiences({"n": 2})
        finally:
            ended.set()
            cancelled.wait(10.0)

    async def main() -> None:
        last = await asyncio.to_thread(client.send_experiences, {"n": 1})
        call = asyncio.create_task(asyncio.to_thread(send))
        await asyncio.to_thread(began.wait, 10.0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        cancelled.set()
        await asyncio.to_thread(ended.wait, 10.0)
        assert numbers(comm.collect_experiences(timeout=5.0)) == ([1, 2] if there_is_room else [1])
        following = await asyncio.to_thread(client.send_experiences, {"n": 3})
        assert following.sequence - last.sequence == (2 if there_is_room else 1)

    asyncio.run(main())


def test_the_loops_of_the_page_train_and_drain(
    page: dict[str, Any], learner: Learner, worker: Worker
) -> None:
    """SIGTERM drains the worker through a handler of the loop."""
    comm, client = learner(), worker()
    seen = []

    def train(pairs: list[Any]) -> dict[str, Any]:
        seen.extend(pairs)
        return {"w": np.full(3, len(seen))}

    async def act(weights: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0.001)
        return {"w": weights["w"].copy()}

    async def main() -> None:
        await asyncio.to_thread(comm.send_model_weights, {"w": np.zeros(3, np.int64)})
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, client.drain)
        working = asyncio.create_task(page["work"](client, {}, act))
        await page["learn"](comm, train, steps=5)
        os.kill(os.getpid(), signal.SIGTERM)
        await working

    asyncio.run(asyncio.wait_for(main(), 60.0))
    assert comm.version == 6
    assert seen
    assert client.draining


# Notebooks


@pytest.fixture
def cells(server: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the cells of the page one after the other in one namespace, as a notebook does."""
    names: dict[str, Any] = {}
    if isinstance(server, RealServer):
        monkeypatch.setenv("RLBROKER_REDIS_URL", server.url)

    def run(code: str) -> dict[str, Any]:
        if not isinstance(server, RealServer):
            code = code.replace('run="notebook"', 'run="notebook", **connect()')
            names["connect"] = server.connection_settings
        exec(code, names)
        return names

    yield run
    run(CLOSE)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_the_cell_that_creates_clients_can_run_again(cells: Any, caplog: pytest.LogCaptureFixture) -> None:
    cells(CREATE)
    names = cells(USE)
    old = [weakref.ref(client) for client in (names["comm"], names["workers"][1])]
    assert [len(batch["obs"]) for _, batch in names["pairs"]] == [8, 8]  # returned, and not acknowledged
    shown = names["workers"][0]  # as `Out` would
    cells(CREATE)
    assert "the run 'notebook' continues" in caplog.text
    comm, workers = names["comm"], names["workers"]
    assert [one.worker_id for one in comm.workers()] == [0, 1]
    assert len(comm.collect_experiences(timeout=5.0)) == 2
    del names["worker"]  # the variable of a loop
    gc.collect()
    wait_until("the old clients are gone", lambda: not any(client() for client in old))
    with pytest.raises(Fenced):
        shown.send_experiences({"n": 1})
    shown.close()
    for worker in workers:
        worker.send_experiences({"obs": np.ones((8, 4))})
    cells(USE)
    assert all(names["command"].outcomes().values())


def test_interrupting_the_kernel_ends_a_call_at_once_and_loses_nothing(
    learner: Learner, worker: Worker
) -> None:
    comm, client = learner(), worker()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        comm.collect_experiences(timeout=60.0)
    assert time.monotonic() - began < 20
    client.send_experiences({"n": 1})
    assert numbers(comm.collect_experiences(timeout=5.0)) == [1]
    timer.join()
