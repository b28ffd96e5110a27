"""The latency of a small network, from publishing to applied."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from statistics import median

from benchmarks.measure import Row, interleaved, progress
from benchmarks.models import training_steps
from benchmarks.peers.naive import NaiveReceiver, NaiveSender
from benchmarks.receiving_workers import MakeReceiver, Sender, start_receiving_workers
from benchmarks.rlbroker_transport import RlbrokerReceiver, RlbrokerSender, open_learner
from benchmarks.servers import scratch_name

DEFAULT, UNCOMPRESSED, NAIVE = "ours", "ours, uncompressed", "naive SET + PUBLISH + GET"

#: The number of deliveries whose median is one sample.
DELIVERIES = 30


def run(url: str, *, quick: bool, repetitions: int) -> list[Row]:
    """Return the rows of a 1 MB network and one worker."""
    size_bytes, deliveries = 1 << 20, 5 if quick else DELIVERIES
    progress("latency: 1 MB float32, publish to applied, one worker")
    steps = training_steps(size_bytes)
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(scratch_name(url))
        keys = {DEFAULT: f"{name}-default", UNCOMPRESSED: f"{name}-raw", NAIVE: f"{name}-naive"}
        senders: dict[str, Sender] = {
            DEFAULT: RlbrokerSender(stack.enter_context(open_learner(url, keys[DEFAULT], workers=1))),
            UNCOMPRESSED: RlbrokerSender(
                stack.enter_context(open_learner(url, keys[UNCOMPRESSED], workers=1)),
                compression_enabled=False,
            ),
            NAIVE: NaiveSender(url, keys[NAIVE]),
        }
        transports: dict[str, MakeReceiver] = {
            DEFAULT: functools.partial(RlbrokerReceiver, url, keys[DEFAULT], True),
            UNCOMPRESSED: functools.partial(RlbrokerReceiver, url, keys[UNCOMPRESSED], True),
            NAIVE: functools.partial(NaiveReceiver, url, keys[NAIVE]),
        }
        workers = stack.enter_context(start_receiving_workers(1, size_bytes, transports))

        def contender(transport: str) -> Callable[[], float]:
            versions = itertools.cycle(steps)
            return lambda: (
                1e3
                * median(
                    workers.deliver(transport, senders[transport], next(versions)) for _ in range(deliveries)
                )
            )

        samples = interleaved({transport: contender(transport) for transport in transports}, repetitions)
    work = "1 MB float32, publish to applied, median"
    return [
        Row(work, NAIVE, "≤ 1.2×", samples[DEFAULT], samples[NAIVE], "ms", False, 1.2),
        Row(
            f"{work}, uncompressed", NAIVE, "≤ 1.2×", samples[UNCOMPRESSED], samples[NAIVE], "ms", False, 1.2
        ),
    ]
