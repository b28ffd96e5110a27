"""A small network: from publishing it to having it applied."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from statistics import median

from benchmarks.crew import MakeReceiver, Sender, crew
from benchmarks.measure import Row, interleaved, progress
from benchmarks.models import training_steps
from benchmarks.ours import OurReceiver, OurSender, learner
from benchmarks.peers.naive import NaiveReceiver, NaiveSender
from benchmarks.servers import scratch

OURS, RAW, NAIVE = "ours", "ours, uncompressed", "naive SET + PUBLISH + GET"

#: Deliveries whose median is one sample.
DELIVERIES = 30


def run(url: str, *, quick: bool, repetitions: int) -> list[Row]:
    """Give the rows of a 1 MB network and one worker."""
    size_bytes, deliveries = 1 << 20, 5 if quick else DELIVERIES
    progress("latency: 1 MB float32, publish to applied, one worker")
    steps = training_steps(size_bytes)
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(scratch(url))
        keys = {OURS: f"{name}-default", RAW: f"{name}-raw", NAIVE: f"{name}-naive"}
        senders: dict[str, Sender] = {
            OURS: OurSender(stack.enter_context(learner(url, keys[OURS], workers=1))),
            RAW: OurSender(
                stack.enter_context(learner(url, keys[RAW], workers=1)), compression_enabled=False
            ),
            NAIVE: NaiveSender(url, keys[NAIVE]),
        }
        ways: dict[str, MakeReceiver] = {
            OURS: functools.partial(OurReceiver, url, keys[OURS], True),
            RAW: functools.partial(OurReceiver, url, keys[RAW], True),
            NAIVE: functools.partial(NaiveReceiver, url, keys[NAIVE]),
        }
        workers = stack.enter_context(crew(1, size_bytes, ways))

        def contender(way: str) -> Callable[[], float]:
            versions = itertools.cycle(steps)
            return lambda: (
                1e3 * median(workers.deliver(way, senders[way], next(versions)) for _ in range(deliveries))
            )

        found = interleaved({way: contender(way) for way in ways}, repetitions)
    work = "1 MB float32, publish to applied, median"
    return [
        Row(work, NAIVE, "≤ 1.2×", found[OURS], found[NAIVE], "ms", False, 1.2),
        Row(f"{work}, uncompressed", NAIVE, "≤ 1.2×", found[RAW], found[NAIVE], "ms", False, 1.2),
    ]
