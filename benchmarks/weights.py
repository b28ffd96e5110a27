"""Weights to four workers of one host: ours, and what one would use otherwise."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable

from benchmarks.crew import MakeReceiver, Sender, crew
from benchmarks.measure import Row, interleaved, progress
from benchmarks.models import training_steps
from benchmarks.ours import OurReceiver, OurSender, learner
from benchmarks.peers.ancestor import AncestorSender
from benchmarks.peers.naive import NaiveReceiver, NaiveSender
from benchmarks.peers.ray_peer import MISSING, ray_crew
from benchmarks.peers.sockets import SocketReceiver, SocketSender
from benchmarks.servers import scratch

WORKERS = 4

#: Against whom, what is wanted in words, and the ratio of times at most.
TARGETS = (
    ("ancestor (mp.Queue, gzip 6)", "≥ 25× faster", 1 / 25),
    ("naive Redis (pickle, one key)", "≥ 3× faster", 1 / 3),
    ("Ray put/get", "≥ 1.5× faster", 1 / 1.5),
)
FLOOR = "raw sockets, same server"
DEFAULT, RAW = "ours", "ours, uncompressed"

#: Their first deliveries touch new memory, here and at the server; the ancestor has none that it uses again.
WARMED_UP = (DEFAULT, RAW, TARGETS[1][0], FLOOR)


def run(url: str, *, quick: bool, repetitions: int) -> list[Row]:
    """Give a row for each peer, with compression and without."""
    megabytes = 2 if quick else 128
    size_bytes = megabytes << 20
    progress(f"weights: {megabytes} MB float32 to {WORKERS} workers of one host")
    steps = training_steps(size_bytes)
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(scratch(url))
        keys = {way: f"{name}-{number}" for number, way in enumerate((DEFAULT, RAW, "naive", FLOOR))}
        ancestor = AncestorSender(WORKERS)
        stack.callback(ancestor.close)
        open_learner = functools.partial(learner, url, workers=WORKERS)
        senders: dict[str, Sender] = {
            DEFAULT: OurSender(stack.enter_context(open_learner(run=keys[DEFAULT]))),
            RAW: OurSender(stack.enter_context(open_learner(run=keys[RAW])), compression_enabled=False),
            TARGETS[0][0]: ancestor,
            TARGETS[1][0]: NaiveSender(url, keys["naive"]),
            FLOOR: SocketSender(url, keys[FLOOR], WORKERS),
        }
        ways: dict[str, MakeReceiver] = {
            DEFAULT: functools.partial(OurReceiver, url, keys[DEFAULT], True),
            RAW: functools.partial(OurReceiver, url, keys[RAW], True),
            TARGETS[0][0]: ancestor.receivers,
            TARGETS[1][0]: functools.partial(NaiveReceiver, url, keys["naive"]),
            FLOOR: functools.partial(SocketReceiver, url, keys[FLOOR]),
        }
        workers = stack.enter_context(crew(WORKERS, size_bytes, ways))
        actors = stack.enter_context(ray_crew(WORKERS, size_bytes))

        def contender(way: str) -> Callable[[], float]:
            versions = itertools.cycle(steps)  # of its own: each delivers every version in turn
            return lambda: workers.deliver(way, senders[way], next(versions))

        contenders = {way: contender(way) for way in ways}
        if actors is not None:
            versions = itertools.cycle(steps)
            contenders[TARGETS[2][0]] = lambda: actors.deliver(next(versions))
        for way in WARMED_UP * 6:
            contenders[way]()
        return _rows(interleaved(contenders, repetitions), megabytes)


def _rows(samples: dict[str, list[float]], megabytes: int) -> list[Row]:
    work = f"weights, {megabytes} MB float32 to {WORKERS} workers of one host"
    rows = []
    for way, suffix in ((DEFAULT, ""), (RAW, ", uncompressed")):
        for against, wanted, target in TARGETS:
            theirs = samples.get(against, [])
            note = "" if theirs else MISSING
            rows.append(Row(work + suffix, against, wanted, samples[way], theirs, "s", False, target, note))
    rows.append(
        Row(f"{work}, uncompressed", FLOOR, "≤ 1.3× its time", samples[RAW], samples[FLOOR], "s", False, 1.3)
    )
    return rows
