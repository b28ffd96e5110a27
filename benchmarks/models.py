"""The models of the benchmarks: float32 tensors of up to 1 MB, changed as by training steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

State = dict[str, torch.Tensor]

#: The largest size of a layer.
LAYER_BYTES = 1 << 20

#: The learning rate, which limits how far one step of Adam changes a weight.
LEARNING_RATE = 3e-4


def make_model(size_bytes: int) -> torch.nn.Module:
    """Return a module whose parameters have about this size."""
    torch.set_num_threads(1)
    width = int((min(size_bytes, LAYER_BYTES) / 4) ** 0.5)
    layers = max(1, size_bytes // (width * width * 4))
    with torch.no_grad():
        return torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(layers))


def training_steps(size_bytes: int, count: int = 3) -> list[State]:
    """Return the state dicts of consecutive steps: normal weights, changed at random by at most the learning rate."""
    random = np.random.default_rng(1)
    shapes = {name: tuple(value.shape) for name, value in make_model(size_bytes).state_dict().items()}
    states: list[dict[str, NDArray[np.float32]]] = [
        {name: random.standard_normal(shape, np.float32) * np.float32(0.05) for name, shape in shapes.items()}
    ]
    while len(states) < count:
        states.append({name: value + _random_step(random, value.shape) for name, value in states[-1].items()})
    return [{name: torch.from_numpy(value) for name, value in state.items()} for state in states]


def to_arrays(state: Mapping[str, torch.Tensor]) -> dict[str, NDArray[np.float32]]:
    """Return arrays on the same memory. Arrays pickle faster than tensors."""
    return {name: value.numpy() for name, value in state.items()}


def load_arrays(model: torch.nn.Module, received: Mapping[str, NDArray[np.float32]]) -> None:
    """Copy received arrays into a model."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(torch.from_numpy(received[name]))


def last_values(state: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the last value of each tensor, to check that the weights arrived."""
    return tuple(float(value.flatten()[-1]) for value in state.values())


def _random_step(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return (random.random(shape, np.float32) * np.float32(2) - np.float32(1)) * np.float32(LEARNING_RATE)
