"""Stepping environments with a policy, into batches that PPO can train on."""

from __future__ import annotations

from typing import Any, TypedDict

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from rlbroker.demo.policy import ActorCritic
from rlbroker.errors import InvalidArgument


class RolloutBatch(TypedDict):
    """`T` steps of `B` environments, time first, on the CPU.

    Row `t` is what happened at step `t`: the observation that the policy saw, what it chose, and what came
    of it. `terminations[t]` and `truncations[t]` say that the episode ended *with* that step (CleanRL's
    `dones` says that it began there, one row later).
    """

    obs: Tensor  #: float32 [T, B, O]
    actions: Tensor  #: int64 [T, B], or float32 [T, B, A] before clipping
    logprobs: Tensor  #: float32 [T, B], of the policy that acted
    values: Tensor  #: float32 [T, B], of the critic that came with that policy
    rewards: Tensor  #: float32 [T, B]
    terminations: Tensor  #: bool [T, B]
    truncations: Tensor  #: bool [T, B]
    mask: Tensor  #: bool [T, B], False where the row is a reset and no transition
    last_obs: Tensor  #: float32 [B, O], the observation after the last row
    episode_returns: Tensor  #: float32 [N], undiscounted, of the episodes that ended in this batch
    episode_lengths: Tensor  #: int64 [N]


def make_envs(env_id: str, num_envs: int) -> VectorEnv[Any, Any, Any]:
    """Make `num_envs` copies of an environment, which step in this process and reset themselves.

    Raises:
        InvalidArgument: Gymnasium does not know the environment, or lacks a package that it needs.
    """
    try:
        envs = gymnasium.make_vec(env_id, num_envs=num_envs, vectorization_mode="sync")
    except gymnasium.error.Error as error:
        raise InvalidArgument(f"Gymnasium cannot make the environment {env_id!r}: {error}") from error
    # A mode without reset rows would silently train on wrong rows.
    mode = envs.metadata.get("autoreset_mode")
    if mode != AutoresetMode.NEXT_STEP:
        envs.close()
        raise InvalidArgument(
            f"the demo needs environments with autoreset mode NEXT_STEP, {env_id} has {mode}"
        )
    return envs


class Rollout:
    """Steps a vector of environments; episodes run on from one batch to the next.

    Gymnasium's autoreset mode NEXT_STEP: at the step that ends an episode, the environment returns the
    episode's final observation. At the following step it ignores the action, returns the first
    observation of a new episode, and a reward of 0. The row of that step is no transition: its `mask` is
    False. But its `obs` is the final observation of the episode, and so its `values` are just what a
    truncated episode must be bootstrapped from.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any], seed: int | None = None) -> None:
        """Reset the environments: number `i` with `seed + i`."""
        self.envs = envs
        obs, _ = envs.reset(seed=seed)
        self._obs = torch.as_tensor(obs, dtype=torch.float32)
        self._resetting = np.zeros(envs.num_envs, dtype=bool)
        self._returns = np.zeros(envs.num_envs)
        self._lengths = np.zeros(envs.num_envs, dtype=np.int64)

    def collect(self, policy: ActorCritic, steps: int) -> RolloutBatch:
        """Step every environment `steps` times and return what happened."""
        shape = (steps, self.envs.num_envs)
        space = self.envs.single_action_space
        batch = RolloutBatch(
            obs=torch.zeros((*shape, *self._obs.shape[1:])),
            actions=torch.zeros(
                (*shape, *(space.shape or ())),
                dtype=torch.int64 if isinstance(space, Discrete) else torch.float32,
            ),
            logprobs=torch.zeros(shape),
            values=torch.zeros(shape),
            rewards=torch.zeros(shape),
            terminations=torch.zeros(shape, dtype=torch.bool),
            truncations=torch.zeros(shape, dtype=torch.bool),
            mask=torch.zeros(shape, dtype=torch.bool),
            last_obs=self._obs,
            episode_returns=torch.zeros(0),
            episode_lengths=torch.zeros(0, dtype=torch.int64),
        )
        episode_returns: list[float] = []
        episode_lengths: list[int] = []
        for t in range(steps):
            actions, logprobs, values = policy.act(self._obs)
            obs, rewards, terminations, truncations, _ = self.envs.step(self._for_envs(actions))
            batch["obs"][t], batch["actions"][t] = self._obs, actions
            batch["logprobs"][t], batch["values"][t] = logprobs, values
            batch["rewards"][t] = torch.as_tensor(rewards)
            batch["terminations"][t] = torch.as_tensor(terminations)
            batch["truncations"][t] = torch.as_tensor(truncations)
            batch["mask"][t] = torch.as_tensor(~self._resetting)

            self._obs = torch.as_tensor(obs, dtype=torch.float32)
            self._returns += rewards
            self._lengths += ~self._resetting
            self._resetting = ended = terminations | truncations
            episode_returns += self._returns[ended].tolist()
            episode_lengths += self._lengths[ended].tolist()
            self._returns[ended] = 0.0
            self._lengths[ended] = 0

        batch["last_obs"] = self._obs
        batch["episode_returns"] = torch.tensor(episode_returns, dtype=torch.float32)
        batch["episode_lengths"] = torch.tensor(episode_lengths, dtype=torch.int64)
        return batch

    def _for_envs(self, actions: Tensor) -> NDArray[Any]:
        """Return the actions as the environments take them: in their own numbering, or clipped."""
        space = self.envs.single_action_space
        taken: NDArray[Any] = actions.numpy()
        if isinstance(space, Discrete):
            taken = taken + space.start
        elif isinstance(space, Box):
            taken = np.clip(taken, space.low, space.high)
        return taken
