"""Worker processes that hold a model and get weights into it, each time in the way that they are told."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch

from benchmarks.models import State, make_model, probe
from benchmarks.network import enter

#: After this many seconds a worker is taken for stuck.
PATIENCE_SECONDS = 300.0

_spawn = multiprocessing.get_context("spawn")


class Sender(Protocol):
    """The learner's side of one way."""

    def send(self, weights: State) -> None:
        """Give weights to all workers; they may arrive later."""


class Receiver(Protocol):
    """A worker's side of one way."""

    def receive(self, model: torch.nn.Module) -> None:
        """Wait for the next weights, and return once they are in the model."""


#: Makes a worker's side, given the worker's number; must pickle.
MakeReceiver = Callable[[int], Receiver]


class Crew:
    """Workers of one host. They do nothing, and cost next to nothing, until they are told to receive."""

    def __init__(
        self, size: int, model_bytes: int, ways: Mapping[str, MakeReceiver], namespace: str = ""
    ) -> None:
        """Start so many processes, on another host if a namespace is given, and wait until all are ready."""
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        try:
            for number in range(size):
                ours, theirs = _spawn.Pipe()
                arguments = (theirs, number, model_bytes, dict(ways), namespace)
                process = _spawn.Process(target=_work, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
            self._answers("open")
        except BaseException:
            self.close()
            raise

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

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()

    def _answers(self, expected: str) -> list[Any]:
        found = []
        for number, pipe in enumerate(self._pipes):
            if not pipe.poll(PATIENCE_SECONDS):
                raise RuntimeError(f"worker {number} gave no answer within {PATIENCE_SECONDS:g} s")
            try:
                kind, value = pipe.recv()
            except EOFError:
                raise RuntimeError(f"worker {number} ended") from None
            if kind != expected:
                raise RuntimeError(f"worker {number}: {value}")
            found.append(value)
        return found


@contextlib.contextmanager
def crew(
    size: int, model_bytes: int, ways: Mapping[str, MakeReceiver], namespace: str = ""
) -> Iterator[Crew]:
    """Give a crew that ends with the block."""
    workers = Crew(size, model_bytes, ways, namespace)
    try:
        yield workers
    finally:
        workers.close()


def _work(
    pipe: Connection, number: int, model_bytes: int, ways: dict[str, MakeReceiver], namespace: str
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the parent says when to end
    with contextlib.ExitStack() as stack:
        try:
            if namespace:
                enter(namespace)
            model = make_model(model_bytes)
            receivers = {way: make(number) for way, make in ways.items()}
            for receiver in receivers.values():
                stack.callback(getattr(receiver, "close", bool))
            pipe.send(("open", None))
            while (way := pipe.recv()) is not None:
                pipe.send(("ready", None))
                receivers[way].receive(model)
                ended = time.perf_counter()  # one clock for all processes of the machine
                pipe.send(("received", (ended, probe(model.state_dict()))))
        except (EOFError, BrokenPipeError):  # the parent is gone
            return
        except Exception as error:
            with contextlib.suppress(OSError):
                pipe.send(("failed", f"{type(error).__name__}: {error}"))
            raise
