"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlbroker.demo.policy import ActorCritic
from rlbroker.demo.rollout import RolloutBatch


@dataclass(frozen=True)
class PPOSettings:
    """The hyperparameters of PPO. The defaults solve CartPole-v1."""

    learning_rate: float = 1e-3
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_coefficient: float = 0.5
    entropy_coefficient: float = 0.0
    epochs: int = 10
    minibatch_rows: int = 256
    max_grad_norm: float = 0.5


@dataclass(frozen=True)
class PPOStatistics:
    """Statistics of one update. All but `rows` are means over its minibatches."""

    rows: int  #: transitions used for training, without reset rows
    policy_loss: float
    value_loss: float
    entropy: float
    kl: float  #: from the acting policy to the trained one, estimated as in http://joschu.net/blog/kl-approx.html
    clip_fraction: float


def advantages(batch: RolloutBatch, last_values: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """Return generalised advantage estimates `[T, B]` (Schulman et al. 2016, arXiv:1506.02438).

    After a termination the value of the rest of the episode is 0. After a truncation it is the value of the final
    observation, which is in the next row. That row is a reset row (`mask` False), and its own advantage is 0.

    Args:
        batch: the rollout of one worker.
        last_values: `[B]`, the values of `batch["last_obs"]`.
        gamma: the discount per step.
        gae_lambda: from 0 (one step, biased) to 1 (whole episodes, high variance).
    """
    rewards, values, mask = batch["rewards"], batch["values"], batch["mask"]
    next_values = torch.cat([values[1:], last_values[None]])
    not_terminated = 1.0 - batch["terminations"].float()
    deltas = rewards + gamma * next_values * not_terminated - values
    result = torch.zeros_like(rewards)
    following = torch.zeros_like(last_values)
    for t in reversed(range(len(rewards))):
        # The mask of the reset row is 0, so an advantage does not cross from one episode to another.
        following = (deltas[t] + gamma * gae_lambda * following) * mask[t]
        result[t] = following
    return result


class PPO:
    """PPO training of a policy, on batches from the current or older versions of it.

    The ratio uses the log-probabilities that the worker recorded. A stale batch is therefore treated as data of
    another policy, and the clip limits its influence.
    """

    def __init__(self, policy: ActorCritic, settings: PPOSettings | None = None) -> None:
        """Prepare to train `policy` in place."""
        self.policy = policy
        self.settings = settings or PPOSettings()
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=self.settings.learning_rate, eps=1e-5)

    def update(self, batches: Sequence[RolloutBatch]) -> PPOStatistics:
        """Train on the batches for `epochs` epochs. The batches may differ in `T` and `B`."""
        s = self.settings
        rows = self._rows(batches)
        count = len(rows["obs"])
        if count == 0:
            return PPOStatistics(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        minibatches = math.ceil(count / s.minibatch_rows)
        sums = torch.zeros(5)
        for _ in range(s.epochs):
            # Minibatches of equal size: a small last one would be a noisy step of the same length.
            for index in torch.randperm(count).chunk(minibatches):
                obs, advantage = rows["obs"][index], rows["advantages"][index]
                distribution = self.policy.distribution(obs)
                logratio = distribution.log_prob(rows["actions"][index]) - rows["logprobs"][index]
                ratio = logratio.exp()
                policy_loss = -torch.min(
                    advantage * ratio, advantage * ratio.clamp(1 - s.clip, 1 + s.clip)
                ).mean()
                value_loss = 0.5 * (self.policy.value(obs) - rows["returns"][index]).square().mean()
                entropy = distribution.entropy().mean()
                loss = policy_loss + s.value_coefficient * value_loss - s.entropy_coefficient * entropy

                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.policy.parameters(), s.max_grad_norm)
                self.optimizer.step()

                with torch.no_grad():
                    kl = ((ratio - 1) - logratio).mean()
                    clipped = ((ratio - 1).abs() > s.clip).float().mean()
                    sums += torch.stack([policy_loss, value_loss, entropy, kl, clipped])
        return PPOStatistics(count, *(sums / (s.epochs * minibatches)).tolist())

    @torch.no_grad()
    def _rows(self, batches: Sequence[RolloutBatch]) -> dict[str, Tensor]:
        """Return the unmasked rows of all batches, with their advantages."""
        parts: dict[str, list[Tensor]] = {}
        for batch in batches:
            estimates = advantages(
                batch,
                self.policy.value(batch["last_obs"]),
                gamma=self.settings.gamma,
                gae_lambda=self.settings.gae_lambda,
            )
            for name, value in (
                ("obs", batch["obs"]),
                ("actions", batch["actions"]),
                ("logprobs", batch["logprobs"]),
                ("advantages", estimates),
                ("returns", estimates + batch["values"]),
            ):
                parts.setdefault(name, []).append(value[batch["mask"]])
        rows = {name: torch.cat(values) for name, values in parts.items()}
        if len(rows["advantages"]) > 1:
            std, mean = torch.std_mean(rows["advantages"])
            rows["advantages"] = (rows["advantages"] - mean) / (std + 1e-8)
        return rows
