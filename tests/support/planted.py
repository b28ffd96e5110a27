"""A run with planted trouble on a real server: what an operator must be able to find, all of it at once."""

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

from rlbroker import Fenced, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.local.embedded_server import RedisServer

#: Workers of the run. 0 is well. 1 polled at version 3 and never since. 2 died. 3 is there twice. 4 sent a batch over
#: which a learner died.
DILIGENT, BEHIND, DEAD, TWIN, POISONER = range(5)

#: How many versions worker 1 is behind.
VERSIONS_BEHIND = 17

#: A worker that is silent for so long is away. Short, as a dead one has to be waited for.
LEASE_SECONDS = 1.5

#: What worker 1 never answers.
COMMAND = "recalibrate"

#: What each version consists of, if nothing else is said.
WEIGHTS: Mapping[str, Any] = {"w": np.zeros(10, np.float32)}

_POLICY = "maxmemory-policy"


@dataclass
class Planted:
    """A run with trouble, while it lasts.

    Attributes:
        url: of its server, with the password.
        run: its name.
        learner: alive; it publishes nothing by itself.
        workers: those that are alive; they poll by themselves, but for the one that is behind.
        fenced: the process whose place another one of its id has taken.
        command: id of the command that is not answered.
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
        """The names of the run's keys."""
        return Keys(self.run)

    def undo(self) -> None:
        """End the run, delete its keys, and give the server its memory policy back. May be called again."""
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
    """Make the run; at the end of the block nothing is left of it.

    Args:
        server: where to.
        run: its name.
        url: how the processes reach the server, if not as it says itself.
        weights: what each version consists of.
        settings: of the learner, besides those that the trouble needs.
    """
    with ExitStack() as stack:
        with _quiet():
            planted = _planted(url or server.url, run, weights, settings, stack)
        yield planted


def _planted(
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

    doomed = open_learner()
    doomed.send_model_weights(weights)
    dead = WorkerClient(url, run, worker_id=DEAD, timeout=5.0)
    stack.callback(dead._connection.close)
    dead.load_weights({})
    wait_until("2 said that it runs version 1", lambda: [info.version for info in doomed.workers()] == [1])
    die(dead)
    fenced = join(TWIN)
    workers = {worker: join(worker) for worker in (DILIGENT, BEHIND, TWIN, POISONER)}

    workers[POISONER].load_weights({})
    workers[POISONER].send_experiences({"x": np.zeros(3, np.float32)})
    wait_until("the batch is in the hands of a learner", lambda: doomed.collect_experiences(0.5))
    doomed._thread.stop(5.0)  # and it dies over it
    stack.callback(doomed._connection.close)
    learner = stack.enter_context(open_learner())
    wait_until("it is a dead letter", lambda: learner.collect_experiences(0.1) or learner.dead_letters())

    publish(learner, 2, weights)
    wait_until("1 runs version 3", lambda: workers[BEHIND].poll({}) and workers[BEHIND].version == 3)
    publish(learner, VERSIONS_BEHIND, weights)
    polling = [client for worker, client in workers.items() if worker != BEHIND]
    stack.enter_context(_polled(polling))
    command = learner.send_control_command(COMMAND, worker_ids=[BEHIND])
    memory_policy = client.config_get(_POLICY)[_POLICY]
    client.config_set(_POLICY, "allkeys-lru")  # after the learner looked
    stack.callback(client.config_set, _POLICY, memory_policy)
    stack.callback(_hurry, [*workers.values(), fenced])

    def on_record() -> bool:
        members = {info.worker_id: info for info in learner.workers()}
        stale = [members[worker].staleness for worker in workers]
        return (
            members[DEAD].state == "away"
            and members[TWIN].fenced_seconds is not None
            and stale == [0, VERSIONS_BEHIND, 0, 0]
        )

    wait_until("everything is on record", on_record)
    return Planted(url, run, learner, workers, fenced, command.id, stack)


def die(worker: WorkerClient) -> None:
    """End what a worker does in the background without a word to anybody, as a killed process does."""
    _hurry([worker])
    worker._heartbeat._thread.stop(5.0)


def publish(learner: WorkerCommunicator, versions: int, weights: Mapping[str, Any] = WEIGHTS) -> None:
    """Publish so many versions."""
    for _ in range(versions):
        learner.send_model_weights(weights)


@contextmanager
def _polled(workers: list[WorkerClient]) -> Iterator[None]:
    """Have workers poll in the background."""
    over = threading.Event()

    def poll() -> None:
        models: list[dict[str, Any]] = [{} for _ in workers]
        while not over.is_set():
            for worker, model in zip(workers, models, strict=True):
                try:
                    worker.poll(model)
                except Fenced:  # the test took its place
                    continue
            time.sleep(0.02)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _hurry(workers: Iterable[WorkerClient]) -> None:
    """Have all of them end in the background at once, as closing one after the other takes its time."""
    for worker in workers:
        for part in (worker._heartbeat, worker._subscriber, worker._inbox):
            part.request_stop()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the log from warning of what is planted."""
    logger = logging.getLogger("rlbroker")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _delete(client: redis.Redis, pattern: str) -> None:
    for key in list(client.scan_iter(pattern)):
        client.delete(key)
