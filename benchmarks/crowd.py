"""Crowds of simulated workers, many real clients in each process, and what they cost everybody."""

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

from benchmarks.children import answer, child
from benchmarks.ours import learner, memory_of_host, worker
from benchmarks.servers import Meter, ServerFigures, scratch
from rlbroker import WorkerClient, WorkerCommunicator

#: Processes that hold the workers; each stands for a host, whose workers share what it downloads.
HOSTS = 4

#: What each worker sends.
BATCH_BYTES = 4096
BATCH = {"obs": np.random.default_rng(1).random(BATCH_BYTES // 4, np.float32)}

#: As docs/scale.md advises where there are many workers: each gives five signs of life in it.
LEASE_SECONDS = 30.0

#: A simulated worker polls about this often, and a process full of them less often.
POLL_SECONDS, POLL_SECONDS_PER_WORKER = 0.001, 0.0002

#: Hundreds of threads that wait for Python's lock would wake up each 5 ms to ask for it; a real worker has a few.
SWITCH_SECONDS = 0.02

#: So many of them leave at the same time.
CLOSED_AT_ONCE = 32

#: So long late versions are waited for.
LATE_SECONDS = 20.0

#: The learner goes on collecting for so long after the last batch was sent.
GRACE_SECONDS = 0.3


@dataclass(frozen=True)
class Work:
    """What a crowd does for some seconds."""

    seconds: float
    batches_per_second: float = 0.0  #: of all workers together
    version_seconds: float = 0.0  #: between two versions; 0 for none
    version_bytes: int = 0
    read_seconds: float = (
        0.0  #: between two reads of the learner, which otherwise takes each batch as it comes
    )


@dataclass(frozen=True)
class Effort:
    """What one process did and needed."""

    cpu_seconds: float
    memory_bytes: int
    batches: int = 0  #: collected by the learner, sent by a worker
    reads: int = 0  #: of the learner that gave something
    published: dict[int, float] = field(default_factory=dict)  #: by version: when that began
    publish_seconds: list[float] = field(default_factory=list)  #: how long each took
    applied: list[tuple[int, float]] = field(default_factory=list)  #: version, and when a worker had it
    warnings: int = 0  #: that rlbroker logged: a crowd that is too large for its machine loses connections


@dataclass(frozen=True)
class Point:
    """What a crowd did in some seconds, and what that took."""

    workers: int
    hosts: int  #: that share downloads; 0 where each worker downloads for itself
    work: Work
    seconds: float
    learner: Effort
    crowd: Sequence[Effort]
    nodes: Sequence[ServerFigures]  #: of each server

    @property
    def server(self) -> ServerFigures:
        """All servers together."""
        return functools.reduce(operator.add, self.nodes)

    @property
    def batches(self) -> int:
        return self.learner.batches

    @property
    def versions(self) -> int:
        return len(self.learner.published)

    @functools.cached_property
    def milliseconds(self) -> list[float]:
        """Give how long each version took to each worker, from publishing to applied."""
        began = self.learner.published
        return [
            1e3 * (at - began[version])
            for one in self.crowd
            for version, at in one.applied
            if version in began
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
        """How many times a worker applied a version."""
        return sum(len(one.applied) for one in self.crowd) / self.seconds

    @property
    def published_per_second(self) -> float:
        """Bytes of weights that went to the server."""
        return self.versions_per_second * self.work.version_bytes

    @property
    def downloaded_per_second(self) -> float:
        """Bytes of weights that came from it, if hosts and workers took each version."""
        if not self.hosts:
            return self.deliveries_per_second * self.work.version_bytes
        return self.published_per_second * self.hosts

    @property
    def warnings(self) -> int:
        return sum(one.warnings for one in (self.learner, *self.crowd))

    @property
    def kept_up(self) -> bool:
        """Whether all had the time to do what they should: the figures of the others are those of too few cores."""
        return not self.warnings and self.batches >= 0.9 * self.work.batches_per_second * self.work.seconds

    @property
    def crowd_cpu_seconds(self) -> float:
        return sum(one.cpu_seconds for one in self.crowd)

    @property
    def crowd_memory_bytes(self) -> int:
        return sum(one.memory_bytes for one in self.crowd)


class Crowd:
    """A learner in a process of its own, and workers in a few."""

    def __init__(
        self,
        meters: Sequence[Meter],
        learning: Connection,
        working: Sequence[Connection],
        workers: int,
        hosts: int,
    ) -> None:
        self._learning, self._working = learning, working
        self._meters = meters
        self.workers, self.hosts = workers, hosts

    def do(self, work: Work) -> Point:
        """Have all of them work, and measure it; versions that are late are waited for when that is done."""
        before, began = [meter.read() for meter in self._meters], time.perf_counter()
        self._learning.send(work)
        share = replace(work, batches_per_second=work.batches_per_second / len(self._working))
        for pipe in self._working:
            pipe.send(share)
        learning = answer(self._learning, "done")
        seconds = time.perf_counter() - began
        nodes = [meter.read().since(then) for meter, then in zip(self._meters, before, strict=True)]
        for pipe in self._working:
            pipe.send(max(learning.published, default=0))
        crowd = [answer(pipe, "done") for pipe in self._working]
        return Point(self.workers, self.hosts, work, seconds, learning, crowd, nodes)


@contextlib.contextmanager
def crowd(
    url: str, workers: int, *, host_cache: bool, nodes: Sequence[str] = (), **settings: Any
) -> Iterator[Crowd]:
    """Give a crowd of so many workers, each of them a member of one run.

    Args:
        url: of the server, or of a Cluster.
        workers: how many.
        host_cache: whether the workers of a process download each version once.
        nodes: URLs of a Cluster's servers.
        settings: further ones of each worker.
    """
    with contextlib.ExitStack() as stack:
        meters = [stack.enter_context(contextlib.closing(Meter(one))) for one in nodes or [url]]
        run = stack.enter_context(scratch(url))
        learning = stack.enter_context(child(_learn, url, run, workers))
        answer(learning, "open")
        hosts = min(workers, HOSTS)
        working = []
        for host in range(hosts):
            cache = stack.enter_context(memory_of_host()) if host_cache else False
            numbers = range(host, workers, hosts)
            working.append(
                stack.enter_context(child(_simulate, url, run, numbers, {**settings, "host_cache": cache}))
            )
        for pipe in working:
            answer(pipe, "open")
        try:
            yield Crowd(meters, learning, working, workers, hosts if host_cache else 0)
        finally:
            for pipe in working:  # all at once, as each has many to close
                with contextlib.suppress(OSError):
                    pipe.send(None)


def memory_bytes() -> int:
    """Give what this process holds in memory now."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Warnings(logging.Handler):
    """Counts what rlbroker warns of, instead of a thousand lines on the terminal."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self._count += 1

    def since_last(self) -> int:
        """Give how many came since this was asked last."""
        count, self._count = self._count, 0
        return count


def _counted() -> _Warnings:
    warnings, logger = _Warnings(), logging.getLogger("rlbroker")
    logger.addHandler(warnings)
    return warnings


# The learner


def _learn(pipe: Connection, url: str, run: str, workers: int) -> None:
    warnings = _counted()
    with learner(url, run, workers=workers, host_cache=False, lease_seconds=LEASE_SECONDS) as communicator:
        pipe.send(("open", None))
        versions: dict[int, list[dict[str, NDArray[np.float32]]]] = {}
        while (work := pipe.recv()) is not None:
            if work.version_bytes not in versions:
                random = np.random.default_rng(1)
                size = work.version_bytes // 4
                versions[work.version_bytes] = [
                    {"w": random.standard_normal(size, np.float32)} for _ in range(2)
                ]
            effort = _lead(communicator, work, versions[work.version_bytes])
            pipe.send(("done", replace(effort, warnings=warnings.since_last())))


def _lead(communicator: WorkerCommunicator, work: Work, weights: Sequence[Any]) -> Effort:
    published: dict[int, float] = {}
    seconds: list[float] = []
    batches, reads, cpu, began = 0, 0, time.process_time(), time.perf_counter()
    end = began + work.seconds
    while (now := time.perf_counter()) < end + GRACE_SECONDS:
        due = began + len(published) * work.version_seconds if work.version_seconds else end
        if now >= due and due < end:
            receipt = communicator.send_model_weights(weights[len(published) % 2], compression_enabled=False)
            published[receipt.version] = now
            seconds.append(time.perf_counter() - now)
        else:
            until = due if now < due < end else end + GRACE_SECONDS
            collected = len(communicator.collect_experiences(timeout=until - now))
            batches, reads = batches + collected, reads + bool(collected)
            time.sleep(work.read_seconds)
    return Effort(time.process_time() - cpu, memory_bytes(), batches, reads, published, seconds)


# The workers


def _simulate(pipe: Connection, url: str, run: str, numbers: range, settings: dict[str, Any]) -> None:
    warnings = _counted()
    sys.setswitchinterval(SWITCH_SECONDS)
    with contextlib.ExitStack() as stack:
        clients = [worker(url, run, number, **settings) for number in numbers]
        stack.callback(_close, clients)
        pipe.send(("open", None))
        while (work := pipe.recv()) is not None:
            crowd = _Clients(clients)
            effort = crowd.act(work)
            crowd.catch_up(pipe.recv())
            pipe.send(("done", replace(effort, applied=crowd.applied, warnings=warnings.since_last())))


def _close(clients: Sequence[WorkerClient]) -> None:
    with ThreadPoolExecutor(CLOSED_AT_ONCE) as pool:
        list(pool.map(WorkerClient.close, clients))


class _Clients:
    """The workers of one process."""

    def __init__(self, clients: Sequence[WorkerClient]) -> None:
        self._clients = clients
        self._models: list[dict[str, Any]] = [{} for _ in clients]
        self._pause_seconds = max(POLL_SECONDS, POLL_SECONDS_PER_WORKER * len(clients))
        self.applied: list[tuple[int, float]] = []

    def act(self, work: Work) -> Effort:
        """Send and poll for as long as it says."""
        sent, cpu, began = 0, time.process_time(), time.perf_counter()
        while (now := time.perf_counter() - began) < work.seconds:
            self._poll()
            while sent < now * work.batches_per_second and time.perf_counter() - began < work.seconds:
                self._clients[sent % len(self._clients)].send_experiences(BATCH)
                sent += 1
            time.sleep(self._pause_seconds)
        return Effort(time.process_time() - cpu, memory_bytes(), sent)

    def catch_up(self, version: int) -> None:
        """Poll until all have a version, or it takes too long."""
        end = time.perf_counter() + LATE_SECONDS
        while min(one.version for one in self._clients) < version and time.perf_counter() < end:
            self._poll()
            time.sleep(self._pause_seconds)

    def _poll(self) -> None:
        for client, model in zip(self._clients, self._models, strict=True):
            if client.poll(model):
                self.applied.append((client.version, time.perf_counter()))
