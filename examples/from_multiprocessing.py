"""From `multiprocessing` queues to rlbroker: the same small job, before and after.

    python examples/from_multiprocessing.py before
    python examples/from_multiprocessing.py after

A learner trains a linear policy on the batches of two workers, and publishes weights after every batch. Worker 1 is
slow, so it cannot load them all. The job and the training loop are the same before and after. Compare `ManagerBefore`
with `ManagerAfter`, method by method, and `work_before` with `work_after`. At the end each version prints what it knows
about the stop and about missed updates.

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
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlbroker import Batch, Missed, WorkerClient, WorkerCommunicator
from rlbroker.local import RedisServer

WORKERS = 2
MAX_QUEUE_SIZE = 4
TIMEOUT = 10.0
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


def train(manager: ManagerBefore | ManagerAfter) -> None:
    weights: Weights = {"w": np.zeros(4, np.float32)}
    seen_workers, rewards, published = set[int](), list[float](), 1
    manager.start_workers()
    try:
        manager.sync(weights)
        while len(rewards) < BATCHES:
            if not all(worker.is_alive() for worker in manager.workers):
                raise RuntimeError("a worker ended before the training did")
            for worker_id, message in manager.collect():
                seen_workers.add(worker_id)
                if len(seen_workers) == WORKERS:  # start when all workers have sent something
                    rewards.append(float(message["experiences"]["rewards"].mean()))
                    weights = improve(weights, message["experiences"])
                    manager.sync(weights)
                    published += 1
    finally:
        manager.stop_workers()
    print(f"learner: {len(rewards)} batches, {published} updates published, ", end="")
    print(f"mean reward {np.mean(rewards[:30]):.2f} at first and {np.mean(rewards[-30:]):.2f} at last")


# BEFORE: queues, on one host ---------------------------------------------------------------------------------


class ManagerBefore:
    def __init__(self) -> None:
        self.communicator = QueueCommunicator(WORKERS, MAX_QUEUE_SIZE, TIMEOUT)
        self.workers: list[SpawnProcess] = []

    def start_workers(self) -> None:
        for worker_id, queues in enumerate(self.communicator.queues):
            worker = spawn.Process(target=work_before, args=(worker_id, queues), daemon=True)
            worker.start()
            self.workers.append(worker)

    def sync(self, weights: Weights) -> None:
        self.communicator.send_model_weights(weights)

    def collect(self) -> list[tuple[int, dict[str, Any]]]:
        time.sleep(0.001)  # no call waits on all queues
        return self.communicator.collect_experiences()

    def stop_workers(self) -> None:
        self.communicator.send_control_command("stop")
        for worker in self.workers:
            worker.join(TIMEOUT)
            if worker.is_alive():  # its queue was full, perhaps
                worker.terminate()
        print("stop: cannot tell which workers obeyed it")
        print(
            "missed updates: cannot tell. Full queues were skipped silently, and the only figure that is left is"
        )
        print(f"the length of the model queues: {self.communicator.get_queue_info()['model_queue_sizes']}")
        self.communicator.cleanup()


def work_before(worker_id: int, queues: Queues) -> None:
    loaded = 1
    weights = pickle.loads(gzip.decompress(queues.model.get()))
    while queues.control.empty():  # `stop` is the only command here
        with contextlib.suppress(queue.Empty):
            weights = pickle.loads(gzip.decompress(queues.model.get_nowait()))
            loaded += 1
        with contextlib.suppress(queue.Full):  # this batch is lost, silently
            queues.experience.put(rollout(worker_id, weights), timeout=1.0)
    print(f"worker {worker_id}: loaded {loaded} updates", flush=True)


# AFTER: rlbroker, on as many hosts as you like ---------------------------------------------------------------


class ManagerAfter:
    def __init__(self, url: str) -> None:
        run = f"from-multiprocessing-{secrets.token_hex(4)}"  # a new name for each training
        self.communicator = WorkerCommunicator(WORKERS, MAX_QUEUE_SIZE, TIMEOUT, redis_url=url, run=run)
        self.url, self.workers = url, list[SpawnProcess]()

    def start_workers(self) -> None:
        for worker_id in range(WORKERS):
            arguments = (worker_id, self.url, self.communicator.run)
            worker = spawn.Process(target=work_after, args=arguments, daemon=True)
            worker.start()
            self.workers.append(worker)

    def sync(self, weights: Weights) -> None:
        self.communicator.send_model_weights(weights)

    def collect(self) -> list[tuple[int, Batch]]:
        return self.communicator.collect_experiences(timeout=1.0)

    def stop_workers(self) -> None:
        outcomes = self.communicator.stop_workers(TIMEOUT)
        for worker in self.workers:
            worker.join(TIMEOUT)
        print("stop:", ", ".join(f"worker {worker} {outcome}" for worker, outcome in outcomes.items()))
        print_missed(self.communicator)
        self.communicator.cleanup()


def work_after(worker_id: int, url: str, run: str) -> None:
    loaded = 1
    weights: Weights = {}
    with WorkerClient(url, run, worker_id) as client:
        client.load_weights(weights)
        while client.running:
            loaded += client.poll(weights)  # applies new weights and obeys commands, such as `stop`
            client.send_experiences(rollout(worker_id, weights))
    print(f"worker {worker_id}: loaded {loaded} updates", flush=True)


def print_missed(communicator: WorkerCommunicator) -> None:
    deadline = time.monotonic() + 5.0
    while any(one.behind for one in communicator.missed_updates().values()) and time.monotonic() < deadline:
        time.sleep(0.01)  # the workers' last acknowledgements are being settled
    for worker_id, missed in communicator.missed_updates().items():
        reasons = ", ".join(f"{count} {why}" for why, count in missed.by_reason.items())
        print(f"missed updates of worker {worker_id}: {missed.total} of {communicator.version} ({reasons})")
        versions = ", ".join(_versions(record) for record in missed.records)
        print(textwrap.fill(versions, width=100, initial_indent="    ", subsequent_indent="    "))


def _versions(record: Missed) -> str:
    return f"{record.first}-{record.last}" if record.last > record.first else f"{record.first}"


# What `ManagerBefore` uses, and rlbroker replaces ------------------------------------------------------------


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
        return [
            (worker_id, message)
            for worker_id, queues in enumerate(self.queues)
            for message in _take_all(queues.experience)
        ]

    def send_control_command(self, command: str, data: Any = None) -> None:
        message = {"command": command, "data": data, "timestamp": time.time()}
        for queues in self.queues:
            with contextlib.suppress(queue.Full):  # this worker never hears of it
                queues.control.put(message, timeout=self.timeout)

    def get_queue_info(self) -> dict[str, list[int]]:
        return {
            "experience_queue_sizes": [_size(queues.experience) for queues in self.queues],
            "model_queue_sizes": [_size(queues.model) for queues in self.queues],
            "control_queue_sizes": [_size(queues.control) for queues in self.queues],
        }

    def cleanup(self) -> None:
        self.send_control_command("stop")
        for queues in self.queues:
            for one in queues:
                _take_all(one)
                one.close()


def _take_all(one: Queue[Any]) -> list[Any]:
    taken: list[Any] = []
    with contextlib.suppress(queue.Empty):
        while True:
            taken.append(one.get_nowait())
    return taken


def _size(one: Queue[Any]) -> int:
    try:
        return one.qsize()  # "approximate", according to its documentation
    except NotImplementedError:  # on macOS
        return -1


def main() -> None:
    if sys.argv[1:] == ["before"]:
        train(ManagerBefore())
    elif sys.argv[1:] == ["after"]:
        with contextlib.ExitStack() as stack:
            train(
                ManagerAfter(os.environ.get("RLBROKER_REDIS_URL") or stack.enter_context(RedisServer()).url)
            )
    else:
        sys.exit("usage: python examples/from_multiprocessing.py before|after")


if __name__ == "__main__":
    main()
