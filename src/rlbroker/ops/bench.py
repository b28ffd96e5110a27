"""What a server gives: round trip, rates, latency and batches, and whether compressing weights pays on the way to it.

A learner in this process and a worker in another one measure it, in a run of their own that is deleted afterwards.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection as Pipe
from statistics import median
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.codec.limits import Limits
from rlbroker.codec.message import MessageAssembly, MessagePlan
from rlbroker.errors import ConnectionFailed, DeadlineExceeded, RlbrokerError
from rlbroker.learner import WorkerCommunicator
from rlbroker.worker import WorkerClient

#: Size of the values with which the way is measured: of this size up to 4 MB they move fastest.
CHUNK_BYTES: Final = 1 << 20

#: So many of them are there at most, in turn.
CHUNKS: Final = 32

#: Sizes of the batches.
BATCH_BYTES: Final = (1 << 10, 64 << 10, 1 << 20)

#: Weights on which the codec is tried.
SAMPLE_BYTES: Final = 16 << 20

#: Seconds that one operation may take.
TIMEOUT_SECONDS: Final = 30.0

#: Compression that makes weights this much faster is worth its cores.
WORTHWHILE: Final = 1.1

#: What is left behind by a probe that was killed goes by itself, as far as it is not the run's own.
_EXPIRE_SECONDS: Final = 60


@dataclass(frozen=True)
class PublishTimings:
    """Weights from this process to the worker's model and back to nobody: how long until they are applied."""

    compressed: bool
    megabytes: float
    applied_ms: float  #: median
    megabytes_per_second: float


@dataclass(frozen=True)
class Batches:
    """What one worker sends and the learner collects, at this size."""

    size_bytes: int
    batches_per_second: float
    megabytes_per_second: float


@dataclass(frozen=True)
class Codec:
    """What compressing does to weights of one kind."""

    weights: str
    ratio: float  #: raw size by stored size
    encode_megabytes_per_second: float
    decode_megabytes_per_second: float


@dataclass(frozen=True)
class Report:
    """Everything that was measured."""

    server: str
    server_version: str
    round_trip_us: float  #: median
    round_trip_p99_us: float
    set_megabytes_per_second: float
    get_megabytes_per_second: float
    published: list[PublishTimings]
    batches: list[Batches]
    codecs: list[Codec]

    @property
    def verdict(self) -> str:
        """Say in one line whether compression pays on this link: by what arrived first, not by rates."""
        raw, compressed = (
            next(one.applied_ms for one in self.published if one.compressed is how) for how in (False, True)
        )
        pays = raw / compressed > WORTHWHILE
        which = "pays" if pays else "does not pay: compression_enabled=False is as fast, or faster"
        return (
            f"on this link compressing float32 weights {which} (compressed and as differences they are applied "
            f"at {raw / compressed:.2f}× the speed of raw ones)"
        )

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self) | {"verdict": self.verdict}


def measure(url: str | None, *, megabytes: float, seconds: float, progress: Callable[[str], None]) -> Report:
    """Measure what a learner and a worker on this machine can expect of a server.

    Args:
        url: the server's; None as everywhere.
        megabytes: size of the published weights, in 2^20 bytes.
        seconds: how long each measurement goes on, about.
        progress: gets a line before each of them.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    run = f"bench-{secrets.token_hex(4)}"
    keys = Keys(run)
    connection = Connection(url, timeout_seconds=TIMEOUT_SECONDS)
    with ExitStack() as stack:
        stack.callback(connection.close)
        connection.execute_once("PING")  # who looks wants to know at once that nobody answers
        connection.check_server()
        stack.callback(_delete, connection, keys)
        progress("round trip")
        trips = _round_trips(connection, seconds)
        progress("chunks to the server and back")
        set_rate, get_rate = _chunk_rates(connection, keys, seconds)
        learner = stack.enter_context(
            WorkerCommunicator(1, redis_url=url, run=run, timeout=TIMEOUT_SECONDS, host_cache=False)
        )
        worker = stack.enter_context(_worker_process(url, run))
        progress(f"weights of {megabytes:g} MB to a worker")
        published = _published(learner, worker, megabytes, seconds)
        batches = []
        for size in BATCH_BYTES:
            progress(f"batches of {size:,} bytes")
            batches.append(_batches(learner, worker, size, seconds))
        progress("codec")
        codecs = [_codec(kind, sample, seconds) for kind, sample in _samples()]
        return Report(
            server=connection.address,
            server_version=connection.server_version(),
            round_trip_us=1e6 * median(trips),
            round_trip_p99_us=1e6 * float(np.percentile(trips, 99)),
            set_megabytes_per_second=set_rate,
            get_megabytes_per_second=get_rate,
            published=published,
            batches=batches,
            codecs=codecs,
        )


def _delete(connection: Connection, keys: Keys) -> None:
    for found in connection.scan(keys.everything):
        connection.on_each("UNLINK", [name.decode() for name in found])


# The way to the server


def _round_trips(connection: Connection, seconds: float) -> list[float]:
    connection.execute("PING")
    return list(_timed(lambda: connection.execute("PING"), seconds / 4))


def _chunk_rates(connection: Connection, keys: Keys, seconds: float) -> tuple[float, float]:
    """Give MB/s to the server and from it, one value after the other."""
    chunk = secrets.token_bytes(CHUNK_BYTES)
    names = [keys.chunk("bench", number) for number in range(CHUNKS)]
    written = _megabytes_per_second(
        [partial(connection.execute, "SET", name, chunk, "EX", _EXPIRE_SECONDS) for name in names], seconds
    )
    # A slow link may not have come round to all of them.
    there = [name for name in names if connection.execute("EXISTS", name)]
    return written, _megabytes_per_second(
        [partial(connection.execute, "GET", name) for name in there], seconds
    )


def _megabytes_per_second(operations: list[Callable[[], Any]], seconds: float) -> float:
    turns = itertools.cycle(operations)
    next(turns)()  # warms up
    taken = list(_timed(lambda: next(turns)(), seconds))
    return len(taken) * CHUNK_BYTES / 1e6 / sum(taken)


def _timed(operation: Callable[[], Any], seconds: float) -> Iterator[float]:
    """Do something again and again, at least once, for so long; give how long each time took."""
    end = time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        operation()
        ended = time.perf_counter()
        yield ended - began
        if ended >= end:
            return


# A run of one worker


def _published(
    learner: WorkerCommunicator, worker: Pipe, megabytes: float, seconds: float
) -> list[PublishTimings]:
    count = max(1, round(megabytes * (1 << 18)))
    random = np.random.default_rng(1)
    weights = {"w": random.standard_normal(count, np.float32)}
    found: dict[bool, list[float]] = {False: [], True: []}

    def once(compressed: bool) -> float:
        worker.send(("apply",))
        _answer(worker, "ready")
        weights["w"] += np.float32(1e-3) * random.standard_normal(count, np.float32)
        began = time.perf_counter()
        learner.send_model_weights(weights, compressed)
        return float(_answer(worker, "applied")) - began

    once(True)
    end = time.perf_counter() + 2 * seconds
    while not found[True] or time.perf_counter() < end:
        for compressed in (False, True):
            found[compressed].append(once(compressed))
    size = weights["w"].nbytes
    return [
        PublishTimings(compressed, size / (1 << 20), 1e3 * median(taken), size / 1e6 / median(taken))
        for compressed, taken in found.items()
    ]


def _batches(learner: WorkerCommunicator, worker: Pipe, size_bytes: int, seconds: float) -> Batches:
    worker.send(("send", size_bytes, seconds))
    _answer(worker, "sending")
    count, ended = 0, None
    began = last = time.perf_counter()
    while ended is None or count < ended:
        found = len(learner.collect_experiences(timeout=0.1))
        count, last = count + found, time.perf_counter() if found else last
        if ended is None and worker.poll():
            ended = int(_answer(worker, "sent"))
        if time.perf_counter() - began > seconds + TIMEOUT_SECONDS:
            raise DeadlineExceeded(f"batches of {size_bytes:,} bytes did not arrive in time")
    taken = last - began
    return Batches(size_bytes, count / taken, count * size_bytes / 1e6 / taken)


@contextmanager
def _worker_process(url: str | None, run: str) -> Iterator[Pipe]:
    """Start a worker in a process of its own, which ends with the block."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_work, args=(theirs, url, run), daemon=True)
    process.start()
    theirs.close()
    try:
        _answer(ours, "open")
        yield ours
    finally:
        with suppress(OSError):
            ours.send(("end",))
        ours.close()
        process.join(5.0)
        if process.is_alive():
            process.kill()
            process.join()


def _answer(pipe: Pipe, expected: str) -> Any:
    if not pipe.poll(TIMEOUT_SECONDS):
        raise DeadlineExceeded(f"the worker's process did not say {expected!r} within {TIMEOUT_SECONDS:g} s")
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise ConnectionFailed("the worker's process ended by itself") from None
    if kind != expected:
        raise ConnectionFailed(f"the worker's process failed: {value}")
    return value


def _work(pipe: Pipe, url: str | None, run: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the parent says when to end
    orders: dict[str, Callable[..., None]] = {"apply": _apply, "send": _send}
    try:
        with WorkerClient(url, run, 0, timeout=TIMEOUT_SECONDS, host_cache=False) as client:
            pipe.send(("open", None))
            while (order := pipe.recv())[0] in orders:
                orders[order[0]](pipe, client, *order[1:])
    except (EOFError, BrokenPipeError):  # the parent is gone
        return
    except RlbrokerError as error:
        with suppress(OSError):
            pipe.send(("failed", str(error)))


def _apply(pipe: Pipe, client: WorkerClient) -> None:
    model: dict[str, Any] = {}
    pipe.send(("ready", None))
    end = time.monotonic() + TIMEOUT_SECONDS
    while not client.poll(model) and time.monotonic() < end:
        time.sleep(0.0002)
    pipe.send(("applied", time.perf_counter()))  # one clock for all processes of the machine


def _send(pipe: Pipe, client: WorkerClient, size_bytes: int, seconds: float) -> None:
    batch = {"data": np.frombuffer(secrets.token_bytes(size_bytes), np.uint8)}
    pipe.send(("sending", None))
    count = sum(1 for _ in _timed(lambda: client.send_experiences(batch), seconds))
    pipe.send(("sent", count))


# The codec


def _samples() -> Iterator[tuple[str, NDArray[Any]]]:
    """Give weights as a network has them after some training: normal, in both kinds that are common."""
    float32 = np.random.default_rng(1).standard_normal(SAMPLE_BYTES // 4, np.float32) * np.float32(0.05)
    yield "float32", float32
    yield "bfloat16", (float32.view(np.uint32) >> 16).astype(np.uint16)  # as bfloat16's bits


def _codec(kind: str, sample: NDArray[Any], seconds: float) -> Codec:
    parts = MessagePlan({"w": sample})
    numbers = range(parts.segment_count)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        encoded = list(pool.map(parts.encode_segment, numbers))
        header = parts.header([fact for fact, _ in encoded])
        stored = [memoryview(data) for _, data in encoded]

        def encode() -> None:
            list(pool.map(parts.encode_segment, numbers))

        def decode() -> None:
            list(pool.map(MessageAssembly(header, Limits()).decode_segment, numbers, stored))

        decode()  # warms up, as encoding did
        megabytes = sample.nbytes / 1e6
        encoding, decoding = (megabytes / median(_timed(turn, seconds / 4)) for turn in (encode, decode))
    part = sum(map(len, stored)) / sample.nbytes
    return Codec(kind, 1 / part, encoding, decoding)
