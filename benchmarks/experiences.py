"""Batches from worker processes to one learner: rlbroker, hand-written redis-py, Ray and Reverb.

Each time is end to end: from the start signal to the workers until the learner has all batches as arrays and the
server has deleted them. All contenders get the same arrays and the same number of processes. Each worker has sent one
batch before, so that all connections are open.
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
from benchmarks.servers import scratch_name
from rlbroker import WorkerClient, WorkerCommunicator

#: How many batches the hand-written worker sends in one round trip.
PIPELINED = 16

#: How many entries of each stream the hand-written learner reads at once, and its socket read size.
READ_COUNT = 64
SOCKET_READ_BYTES = 1 << 20

GROUP = "learner"

REVERB_PYTHON = Path(__file__).with_name(".reverb") / "bin" / "python"
REVERB_PEER = Path(__file__).with_name("peers") / "reverb_peer.py"

TIMEOUT_SECONDS = 60.0

Array = np.ndarray[Any, Any]

#: Receives the load of a number of workers through the server at a URL, and returns the seconds that it took.
Learn = Callable[[str, int, "Load"], float]


@dataclass(frozen=True)
class Load:
    """The batches that each worker sends.

    Attributes:
        kind: `noise`, which is incompressible, or `frames`, which is compressible.
        shape: the shape of the only array of a batch, of bytes.
        batches: the number of batches of each worker.
    """

    kind: str
    shape: tuple[int, ...]
    batches: int

    @property
    def batch_bytes(self) -> int:
        """The size of a batch."""
        return int(np.prod(self.shape))

    def arrays(self) -> list[Array]:
        """Return the arrays of four different batches, to be sent in turn."""
        make = make_frames if self.kind == "frames" else make_noise
        return [make(self.shape, seed) for seed in range(4)]


def make_noise(shape: tuple[int, ...], seed: int) -> Array:
    """Return incompressible bytes."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def make_frames(shape: tuple[int, ...], seed: int) -> Array:
    """Return stacks of Atari-like frames, uint8 [rows, 4, 84, 84]: a fixed background with a few moving objects.

    Each row is one step later than the row before, so the two rows have three frames in common.
    """
    rows, depth, height, width = shape
    random = np.random.default_rng(seed)
    background = np.full((height, width), 87, np.uint8)
    background[:14] = 0
    background[14:18] = background[-4:] = 142
    for row in range(6):  # bricks
        background[24 + 3 * row : 26 + 3 * row, 4:-4] = 110 + 20 * row
        background[24 + 3 * row : 26 + 3 * row, random.integers(4, width - 4, 20)] = 87
    sequence = []
    position, speed = random.uniform(30, 60, 2), random.uniform(-2, 2, 2)
    for _ in range(rows + depth - 1):
        frame = background.copy()
        position = np.clip(position + speed, 20, 78)
        speed = np.where((position <= 20) | (position >= 78), -speed, speed)
        ball_y, ball_x = position.astype(int)
        frame[ball_y : ball_y + 3, ball_x : ball_x + 2] = 236
        paddle = int(np.clip(ball_x + random.integers(-3, 4), 4, 68))
        frame[76:79, paddle : paddle + 12] = 200
        score = random.integers(0, 8)
        frame[2:10, 10 + score : 14 + score] = 180
        sequence.append(frame)
    return np.stack([np.stack(sequence[row : row + depth]) for row in range(rows)])


# With rlbroker


def work_with_rlbroker(url: str, run: str, worker: int, load: Load, ready: Barrier, done: Event) -> None:
    """Run one worker, which sends its batches."""
    arrays = load.arrays()
    with WorkerClient(redis_url=url, run=run, worker_id=worker, timeout=TIMEOUT_SECONDS) as client:
        client.send_experiences({"obs": arrays[0]})
        ready.wait()
        for number in range(load.batches):
            client.send_experiences({"obs": arrays[number % len(arrays)]})
        done.wait()


def learn_with_rlbroker(url: str, workers: int, load: Load) -> float:
    """Return the seconds for all batches."""
    with (
        scratch_name(url) as run,
        WorkerCommunicator(
            workers, max_queue_size=load.batches, redis_url=url, run=run, timeout=TIMEOUT_SECONDS
        ) as comm,
        _prepare_processes(work_with_rlbroker, url, run, workers, load) as start_workers,
    ):
        pairs: list[Any] = []

        def collect(batches: int) -> None:
            nonlocal pairs
            while batches:
                pairs = comm.collect_experiences(timeout=TIMEOUT_SECONDS, max_batches=256)
                assert pairs, "no batch arrived in time"
                batches -= len(pairs)
            comm.acknowledge(pairs)

        collect(workers)
        started_at = start_workers()
        collect(workers * load.batches)
        return time.perf_counter() - started_at


# With hand-written redis-py


def work_by_hand(url: str, run: str, worker: int, load: Load, ready: Barrier, done: Event) -> None:
    """Run one worker that uses redis-py: pipelined, without ids, bounds and retries."""
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
    """Return the seconds for all batches."""
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

    with scratch_name(url) as run:
        for worker in range(workers):
            streams[f"{run}:{worker}"] = ">"
            client.xgroup_create(f"{run}:{worker}", GROUP, "0", mkstream=True)
        with _prepare_processes(work_by_hand, url, run, workers, load) as start_workers:
            collect(workers)
            started_at = start_workers()
            collect(workers * load.batches)
            return time.perf_counter() - started_at


# With Ray


def learn_with_ray(url: str, workers: int, load: Load) -> float:
    """Return the seconds for all batches. Each worker is an actor whose results the learner gets."""
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
    started_at = time.perf_counter()
    waiting = [
        [actor.batch.remote(number) for number in range(min(PIPELINED, load.batches))] for actor in actors
    ]
    for number in range(load.batches):
        for actor, futures in zip(actors, waiting, strict=True):
            ray.get(futures.pop(0))
            if number + PIPELINED < load.batches:
                futures.append(actor.batch.remote(number + PIPELINED))
    seconds = time.perf_counter() - started_at
    for actor in actors:
        ray.kill(actor)
    return seconds


# With Reverb


def learn_with_reverb(url: str, workers: int, load: Load) -> float:
    """Return the seconds for all batches, in Reverb's own environment and through its own server."""
    command = [REVERB_PYTHON, REVERB_PEER, workers, load.batches, load.batch_bytes]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


# All contenders


def run(url: str, *, quick: bool, repetitions: int) -> list[Row]:
    """Return the rows of all contenders."""
    scale = 0.1 if quick else 2
    rows = []
    for name, load in (
        ("64 KB", Load("noise", (64, 1024), int(1000 * scale))),
        ("1 MB", Load("noise", (64, 16384), int(80 * scale))),
    ):
        for workers in (1, 2, 4):
            worker_load = Load(load.kind, load.shape, load.batches // workers)
            work = f"experiences, incompressible {name} batches, {workers} worker{'s' * (workers > 1)}"
            peers: dict[str, tuple[Learn, float | None]] = {"redis-py by hand": (learn_by_hand, 0.85)}
            rows += _compare(url, work, workers, worker_load, repetitions, peers)
    frames_load = Load("frames", (32, 4, 84, 84), int(200 * scale))
    peers = {"redis-py by hand, raw": (learn_by_hand, 3.0)}
    rows += _compare(url, "experiences, Atari frames, 2 workers", 2, frames_load, repetitions, peers)
    small = Load("noise", (64, 1024), int(500 * scale))
    work = "experiences, incompressible 64 KB batches, 2 workers"
    peers = {}
    for against, available, learn, target, reason in (
        (
            "Ray",
            importlib.util.find_spec("ray"),
            learn_with_ray,
            4.0,
            "Ray is not installed: pip install '.[bench]'",
        ),
        ("Reverb", REVERB_PYTHON.exists(), learn_with_reverb, None, "benchmarks/reverb_env.sh was not run"),
    ):
        if available:
            peers[against] = learn, target
        else:
            rows.append(Row(work, against, _format_target(target), [], [], "MB/s", True, target, reason))
    return rows + (_compare(url, work, 2, small, repetitions, peers) if peers else [])


def _compare(
    url: str,
    work: str,
    workers: int,
    load: Load,
    repetitions: int,
    peers: Mapping[str, tuple[Learn, float | None]],
) -> list[Row]:
    """Return a row for each peer. The contenders take turns in the same rounds."""
    progress(work)
    megabytes = workers * load.batches * load.batch_bytes / 1e6

    def contender(learn: Learn) -> Callable[[], float]:
        return lambda: megabytes / learn(url, workers, load)

    contenders = {"ours": contender(learn_with_rlbroker)}
    contenders |= {against: contender(learn) for against, (learn, _) in peers.items()}
    found = interleaved(contenders, repetitions)
    return [
        Row(work, against, _format_target(target), found["ours"], found[against], "MB/s", True, target)
        for against, (_, target) in peers.items()
    ]


def _format_target(target: float | None) -> str:
    return "" if target is None else f"≥ {target:g}×"


@contextmanager
def _prepare_processes(
    work: Callable[..., None], url: str, run: str, workers: int, load: Load
) -> Iterator[Callable[[], float]]:
    """Prepare worker processes; yield a function that starts them and returns the time of the start."""
    context = multiprocessing.get_context("spawn")
    ready, done = context.Barrier(workers + 1), context.Event()
    processes = [
        context.Process(target=work, args=(url, run, worker, load, ready, done)) for worker in range(workers)
    ]
    for process in processes:
        process.start()

    def start() -> float:
        ready.wait(TIMEOUT_SECONDS)
        return time.perf_counter()

    try:
        yield start
    finally:
        done.set()
        for process in processes:
            process.join()
