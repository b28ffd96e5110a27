"""rlbroker's ancestor: a queue per worker, and the weights pickled and compressed again for each."""

from __future__ import annotations

import functools
import gzip
import multiprocessing
import pickle
from multiprocessing.queues import Queue

import torch

from benchmarks.models import State, load_arrays, to_arrays

#: The level that the ancestor used. The default is 9 in Python, and 6 in the shell.
GZIP_LEVEL = 6


class AncestorSender:
    """Serialises the weights once per worker."""

    def __init__(self, workers: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._queues: list[Queue[bytes]] = [spawn.Queue(maxsize=1) for _ in range(workers)]

    @property
    def receivers(self) -> functools.partial[AncestorReceiver]:
        return functools.partial(AncestorReceiver, self._queues)

    def send(self, weights: State) -> None:
        for queue in self._queues:
            queue.put(gzip.compress(pickle.dumps(to_arrays(weights), protocol=5), GZIP_LEVEL))

    def close(self) -> None:
        for queue in self._queues:
            queue.close()
            queue.cancel_join_thread()


class AncestorReceiver:
    def __init__(self, queues: list[Queue[bytes]], number: int) -> None:
        self._queue = queues[number]

    def receive(self, model: torch.nn.Module) -> None:
        load_arrays(model, pickle.loads(gzip.decompress(self._queue.get())))

    def close(self) -> None:
        self._queue.close()
