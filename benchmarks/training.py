"""Three small trainings whose consecutive weights the benchmarks ship.

Random weights would say little: how well weights compress, and how many of them an update changes, follows
from the network, the optimizer and its rate, and from how far the training has come.
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

#: What is sent to workers: a state dict.
Version = dict[str, Tensor]

_SEED = 20


@dataclass(frozen=True)
class Effort:
    """How long a training takes, and how large its network is."""

    updates: int  #: before the first recorded version
    width: int  #: units of a hidden layer; for the transformer, a multiple of 4
    versions: int = 12  #: how many are recorded


def snapshot(model: nn.Module) -> Version:
    """Copy the weights of `model`."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def ppo(effort: Effort) -> dict[str, list[Version]]:
    """Train two tanh networks on CartPole-v1 with PPO, Adam at 3e-4, in float32.

    A PPO learner publishes once per update, which here is 16 steps of Adam: these versions are `ppo`.
    `ppo-step` are the versions after each of the last steps of Adam.
    """
    torch.manual_seed(_SEED)
    envs = make_envs("CartPole-v1", 8)
    policy = ActorCritic(envs.single_observation_space, envs.single_action_space, hidden=effort.width)
    trainer = PPO(policy, PPOSettings(learning_rate=3e-4, epochs=4, minibatch_rows=128))
    rollout = Rollout(envs, seed=_SEED)
    updates: list[Version] = []
    steps: list[Version] = []
    returns: list[float] = []
    for update in range(effort.updates + effort.versions):
        if update == effort.updates + effort.versions - 1:
            trainer.optimizer.register_step_post_hook(lambda *_: steps.append(snapshot(policy)))
        batch = rollout.collect(policy, 64)
        returns += batch["episode_returns"].tolist()
        trainer.update([batch])
        if update >= effort.updates:
            updates.append(snapshot(policy))
    envs.close()
    tenth = max(len(returns) // 10, 1)
    progress(
        f"  ppo: mean return {_mean(returns[:tenth]):.0f} at first, {_mean(returns[-tenth:]):.0f} at last"
    )
    return {"ppo": updates, "ppo-step": steps[-effort.versions :]}


class Catch:
    """Games in which a paddle is to be under a falling dot, seen as an Atari learner sees its own.

    Observations are uint8 `[games, 4, 84, 84]`: the last four frames. The actions are left, stay, right. The
    reward of a step is 1 if it brought the paddle nearer to the dot, -1 if it took it away, else 0.
    """

    ACTIONS = 3
    _SIDE = 84
    _STEP = 4

    def __init__(self, games: int) -> None:
        """Start `games` games, each with its dot at another height."""
        self._dot = torch.randint(0, self._SIDE - 6, (games, 2))  # row, column
        self._drift = torch.randint(-2, 3, (games,))
        self._paddle = torch.randint(0, self._SIDE - 12, (games,))
        self.obs = torch.zeros(games, 4, self._SIDE, self._SIDE, dtype=torch.uint8)
        self._render()

    def step(self, actions: Tensor) -> Tensor:
        """Move paddles by `actions`, int64 `[games]`, and let the dots fall; give the rewards, `[games]`."""
        before = self._distance()
        self._paddle = (self._paddle + (actions - 1) * self._STEP).clamp(0, self._SIDE - 12)
        rewards = (before - self._distance()).sign().float()
        self._dot[:, 0] += self._STEP
        self._dot[:, 1] = (self._dot[:, 1] + self._drift).clamp(0, self._SIDE - 6)
        fallen = self._dot[:, 0] > self._SIDE - 6
        self._dot[fallen, 0] = 0
        self._dot[fallen, 1] = torch.randint(0, self._SIDE - 6, (int(fallen.sum()),))
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
        """Make a network for frames `[rows, 4, 84, 84]` whose dense layer has `hidden` units."""
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
        """Give action logits `[rows, actions]` and values `[rows]` for uint8 frames."""
        features = self.body(frames.float() / 255)
        return self.actor(features), self.critic(features).squeeze(-1)


def atari(effort: Effort) -> dict[str, list[Version]]:
    """Train `AtariNet` to catch with advantage actor-critic, Adam at 2.5e-4: one step is one version."""
    torch.manual_seed(_SEED)
    steps, games = 8, Catch(16)
    model = AtariNet(games.ACTIONS, effort.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=2.5e-4, eps=1e-5)
    versions: list[Version] = []
    earned: list[float] = []
    for update in range(effort.updates + effort.versions):
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
            future = reward + 0.5 * future  # what a step earned is soon known
            returns.insert(0, future)
        values, policy = values[: -len(games.obs)], Categorical(logits=logits[: -len(games.obs)])
        advantage = torch.cat(returns) - values
        weight = advantage.detach() - advantage.detach().mean()
        log_probs: Tensor = policy.log_prob(torch.cat(actions))
        gained = (log_probs * weight).mean() / (weight.std() + 1e-8)
        entropy: Tensor = policy.entropy()
        loss = 0.5 * advantage.square().mean() - gained - 0.01 * entropy.mean()
        _step(model, optimizer, loss)
        earned.append(torch.stack(rewards).mean().item())
        if update >= effort.updates:
            versions.append(snapshot(model))
    progress(f"  atari: mean reward {_mean(earned[:10]):+.2f} at first, {_mean(earned[-10:]):+.2f} at last")
    return {"atari": versions}


class Transformer(nn.Module):
    """A decoder of characters, of four layers with four heads, initialised as GPT-2 is."""

    CONTEXT = 64
    _LAYERS = 4

    def __init__(self, width: int) -> None:
        """Make a network whose residual stream has `width` elements."""
        super().__init__()
        self.characters = nn.Embedding(128, width)
        self.places = nn.Embedding(self.CONTEXT, width)
        # One by one: nn.TransformerEncoder would begin with equal layers, and equal weights compress.
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
        """Give logits `[rows, CONTEXT, 128]` for the characters that follow those of int64 `text`."""
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        stream = self.characters(text) + self.places.weight[: text.shape[1]]
        for layer in self.layers:
            stream = layer(stream, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(stream))
        return logits


def transformer(effort: Effort) -> dict[str, list[Version]]:
    """Train a transformer on Python's own library, then go on as a fine-tuning does: AdamW at 3e-6.

    `transformer-master` are the float32 weights that the optimizer keeps, one version per step;
    `transformer` are their copies in bfloat16, which is what such a learner publishes.
    """
    torch.manual_seed(_SEED)
    source = "".join(inspect.getsource(module) for module in (argparse, ast, inspect, tarfile, typing))
    text = torch.frombuffer(bytearray(source, "ascii", "replace"), dtype=torch.uint8).long()
    model = Transformer(effort.width)
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
    train(1e-3, effort.updates)
    # The first steps of a new optimizer are as long as its rate, whatever the gradient: they are left out.
    train(3e-6, 8 + effort.versions, lambda: versions.append(snapshot(model)))
    versions = versions[-effort.versions :]
    progress(f"  transformer: loss {losses[0]:.2f} at first, {_mean(losses[-8:]):.2f} at last")
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
