"""Many workers: their cost to the learner while most are idle, and the time until all have a version."""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.child_processes import receive, start_child
from benchmarks.measure import Row, interleaved, progress
from benchmarks.rlbroker_transport import open_learner, open_worker
from benchmarks.servers import scratch_name
from rlbroker import WorkerClient

#: The lease of workers that have exited: they must count as members for longer than any benchmark takes.
LEASE_SECONDS = 3600.0

#: The number of batches that wait when the learner collects, and the number of collections for one sample.
BATCHES, ROUNDS = 8, 40

#: The number of versions whose deliveries are one sample.
VERSIONS = 20

#: The largest number of processes for the simulated workers.
PROCESSES = 4

STEP_SECONDS = 0.0002


def run(url: str, *, quick: bool, repetitions: int) -> list[Row]:
    """Return the rows of collecting, and of delivering to growing numbers of workers."""
    return [
        *_collecting(url, 32 if quick else 256, 5 if quick else ROUNDS, repetitions),
        *_delivering(url, (1, 4) if quick else (1, 4, 16, 64), 3 if quick else VERSIONS, repetitions),
    ]


# The cost of idle workers


def _collecting(url: str, registered: int, rounds: int, repetitions: int) -> list[Row]:
    progress(f"scale: collecting from 8 busy workers of {registered}")
    sizes = {"4 workers, all busy": (4, 4), "8 workers, all busy": (8, 8), "many": (registered, 8)}
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(scratch_name(url))
        contenders = {}
        for number, (label, (members, busy)) in enumerate(sizes.items()):
            collecting = _Collecting(stack, url, f"{name}-{number}", members, busy, rounds)
            contenders[label] = collecting.microseconds
        found = interleaved(contenders, repetitions)
    work = f"collecting, per batch of 4 KB: {registered} workers, 8 of them busy"
    return [
        Row(work, against, "≤ 1.5×", found["many"], found[against], "µs", False, 1.5)
        for against in ("4 workers, all busy", "8 workers, all busy")
    ]


class _Collecting:
    """A run with many members, of which a few send."""

    def __init__(
        self, stack: contextlib.ExitStack, url: str, run: str, members: int, busy: int, rounds: int
    ) -> None:
        self._rounds, self._busy = rounds, busy
        self._learner = stack.enter_context(
            open_learner(
                url, run, workers=members, lease_seconds=LEASE_SECONDS, forget_seconds=2 * LEASE_SECONDS
            )
        )
        with start_child(_register, url, run, range(busy, members)) as pipe:
            receive(pipe, "registered")
        self._pipe = stack.enter_context(start_child(_send, url, run, busy))
        receive(self._pipe, "open")
        assert len(self._learner.workers()) == members

    def microseconds(self) -> float:
        """Return the learner's time per batch, when a few batches wait at a time."""
        seconds = 0.0
        for _ in range(self._rounds):
            self._pipe.send(BATCHES // self._busy)
            receive(self._pipe, "sent")
            started, found = time.perf_counter(), 0
            while found < BATCHES:
                found += len(self._learner.collect_experiences(timeout=5.0))
            seconds += time.perf_counter() - started
        return 1e6 * seconds / (self._rounds * BATCHES)


def _register(pipe: Connection, url: str, run: str, numbers: range) -> None:
    """Join a run as several workers and exit without leaving, so that they stay members."""
    clients = [open_worker(url, run, number) for number in numbers]
    pipe.send(("registered", len(clients)))
    pipe.recv()
    os._exit(0)


def _send(pipe: Connection, url: str, run: str, busy: int) -> None:
    batch = {"obs": np.arange(1000, dtype=np.float32)}
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(open_worker(url, run, number)) for number in range(busy)]
        pipe.send(("open", None))
        while (count := pipe.recv()) is not None:
            for client in clients:
                for _ in range(count):
                    client.send_experiences(batch)
            pipe.send(("sent", None))


# The time until all workers have a version


def _delivering(url: str, sizes: tuple[int, ...], versions: int, repetitions: int) -> list[Row]:
    progress(f"scale: 1 MB to {', '.join(map(str, sizes))} workers")
    tails: dict[int, list[float]] = {size: [] for size in sizes}

    def sample(size: int) -> float:
        found = _deliver_milliseconds(url, size, versions)
        tails[size].append(float(np.percentile(found, 99)))
        return float(np.percentile(found, 50))

    medians = interleaved({str(size): partial(sample, size) for size in sizes}, repetitions)
    rows = []
    for size in sizes[1:]:
        for label, ours, theirs in (
            ("p50", medians[str(size)], medians[str(sizes[0])]),
            ("p99", tails[size][-repetitions:], tails[sizes[0]][-repetitions:]),
        ):
            work = f"1 MB float32, publish to applied, {label}: {size} workers of one host"
            rows.append(Row(work, "1 worker", "", ours, theirs, "ms", False, None))
    return rows


def _deliver_milliseconds(url: str, size: int, versions: int) -> list[float]:
    """Return the time from publishing to applied, for each version and worker."""
    random = np.random.default_rng(1)
    base = random.standard_normal(1 << 18, np.float32)
    found: list[float] = []
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(scratch_name(url))
        communicator = stack.enter_context(open_learner(url, name, workers=size))
        shares = [range(first, size, PROCESSES) for first in range(min(size, PROCESSES))]
        pipes = [stack.enter_context(start_child(_apply, url, name, share)) for share in shares]
        for pipe in pipes:
            receive(pipe, "open")
        for version in range(versions + 1):
            weights = {"w": base + np.float32(3e-4) * random.standard_normal(1 << 18, np.float32)}
            for pipe in pipes:
                pipe.send("next")
                receive(pipe, "ready")
            started = time.perf_counter()
            communicator.send_model_weights(weights)
            applied = [at for pipe in pipes for at in receive(pipe, "applied")]
            found += [1e3 * (at - started) for at in applied] if version else []  # the first version warms up
    return found


def _apply(pipe: Connection, url: str, run: str, numbers: range) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(open_worker(url, run, number)) for number in numbers]
        models: list[dict[str, Any]] = [{"w": np.zeros(1 << 18, np.float32)} for _ in clients]
        pipe.send(("open", None))
        while pipe.recv() is not None:
            pipe.send(("ready", None))
            waiting = list(zip(clients, models, strict=True))
            applied: list[float] = []
            while waiting:
                remaining = [pair for pair in waiting if not _poll(*pair, applied)]
                if len(remaining) == len(waiting):
                    time.sleep(STEP_SECONDS)
                waiting = remaining
            pipe.send(("applied", applied))


def _poll(client: WorkerClient, model: dict[str, Any], applied: list[float]) -> bool:
    if not client.poll(model):
        return False
    applied.append(time.perf_counter())
    return True
