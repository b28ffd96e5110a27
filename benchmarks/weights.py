"""Weights to four workers of one host: rlbroker and its peers."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable

from benchmarks.measure import Row, interleaved, progress
from benchmarks.models import training_steps
from benchmarks.peers.ancestor import AncestorSender
from benchmarks.peers.naive import NaiveReceiver, NaiveSender
from benchmarks.peers.ray_peer import MISSING, start_ray_actors
from benchmarks.peers.sockets import SocketReceiver, SocketSender
from benchmarks.receiving_workers import MakeReceiver, Sender, start_receiving_workers
from benchmarks.rlbroker_transport import RlbrokerReceiver, RlbrokerSender, open_learner
from benchmarks.servers import scratch_name

WORKERS = 4

#: For each peer, the target as text, and the highest ratio of times.
TARGETS = (
    ("ancestor (mp.Queue, gzip 6)", "≥ 25× faster", 1 / 25),
    ("naive Redis (pickle, one key)", "≥ 3× faster", 1 / 3),
    ("Ray put/get", "≥ 1.5× faster", 1 / 1.5),
)
FLOOR = "raw sockets, same server"
DEFAULT, UNCOMPRESSED = "ours", "ours, uncompressed"

#: The first deliveries of these transports touch new memory, here and at the server. The ancestor reuses no memory.
WARMED_UP = (DEFAULT, UNCOMPRESSED, TARGETS[1][0], FLOOR)


def run(url: str, *, quick: bool, repetitions: int) -> list[Row]:
    """Return a row for each peer, with and without compression."""
    megabytes = 2 if quick else 128
    size_bytes = megabytes << 20
    progress(f"weights: {megabytes} MB float32 to {WORKERS} workers of one host")
    steps = training_steps(size_bytes)
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(scratch_name(url))
        keys = {
            transport: f"{name}-{number}"
            for number, transport in enumerate((DEFAULT, UNCOMPRESSED, "naive", FLOOR))
        }
        ancestor = AncestorSender(WORKERS)
        stack.callback(ancestor.close)
        learner = functools.partial(open_learner, url, workers=WORKERS)
        senders: dict[str, Sender] = {
            DEFAULT: RlbrokerSender(stack.enter_context(learner(run=keys[DEFAULT]))),
            UNCOMPRESSED: RlbrokerSender(
                stack.enter_context(learner(run=keys[UNCOMPRESSED])), compression_enabled=False
            ),
            TARGETS[0][0]: ancestor,
            TARGETS[1][0]: NaiveSender(url, keys["naive"]),
            FLOOR: SocketSender(url, keys[FLOOR], WORKERS),
        }
        transports: dict[str, MakeReceiver] = {
            DEFAULT: functools.partial(RlbrokerReceiver, url, keys[DEFAULT], True),
            UNCOMPRESSED: functools.partial(RlbrokerReceiver, url, keys[UNCOMPRESSED], True),
            TARGETS[0][0]: ancestor.receivers,
            TARGETS[1][0]: functools.partial(NaiveReceiver, url, keys["naive"]),
            FLOOR: functools.partial(SocketReceiver, url, keys[FLOOR]),
        }
        workers = stack.enter_context(start_receiving_workers(WORKERS, size_bytes, transports))
        actors = stack.enter_context(start_ray_actors(WORKERS, size_bytes))

        def contender(transport: str) -> Callable[[], float]:
            versions = itertools.cycle(steps)  # each contender delivers every version in turn
            return lambda: workers.deliver(transport, senders[transport], next(versions))

        contenders = {transport: contender(transport) for transport in transports}
        if actors is not None:
            versions = itertools.cycle(steps)
            contenders[TARGETS[2][0]] = lambda: actors.deliver(next(versions))
        for transport in WARMED_UP * 6:
            contenders[transport]()
        return _rows(interleaved(contenders, repetitions), megabytes)


def _rows(samples: dict[str, list[float]], megabytes: int) -> list[Row]:
    work = f"weights, {megabytes} MB float32 to {WORKERS} workers of one host"
    rows = []
    for transport, suffix in ((DEFAULT, ""), (UNCOMPRESSED, ", uncompressed")):
        for against, wanted, target in TARGETS:
            theirs = samples.get(against, [])
            note = "" if theirs else MISSING
            rows.append(
                Row(work + suffix, against, wanted, samples[transport], theirs, "s", False, target, note)
            )
    rows.append(
        Row(
            f"{work}, uncompressed",
            FLOOR,
            "≤ 1.3× its time",
            samples[UNCOMPRESSED],
            samples[FLOOR],
            "s",
            False,
            1.3,
        )
    )
    return rows
