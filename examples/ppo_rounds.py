"""On-policy PPO in rounds, and the same training in a single process.

    python examples/ppo_rounds.py single
    python examples/ppo_rounds.py rounds

Each update of PPO needs batches of the policy that it is about to change. In a round, the learner publishes its policy,
and collects one batch of exactly that version from each worker. Both versions share everything else, random numbers
included, so for one seed they learn the same weights, bit for bit. `train_with_rounds` and `work` are all that rlbroker
adds.

`rounds` uses the server that RLBROKER_REDIS_URL names. Without it, it starts a server of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import secrets
from collections.abc import Sequence

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.local import RedisServer

WORKERS = 3
ENVS_PER_WORKER = 4
STEPS_PER_BATCH = 64
GAMMA, GAE_LAMBDA = 0.99, 0.95
LEARNING_RATE, EPOCHS, MINIBATCHES, CLIP = 1e-3, 6, 4, 0.2

Batch = dict[str, Tensor]
Curve = list[tuple[int, float]]  #: environment steps, and the mean return of the 50 episodes before


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(
            nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
        )
        self.critic = nn.Sequential(
            nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
        )

    def value(self, obs: Tensor) -> Tensor:
        value: Tensor = self.critic(obs).squeeze(-1)
        return value

    def logprobs(self, obs: Tensor) -> Tensor:
        return torch.log_softmax(self.actor(obs), dim=-1)


class Rollout:
    """The environments of one worker; their episodes continue from batch to batch."""

    def __init__(self, seed: int, worker_id: int) -> None:
        self.envs = gymnasium.make_vec("CartPole-v1", num_envs=ENVS_PER_WORKER, vectorization_mode="sync")
        self.random = torch.Generator().manual_seed(1000 * seed + worker_id)
        obs, _ = self.envs.reset(seed=1000 * seed + 100 * worker_id)
        self.obs = torch.as_tensor(obs)
        self.resetting = np.zeros(ENVS_PER_WORKER, dtype=bool)
        self.returns = np.zeros(ENVS_PER_WORKER)

    @torch.no_grad()
    def collect(self, policy: Policy) -> Batch:
        """Return a batch `[T, B, …]`. Gymnasium ignores the action after an episode's end; `mask` is False there."""
        rows: dict[str, list[Tensor]] = {}
        finished: list[float] = []
        for _ in range(STEPS_PER_BATCH):
            logprobs = policy.logprobs(self.obs)
            actions = torch.multinomial(logprobs.exp(), 1, generator=self.random).squeeze(-1)
            obs, rewards, terminations, truncations, _ = self.envs.step(actions.numpy())
            row = {
                "obs": self.obs,
                "actions": actions,
                "logprobs": logprobs.gather(-1, actions[:, None]).squeeze(-1),
                "rewards": torch.as_tensor(rewards, dtype=torch.float32),
                "terminations": torch.as_tensor(terminations),
                "mask": torch.as_tensor(~self.resetting),
            }
            for name, value in row.items():
                rows.setdefault(name, []).append(value)
            self.obs = torch.as_tensor(obs)
            self.returns += rewards
            self.resetting = terminations | truncations
            finished += self.returns[self.resetting].tolist()
            self.returns[self.resetting] = 0.0
        batch = {name: torch.stack(values) for name, values in rows.items()}
        return batch | {"last_obs": self.obs, "episode_returns": torch.tensor(finished)}


class Trainer:
    """PPO (Schulman et al. 2017, arXiv:1707.06347) on the batches of all workers."""

    def __init__(self, seed: int) -> None:
        torch.set_num_threads(1)  # sums of several threads may differ in the last bit
        torch.manual_seed(seed)
        self.policy = Policy()
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=LEARNING_RATE, eps=1e-5)
        self.steps, self.episode_returns, self.curve = 0, [0.0], Curve()

    def update(self, batches: Sequence[Batch]) -> None:
        parts = [self._with_advantages(batch) for batch in batches]
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        std, mean = torch.std_mean(rows["advantages"])
        rows["advantages"] = (rows["advantages"] - mean) / (std + 1e-8)
        for _ in range(EPOCHS):
            for index in torch.randperm(len(rows["obs"])).chunk(MINIBATCHES):
                obs, actions, old, advantages, returns = (rows[name][index] for name in rows)
                logprobs = self.policy.logprobs(obs)
                ratio = (logprobs.gather(-1, actions[:, None]).squeeze(-1) - old).exp()
                gains = torch.min(advantages * ratio, advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
                errors = (self.policy.value(obs) - returns).square()
                loss = 0.25 * errors.mean() - gains.mean()
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.policy.parameters(), 0.5)
                self.optimizer.step()
        self._note(batches)

    @torch.no_grad()
    def _with_advantages(self, batch: Batch) -> Batch:
        """Return the batch's transitions with generalised advantage estimates (arXiv:1506.02438)."""
        values = self.policy.value(torch.cat([batch["obs"], batch["last_obs"][None]]))
        goes_on = 1.0 - batch["terminations"].float()
        deltas = batch["rewards"] + GAMMA * values[1:] * goes_on - values[:-1]
        advantages, following = torch.zeros_like(deltas), torch.zeros(ENVS_PER_WORKER)
        for t in reversed(range(STEPS_PER_BATCH)):
            following = (deltas[t] + GAMMA * GAE_LAMBDA * following) * batch["mask"][t]
            advantages[t] = following
        rows = {name: batch[name] for name in ("obs", "actions", "logprobs")}
        rows |= {"advantages": advantages, "returns": advantages + values[:-1]}
        return {name: value[batch["mask"]] for name, value in rows.items()}

    def _note(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self.steps += batch["rewards"].numel()
            self.episode_returns += batch["episode_returns"].tolist()
        last = self.episode_returns[-50:]
        self.curve.append((self.steps, sum(last) / len(last)))


def train_alone(seed: int, updates: int) -> Trainer:
    trainer = Trainer(seed)
    rollouts = [Rollout(seed, worker_id) for worker_id in range(WORKERS)]
    for _ in range(updates):
        trainer.update([rollout.collect(trainer.policy) for rollout in rollouts])
    return trainer


def train_with_rounds(seed: int, updates: int, url: str | None = None) -> Trainer:
    trainer = Trainer(seed)
    run = f"ppo-{secrets.token_hex(4)}"
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=work, args=(url, run, seed, worker_id)) for worker_id in range(WORKERS)]
    with WorkerCommunicator(WORKERS, redis_url=url, run=run) as comm:
        for worker in workers:
            worker.start()
        for _ in range(updates):
            comm.send_model_weights(trainer.policy.state_dict(), compression_enabled=False)
            pairs = comm.collect_round(workers=range(WORKERS), timeout=60.0)
            trainer.update([batch for _, batch in pairs])
    for worker in workers:  # leaving the block has told them to stop
        worker.join()
    return trainer


def work(url: str | None, run: str, seed: int, worker_id: int) -> None:
    torch.set_num_threads(1)
    policy, rollout = Policy(), Rollout(seed, worker_id)
    with WorkerClient(redis_url=url, run=run, worker_id=worker_id) as worker:
        while worker.wait_for_weights(policy):
            worker.send_experiences(rollout.collect(policy))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("how", choices=["single", "rounds"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--updates", type=int, default=100, help="updates of the policy; 100 by default")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if arguments.how == "single":
            trainer = train_alone(arguments.seed, arguments.updates)
        else:
            url = None  # the environment's
            if "RLBROKER_REDIS_URL" not in os.environ:
                url = stack.enter_context(RedisServer()).url
            trainer = train_with_rounds(arguments.seed, arguments.updates, url)
    for steps, mean_return in trainer.curve[9::10]:
        print(f"{steps:>9,} steps  return {mean_return:6.1f}")
    checksum = sum(float(value.double().sum()) for value in trainer.policy.state_dict().values())
    print(f"sum of all weights {checksum!r}")


if __name__ == "__main__":
    main()
