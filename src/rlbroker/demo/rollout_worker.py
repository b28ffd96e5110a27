"""The worker of the demo: act with the latest policy and send batches until the learner stops the run."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium.vector import VectorEnv

from rlbroker.backend.deadline import Deadline
from rlbroker.backend.text import counted
from rlbroker.demo import describe_run
from rlbroker.demo.policy import HIDDEN, ActorCritic
from rlbroker.demo.retries import retry_during_outage
from rlbroker.demo.rollout import Rollout, make_envs
from rlbroker.errors import QueueFull, RunLost, Unconfirmed
from rlbroker.worker.client import WorkerClient

STEPS_PER_BATCH = 64
#: The distance between the seeds of two workers. It must exceed the number of environments of a worker.
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
    """Step the environments until the learner sends "stop" or the worker drains; return the number of batches sent.

    Args:
        worker: the client that joined the run.
        envs: from `make_envs`.
        env_id: the environment's name, so that the learner can refuse batches of another environment.
        seed: the run's seed, from which each worker derives its own; None for random seeds.
        timeout: seconds to wait for the learner's first weights.
        hidden: units in each hidden layer, the same as in the learner.

    Raises:
        DeadlineExceeded: no weights arrived in time.
        WeightsMismatch: the learner trains on an environment with other observations or actions.
        ConnectionFailed: the server was unreachable for longer than ten minutes.
        QueueFull: the queue had no room for the last batch while the worker drained.
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
    """Send a batch, and wait while the learner or the server is away; return whether the batch was accepted."""
    while worker.running or worker.draining:
        try:
            return bool(
                retry_during_outage(lambda: worker.send_experiences(batch), give_up=lambda: worker.draining)
            )
        except Unconfirmed:
            return True  # the client resends the batch before the next one
        except QueueFull:  # the learner is slow or away, and may come back
            if worker.draining:  # a draining worker must not wait for the learner
                raise
            worker.poll()  # without a model: new weights did not produce this batch
    return False


@dataclass(frozen=True)
class WorkerSettings:
    """The options of `rlbroker worker`."""

    run: str
    env_id: str = "CartPole-v1"
    worker_id: int | None = None
    num_envs: int = 8
    seed: int | None = None
    timeout_seconds: float = 60.0
    url: str | None = None
    hidden: int = HIDDEN


def join(settings: WorkerSettings) -> WorkerClient:
    """Join a run. A worker whose user may not load scripts waits for the first learner, which loads them.

    Raises:
        RunLost: no learner started in time.
        PeerError: the server refused the worker, or could not be reached in time.
    """
    deadline = Deadline(settings.timeout_seconds)
    while True:
        try:
            return WorkerClient(redis_url=settings.url, run=settings.run, worker_id=settings.worker_id)
        except RunLost:
            if deadline.over:
                raise


def work(settings: WorkerSettings, learner_state: Callable[[], str]) -> None:
    """Join a run and act until the learner stops it or a signal drains the worker; print the reason at the end.

    Args:
        settings: the options of the command.
        learner_state: returns the learner's state: `alive`, `away`, or `none` before the first learner.

    Raises:
        InvalidArgument: the environment is unknown, or the demo cannot train on it.
        DeadlineExceeded: no weights arrived in time.
        PeerError: the server refused the worker, or could not be reached in time; or the queue had no room for the
            last batch while the worker drained.
    """
    torch.set_num_threads(1)  # networks of this size are slower with more threads
    envs = make_envs(settings.env_id, settings.num_envs)
    try:
        with join(settings) as worker:
            worker.drain_on(signal.SIGTERM, signal.SIGUSR1)
            described_run = describe_run(settings.url, settings.run)
            if not worker.running:
                print(f"{described_run} has ended; start its learner before its workers", flush=True)
                return
            print(f"worker {worker.worker_id} of {described_run} waits for the learner's weights", flush=True)
            try:
                sent = run_worker(
                    worker,
                    envs,
                    env_id=settings.env_id,
                    seed=settings.seed,
                    timeout=settings.timeout_seconds,
                    hidden=settings.hidden,
                )
            except QueueFull as error:
                learner_is = {"away": "is away", "none": "has not started yet"}.get(learner_state())
                if learner_is is None:
                    raise
                raise QueueFull(
                    f"drained, but its last batch is lost: the queue is full, and the learner of "
                    f"{settings.run!r} {learner_is}"
                ) from error
            drained = worker.draining
        reason = "drained: sent its last batch and left the run" if drained else "stopped by the learner"
        print(f"{reason} after {counted(sent, 'batch', 'batches')}", flush=True)
    finally:
        envs.close()
