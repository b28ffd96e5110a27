"""A learner and two workers in JAX, which exchange weights and experiences through rlbroker alone.

    python examples/jax_policy.py [UPDATES]

A small policy learns to balance a pole (REINFORCE, on the CPU). Each worker plays one batch of episodes with each
version of the weights, and the learner makes the next version from one batch of each worker, so all data is on-policy.
JAX arrays are sent as they are and arrive as numpy arrays, which JAX takes as they are. A collected `Batch` is an
argument of a compiled function.

It uses the server that RLBROKER_REDIS_URL names. Without it, it starts a server of its own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import sys
from typing import Any

import jax
import jax.numpy as jnp

from rlbroker import Batch, WorkerClient, WorkerCommunicator
from rlbroker.local import RedisServer

# Several processes would each take the memory of a GPU.
jax.config.update("jax_platforms", "cpu")  # type: ignore[no-untyped-call] # JAX does not say

WORKERS = 2
EPISODES = 32  # in each batch
STEPS = 100  # of an episode; it ends before if the pole falls
LEARNING_RATE = 0.02
DISCOUNT = 0.97

Params = dict[str, Any]
Moments = tuple[jax.Array, Params, Params]  # of Adam: the number of steps, and two averages


# The task and the policy, as pure functions ------------------------------------------------------------------


def initial_params(key: jax.Array) -> Params:
    """Return the weights of a policy with one hidden layer."""
    first, second = jax.random.split(key)
    return {
        "hidden": {"w": jax.random.normal(first, (4, 16)) * 0.5, "b": jnp.zeros(16)},
        "out": {"w": jax.random.normal(second, (16, 2)) * 0.1, "b": jnp.zeros(2)},
    }


def logits(params: Params, obs: jax.Array) -> jax.Array:
    """Return the policy's preferences for both actions."""
    hidden = jnp.tanh(obs @ params["hidden"]["w"] + params["hidden"]["b"])
    found: jax.Array = hidden @ params["out"]["w"] + params["out"]["b"]
    return found


def step(state: jax.Array, action: jax.Array) -> jax.Array:
    """Move the cart for 0.02 s: states and actions are those of CartPole."""
    _, speed, angle, turn = state
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    push = (jnp.where(action == 1, 10.0, -10.0) + 0.05 * turn**2 * sine) / 1.1
    spin = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    change = jnp.stack([speed, push - 0.05 * spin * cosine / 1.1, turn, spin])
    return state + 0.02 * change


@jax.jit
def play(params: Params, key: jax.Array) -> dict[str, jax.Array]:
    """Return a batch of episodes: arrays of the shape [steps, episodes, …]."""

    def advance(carry: Any, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        states, alive = carry
        actions = jax.random.categorical(key, logits(params, states))
        following = jax.vmap(step)(states, actions)
        stands = (jnp.abs(following[:, 0]) < 2.4) & (jnp.abs(following[:, 2]) < 0.21)
        return (following, alive & stands), {"obs": states, "actions": actions, "alive": alive}

    first, rest = jax.random.split(key)
    states = jax.random.uniform(first, (EPISODES, 4), minval=-0.05, maxval=0.05)
    begin = states, jnp.ones(EPISODES, bool)
    batch: dict[str, jax.Array] = jax.lax.scan(advance, begin, jax.random.split(rest, STEPS))[1]
    return batch


@jax.jit
def improve(params: Params, moments: Moments, batches: list[Batch]) -> tuple[Params, Moments]:
    """Take one step of Adam along the policy gradient of one batch of each worker."""

    def loss(params: Params, batch: Batch) -> jax.Array:
        alive, steps = jnp.asarray(batch["alive"], jnp.float32), jnp.arange(STEPS)
        future = (
            jnp.triu(DISCOUNT ** (steps - steps[:, None])) @ alive
        )  # discounted sums of the steps to come
        advantage = (future - future.mean(axis=1, keepdims=True)) / (future.std() + 1e-6)
        log_probs = jax.nn.log_softmax(logits(params, batch["obs"]))
        chosen = jnp.take_along_axis(log_probs, batch["actions"][..., None], axis=-1)[..., 0]
        negative: jax.Array = -(chosen * advantage * alive).sum() / alive.sum()
        return negative

    gradients = jax.grad(lambda one: sum(loss(one, batch) for batch in batches) / len(batches))(params)
    count, first, second = moments
    count = count + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
    second = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g**2, second, gradients)

    def descend(value: jax.Array, m: jax.Array, s: jax.Array) -> jax.Array:
        direction = (m / (1 - 0.9**count)) / (jnp.sqrt(s / (1 - 0.99**count)) + 1e-8)
        return value - LEARNING_RATE * direction

    return jax.tree.map(descend, params, first, second), (count, first, second)


# Learner and worker ------------------------------------------------------------------------------------------


def work(url: str, run: str, worker_id: int) -> None:
    """Play one batch with each version, until the learner says stop."""
    key = jax.random.key(1000 + worker_id)
    with WorkerClient(redis_url=url, run=run, worker_id=worker_id) as worker:
        while worker.running:
            if taken := worker.take_weights(timeout=60.0):
                version, params = taken
                worker.send_experiences(play(params, jax.random.fold_in(key, version)))


def learn(comm: WorkerCommunicator, updates: int) -> tuple[float, float]:
    """Train; return the mean length of an episode with the first version, and with the last one."""
    params = initial_params(jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    moments = jnp.zeros(()), zeros, zeros
    lengths = []
    for update in range(updates):
        version = comm.send_model_weights(params, compression_enabled=False).version
        batches = [batch for _, batch in comm.collect_round(workers=range(WORKERS), timeout=60.0)]
        lengths.append(sum(float(batch["alive"].sum(axis=0).mean()) for batch in batches) / WORKERS)
        if update % 5 == 0 or update == updates - 1:
            print(f"version {version:2}: an episode lasts {lengths[-1]:5.1f} of {STEPS} steps")
        params, moments = improve(params, moments, batches)
    return lengths[0], lengths[-1]


def main(updates: int) -> None:
    """Start workers in processes of their own, and train."""
    run = f"jax-policy-{secrets.token_hex(4)}"
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        url = os.environ.get("RLBROKER_REDIS_URL") or stack.enter_context(RedisServer()).url
        comm = stack.enter_context(
            WorkerCommunicator(WORKERS, max_queue_size=2, redis_url=url, run=run, timeout=30.0)
        )
        workers = [spawn.Process(target=work, args=(url, run, number)) for number in range(WORKERS)]
        for process in workers:
            process.start()
        first, last = learn(comm, updates)
        comm.stop_workers()
        for process in workers:
            process.join(timeout=10.0)
        print(f"learned: {first:.1f} steps at first, {last:.1f} at last")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 25)
