"""Rollouts: stepping environments with a policy, into batches for PPO."""

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

    Row `t` holds step `t`: the observation before it, the policy's action, and the reward. `terminations[t]` and
    `truncations[t]` are set if the episode ended *with* that step. (In CleanRL `dones[t]` is set one row later,
    where the next episode begins.)
    """

    obs: Tensor  #: float32 [T, B, O]
    actions: Tensor  #: int64 [T, B], or float32 [T, B, A] before clipping
    logprobs: Tensor  #: float32 [T, B], from the policy that acted
    values: Tensor  #: float32 [T, B], from the critic of the same version
    rewards: Tensor  #: float32 [T, B]
    terminations: Tensor  #: bool [T, B]
    truncations: Tensor  #: bool [T, B]
    mask: Tensor  #: bool [T, B], False for reset rows, which are not transitions
    last_obs: Tensor  #: float32 [B, O], the observation after the last row
    episode_returns: Tensor  #: float32 [N], undiscounted returns of the episodes that ended in this batch
    episode_lengths: Tensor  #: int64 [N], of the same episodes


def make_envs(env_id: str, num_envs: int) -> VectorEnv[Any, Any, Any]:
    """Create `num_envs` copies of an environment, which run in this process and reset automatically.

    Raises:
        InvalidArgument: Gymnasium does not know the environment, or a package that it needs is missing.
    """
    try:
        envs = gymnasium.make_vec(env_id, num_envs=num_envs, vectorization_mode="sync")
    except gymnasium.error.Error as error:
        raise InvalidArgument(f"Gymnasium cannot create the environment {env_id!r}: {error}") from error
    # In another mode there are no reset rows, and training would silently use wrong rows.
    mode = envs.metadata.get("autoreset_mode")
    if mode != AutoresetMode.NEXT_STEP:
        envs.close()
        raise InvalidArgument(
            f"the demo needs an environment with autoreset mode NEXT_STEP, but {env_id} has {mode}"
        )
    return envs


class Rollout:
    """A vector of environments and their current episodes, which continue from one batch to the next.

    In Gymnasium's autoreset mode NEXT_STEP, the step that ends an episode returns the episode's final observation.
    The next step ignores the action, and returns the first observation of a new episode and a reward of 0. The row
    of that step is a reset row and not a transition, so its `mask` is False. Its `obs` is the final observation of
    the old episode, so its `values` are the bootstrap values for a truncated episode.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any], seed: int | None = None) -> None:
        """Reset the environments; environment `i` gets the seed `seed + i`."""
        self.envs = envs
        obs, _ = envs.reset(seed=seed)
        self._obs = torch.as_tensor(obs, dtype=torch.float32)
        self._resetting = np.zeros(envs.num_envs, dtype=bool)
        self._returns = np.zeros(envs.num_envs)
        self._lengths = np.zeros(envs.num_envs, dtype=np.int64)

    def collect(self, policy: ActorCritic, steps: int) -> RolloutBatch:
        """Step every environment `steps` times; return the batch."""
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
            obs, rewards, terminations, truncations, _ = self.envs.step(self._to_env_actions(actions))
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

    def _to_env_actions(self, actions: Tensor) -> NDArray[Any]:
        """Return the actions in the form of the environments: in their own numbering, or clipped."""
        space = self.envs.single_action_space
        env_actions: NDArray[Any] = actions.numpy()
        if isinstance(space, Discrete):
            env_actions = env_actions + space.start
        elif isinstance(space, Box):
            env_actions = np.clip(env_actions, space.low, space.high)
        return env_actions
