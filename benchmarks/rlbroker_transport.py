"""rlbroker's learner and workers, with the settings of the benchmarks, and as a transport to be compared."""

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

#: The pause between two polls, in which a real worker would step its environments.
STEP_SECONDS = 0.0002


def open_learner(
    url: str, run: str, *, workers: int, host_cache: bool | str = True, **settings: Any
) -> WorkerCommunicator:
    return WorkerCommunicator(
        workers,
        timeout=60.0,
        redis_url=url,
        run=run,
        host_cache=host_cache,
        **settings,
    )


def open_worker(
    url: str, run: str, worker_id: int, *, host_cache: bool | str = True, **settings: Any
) -> WorkerClient:
    return WorkerClient(url, run, worker_id, timeout=60.0, host_cache=host_cache, **settings)


@contextlib.contextmanager
def temporary_host_cache() -> Iterator[str]:
    """Yield a directory for the host cache of a simulated host, which must not share the learner's /dev/shm."""
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="rlb-bench-", dir=shared_memory if shared_memory.is_dir() else None
    ) as directory:
        yield directory


class RlbrokerSender:
    """Publishes weights to a run."""

    def __init__(self, communicator: WorkerCommunicator, **settings: Any) -> None:
        self._communicator, self._settings = communicator, settings
        self.receipt: PublishReceipt | None = None

    def send(self, weights: State) -> None:
        self.receipt = self._communicator.send_model_weights(weights, **self._settings)


class RlbrokerReceiver:
    """Polls for weights, as a rollout loop does."""

    def __init__(self, url: str, run: str, host_cache: bool | str, number: int) -> None:
        self._worker = open_worker(url, run, number, host_cache=host_cache)

    def receive(self, model: torch.nn.Module) -> None:
        while not self._worker.poll(model):
            time.sleep(STEP_SECONDS)

    def close(self) -> None:
        self._worker.close()
