"""The worker's side of the demo: act with the newest policy, send what happened, until told to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium.vector import VectorEnv

from rlbroker.backend.deadline import Deadline
from rlbroker.backend.text import counted
from rlbroker.demo import place
from rlbroker.demo.policy import HIDDEN, ActorCritic
from rlbroker.demo.retries import outlast
from rlbroker.demo.rollout import Rollout, make_envs
from rlbroker.errors import QueueFull, RunLost, Unconfirmed
from rlbroker.worker import WorkerClient

STEPS_PER_BATCH = 64
#: How far apart the seeds of two workers are: more than either has environments.
SEED_STRIDE = 1000


def run_worker(
    worker: WorkerClient,
    envs: VectorEnv[Any, Any, Any],
    *,
    env_id: str,
    seed: int | None,
    timeout: float,
    hidden: int = HIDDEN,
) -> int:
    """Step the environments until the learner says stop, or the worker drains; return how many batches were sent.

    Args:
        worker: this process's place in the run.
        envs: from `make_envs`.
        env_id: their name, so that the learner can refuse those of another environment.
        seed: of the run; each worker derives its own. None for a random one.
        timeout: seconds to wait for the learner's first weights.
        hidden: units in each of the network's layers, as the learner has them.

    Raises:
        DeadlineExceeded: no weights came in time.
        WeightsMismatch: the learner trains for an environment with other observations or actions.
        ConnectionFailed: the server was away for longer than ten minutes.
        QueueFull: while it drained, its last batch found no room.
    """
    policy = ActorCritic(envs.single_observation_space, envs.single_action_space, hidden)
    if seed is not None:
        seed += SEED_STRIDE * (1 + worker.worker_id)
        torch.manual_seed(seed)
    rollout = Rollout(envs, seed)
    worker.load_weights(policy, timeout=timeout)
    sent = 0
    while worker.running:
        worker.poll(policy)
        if not worker.running:
            break
        sent += _send(worker, {**rollout.collect(policy, STEPS_PER_BATCH), "env_id": env_id})
    return sent


def _send(worker: WorkerClient, batch: dict[str, Any]) -> bool:
    """Send a batch, however long that takes while learner or server are away; give whether it was taken."""
    while worker.running or worker.draining:
        try:
            return bool(outlast(lambda: worker.send_experiences(batch), leaving=lambda: worker.draining))
        except Unconfirmed:
            return True  # it goes again by itself, before the next one
        except QueueFull:  # the learner is slow, or away: it may come back
            if worker.draining:  # and nobody shall wait for that
                raise
            worker.poll()  # no weights: they did not produce this batch
    return False


@dataclass(frozen=True)
class WorkerSettings:
    """What `rlbroker worker` was asked to do."""

    run: str
    env_id: str = "CartPole-v1"
    worker_id: int | None = None
    num_envs: int = 8
    seed: int | None = None
    timeout_seconds: float = 60.0
    url: str | None = None
    hidden: int = HIDDEN


def join(settings: WorkerSettings) -> WorkerClient:
    """Join a run. A user that may not load scripts has to wait for the first learner, which does.

    Raises:
        RunLost: no learner came in time.
        PeerError: the server refused, or could not be reached in time.
    """
    deadline = Deadline(settings.timeout_seconds)
    while True:
        try:
            return WorkerClient(redis_url=settings.url, run=settings.run, worker_id=settings.worker_id)
        except RunLost:
            if deadline.over:
                raise


def work(settings: WorkerSettings, learner_state: Callable[[], str]) -> None:
    """Join a run and act in it until told to stop or to go; say which it was, and how many batches were sent.

    Args:
        settings: what was asked for.
        learner_state: says what the learner is about: `alive`, `ended`, `away`, or `none` before the first.

    Raises:
        InvalidArgument: the environment is unknown, or none that the demo can train on.
        DeadlineExceeded: no learner gave weights in time.
        PeerError: the server refused, or could not be reached in time; or the last batch found no room while it
            drained.
    """
    torch.set_num_threads(1)  # networks this small are slower with more
    envs = make_envs(settings.env_id, settings.num_envs)
    try:
        with join(settings) as worker:
            worker.drain_on(signal.SIGTERM, signal.SIGUSR1)
            where = place(settings.url, settings.run)
            print(f"worker {worker.worker_id} of {where} waits for the learner's weights", flush=True)
            if learner_state() == "ended":
                print(f"the learner of {settings.run!r} has ended; waiting for another", flush=True)
            try:
                sent = run_worker(
                    worker,
                    envs,
                    env_id=settings.env_id,
                    seed=settings.seed,
                    timeout=settings.timeout_seconds,
                    hidden=settings.hidden,
                )
            except QueueFull as full:
                what = {"ended": "has ended", "away": "is away", "none": "has not come yet"}.get(
                    learner_state()
                )
                if what is None:
                    raise
                raise QueueFull(
                    f"told to go, and its last batch is lost: the queue is full, and the learner of "
                    f"{settings.run!r} {what}"
                ) from full
            drained = worker.draining
        why = "told to go: sent what it had begun, and left" if drained else "stopped by the learner"
        print(f"{why} after {counted(sent, 'batch', 'batches')}", flush=True)
    finally:
        envs.close()
