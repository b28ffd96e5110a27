"""What rlbroker replaces: a queue per worker, and for each of them the weights pickled and gzipped again."""

from __future__ import annotations

import functools
import gzip
import multiprocessing
import pickle
from multiprocessing.queues import Queue

import torch

from benchmarks.models import State, arrays, load_arrays

#: gzip's default in Python is 9, in the shell 6; the ancestor chose 6.
GZIP_LEVEL = 6


class AncestorSender:
    """Serialises once per worker."""

    def __init__(self, workers: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._queues: list[Queue[bytes]] = [spawn.Queue(maxsize=1) for _ in range(workers)]

    @property
    def receivers(self) -> functools.partial[AncestorReceiver]:
        return functools.partial(AncestorReceiver, self._queues)

    def send(self, weights: State) -> None:
        for queue in self._queues:
            queue.put(gzip.compress(pickle.dumps(arrays(weights), protocol=5), GZIP_LEVEL))

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
