"""A run with many simulated workers (several real clients in each process), and measurements of its costs."""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.child_processes import receive, start_child
from benchmarks.rlbroker_transport import open_learner, open_worker, temporary_host_cache
from benchmarks.servers import ServerMeter, ServerMetrics, scratch_name
from rlbroker import WorkerClient, WorkerCommunicator

#: The number of worker processes. Each stands for a host, whose workers share its downloads.
HOSTS = 4

#: The batch that each worker sends.
BATCH_BYTES = 4096
BATCH = {"obs": np.random.default_rng(1).random(BATCH_BYTES // 4, np.float32)}

#: As docs/scale.md recommends for many workers. Each worker sends five heartbeats per lease.
LEASE_SECONDS = 30.0

#: The pause between polls: at least the first, and the second for each worker in the process.
POLL_SECONDS, POLL_SECONDS_PER_WORKER = 0.001, 0.0002

#: The switch interval of a worker process. With the default of 5 ms, its hundreds of threads would mostly wake up to
#: request the GIL. A real worker has only a few threads.
SWITCH_SECONDS = 0.02

#: How many clients of a process are closed at the same time.
CLOSING_THREADS = 32

#: How long the workers wait for versions that arrive late.
LATE_SECONDS = 20.0

#: How long the learner continues to collect after the last batch was sent.
GRACE_SECONDS = 0.3


@dataclass(frozen=True)
class Workload:
    """What learner and workers do during one measurement."""

    seconds: float
    batches_per_second: float = 0.0  #: of all workers together
    version_seconds: float = 0.0  #: between two versions; 0 for none
    version_bytes: int = 0
    read_seconds: float = 0.0  #: pause between two reads of the learner; 0 to read each batch as it arrives


@dataclass(frozen=True)
class ProcessUsage:
    """What one process did, and the CPU time and memory that it used."""

    cpu_seconds: float
    memory_bytes: int
    batches: int = 0  #: collected by the learner, or sent by the workers
    reads: int = 0  #: of the learner that returned batches
    #: By version, the time at which publishing started.
    published: dict[int, float] = field(default_factory=dict)
    publish_seconds: list[float] = field(default_factory=list)  #: the duration of each publication
    #: Versions, with the time at which a worker had applied them.
    applied: list[tuple[int, float]] = field(default_factory=list)
    warnings: int = 0  #: logged by rlbroker; too many workers for the machine lose connections


@dataclass(frozen=True)
class Measurement:
    """The result of one workload."""

    workers: int
    hosts: int  #: whose workers share downloads; 0 if each worker downloads separately
    workload: Workload
    seconds: float
    learner: ProcessUsage
    worker_processes: Sequence[ProcessUsage]
    nodes: Sequence[ServerMetrics]  #: of each server

    @property
    def server(self) -> ServerMetrics:
        """The metrics of all servers together."""
        return functools.reduce(operator.add, self.nodes)

    @property
    def batches(self) -> int:
        return self.learner.batches

    @property
    def versions(self) -> int:
        return len(self.learner.published)

    @functools.cached_property
    def milliseconds(self) -> list[float]:
        """The time from publishing to applied, for each version and worker."""
        published = self.learner.published
        return [
            1e3 * (at - published[version])
            for process in self.worker_processes
            for version, at in process.applied
            if version in published
        ]

    @property
    def batches_per_second(self) -> float:
        return self.batches / self.seconds

    @property
    def reads_per_second(self) -> float:
        return self.learner.reads / self.seconds

    @property
    def versions_per_second(self) -> float:
        return self.versions / self.seconds

    @property
    def deliveries_per_second(self) -> float:
        """How often any worker applied a version."""
        return sum(len(process.applied) for process in self.worker_processes) / self.seconds

    @property
    def published_per_second(self) -> float:
        """Bytes of weights sent to the server."""
        return self.versions_per_second * self.workload.version_bytes

    @property
    def downloaded_per_second(self) -> float:
        """Bytes of weights sent by the server, if each host or worker downloads each version."""
        if not self.hosts:
            return self.deliveries_per_second * self.workload.version_bytes
        return self.published_per_second * self.hosts

    @property
    def warnings(self) -> int:
        return sum(process.warnings for process in (self.learner, *self.worker_processes))

    @property
    def kept_up(self) -> bool:
        """Whether the workload was completed in time. Otherwise the machine has too few cores to measure it."""
        return (
            not self.warnings
            and self.batches >= 0.9 * self.workload.batches_per_second * self.workload.seconds
        )

    @property
    def workers_cpu_seconds(self) -> float:
        return sum(process.cpu_seconds for process in self.worker_processes)

    @property
    def workers_memory_bytes(self) -> int:
        return sum(process.memory_bytes for process in self.worker_processes)


class SimulatedRun:
    """A learner in its own process, and many workers in a few processes."""

    def __init__(
        self,
        meters: Sequence[ServerMeter],
        learner_pipe: Connection,
        worker_pipes: Sequence[Connection],
        workers: int,
        hosts: int,
    ) -> None:
        self._learner_pipe, self._worker_pipes = learner_pipe, worker_pipes
        self._meters = meters
        self.workers, self.hosts = workers, hosts

    def measure(self, workload: Workload) -> Measurement:
        """Run a workload and measure it. Then wait until the workers have applied the last version."""
        before, started = [meter.read() for meter in self._meters], time.perf_counter()
        self._learner_pipe.send(workload)
        share = replace(workload, batches_per_second=workload.batches_per_second / len(self._worker_pipes))
        for pipe in self._worker_pipes:
            pipe.send(share)
        learner = receive(self._learner_pipe, "done")
        seconds = time.perf_counter() - started
        nodes = [meter.read().since(then) for meter, then in zip(self._meters, before, strict=True)]
        for pipe in self._worker_pipes:
            pipe.send(max(learner.published, default=0))
        processes = [receive(pipe, "done") for pipe in self._worker_pipes]
        return Measurement(self.workers, self.hosts, workload, seconds, learner, processes, nodes)


@contextlib.contextmanager
def start_simulated_run(
    url: str, workers: int, *, host_cache: bool, nodes: Sequence[str] = (), **settings: Any
) -> Iterator[SimulatedRun]:
    """Start a run with simulated workers, which ends with the block.

    Args:
        url: the URL of the server or Cluster.
        workers: the number of workers.
        host_cache: whether the workers of a process share each download.
        nodes: the URLs of the Cluster's servers.
        settings: further settings of each worker.
    """
    with contextlib.ExitStack() as stack:
        meters = [stack.enter_context(contextlib.closing(ServerMeter(node))) for node in nodes or [url]]
        run = stack.enter_context(scratch_name(url))
        learner_pipe = stack.enter_context(start_child(_learn, url, run, workers))
        receive(learner_pipe, "open")
        hosts = min(workers, HOSTS)
        worker_pipes = []
        for host in range(hosts):
            cache = stack.enter_context(temporary_host_cache()) if host_cache else False
            numbers = range(host, workers, hosts)
            worker_pipes.append(
                stack.enter_context(
                    start_child(_simulate, url, run, numbers, {**settings, "host_cache": cache})
                )
            )
        for pipe in worker_pipes:
            receive(pipe, "open")
        try:
            yield SimulatedRun(meters, learner_pipe, worker_pipes, workers, hosts if host_cache else 0)
        finally:
            # End all processes at the same time, because each has many clients to close.
            for pipe in worker_pipes:
                with contextlib.suppress(OSError):
                    pipe.send(None)


def memory_bytes() -> int:
    """Return the memory that this process uses now."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _WarningCounter(logging.Handler):
    """Counts the warnings of rlbroker, instead of a thousand lines on the terminal."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self._count += 1

    def take_count(self) -> int:
        """Return the number of warnings since the previous call."""
        count, self._count = self._count, 0
        return count


def _count_warnings() -> _WarningCounter:
    warnings, logger = _WarningCounter(), logging.getLogger("rlbroker")
    logger.addHandler(warnings)
    return warnings


# The learner


def _learn(pipe: Connection, url: str, run: str, workers: int) -> None:
    warnings = _count_warnings()
    with open_learner(
        url, run, workers=workers, host_cache=False, lease_seconds=LEASE_SECONDS
    ) as communicator:
        pipe.send(("open", None))
        versions: dict[int, list[dict[str, NDArray[np.float32]]]] = {}
        while (workload := pipe.recv()) is not None:
            if workload.version_bytes not in versions:
                random = np.random.default_rng(1)
                size = workload.version_bytes // 4
                versions[workload.version_bytes] = [
                    {"w": random.standard_normal(size, np.float32)} for _ in range(2)
                ]
            usage = _collect_and_publish(communicator, workload, versions[workload.version_bytes])
            pipe.send(("done", replace(usage, warnings=warnings.take_count())))


def _collect_and_publish(
    communicator: WorkerCommunicator, workload: Workload, weights: Sequence[Any]
) -> ProcessUsage:
    published: dict[int, float] = {}
    seconds: list[float] = []
    batches, reads, cpu, started = 0, 0, time.process_time(), time.perf_counter()
    end = started + workload.seconds
    while (now := time.perf_counter()) < end + GRACE_SECONDS:
        due = started + len(published) * workload.version_seconds if workload.version_seconds else end
        if now >= due and due < end:
            receipt = communicator.send_model_weights(weights[len(published) % 2], compression_enabled=False)
            published[receipt.version] = now
            seconds.append(time.perf_counter() - now)
        else:
            until = due if now < due < end else end + GRACE_SECONDS
            collected = len(communicator.collect_experiences(timeout=until - now))
            batches, reads = batches + collected, reads + bool(collected)
            time.sleep(workload.read_seconds)
    return ProcessUsage(time.process_time() - cpu, memory_bytes(), batches, reads, published, seconds)


# The workers


def _simulate(pipe: Connection, url: str, run: str, numbers: range, settings: dict[str, Any]) -> None:
    warnings = _count_warnings()
    sys.setswitchinterval(SWITCH_SECONDS)
    with contextlib.ExitStack() as stack:
        clients = [open_worker(url, run, number, **settings) for number in numbers]
        stack.callback(_close, clients)
        pipe.send(("open", None))
        while (workload := pipe.recv()) is not None:
            workers = _WorkerClients(clients)
            usage = workers.run(workload)
            workers.catch_up(pipe.recv())
            pipe.send(("done", replace(usage, applied=workers.applied, warnings=warnings.take_count())))


def _close(clients: Sequence[WorkerClient]) -> None:
    with ThreadPoolExecutor(CLOSING_THREADS) as pool:
        list(pool.map(WorkerClient.close, clients))


class _WorkerClients:
    """The workers of one process."""

    def __init__(self, clients: Sequence[WorkerClient]) -> None:
        self._clients = clients
        self._models: list[dict[str, Any]] = [{} for _ in clients]
        self._pause_seconds = max(POLL_SECONDS, POLL_SECONDS_PER_WORKER * len(clients))
        self.applied: list[tuple[int, float]] = []

    def run(self, workload: Workload) -> ProcessUsage:
        """Send and poll for the time of the workload."""
        sent, cpu, started = 0, time.process_time(), time.perf_counter()
        while (now := time.perf_counter() - started) < workload.seconds:
            self._poll()
            while (
                sent < now * workload.batches_per_second and time.perf_counter() - started < workload.seconds
            ):
                self._clients[sent % len(self._clients)].send_experiences(BATCH)
                sent += 1
            time.sleep(self._pause_seconds)
        return ProcessUsage(time.process_time() - cpu, memory_bytes(), sent)

    def catch_up(self, version: int) -> None:
        """Poll until all workers have a version, for at most `LATE_SECONDS`."""
        end = time.perf_counter() + LATE_SECONDS
        while min(client.version for client in self._clients) < version and time.perf_counter() < end:
            self._poll()
            time.sleep(self._pause_seconds)

    def _poll(self) -> None:
        for client, model in zip(self._clients, self._models, strict=True):
            if client.poll(model):
                self.applied.append((client.version, time.perf_counter()))
