"""The worker's side of the demo: act with the newest policy, send what happened, until told to stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gymnasium.vector import VectorEnv

from rlbroker.demo import place
from rlbroker.demo.policy import ActorCritic
from rlbroker.demo.rollout import Rollout, make_envs
from rlbroker.errors import QueueFull
from rlbroker.worker import WorkerClient

STEPS_PER_BATCH = 64
#: How far apart the seeds of two workers are: more than either has environments.
SEED_STRIDE = 1000


def run_worker(
    worker: WorkerClient, envs: VectorEnv[Any, Any, Any], *, env_id: str, seed: int | None, timeout: float
) -> int:
    """Step the environments until the learner says stop; return how many batches were sent.

    Args:
        worker: this process's place in the run.
        envs: from `make_envs`.
        env_id: their name, so that the learner can refuse those of another environment.
        seed: of the run; each worker derives its own. None for a random one.
        timeout: seconds to wait for the learner's first weights.

    Raises:
        DeadlineExceeded: no weights came in time.
        WeightsMismatch: the learner trains for an environment with other observations or actions.
    """
    policy = ActorCritic(envs.single_observation_space, envs.single_action_space)
    if seed is not None:
        seed += SEED_STRIDE * (1 + worker.worker_id)
        torch.manual_seed(seed)
    rollout = Rollout(envs, seed)
    worker.load_weights(policy, timeout=timeout)
    sent = 0
    while worker.running:
        worker.poll(policy)
        batch = rollout.collect(policy, STEPS_PER_BATCH)
        while worker.running:
            try:
                sent += bool(worker.send_experiences({**batch, "env_id": env_id}))
                break
            except QueueFull:  # the learner is slow, or away: it may come back
                worker.poll(policy)
    return sent


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


def work(settings: WorkerSettings) -> int:
    """Join a run and act in it until told to stop; return how many batches were sent.

    Raises:
        InvalidArgument: the environment is unknown, or none that the demo can train on.
        DeadlineExceeded: no learner gave weights in time.
        PeerError: the server refused, or could not be reached in time.
    """
    torch.set_num_threads(1)  # networks this small are slower with more
    envs = make_envs(settings.env_id, settings.num_envs)
    try:
        with WorkerClient(redis_url=settings.url, run=settings.run, worker_id=settings.worker_id) as worker:
            print(f"worker {worker.worker_id} of {place(settings.url, settings.run)}", flush=True)
            return run_worker(
                worker, envs, env_id=settings.env_id, seed=settings.seed, timeout=settings.timeout_seconds
            )
    finally:
        envs.close()
