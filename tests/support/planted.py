"""A run with planted faults on a real server, for the tests of what an operator must find."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import redis
from conftest import wait_until
from crashed import end_at_once

from rlbroker import Fenced, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.local.embedded_server import RedisServer

#: Workers of the run. 0 is healthy. 1 has not polled since version 3. 2 died. 3 was started twice. 4 sent a batch that
#: killed a learner.
DILIGENT, BEHIND, DEAD, TWIN, POISONER = range(5)

#: How many versions worker 1 is behind.
VERSIONS_BEHIND = 17

#: The lease: short, because the fixture waits until the dead worker is away.
LEASE_SECONDS = 1.5

#: A command that worker 1 never answers.
COMMAND = "recalibrate"

#: The default contents of each version.
WEIGHTS: Mapping[str, Any] = {"w": np.zeros(10, np.float32)}

_POLICY = "maxmemory-policy"


@dataclass
class Planted:
    """The run with planted faults.

    Attributes:
        url: the URL of its server, with the password.
        run: its name.
        learner: the live learner; it publishes only on request.
        workers: the live workers; all but the one that is behind poll in the background.
        fenced: the worker that was fenced by a second process with its id.
        command: the id of the unanswered command.
    """

    url: str
    run: str
    learner: WorkerCommunicator
    workers: Mapping[int, WorkerClient]
    fenced: WorkerClient
    command: str
    _stack: ExitStack = field(repr=False)

    @property
    def keys(self) -> Keys:
        """The run's keys."""
        return Keys(self.run)

    def undo(self) -> None:
        """End the run, delete its keys, and restore the memory policy of the server. Idempotent."""
        self._stack.close()


@contextmanager
def plant(
    server: RedisServer,
    run: str = "pong",
    *,
    url: str | None = None,
    weights: Mapping[str, Any] = WEIGHTS,
    **settings: Any,
) -> Iterator[Planted]:
    """Make the run; delete it at the end of the block.

    Args:
        server: the server.
        run: the name of the run.
        url: the URL for learners and workers, if not the server's own.
        weights: the contents of each version.
        settings: further settings of the learner.
    """
    with ExitStack() as stack:
        with _quiet():
            planted = _make_run(url or server.url, run, weights, settings, stack)
        yield planted


def _make_run(
    url: str, run: str, weights: Mapping[str, Any], settings: Mapping[str, Any], stack: ExitStack
) -> Planted:
    client = stack.enter_context(redis.Redis.from_url(url))
    stack.callback(_delete, client, Keys(run).everything)
    open_learner = partial(
        WorkerCommunicator,
        **{
            "num_workers": 5,
            "redis_url": url,
            "run": run,
            "acknowledge": "manual",
            "max_deliveries": 1,
            "lease_seconds": LEASE_SECONDS,
            "timeout": 5.0,
            **settings,
        },
    )

    def join(worker: int) -> WorkerClient:
        return stack.enter_context(WorkerClient(url, run, worker_id=worker, timeout=5.0))

    dying_learner = open_learner()
    dying_learner.send_model_weights(weights)
    dead_worker = WorkerClient(url, run, worker_id=DEAD, timeout=5.0)
    stack.callback(end_at_once, dead_worker)
    dead_worker.load_weights({})
    wait_until(
        "worker 2 has reported version 1", lambda: [info.version for info in dying_learner.workers()] == [1]
    )
    die(dead_worker)
    fenced = join(TWIN)
    workers = {worker: join(worker) for worker in (DILIGENT, BEHIND, TWIN, POISONER)}

    workers[POISONER].load_weights({})
    workers[POISONER].send_experiences({"x": np.zeros(3, np.float32)})
    wait_until("a learner has read the batch", lambda: dying_learner.collect_experiences(0.5))
    dying_learner._thread.stop(5.0)  # killed before it acknowledges the batch
    stack.callback(end_at_once, dying_learner)
    learner = stack.enter_context(open_learner())
    wait_until(
        "the batch is a dead letter", lambda: learner.collect_experiences(0.1) or learner.dead_letters()
    )

    publish(learner, 2, weights)
    wait_until("worker 1 runs version 3", lambda: workers[BEHIND].poll({}) and workers[BEHIND].version == 3)
    publish(learner, VERSIONS_BEHIND, weights)
    polling = [client for worker, client in workers.items() if worker != BEHIND]
    stack.enter_context(_polling(polling))
    command = learner.send_control_command(COMMAND, worker_ids=[BEHIND])
    memory_policy = client.config_get(_POLICY)[_POLICY]
    client.config_set(_POLICY, "allkeys-lru")  # after the learner has checked it
    stack.callback(client.config_set, _POLICY, memory_policy)
    stack.callback(_request_stop, [*workers.values(), fenced])

    def is_recorded() -> bool:
        members = {info.worker_id: info for info in learner.workers()}
        stale = [members[worker].staleness for worker in workers]
        return (
            members[DEAD].state == "away"
            and members[TWIN].fenced_seconds is not None
            and stale == [0, VERSIONS_BEHIND, 0, 0]
        )

    wait_until("every fault is recorded", is_recorded)
    return Planted(url, run, learner, workers, fenced, command.id, stack)


def die(worker: WorkerClient) -> None:
    """Stop the background threads of a worker without leaving the run, like a killed process."""
    _request_stop([worker])
    worker._heartbeat._thread.stop(5.0)


def publish(learner: WorkerCommunicator, versions: int, weights: Mapping[str, Any] = WEIGHTS) -> None:
    """Publish a number of versions."""
    for _ in range(versions):
        learner.send_model_weights(weights)


@contextmanager
def _polling(workers: list[WorkerClient]) -> Iterator[None]:
    """Poll workers in the background."""
    ended = threading.Event()

    def poll() -> None:
        models: list[dict[str, Any]] = [{} for _ in workers]
        while not ended.is_set():
            for worker, model in zip(workers, models, strict=True):
                try:
                    worker.poll(model)
                except Fenced:  # the test has started a second process with its id
                    continue
            time.sleep(0.02)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _request_stop(workers: Iterable[WorkerClient]) -> None:
    """Stop the background threads of all workers at once: closing one worker after another is slow."""
    for worker in workers:
        for part in (worker._heartbeat, worker._subscriber, worker._inbox):
            part.thread.request_stop()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings that the faults cause."""
    logger = logging.getLogger("rlbroker")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _delete(client: redis.Redis, pattern: str) -> None:
    for key in list(client.scan_iter(pattern)):
        client.delete(key)
