"""From `multiprocessing` queues to rlbroker: the same small job, before and after.

    python examples/from_multiprocessing.py before
    python examples/from_multiprocessing.py after

A learner trains a linear policy on the batches of two workers, and publishes weights after every batch. Worker 1 is
slow, so it cannot load them all. Both versions share the job and the training loop. The differences are marked BEFORE
and AFTER: the constructor, and the worker's three queue calls. At the end each version prints what it knows about
missed updates.

`after` uses the server that RLBROKER_REDIS_URL names. Without it, it starts a server of its own.
"""

from __future__ import annotations

import contextlib
import gzip
import multiprocessing
import os
import pickle
import queue
import secrets
import sys
import textwrap
import time
from collections.abc import Sequence
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlbroker import Missed, WorkerClient, WorkerCommunicator
from rlbroker.local import RedisServer

WORKERS = 2
MAX_QUEUE_SIZE = 4
BATCHES = 200
SECONDS_PER_ROLLOUT = (0.004, 0.03)  # by worker

Weights = dict[str, NDArray[np.float32]]
spawn = multiprocessing.get_context("spawn")


# The job, independent of how batches and weights travel ------------------------------------------------------


def rollout(worker_id: int, weights: Weights) -> dict[str, Any]:
    """Act 64 times in a toy environment: action 1 is right if the observation's sum is positive."""
    time.sleep(SECONDS_PER_ROLLOUT[worker_id])
    random = np.random.default_rng()
    obs = random.normal(size=(64, 4)).astype(np.float32)
    actions = random.random(64) < _chance_of_action_1(weights, obs)
    rewards = (actions == (obs.sum(axis=1) > 0)).astype(np.float32)
    experiences = {"obs": obs, "actions": actions, "rewards": rewards}
    return {"worker_id": worker_id, "experiences": experiences, "batch_size": 64, "timestamp": time.time()}


def improve(weights: Weights, experiences: dict[str, Any]) -> Weights:
    """Take one REINFORCE step."""
    obs, actions, rewards = (experiences[name] for name in ("obs", "actions", "rewards"))
    advantages = rewards - rewards.mean()
    step = ((actions - _chance_of_action_1(weights, obs)) * advantages) @ obs / len(obs)
    return {"w": (weights["w"] + 0.5 * step).astype(np.float32)}


def _chance_of_action_1(weights: Weights, obs: NDArray[np.float32]) -> NDArray[np.float32]:
    chance: NDArray[np.float32] = 1 / (1 + np.exp(-obs @ weights["w"]))
    return chance


# The learner's loop: the same lines before and after ---------------------------------------------------------


def train(communicator: QueueCommunicator | WorkerCommunicator, workers: Sequence[SpawnProcess]) -> None:
    for worker in workers:
        worker.start()
    weights: Weights = {"w": np.zeros(4, np.float32)}
    communicator.send_model_weights(weights)
    seen_workers, rewards, published = set[int](), list[float](), 1
    while len(rewards) < BATCHES:
        if not all(worker.is_alive() for worker in workers):
            raise RuntimeError("a worker ended before the training did")
        for worker_id, message in communicator.collect_experiences():
            seen_workers.add(worker_id)
            if len(seen_workers) == WORKERS:  # start when all workers have sent something
                rewards.append(float(message["experiences"]["rewards"].mean()))
                weights = improve(weights, message["experiences"])
                communicator.send_model_weights(weights)
                published += 1
        time.sleep(0.001)
    communicator.send_control_command("stop")
    for worker in workers:
        worker.join(timeout=10)
    print(f"learner: {len(rewards)} batches, {published} updates published, ", end="")
    print(f"mean reward {np.mean(rewards[:30]):.2f} at first and {np.mean(rewards[-30:]):.2f} at last")


# BEFORE: queues, on one host ---------------------------------------------------------------------------------


class Queues(NamedTuple):
    experience: Queue[dict[str, Any]]
    model: Queue[bytes]
    control: Queue[dict[str, Any]]


class QueueCommunicator:
    """A typical class of this kind: three queues for each worker, gzip and pickle."""

    def __init__(self, num_workers: int, max_queue_size: int = 1000, timeout: float = 10.0) -> None:
        self.queues = [
            Queues(spawn.Queue(max_queue_size), spawn.Queue(max_queue_size), spawn.Queue(max_queue_size))
            for _ in range(num_workers)
        ]
        self.timeout = timeout

    def send_model_weights(self, model_state_dict: Weights) -> None:
        for queues in self.queues:
            packed = gzip.compress(pickle.dumps(model_state_dict), compresslevel=6)
            with contextlib.suppress(queue.Full):  # this worker misses the update, silently
                queues.model.put_nowait(packed)

    def collect_experiences(self) -> list[tuple[int, dict[str, Any]]]:
        pairs = []
        for worker_id, queues in enumerate(self.queues):
            with contextlib.suppress(queue.Empty):
                while True:
                    pairs.append((worker_id, queues.experience.get_nowait()))
        return pairs

    def send_control_command(self, command: str, data: Any = None) -> None:
        for queues in self.queues:
            queues.control.put(
                {"command": command, "data": data, "timestamp": time.time()}, timeout=self.timeout
            )

    def get_queue_info(self) -> dict[str, list[int]]:
        return {
            "experience_queue_sizes": [_size(queues.experience) for queues in self.queues],
            "model_queue_sizes": [_size(queues.model) for queues in self.queues],
            "control_queue_sizes": [_size(queues.control) for queues in self.queues],
        }

    def cleanup(self) -> None:
        for queues in self.queues:
            for one in queues:
                one.cancel_join_thread()
                one.close()


def _size(one: Queue[Any]) -> int:
    try:
        return one.qsize()  # "approximate", according to its documentation
    except NotImplementedError:  # on macOS
        return -1


def worker_before(worker_id: int, queues: Queues) -> None:
    loaded = 1
    weights = pickle.loads(gzip.decompress(queues.model.get()))
    while queues.control.empty():  # `stop` is the only command here
        with contextlib.suppress(queue.Empty):
            weights = pickle.loads(gzip.decompress(queues.model.get_nowait()))
            loaded += 1
        with contextlib.suppress(queue.Full):
            queues.experience.put(rollout(worker_id, weights), timeout=1.0)
    print(f"worker {worker_id}: loaded {loaded} updates", flush=True)


def before() -> None:
    communicator = QueueCommunicator(WORKERS, MAX_QUEUE_SIZE)
    train(
        communicator,
        [
            spawn.Process(target=worker_before, args=(worker_id, queues), daemon=True)
            for worker_id, queues in enumerate(communicator.queues)
        ],
    )
    print(
        "missed updates: cannot tell. Full queues were skipped silently, and the only figure that is left is"
    )
    print(f"the length of the model queues: {communicator.get_queue_info()['model_queue_sizes']}")
    communicator.cleanup()


# AFTER: rlbroker, on as many hosts as you like ---------------------------------------------------------------


def worker_after(worker_id: int, url: str, run: str) -> None:
    loaded = 1
    weights: Weights = {}
    with WorkerClient(url, run, worker_id) as client:
        client.load_weights(weights)
        while client.running:
            loaded += client.poll(weights)  # applies new weights and obeys commands, such as `stop`
            client.send_experiences(rollout(worker_id, weights))
    print(f"worker {worker_id}: loaded {loaded} updates", flush=True)


def after(url: str) -> None:
    run = f"from-multiprocessing-{secrets.token_hex(4)}"
    communicator = WorkerCommunicator(WORKERS, MAX_QUEUE_SIZE, redis_url=url, run=run)
    train(
        communicator,
        [
            spawn.Process(target=worker_after, args=(worker_id, url, run), daemon=True)
            for worker_id in range(WORKERS)
        ],
    )
    deadline = time.monotonic() + 5.0
    while any(one.behind for one in communicator.missed_updates().values()) and time.monotonic() < deadline:
        time.sleep(0.01)  # the workers' last acknowledgements are being settled
    for worker_id, missed in communicator.missed_updates().items():
        reasons = ", ".join(f"{count} {why}" for why, count in missed.by_reason.items())
        print(f"missed updates of worker {worker_id}: {missed.total} of {communicator.version} ({reasons})")
        versions = ", ".join(_versions(record) for record in missed.records)
        print(textwrap.fill(versions, width=100, initial_indent="    ", subsequent_indent="    "))
    communicator.cleanup()


def _versions(record: Missed) -> str:
    return f"{record.first}-{record.last}" if record.last > record.first else f"{record.first}"


def main() -> None:
    if sys.argv[1:] == ["before"]:
        before()
    elif sys.argv[1:] == ["after"]:
        with contextlib.ExitStack() as stack:
            after(os.environ.get("RLBROKER_REDIS_URL") or stack.enter_context(RedisServer()).url)
    else:
        sys.exit("usage: python examples/from_multiprocessing.py before|after")


if __name__ == "__main__":
    main()
