"""Tests of PPO's arithmetic, on examples that are small enough to compute by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from rlbroker.demo.policy import ActorCritic
from rlbroker.demo.ppo import PPO, PPOSettings, advantages
from rlbroker.demo.rollout import RolloutBatch
from rlbroker.errors import InvalidArgument

pytestmark = pytest.mark.unit

GAMMA, LAMBDA = 0.5, 0.5


def column(*values: float) -> Tensor:
    """The values of one environment over time, `[T, 1]`."""
    return torch.tensor(values, dtype=torch.float32)[:, None]


def flags(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)[:, None]


def make_batch(rewards: Tensor, values: Tensor, **given: Tensor) -> RolloutBatch:
    steps, envs = rewards.shape
    never = torch.zeros(steps, envs, dtype=torch.bool)
    fields: dict[str, Any] = {
        "obs": torch.zeros(steps, envs, 1),
        "actions": torch.zeros(steps, envs, dtype=torch.int64),
        "logprobs": torch.full((steps, envs), math.log(0.5)),
        "values": values,
        "rewards": rewards,
        "terminations": never,
        "truncations": never,
        "mask": ~never,
        "last_obs": torch.zeros(envs, 1),
        "episode_returns": torch.zeros(0),
        "episode_lengths": torch.zeros(0, dtype=torch.int64),
    }
    return RolloutBatch(**{**fields, **given})  # type: ignore[typeddict-item]


def estimate(batch: RolloutBatch, last_value: float) -> list[float]:
    result = advantages(batch, torch.tensor([last_value]), gamma=GAMMA, gae_lambda=LAMBDA)
    return result[:, 0].tolist()


def test_an_unfinished_episode_is_bootstrapped_from_the_last_observation() -> None:
    batch = make_batch(rewards=column(1, 2), values=column(4, 8))
    # Errors: 1 + 0.5 * 8 - 4 = 1 and 2 + 0.5 * 16 - 8 = 2; then 1 + 0.25 * 2.
    assert estimate(batch, last_value=16.0) == [1.5, 2.0]


def test_after_a_termination_the_value_is_zero() -> None:
    batch = make_batch(
        rewards=column(1, 2, 0, 3),
        values=column(4, 8, 100, 2),
        terminations=flags(0, 1, 0, 0),
        mask=flags(1, 1, 0, 1),
    )
    # Errors: 1 + 4 - 4 = 1; 2 - 8 = -6, without the 100; none for the reset row; 3 + 2 - 2 = 3.
    assert estimate(batch, last_value=4.0) == [1.0 - 0.25 * 6.0, -6.0, 0.0, 3.0]


def test_a_truncated_episode_is_bootstrapped_from_its_final_observation() -> None:
    batch = make_batch(
        rewards=column(1, 2, 0, 3),
        values=column(4, 8, 100, 2),
        truncations=flags(0, 1, 0, 0),
        mask=flags(1, 1, 0, 1),
    )
    # As above, but 2 + 0.5 * 100 - 8 = 44: the reset row's observation is the episode's final one.
    assert estimate(batch, last_value=4.0) == [1.0 + 0.25 * 44.0, 44.0, 0.0, 3.0]


def test_a_truncation_in_the_last_row_is_bootstrapped_from_the_last_observation() -> None:
    batch = make_batch(rewards=column(1), values=column(4), truncations=flags(1))
    assert estimate(batch, last_value=16.0) == [1.0 + 8.0 - 4.0]


def test_a_termination_in_the_last_row_ignores_the_last_observation() -> None:
    batch = make_batch(rewards=column(1), values=column(4), terminations=flags(1))
    assert estimate(batch, last_value=16.0) == [1.0 - 4.0]


def test_a_reset_row_at_the_start_of_a_batch_has_no_advantage() -> None:
    batch = make_batch(rewards=column(0, 1), values=column(100, 4), mask=flags(0, 1))
    assert estimate(batch, last_value=8.0) == [0.0, 1.0]


def make_ppo(**settings: Any) -> PPO:
    torch.manual_seed(0)
    policy = ActorCritic(Box(-1.0, 1.0, (1,)), Discrete(2), hidden=8)
    return PPO(policy, PPOSettings(**{"minibatch_rows": 4, **settings}))


def make_batch_of(policy: ActorCritic, steps: int, **given: Tensor) -> RolloutBatch:
    obs = torch.linspace(-1.0, 1.0, steps)[:, None, None]
    actions, logprobs, values = policy.act(obs)
    rewards = actions.float()
    return make_batch(rewards, values, obs=obs, actions=actions, logprobs=logprobs, **given)


def test_updating_makes_the_better_action_more_likely() -> None:
    ppo = make_ppo(learning_rate=1e-2, gamma=0.0)
    obs = torch.zeros(1, 1)
    before = ppo.policy.distribution(obs).log_prob(torch.tensor([1])).item()
    statistics = ppo.update([make_batch_of(ppo.policy, 32)])
    assert ppo.policy.distribution(obs).log_prob(torch.tensor([1])).item() > before + 0.05
    assert statistics.rows == 32
    assert statistics.kl > 0.0
    assert 0.0 < statistics.entropy <= math.log(2) + 1e-6


def test_reset_rows_are_not_trained_on() -> None:
    """Garbage in the reset rows has no effect, not even through the normalisation of the advantages."""
    mask = flags(*([1, 1, 1, 0] * 4))
    results = []
    for garbage in (0.0, 1e3):
        ppo = make_ppo()
        batch = make_batch_of(ppo.policy, 16, mask=mask, truncations=mask.roll(-1, 0).logical_not())
        batch["logprobs"][~mask] += garbage
        batch["rewards"][~mask] += garbage
        batch["obs"][~mask] += garbage
        assert ppo.update([batch]).rows == 12
        results.append([parameter.clone() for parameter in ppo.policy.parameters()])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)


def test_the_ratio_uses_the_recorded_log_probabilities() -> None:
    """If the good actions of a stale batch are already much more likely, the clip stops the update."""
    ppo = make_ppo(epochs=1, minibatch_rows=64, value_coefficient=0.0, gamma=0.0)
    batch = make_batch_of(ppo.policy, 32)
    better = batch["actions"] == 1
    batch["logprobs"] = batch["logprobs"] + torch.where(better, -1.0, 1.0)
    before = [parameter.clone() for parameter in ppo.policy.actor.parameters()]
    statistics = ppo.update([batch])
    assert statistics.clip_fraction == 1.0
    for old, new in zip(before, ppo.policy.actor.parameters(), strict=True):
        assert torch.equal(old, new)


def test_batches_of_different_shapes_can_be_combined() -> None:
    ppo = make_ppo()
    assert ppo.update([make_batch_of(ppo.policy, 8), make_batch_of(ppo.policy, 5)]).rows == 13


def test_a_batch_of_only_reset_rows_changes_nothing() -> None:
    ppo = make_ppo()
    before = [parameter.clone() for parameter in ppo.policy.parameters()]
    statistics = ppo.update([make_batch_of(ppo.policy, 2, mask=flags(0, 0))])
    assert statistics.rows == 0
    for old, new in zip(before, ppo.policy.parameters(), strict=True):
        assert torch.equal(old, new)


def test_continuous_actions_have_one_log_probability_per_row() -> None:
    policy = ActorCritic(Box(-1.0, 1.0, (3,)), Box(-2.0, 2.0, (2,)))
    actions, logprobs, values = policy.act(torch.zeros(5, 4, 3))
    assert actions.shape == (5, 4, 2)
    assert logprobs.shape == values.shape == (5, 4)
    # The initial policy is a standard normal around almost zero.
    expected = -0.5 * actions.square().sum(-1) - math.log(2 * math.pi)
    torch.testing.assert_close(logprobs, expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("observations", "actions", "message"),
    [
        (Discrete(16), Discrete(4), "1-D Box"),
        (Box(0.0, 1.0, (8, 8)), Discrete(4), "1-D Box"),
        (Box(0.0, 1.0, (8,)), Box(0.0, 1.0, (2, 2)), "Discrete actions"),
    ],
)
def test_unsupported_spaces_are_refused_with_a_suggestion(
    observations: Any, actions: Any, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        ActorCritic(observations, actions)
    assert "CartPole-v1" in str(caught.value)
