"""Batches from worker processes to one learner, against what one would write by hand, and against Ray and Reverb.

Each figure is end to end: from the word "go" to the worker processes until the learner has every batch as arrays
and the server has forgotten it. All sides are given the same arrays, and as many processes; one batch of each worker
went before, so that everything is connected.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import numpy as np
import redis

from benchmarks.measure import Row, interleaved, progress
from benchmarks.servers import scratch
from rlbroker import WorkerClient, WorkerCommunicator

#: How many batches the hand-made worker sends in one round trip.
PIPELINED = 16

#: How many entries of each stream the hand-made learner reads at once, and how much it reads from its socket.
READ_COUNT = 64
SOCKET_READ_BYTES = 1 << 20

GROUP = "learner"

REVERB_PYTHON = Path(__file__).with_name(".reverb") / "bin" / "python"
REVERB_PEER = Path(__file__).with_name("peers") / "reverb_peer.py"

PATIENCE_SECONDS = 60.0

Array = np.ndarray[Any, Any]

#: Gives the seconds that so many workers took for their batches, through the server with this URL.
Learn = Callable[[str, int, "Load"], float]


@dataclass(frozen=True)
class Load:
    """What each worker sends.

    Attributes:
        kind: `noise`, which does not compress, or `frames`, which does.
        shape: of a batch's one array of bytes.
        batches: how many each worker sends.
    """

    kind: str
    shape: tuple[int, ...]
    batches: int

    @property
    def batch_bytes(self) -> int:
        """Bytes of a batch."""
        return int(np.prod(self.shape))

    def arrays(self) -> list[Array]:
        """Give some different batches, to be sent in turn."""
        make = frames if self.kind == "frames" else noise
        return [make(self.shape, seed) for seed in range(4)]


def noise(shape: tuple[int, ...], seed: int) -> Array:
    """Give bytes that no codec makes smaller."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def frames(shape: tuple[int, ...], seed: int) -> Array:
    """Give stacks of Atari-like frames, uint8 [rows, 4, 84, 84]: a still background, and a few things that move.

    Each row is one step later than the one before, so three of its four frames were in that one too.
    """
    rows, depth, height, width = shape
    random = np.random.default_rng(seed)
    background = np.full((height, width), 87, np.uint8)
    background[:14] = 0
    background[14:18] = background[-4:] = 142
    for row in range(6):  # bricks
        background[24 + 3 * row : 26 + 3 * row, 4:-4] = 110 + 20 * row
        background[24 + 3 * row : 26 + 3 * row, random.integers(4, width - 4, 20)] = 87
    seen = []
    place, speed = random.uniform(30, 60, 2), random.uniform(-2, 2, 2)
    for _ in range(rows + depth - 1):
        frame = background.copy()
        place = np.clip(place + speed, 20, 78)
        speed = np.where((place <= 20) | (place >= 78), -speed, speed)
        ball_y, ball_x = place.astype(int)
        frame[ball_y : ball_y + 3, ball_x : ball_x + 2] = 236
        paddle = int(np.clip(ball_x + random.integers(-3, 4), 4, 68))
        frame[76:79, paddle : paddle + 12] = 200
        score = random.integers(0, 8)
        frame[2:10, 10 + score : 14 + score] = 180
        seen.append(frame)
    return np.stack([np.stack(seen[row : row + depth]) for row in range(rows)])


# Ours


def work_with_rlbroker(url: str, run: str, worker: int, load: Load, ready: Barrier, done: Event) -> None:
    """Be one worker that sends its batches."""
    arrays = load.arrays()
    with WorkerClient(redis_url=url, run=run, worker_id=worker, timeout=PATIENCE_SECONDS) as client:
        client.send_experiences({"obs": arrays[0]})
        ready.wait()
        for number in range(load.batches):
            client.send_experiences({"obs": arrays[number % len(arrays)]})
        done.wait()


def learn_with_rlbroker(url: str, workers: int, load: Load) -> float:
    """Give the seconds that all batches took."""
    with (
        scratch(url) as run,
        WorkerCommunicator(
            workers, max_queue_size=load.batches, redis_url=url, run=run, timeout=PATIENCE_SECONDS
        ) as comm,
        _processes(work_with_rlbroker, url, run, workers, load) as go,
    ):
        pairs: list[Any] = []

        def collect(batches: int) -> None:
            nonlocal pairs
            while batches:
                pairs = comm.collect_experiences(timeout=PATIENCE_SECONDS, max_batches=256)
                assert pairs, "no batch came"
                batches -= len(pairs)
            comm.acknowledge(pairs)

        collect(workers)
        began = go()
        collect(workers * load.batches)
        return time.perf_counter() - began


# By hand


def work_by_hand(url: str, run: str, worker: int, load: Load, ready: Barrier, done: Event) -> None:
    """Be one worker that sends its batches with redis-py: pipelined, without ids, bounds and retries."""
    arrays = load.arrays()
    client = redis.Redis.from_url(url, protocol=2)
    client.xadd(f"{run}:{worker}", {"data": arrays[0].tobytes()})
    ready.wait()
    for first in range(0, load.batches, PIPELINED):
        pipeline = client.pipeline(transaction=False)
        for number in range(first, min(first + PIPELINED, load.batches)):
            pipeline.xadd(f"{run}:{worker}", {"data": arrays[number % len(arrays)].tobytes()})
        pipeline.execute()
    done.wait()


def learn_by_hand(url: str, workers: int, load: Load) -> float:
    """Give the seconds that all batches took."""
    client = redis.Redis.from_url(url, protocol=2, socket_read_size=SOCKET_READ_BYTES)
    streams: Any = {}

    def collect(missing: int) -> None:
        while missing:
            found: Any = client.xreadgroup(GROUP, "me", streams, count=READ_COUNT, block=1000)
            pipeline = client.pipeline(transaction=False)
            for stream, entries in found:
                batches = [
                    {"obs": np.frombuffer(fields[b"data"], np.uint8).reshape(load.shape)}
                    for _, fields in entries
                ]
                ids = [entry_id for entry_id, _ in entries]
                pipeline.xack(stream, GROUP, *ids)
                pipeline.xdel(stream, *ids)
                missing -= len(batches)
            pipeline.execute()

    with scratch(url) as run:
        for worker in range(workers):
            streams[f"{run}:{worker}"] = ">"
            client.xgroup_create(f"{run}:{worker}", GROUP, "0", mkstream=True)
        with _processes(work_by_hand, url, run, workers, load) as go:
            collect(workers)
            began = go()
            collect(workers * load.batches)
            return time.perf_counter() - began


# With Ray


def learn_with_ray(url: str, workers: int, load: Load) -> float:
    """Give the seconds that all batches took: each worker is an actor whose results the learner gets."""
    ray: Any = importlib.import_module("ray")
    if not ray.is_initialized():
        ray.init(num_cpus=workers, include_dashboard=False, logging_level="ERROR", log_to_driver=False)

    class Worker:
        def __init__(self) -> None:
            self.arrays = load.arrays()

        def batch(self, number: int) -> dict[str, Array]:
            return {"obs": self.arrays[number % len(self.arrays)]}

    remote = ray.remote(num_cpus=0)(Worker)
    actors = [remote.remote() for _ in range(workers)]
    ray.get([actor.batch.remote(0) for actor in actors])
    began = time.perf_counter()
    waiting = [
        [actor.batch.remote(number) for number in range(min(PIPELINED, load.batches))] for actor in actors
    ]
    for number in range(load.batches):
        for actor, futures in zip(actors, waiting, strict=True):
            ray.get(futures.pop(0))
            if number + PIPELINED < load.batches:
                futures.append(actor.batch.remote(number + PIPELINED))
    seconds = time.perf_counter() - began
    for actor in actors:
        ray.kill(actor)
    return seconds


# With Reverb


def learn_with_reverb(url: str, workers: int, load: Load) -> float:
    """Give the seconds that all batches took, in Reverb's own environment and through its own server."""
    command = [REVERB_PYTHON, REVERB_PEER, workers, load.batches, load.batch_bytes]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


# All of it


def run(url: str, *, quick: bool, repetitions: int) -> list[Row]:
    """Measure all of it on a server, and give the table's rows."""
    scale = 0.1 if quick else 2
    rows = []
    for name, load in (
        ("64 KB", Load("noise", (64, 1024), int(1000 * scale))),
        ("1 MB", Load("noise", (64, 16384), int(80 * scale))),
    ):
        for workers in (1, 2, 4):
            some = Load(load.kind, load.shape, load.batches // workers)
            work = f"experiences, incompressible {name} batches, {workers} worker{'s' * (workers > 1)}"
            peers: dict[str, tuple[Learn, float | None]] = {"redis-py by hand": (learn_by_hand, 0.85)}
            rows += _compared(url, work, workers, some, repetitions, peers)
    frames_load = Load("frames", (32, 4, 84, 84), int(200 * scale))
    peers = {"redis-py by hand, raw": (learn_by_hand, 3.0)}
    rows += _compared(url, "experiences, Atari frames, 2 workers", 2, frames_load, repetitions, peers)
    small = Load("noise", (64, 1024), int(500 * scale))
    work = "experiences, incompressible 64 KB batches, 2 workers"
    peers = {}
    for against, there, learn, target, missing in (
        (
            "Ray",
            importlib.util.find_spec("ray"),
            learn_with_ray,
            4.0,
            "Ray is not installed: pip install '.[bench]'",
        ),
        ("Reverb", REVERB_PYTHON.exists(), learn_with_reverb, None, "benchmarks/reverb_env.sh was not run"),
    ):
        if there:
            peers[against] = learn, target
        else:
            rows.append(Row(work, against, _wanted(target), [], [], "MB/s", True, target, missing))
    return rows + (_compared(url, work, 2, small, repetitions, peers) if peers else [])


def _compared(
    url: str,
    work: str,
    workers: int,
    load: Load,
    repetitions: int,
    peers: Mapping[str, tuple[Learn, float | None]],
) -> list[Row]:
    """Give a row for each peer; all take their turns in the same rounds."""
    progress(work)
    megabytes = workers * load.batches * load.batch_bytes / 1e6

    def contender(learn: Learn) -> Callable[[], float]:
        return lambda: megabytes / learn(url, workers, load)

    contenders = {"ours": contender(learn_with_rlbroker)}
    contenders |= {against: contender(learn) for against, (learn, _) in peers.items()}
    found = interleaved(contenders, repetitions)
    return [
        Row(work, against, _wanted(target), found["ours"], found[against], "MB/s", True, target)
        for against, (_, target) in peers.items()
    ]


def _wanted(target: float | None) -> str:
    return "" if target is None else f"≥ {target:g}×"


@contextmanager
def _processes(
    work: Callable[..., None], url: str, run: str, workers: int, load: Load
) -> Iterator[Callable[[], float]]:
    """Have worker processes ready; give what starts them and tells when that was."""
    context = multiprocessing.get_context("spawn")
    ready, done = context.Barrier(workers + 1), context.Event()
    started = [
        context.Process(target=work, args=(url, run, worker, load, ready, done)) for worker in range(workers)
    ]
    for process in started:
        process.start()

    def go() -> float:
        ready.wait(PATIENCE_SECONDS)
        return time.perf_counter()

    try:
        yield go
    finally:
        done.set()
        for process in started:
            process.join()
