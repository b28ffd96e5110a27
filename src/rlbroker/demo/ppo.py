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
    """What PPO can be tuned with. The defaults solve CartPole-v1."""

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
    """Means over one update, but for `rows` and `clip_fraction`."""

    rows: int  #: transitions trained on, without reset rows
    policy_loss: float
    value_loss: float
    entropy: float
    kl: float  #: from the policy that acted to the last one trained, estimated as in http://joschu.net/blog/kl-approx.html
    clip_fraction: float


def advantages(batch: RolloutBatch, last_values: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates `[T, B]` (Schulman et al. 2016, arXiv:1506.02438).

    A terminated episode is worth nothing after its last step. A truncated one is worth the value of its
    final observation, and that is the next row's: a reset row (`mask` False), which itself gets 0.

    Args:
        batch: what a worker collected.
        last_values: `[B]`, values of `batch["last_obs"]`.
        gamma: discount per step.
        gae_lambda: from 0 (one step, biased) to 1 (whole episodes, noisy).
    """
    rewards, values, mask = batch["rewards"], batch["values"], batch["mask"]
    next_values = torch.cat([values[1:], last_values[None]])
    going_on = 1.0 - batch["terminations"].float()
    deltas = rewards + gamma * next_values * going_on - values
    result = torch.zeros_like(rewards)
    following = torch.zeros_like(last_values)
    for t in reversed(range(len(rewards))):
        # Between two episodes there is a reset row, whose 0 keeps the one from reaching the other.
        following = (deltas[t] + gamma * gae_lambda * following) * mask[t]
        result[t] = following
    return result


class PPO:
    """Trains a policy on batches which older versions of it may have collected.

    The ratio is taken to the probabilities that the worker recorded, so a batch that is a few versions
    stale is handled as what it is: data of another policy, whose influence the clip limits.
    """

    def __init__(self, policy: ActorCritic, settings: PPOSettings | None = None) -> None:
        """Train `policy` in place."""
        self.policy = policy
        self.settings = settings or PPOSettings()
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=self.settings.learning_rate, eps=1e-5)

    def update(self, batches: Sequence[RolloutBatch]) -> PPOStatistics:
        """Train on the batches, `epochs` times over. They may differ in `T` and `B`."""
        s = self.settings
        rows = self._rows(batches)
        count = len(rows["obs"])
        if count == 0:
            return PPOStatistics(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        minibatches = math.ceil(count / s.minibatch_rows)
        sums = torch.zeros(5)
        for _ in range(s.epochs):
            # Of about equal size: a small rest would be a noisy step as long as the others.
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
        """Estimate advantages, and flatten all batches to their unmasked rows."""
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
