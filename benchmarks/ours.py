"""rlbroker's sides of a way."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlbroker import PublishReceipt, WorkerClient, WorkerCommunicator

if TYPE_CHECKING:
    import torch

    from benchmarks.models import State

#: Between two polls a worker does something else.
STEP_SECONDS = 0.0002


def learner(
    url: str, run: str, *, workers: int, host_cache: bool | str = True, **more: Any
) -> WorkerCommunicator:
    return WorkerCommunicator(
        workers,
        timeout=60.0,
        redis_url=url,
        run=run,
        host_cache=host_cache,
        **more,
    )


def worker(url: str, run: str, worker_id: int, *, host_cache: bool | str = True, **more: Any) -> WorkerClient:
    return WorkerClient(url, run, worker_id, timeout=60.0, host_cache=host_cache, **more)


@contextlib.contextmanager
def memory_of_host() -> Iterator[str]:
    """Give a directory that stands for another host's /dev/shm, which on one machine would be the learner's."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="rlb-bench-", dir=shared if shared.is_dir() else None
    ) as directory:
        yield directory


class OurSender:
    """Publishes to a run."""

    def __init__(self, communicator: WorkerCommunicator, **settings: Any) -> None:
        self._communicator, self._settings = communicator, settings
        self.receipt: PublishReceipt | None = None

    def send(self, weights: State) -> None:
        self.receipt = self._communicator.send_model_weights(weights, **self._settings)


class OurReceiver:
    """Polls, as a rollout loop does."""

    def __init__(self, url: str, run: str, host_cache: bool | str, number: int) -> None:
        self._worker = worker(url, run, number, host_cache=host_cache)

    def receive(self, model: torch.nn.Module) -> None:
        while not self._worker.poll(model):
            time.sleep(STEP_SECONDS)

    def close(self) -> None:
        self._worker.close()
