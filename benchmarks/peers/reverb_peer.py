"""Batches from worker processes to one learner with Reverb, in the environment that `reverb_env.sh` creates.

Usage: python reverb_peer.py WORKERS BATCHES BATCH_BYTES. Prints the seconds for all batches.
"""

from __future__ import annotations

import importlib
import multiprocessing
import socket
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier, Event
from typing import Any

import numpy as np

TABLE = "batches"
MAX_SIZE = 1000


def serve(port: int, ready: Connection, done: Event) -> None:
    """Run the server, with one queue for all workers."""
    reverb: Any = importlib.import_module("reverb")
    server = reverb.Server(tables=[reverb.Table.queue(TABLE, max_size=MAX_SIZE)], port=port)
    ready.send(None)
    done.wait()
    server.stop()


def work(port: int, batches: int, batch_bytes: int, ready: Barrier) -> None:
    """Run one worker, which sends its batches."""
    reverb: Any = importlib.import_module("reverb")
    arrays = [
        np.random.default_rng(seed).integers(0, 256, (64, batch_bytes // 64), np.uint8) for seed in range(4)
    ]
    with reverb.Client(f"localhost:{port}").trajectory_writer(num_keep_alive_refs=1) as writer:
        for number in range(-1, batches):  # the first batch is not measured
            writer.append({"obs": arrays[number % len(arrays)]})
            writer.create_item(TABLE, 1.0, {"obs": writer.history["obs"][-1:]})
            if number < 0:
                writer.flush()
                ready.wait()
        writer.flush()


def main(workers: int, batches: int, batch_bytes: int) -> float:
    """Return the seconds for all batches; each worker sends `batches` of them."""
    reverb: Any = importlib.import_module("reverb")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ready, done = context.Barrier(workers + 1), context.Event()
    receiver, sender = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(port, sender, done))
    server.start()
    receiver.recv()
    processes = [
        context.Process(target=work, args=(port, batches, batch_bytes, ready)) for _ in range(workers)
    ]
    for process in processes:
        process.start()
    client = reverb.Client(f"localhost:{port}")
    list(client.sample(TABLE, num_samples=workers))
    ready.wait()
    started = time.perf_counter()
    for sample in client.sample(TABLE, num_samples=workers * batches):
        assert sample[0].data[0].nbytes == batch_bytes
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    done.set()
    server.join()
    return seconds


if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:4])))
