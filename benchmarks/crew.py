"""Worker processes that hold a model and get weights into it, each time in the way that they are told."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Protocol

import torch

from benchmarks.children import answer, child
from benchmarks.models import State, make_model, probe
from benchmarks.network import enter


class Sender(Protocol):
    """The learner's side of one way."""

    def send(self, weights: State) -> None:
        """Give weights to all workers; they may arrive later."""


class Receiver(Protocol):
    """A worker's side of one way."""

    def receive(self, model: torch.nn.Module) -> None:
        """Wait for the next weights, and return once they are in the model."""

    def close(self) -> None:
        """Leave."""


#: Makes a worker's side, given the worker's number; must pickle.
MakeReceiver = Callable[[int], Receiver]


class Crew:
    """Workers of one host. They do nothing, and cost next to nothing, until they are told to receive."""

    def __init__(self, pipes: Sequence[Connection]) -> None:
        """Wait until all are ready."""
        self._pipes = pipes
        self._answers("open")

    def deliver(self, way: str, sender: Sender, weights: State) -> float:
        """Send weights in one way; give the seconds until the last worker has them in its model."""
        for pipe in self._pipes:
            pipe.send(way)
        self._answers("ready")
        began = time.perf_counter()
        sender.send(weights)
        answers: list[tuple[float, tuple[float, ...]]] = self._answers("received")
        wanted = probe(weights)
        for _, found in answers:
            assert found == wanted, f"{way}: a worker has other weights than those that were sent"
        return max(ended for ended, _ in answers) - began

    def _answers(self, expected: str) -> list[tuple[float, tuple[float, ...]]]:
        return [answer(pipe, expected) for pipe in self._pipes]


@contextlib.contextmanager
def crew(
    size: int, model_bytes: int, ways: Mapping[str, MakeReceiver], namespace: str = ""
) -> Iterator[Crew]:
    """Give so many workers, on another host if its namespace is given; they end with the block."""
    with contextlib.ExitStack() as stack:
        arguments = (model_bytes, dict(ways), namespace)
        yield Crew([stack.enter_context(child(_work, number, *arguments)) for number in range(size)])


def _work(
    pipe: Connection, number: int, model_bytes: int, ways: dict[str, MakeReceiver], namespace: str
) -> None:
    if namespace:
        enter(namespace)
    model = make_model(model_bytes)
    with contextlib.ExitStack() as stack:
        receivers = {way: stack.enter_context(contextlib.closing(make(number))) for way, make in ways.items()}
        pipe.send(("open", None))
        while (way := pipe.recv()) is not None:
            pipe.send(("ready", None))
            receivers[way].receive(model)
            ended = time.perf_counter()  # one clock for all processes of the machine
            pipe.send(("received", (ended, probe(model.state_dict()))))
