"""The network that the learner trains and the workers use to act."""

from __future__ import annotations

import math
from typing import Any

import torch
from gymnasium.spaces import Box, Discrete, Space
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from rlbroker.errors import InvalidArgument

#: Units in each of the two hidden layers.
HIDDEN = 64


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _mlp(inputs: int, hidden: int, outputs: int, last_gain: float) -> nn.Sequential:
    return nn.Sequential(
        _linear(inputs, hidden, math.sqrt(2)),
        nn.Tanh(),
        _linear(hidden, hidden, math.sqrt(2)),
        nn.Tanh(),
        _linear(hidden, outputs, last_gain),
    )


class ActorCritic(nn.Module):
    """Two separate tanh networks: action logits (or the mean of a Gaussian), and the value of a state.

    Observations are float32 `[..., observation_size]`. Actions are int64 `[...]`, counted from zero, for a
    `Discrete` space, and float32 `[..., action_size]`, not clipped, for a `Box`.

    Initialisation after Andrychowicz et al. 2021 (arXiv:2006.05990): orthogonal, with a last policy layer
    so small that the initial policy is close to uniform.

    Raises:
        InvalidArgument: the observation space is not a 1-D `Box`, or the action space is neither
            `Discrete` nor a 1-D `Box`.
    """

    def __init__(self, observation_space: Space[Any], action_space: Space[Any], hidden: int = HIDDEN) -> None:
        """Create networks with two layers of `hidden` units for the spaces of an environment."""
        super().__init__()
        if not isinstance(observation_space, Box) or len(observation_space.shape) != 1:
            raise InvalidArgument(
                f"the demo needs a vector as observation (a 1-D Box), not {observation_space}: "
                "choose another environment, such as CartPole-v1"
            )
        self.log_std: nn.Parameter | None = None
        if isinstance(action_space, Discrete):
            action_size = int(action_space.n)
        elif isinstance(action_space, Box) and len(action_space.shape) == 1:
            action_size = action_space.shape[0]
            self.log_std = nn.Parameter(torch.zeros(action_size))
        else:
            raise InvalidArgument(
                f"the demo needs Discrete actions or a vector of continuous actions (a 1-D Box), not "
                f"{action_space}: choose another environment, such as CartPole-v1 or Pendulum-v1"
            )
        self.actor = _mlp(observation_space.shape[0], hidden, action_size, last_gain=0.01)
        self.critic = _mlp(observation_space.shape[0], hidden, 1, last_gain=1.0)

    def distribution(self, obs: Tensor) -> Distribution:
        """Return the distribution over actions. Its batch shape is that of `obs` without the last dimension."""
        output = self.actor(obs)
        if self.log_std is None:
            return Categorical(logits=output, validate_args=False)
        return Independent(Normal(output, self.log_std.exp(), validate_args=False), 1, validate_args=False)

    def value(self, obs: Tensor) -> Tensor:
        """Return the expected discounted return of each observation, `[...]`."""
        value: Tensor = self.critic(obs).squeeze(-1)
        return value

    @torch.no_grad()
    def act(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample actions; return actions, log-probabilities and the values of `obs`."""
        distribution = self.distribution(obs)
        actions = distribution.sample()
        return actions, distribution.log_prob(actions), self.value(obs)
