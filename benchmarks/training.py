"""Three small trainings, whose consecutive weights the benchmarks send.

Random weights would not be representative: how well weights compress, and how many of them an update changes, depends
on the network, the optimizer, its learning rate, and the progress of the training.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import tarfile
import typing
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional

from benchmarks.measure import progress
from rlbroker.demo.policy import ActorCritic
from rlbroker.demo.ppo import PPO, PPOSettings
from rlbroker.demo.rollout import Rollout, make_envs

#: The state dict that is sent to workers.
Version = dict[str, Tensor]

_SEED = 20


@dataclass(frozen=True)
class TrainingSize:
    """The length of a training, and the size of its network."""

    updates: int  #: updates before the first recorded version
    width: int  #: units of a hidden layer; a multiple of 4 for the transformer
    versions: int = 12  #: the number of recorded versions


def copy_weights(model: nn.Module) -> Version:
    """Return a copy of the weights of a model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def ppo(size: TrainingSize) -> dict[str, list[Version]]:
    """Train two tanh networks on CartPole-v1 with PPO, Adam at 3e-4, in float32.

    The versions of `ppo` are those after each update, as a PPO learner publishes them; an update is 16 steps of Adam.
    The versions of `ppo-step` are those after each of the last steps of Adam.
    """
    torch.manual_seed(_SEED)
    envs = make_envs("CartPole-v1", 8)
    policy = ActorCritic(envs.single_observation_space, envs.single_action_space, hidden=size.width)
    trainer = PPO(policy, PPOSettings(learning_rate=3e-4, epochs=4, minibatch_rows=128))
    rollout = Rollout(envs, seed=_SEED)
    updates: list[Version] = []
    steps: list[Version] = []
    returns: list[float] = []
    for update in range(size.updates + size.versions):
        if update == size.updates + size.versions - 1:
            trainer.optimizer.register_step_post_hook(lambda *_: steps.append(copy_weights(policy)))
        batch = rollout.collect(policy, 64)
        returns += batch["episode_returns"].tolist()
        trainer.update([batch])
        if update >= size.updates:
            updates.append(copy_weights(policy))
    envs.close()
    tenth = max(len(returns) // 10, 1)
    progress(
        f"  ppo: mean return {_mean(returns[:tenth]):.0f} at the start, {_mean(returns[-tenth:]):.0f} at the end"
    )
    return {"ppo": updates, "ppo-step": steps[-size.versions :]}


class Catch:
    """Games in which a paddle must catch a falling dot, with observations like those of Atari games.

    Observations are uint8 `[games, 4, 84, 84]`: the last four frames. The actions are left, stay, right. The
    reward of a step is 1 if the paddle moved towards the dot, -1 if it moved away, else 0.
    """

    ACTIONS = 3
    _SIDE = 84
    _STEP = 4

    def __init__(self, games: int) -> None:
        """Start `games` games, with their dots at different heights."""
        self._dot = torch.randint(0, self._SIDE - 6, (games, 2))  # row, column
        self._drift = torch.randint(-2, 3, (games,))
        self._paddle = torch.randint(0, self._SIDE - 12, (games,))
        self.obs = torch.zeros(games, 4, self._SIDE, self._SIDE, dtype=torch.uint8)
        self._render()

    def step(self, actions: Tensor) -> Tensor:
        """Move the paddles by `actions`, int64 `[games]`, and the dots; return the rewards, `[games]`."""
        before = self._distance()
        self._paddle = (self._paddle + (actions - 1) * self._STEP).clamp(0, self._SIDE - 12)
        rewards = (before - self._distance()).sign().float()
        self._dot[:, 0] += self._STEP
        self._dot[:, 1] = (self._dot[:, 1] + self._drift).clamp(0, self._SIDE - 6)
        landed = self._dot[:, 0] > self._SIDE - 6
        self._dot[landed, 0] = 0
        self._dot[landed, 1] = torch.randint(0, self._SIDE - 6, (int(landed.sum()),))
        self._render()
        return rewards

    def _distance(self) -> Tensor:
        return (self._paddle + 6 - (self._dot[:, 1] + 3)).abs()

    def _render(self) -> None:
        frames = torch.zeros_like(self.obs[:, 0])
        for frame, (row, column), paddle in zip(
            frames, self._dot.tolist(), self._paddle.tolist(), strict=True
        ):
            frame[row : row + 6, column : column + 6] = 255
            frame[-4:, paddle : paddle + 12] = 160
        self.obs = torch.cat([self.obs[:, 1:], frames[:, None]], dim=1)


class AtariNet(nn.Module):
    """The convolutions of Mnih et al. 2015 (doi:10.1038/nature14236), with heads for actions and value."""

    def __init__(self, actions: int, hidden: int) -> None:
        """Create a network for frames `[rows, 4, 84, 84]`, with `hidden` units in its dense layer."""
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, hidden),
            nn.ReLU(),
        )
        self.actor = nn.Linear(hidden, actions)
        self.critic = nn.Linear(hidden, 1)
        for layer in self.body:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(layer.weight, math.sqrt(2))
        nn.init.orthogonal_(self.actor.weight, 0.01)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return action logits `[rows, actions]` and values `[rows]` for uint8 frames."""
        features = self.body(frames.float() / 255)
        return self.actor(features), self.critic(features).squeeze(-1)


def atari(size: TrainingSize) -> dict[str, list[Version]]:
    """Train `AtariNet` on `Catch` with advantage actor-critic, Adam at 2.5e-4. Each step is a version."""
    torch.manual_seed(_SEED)
    steps, games = 8, Catch(16)
    model = AtariNet(games.ACTIONS, size.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=2.5e-4, eps=1e-5)
    versions: list[Version] = []
    mean_rewards: list[float] = []
    for update in range(size.updates + size.versions):
        frames, actions, rewards = [], [], []
        for _ in range(steps):
            with torch.no_grad():
                chosen = Categorical(logits=model(games.obs)[0]).sample()
            frames.append(games.obs)
            actions.append(chosen)
            rewards.append(games.step(chosen))
        logits, values = model(torch.cat([*frames, games.obs]))
        future = values[-len(games.obs) :].detach()
        returns: list[Tensor] = []
        for reward in reversed(rewards):
            future = reward + 0.5 * future  # a short horizon is enough for this game
            returns.insert(0, future)
        values, policy = values[: -len(games.obs)], Categorical(logits=logits[: -len(games.obs)])
        advantage = torch.cat(returns) - values
        weight = advantage.detach() - advantage.detach().mean()
        log_probs: Tensor = policy.log_prob(torch.cat(actions))
        policy_gain = (log_probs * weight).mean() / (weight.std() + 1e-8)
        entropy: Tensor = policy.entropy()
        loss = 0.5 * advantage.square().mean() - policy_gain - 0.01 * entropy.mean()
        _step(model, optimizer, loss)
        mean_rewards.append(torch.stack(rewards).mean().item())
        if update >= size.updates:
            versions.append(copy_weights(model))
    first, last = _mean(mean_rewards[:10]), _mean(mean_rewards[-10:])
    progress(f"  atari: mean reward {first:+.2f} at the start, {last:+.2f} at the end")
    return {"atari": versions}


class Transformer(nn.Module):
    """A decoder of characters with four layers and four heads, initialised like GPT-2."""

    CONTEXT = 64
    _LAYERS = 4

    def __init__(self, width: int) -> None:
        """Create a network with a residual stream of `width` elements."""
        super().__init__()
        self.characters = nn.Embedding(128, width)
        self.positions = nn.Embedding(self.CONTEXT, width)
        # Created one by one: nn.TransformerEncoder would start with equal layers, which compress too well.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(self._LAYERS)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 128, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Return logits `[rows, CONTEXT, 128]` for the characters after those of the int64 `text`."""
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        stream = self.characters(text) + self.positions.weight[: text.shape[1]]
        for layer in self.layers:
            stream = layer(stream, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(stream))
        return logits


def transformer(size: TrainingSize) -> dict[str, list[Version]]:
    """Train a transformer on the source of Python's standard library, then fine-tune it with AdamW at 3e-6.

    The versions of `transformer-master` are the float32 weights of the optimizer after each step. Those of
    `transformer` are copies in bfloat16, as such a learner publishes them.
    """
    torch.manual_seed(_SEED)
    source = "".join(inspect.getsource(module) for module in (argparse, ast, inspect, tarfile, typing))
    text = torch.frombuffer(bytearray(source, "ascii", "replace"), dtype=torch.uint8).long()
    model = Transformer(size.width)
    losses: list[float] = []

    def train(learning_rate: float, steps: int, after: Callable[[], object] = lambda: None) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        for _ in range(steps):
            starts = torch.randint(0, len(text) - Transformer.CONTEXT, (8,))
            rows = text[starts[:, None] + torch.arange(Transformer.CONTEXT + 1)]
            logits = model(rows[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            _step(model, optimizer, loss)
            losses.append(loss.item())
            after()

    versions: list[Version] = []
    train(1e-3, size.updates)
    # The first steps of a new optimizer are as long as its learning rate for any gradient, so they are left out.
    train(3e-6, 8 + size.versions, lambda: versions.append(copy_weights(model)))
    versions = versions[-size.versions :]
    progress(f"  transformer: loss {losses[0]:.2f} at the start, {_mean(losses[-8:]):.2f} at the end")
    published = [
        {name: tensor.to(torch.bfloat16) for name, tensor in version.items()} for version in versions
    ]
    return {"transformer-master": versions, "transformer": published}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)
