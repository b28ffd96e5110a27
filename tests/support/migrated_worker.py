"""The main function of workers that tests start with `multiprocessing`, as trainers with queues do."""

from __future__ import annotations

import signal

import numpy as np

from rlbroker import WorkerClient


def work(worker_id: int, url: str, run: str, drains_on: signal.Signals | None = None) -> None:
    """Send numbered batches until stopped or drained."""
    weights: dict[str, np.ndarray] = {}
    with WorkerClient(url, run, worker_id, timeout=5.0) as client:
        if drains_on:
            client.drain_on(drains_on)
        client.load_weights(weights)
        number = 0
        while client.running:
            number += 1
            client.send_experiences({"number": number, "w": weights["w"]})
            client.poll(weights)
