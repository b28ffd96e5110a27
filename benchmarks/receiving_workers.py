"""Worker processes with a model, which receive weights over any of the compared transports."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Protocol

import torch

from benchmarks.child_processes import receive, start_child
from benchmarks.models import State, last_values, make_model
from benchmarks.network import enter


class Sender(Protocol):
    """The learner's side of a transport."""

    def send(self, weights: State) -> None:
        """Send weights to all workers. They may arrive after the call returns."""


class Receiver(Protocol):
    """A worker's side of a transport."""

    def receive(self, model: torch.nn.Module) -> None:
        """Wait for the next weights and copy them into the model."""

    def close(self) -> None:
        """Close the transport."""


#: Creates a worker's side, given the worker's number. Must be picklable.
MakeReceiver = Callable[[int], Receiver]


class ReceivingWorkers:
    """Worker processes of one host. They are idle until `deliver` is called."""

    def __init__(self, pipes: Sequence[Connection]) -> None:
        """Wait until all processes are ready."""
        self._pipes = pipes
        self._receive_all("open")

    def deliver(self, transport: str, sender: Sender, weights: State) -> float:
        """Send weights over a transport; return the seconds until the last worker has them in its model."""
        for pipe in self._pipes:
            pipe.send(transport)
        self._receive_all("ready")
        started = time.perf_counter()
        sender.send(weights)
        answers: list[tuple[float, tuple[float, ...]]] = self._receive_all("received")
        expected = last_values(weights)
        for _, found in answers:
            assert found == expected, f"{transport}: a worker has other weights than those that were sent"
        return max(ended for ended, _ in answers) - started

    def _receive_all(self, expected: str) -> list[tuple[float, tuple[float, ...]]]:
        return [receive(pipe, expected) for pipe in self._pipes]


@contextlib.contextmanager
def start_receiving_workers(
    count: int, model_bytes: int, transports: Mapping[str, MakeReceiver], namespace: str = ""
) -> Iterator[ReceivingWorkers]:
    """Start worker processes, on another host if its namespace is given; they end with the block."""
    with contextlib.ExitStack() as stack:
        arguments = (model_bytes, dict(transports), namespace)
        yield ReceivingWorkers(
            [stack.enter_context(start_child(_work, number, *arguments)) for number in range(count)]
        )


def _work(
    pipe: Connection, number: int, model_bytes: int, transports: dict[str, MakeReceiver], namespace: str
) -> None:
    if namespace:
        enter(namespace)
    model = make_model(model_bytes)
    with contextlib.ExitStack() as stack:
        receivers = {
            transport: stack.enter_context(contextlib.closing(make(number)))
            for transport, make in transports.items()
        }
        pipe.send(("open", None))
        while (transport := pipe.recv()) is not None:
            pipe.send(("ready", None))
            receivers[transport].receive(model)
            ended = time.perf_counter()  # the same clock in all processes of the machine
            pipe.send(("received", (ended, last_values(model.state_dict()))))
