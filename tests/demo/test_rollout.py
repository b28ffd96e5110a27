"""Tests of rollouts: resets, terminations, truncations and final observations, on an environment that counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import register, registry
from gymnasium.spaces import Box, Discrete

from rlbroker.demo.policy import ActorCritic
from rlbroker.demo.rollout import Rollout, make_envs
from rlbroker.errors import InvalidArgument

pytestmark = pytest.mark.unit


class Counting(gymnasium.Env[Any, Any]):
    """An environment whose observation is (episode, step) and whose reward is the step's number."""

    action_space = Discrete(2, start=3)
    observation_space = Box(-100.0, 100.0, (2,))
    episode = -1
    step_number = 0

    def __init__(self, length: int = 2, terminates: bool = True) -> None:
        self.length, self.terminates = length, terminates

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        self.episode, self.step_number = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.step_number += 1
        ended = self.step_number == self.length
        return (
            self._observe(),
            float(self.step_number),
            ended and self.terminates,
            ended and not self.terminates,
            {},
        )

    def _observe(self) -> Any:
        return np.array([self.episode, self.step_number], dtype=np.float32)


class ContinuousCounting(Counting):
    action_space = Box(-0.01, 0.01, (1,))  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def counting_environments() -> Iterator[None]:
    entry_point = f"{__name__}:Counting"
    register("Terminating-v0", entry_point=entry_point, disable_env_checker=True)
    register("Truncating-v0", entry_point=entry_point, disable_env_checker=True, kwargs={"terminates": False})
    register("Continuous-v0", entry_point=f"{__name__}:ContinuousCounting", disable_env_checker=True)
    yield
    for name in ("Terminating-v0", "Truncating-v0", "Continuous-v0"):
        del registry[name]


def make_rollout(env_id: str, num_envs: int = 2) -> tuple[Rollout, ActorCritic]:
    envs = make_envs(env_id, num_envs)
    return Rollout(envs, seed=0), ActorCritic(envs.single_observation_space, envs.single_action_space)


def test_the_row_after_an_episode_is_masked_and_holds_its_final_observation() -> None:
    rollout, policy = make_rollout("Terminating-v0", num_envs=1)
    batch = rollout.collect(policy, 5)
    assert batch["obs"][:, 0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    assert batch["mask"][:, 0].tolist() == [True, True, False, True, True]
    assert batch["rewards"][:, 0].tolist() == [1, 2, 0, 1, 2]
    assert batch["terminations"][:, 0].tolist() == [False, True, False, False, True]
    assert not batch["truncations"].any()
    assert batch["last_obs"].tolist() == [[1, 2]]
    torch.testing.assert_close(batch["values"], policy.value(batch["obs"]).detach())


def test_a_truncation_is_not_marked_as_a_termination() -> None:
    rollout, policy = make_rollout("Truncating-v0", num_envs=1)
    batch = rollout.collect(policy, 3)
    assert batch["truncations"][:, 0].tolist() == [False, True, False]
    assert not batch["terminations"].any()


def test_an_episode_that_ends_with_a_batch_is_reset_in_the_next_batch() -> None:
    rollout, policy = make_rollout("Terminating-v0")
    first, second = rollout.collect(policy, 2), rollout.collect(policy, 2)
    assert first["mask"].all()
    assert second["mask"].tolist() == [[False, False], [True, True]]
    assert torch.equal(second["obs"][0], first["last_obs"])


def test_each_episode_is_counted_once_without_its_reset_row() -> None:
    rollout, policy = make_rollout("Terminating-v0")
    batches = [rollout.collect(policy, 1) for _ in range(8)]
    # Three rows per episode: two steps and a reset. Two environments.
    assert torch.cat([batch["episode_returns"] for batch in batches]).tolist() == [3.0] * 6
    assert torch.cat([batch["episode_lengths"] for batch in batches]).tolist() == [2] * 6


def test_discrete_actions_are_converted_to_the_environments_numbering() -> None:
    """The environment asserts that its actions are 3 or 4. The batch counts from zero."""
    rollout, policy = make_rollout("Terminating-v0")
    assert set(rollout.collect(policy, 20)["actions"].flatten().tolist()) == {0, 1}


def test_continuous_actions_are_clipped_only_for_the_environment() -> None:
    rollout, policy = make_rollout("Continuous-v0")
    assert rollout.collect(policy, 4)["actions"].abs().max() > 0.01


def test_a_batch_does_not_change_when_the_next_one_is_collected() -> None:
    rollout, policy = make_rollout("Terminating-v0")
    first = rollout.collect(policy, 2)
    copies = {name: value.clone() for name, value in first.items()}  # type: ignore[attr-defined]
    rollout.collect(policy, 2)
    for name, value in first.items():
        assert torch.equal(value, copies[name])  # type: ignore[arg-type]


def test_the_error_for_an_unknown_environment_names_it() -> None:
    with pytest.raises(InvalidArgument, match="NoSuchGame-v7"):
        make_envs("NoSuchGame-v7", 1)
