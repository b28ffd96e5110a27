"""The benchmark of `rlbroker bench`: round trip, transfer rates, publishing, batches, and whether compression pays.

A learner in this process and a worker in another use a run of their own, which is deleted afterwards.
"""

from __future__ import annotations

import itertools
import multiprocessing
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection as Pipe
from statistics import median
from typing import Any, Final

import numpy as np

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import ONE_TRY
from rlbroker.backend.keys import Keys
from rlbroker.backend.suitability import name_and_version
from rlbroker.errors import ConnectionFailed, DeadlineExceeded, RlbrokerError
from rlbroker.learner.communicator import WorkerCommunicator
from rlbroker.worker.client import WorkerClient

#: Size of the values that measure transfer rates: values of 1 to 4 MB move fastest.
CHUNK_BYTES: Final = 1 << 20

#: How many such values are stored; they are written and read in turn.
CHUNKS: Final = 32

#: Sizes of the batches.
BATCH_BYTES: Final = (1 << 10, 64 << 10, 1 << 20)

#: Timeout of one operation.
TIMEOUT_SECONDS: Final = 30.0

#: The least speed-up from which compression pays.
WORTHWHILE: Final = 1.1

#: Expiry of the values, in case the benchmark is killed.
_EXPIRE_SECONDS: Final = 60


@dataclass(frozen=True)
class PublishTimings:
    """The time from publishing weights until the worker has applied them."""

    compressed: bool
    megabytes: float
    applied_ms: float  #: median
    megabytes_per_second: float


@dataclass(frozen=True)
class BatchRates:
    """The rate at which the learner collects batches of one size from one worker."""

    size_bytes: int
    batches_per_second: float
    megabytes_per_second: float


@dataclass(frozen=True)
class BenchReport:
    """The measurements of one server."""

    server: str
    server_version: str
    round_trip_us: float  #: median
    round_trip_p99_us: float
    set_megabytes_per_second: float
    get_megabytes_per_second: float
    published: list[PublishTimings]
    batches: list[BatchRates]

    @property
    def verdict(self) -> str:
        """One line on whether compression pays on this link: whether weights are applied sooner."""
        raw, compressed = (
            next(timings.applied_ms for timings in self.published if timings.compressed is compression)
            for compression in (False, True)
        )
        pays = raw / compressed > WORTHWHILE
        which = "pays" if pays else "does not pay: compression_enabled=False is as fast, or faster"
        return (
            f"on this link compressing float32 weights {which} (compressed deltas are applied at "
            f"{raw / compressed:.2f}× the speed of raw weights)"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as values for JSON."""
        return asdict(self) | {"verdict": self.verdict}


def measure(
    url: str | None, *, megabytes: float, seconds: float, progress: Callable[[str], None]
) -> BenchReport:
    """Measure a server with a learner and a worker on this machine.

    Args:
        url: None for the URL in the environment, or the default.
        megabytes: size of the published weights, in 2^20 bytes.
        seconds: the approximate duration of each measurement.
        progress: called with the name of each measurement before it begins.
    """
    run = f"bench-{secrets.token_hex(4)}"
    keys = Keys(run)
    connection = Connection(url, timeout_seconds=TIMEOUT_SECONDS)
    with ExitStack() as stack:
        stack.callback(connection.close)
        connection.execute("PING", deadline=ONE_TRY)  # to fail at once if the server does not answer
        connection.check_server()
        stack.callback(_delete, connection, keys)
        progress("round trip")
        round_trips = _measure_round_trips(connection, seconds)
        progress("chunks to the server and back")
        set_rate, get_rate = _measure_transfer(connection, keys, seconds)
        learner = stack.enter_context(
            WorkerCommunicator(1, redis_url=url, run=run, timeout=TIMEOUT_SECONDS, host_cache=False)
        )
        worker = stack.enter_context(_worker_process(url, run))
        progress(f"weights of {megabytes:g} MB to a worker")
        published = _measure_publishing(learner, worker, megabytes, seconds)
        batches = []
        for size in BATCH_BYTES:
            progress(f"batches of {size:,} bytes")
            batches.append(_measure_batches(learner, worker, size, seconds))
        return BenchReport(
            server=connection.address,
            server_version=name_and_version(connection.server_info()),
            round_trip_us=1e6 * median(round_trips),
            round_trip_p99_us=1e6 * float(np.percentile(round_trips, 99)),
            set_megabytes_per_second=set_rate,
            get_megabytes_per_second=get_rate,
            published=published,
            batches=batches,
        )


def _delete(connection: Connection, keys: Keys) -> None:
    for names in connection.scan(keys.everything):
        connection.execute_on_keys("UNLINK", [name.decode() for name in names])


# Round trips and transfer rates


def _measure_round_trips(connection: Connection, seconds: float) -> list[float]:
    connection.execute("PING")
    return list(_time_repeatedly(lambda: connection.execute("PING"), seconds / 4))


def _measure_transfer(connection: Connection, keys: Keys, seconds: float) -> tuple[float, float]:
    """Return the rates to and from the server in MB/s, for one value at a time."""
    chunk = secrets.token_bytes(CHUNK_BYTES)
    names = [keys.chunk("bench", number) for number in range(CHUNKS)]
    set_rate = _megabytes_per_second(
        [partial(connection.execute, "SET", name, chunk, "EX", _EXPIRE_SECONDS) for name in names], seconds
    )
    # On a slow link the time may have ended before all values were written.
    stored = [name for name in names if connection.execute("EXISTS", name)]
    return set_rate, _megabytes_per_second(
        [partial(connection.execute, "GET", name) for name in stored], seconds
    )


def _megabytes_per_second(operations: list[Callable[[], Any]], seconds: float) -> float:
    in_turn = itertools.cycle(operations)
    next(in_turn)()  # warm-up
    durations = list(_time_repeatedly(lambda: next(in_turn)(), seconds))
    return len(durations) * CHUNK_BYTES / 1e6 / sum(durations)


def _time_repeatedly(operation: Callable[[], Any], seconds: float) -> Iterator[float]:
    """Repeat an operation for this time, at least once; yield the duration of each call."""
    end = time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        operation()
        ended = time.perf_counter()
        yield ended - began
        if ended >= end:
            return


# A run of one worker


def _measure_publishing(
    learner: WorkerCommunicator, worker: Pipe, megabytes: float, seconds: float
) -> list[PublishTimings]:
    count = max(1, round(megabytes * (1 << 18)))
    random = np.random.default_rng(1)
    weights = {"w": random.standard_normal(count, np.float32)}
    durations: dict[bool, list[float]] = {False: [], True: []}

    def publish_once(compressed: bool) -> float:
        worker.send(("apply",))
        _receive(worker, "ready")
        weights["w"] += np.float32(1e-3) * random.standard_normal(count, np.float32)
        began = time.perf_counter()
        learner.send_model_weights(weights, compressed)
        return float(_receive(worker, "applied")) - began

    publish_once(True)  # warm-up
    end = time.perf_counter() + 2 * seconds
    while not durations[True] or time.perf_counter() < end:
        for compressed in (False, True):
            durations[compressed].append(publish_once(compressed))
    size = weights["w"].nbytes
    return [
        PublishTimings(
            compressed, size / (1 << 20), 1e3 * median(seconds_taken), size / 1e6 / median(seconds_taken)
        )
        for compressed, seconds_taken in durations.items()
    ]


def _measure_batches(
    learner: WorkerCommunicator, worker: Pipe, size_bytes: int, seconds: float
) -> BatchRates:
    worker.send(("send", size_bytes, seconds))
    _receive(worker, "sending")
    count, expected = 0, None
    began = last = time.perf_counter()
    while expected is None or count < expected:
        collected = len(learner.collect_experiences(timeout=0.1))
        count, last = count + collected, time.perf_counter() if collected else last
        if expected is None and worker.poll():
            expected = int(_receive(worker, "sent"))
        if time.perf_counter() - began > seconds + TIMEOUT_SECONDS:
            raise DeadlineExceeded(f"batches of {size_bytes:,} bytes did not arrive in time")
    duration = last - began
    return BatchRates(size_bytes, count / duration, count * size_bytes / 1e6 / duration)


@contextmanager
def _worker_process(url: str | None, run: str) -> Iterator[Pipe]:
    """Run a worker in another process until the block ends; yield the pipe to it."""
    spawn = multiprocessing.get_context("spawn")
    pipe, worker_pipe = spawn.Pipe()
    process = spawn.Process(target=_run_worker, args=(worker_pipe, url, run), daemon=True)
    process.start()
    worker_pipe.close()
    try:
        _receive(pipe, "open")
        yield pipe
    finally:
        with suppress(OSError):
            pipe.send(("end",))
        pipe.close()
        process.join(5.0)
        if process.is_alive():
            process.kill()
            process.join()


def _receive(pipe: Pipe, expected: str) -> Any:
    if not pipe.poll(TIMEOUT_SECONDS):
        raise DeadlineExceeded(f"the worker process did not report {expected!r} within {TIMEOUT_SECONDS:g} s")
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise ConnectionFailed("the worker process ended unexpectedly") from None
    if kind != expected:
        raise ConnectionFailed(f"the worker process failed: {value}")
    return value


def _run_worker(pipe: Pipe, url: str | None, run: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C the parent ends this process
    tasks: dict[str, Callable[..., None]] = {"apply": _apply, "send": _send}
    try:
        with WorkerClient(url, run, 0, timeout=TIMEOUT_SECONDS, host_cache=False) as client:
            pipe.send(("open", None))
            while (request := pipe.recv())[0] in tasks:
                tasks[request[0]](pipe, client, *request[1:])
    except (EOFError, BrokenPipeError):  # the parent has ended
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
    pipe.send(("applied", time.perf_counter()))  # the same clock in all processes of a machine


def _send(pipe: Pipe, client: WorkerClient, size_bytes: int, seconds: float) -> None:
    batch = {"data": np.frombuffer(secrets.token_bytes(size_bytes), np.uint8)}
    pipe.send(("sending", None))
    count = sum(1 for _ in _time_repeatedly(lambda: client.send_experiences(batch), seconds))
    pipe.send(("sent", count))
