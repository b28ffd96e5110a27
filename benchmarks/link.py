"""Eight workers of one host behind a 1 Gbit/s link: what crosses it, and how long that takes."""

from __future__ import annotations

import contextlib
import functools
import itertools

from benchmarks.crew import Crew, MakeReceiver, Sender, crew
from benchmarks.measure import Row, interleaved, progress
from benchmarks.models import State, training_steps
from benchmarks.network import RATE_BITS, Link, two_hosts, unavailable
from benchmarks.ours import OurReceiver, OurSender, learner, memory_of_host
from benchmarks.peers.naive import NaiveReceiver, NaiveSender
from rlbroker.local import RedisServer

WORKERS = 8
OURS, NAIVE = "ours", "naive Redis (pickle, one key)"


def run(url: str, *, quick: bool, repetitions: int) -> list[Row]:
    """Give the rows of the link; its server is one of its own, on the link's address."""
    megabytes = 2 if quick else 32
    work = f"{megabytes} MB float32 to {WORKERS} workers of one host behind a 1 Gbit/s link"
    reason = unavailable()
    if reason:
        progress(f"link: left out, {reason}")
        return [
            Row(f"{work}: bytes", "1 × stored size", "1×", [], [], "MB", False, None, f"left out: {reason}")
        ]
    progress(f"link: {work}")
    steps = training_steps(megabytes << 20)
    ours, theirs = itertools.cycle(steps), itertools.cycle(steps)
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(two_hosts())
        server = stack.enter_context(RedisServer(bind=link.address))
        place = server.network_url
        assert place is not None
        sender = OurSender(stack.enter_context(learner(place, "link", workers=WORKERS, host_cache=False)))
        ways: dict[str, MakeReceiver] = {
            OURS: functools.partial(OurReceiver, place, "link", stack.enter_context(memory_of_host())),
            NAIVE: functools.partial(NaiveReceiver, place, "link-naive"),
        }
        workers = stack.enter_context(crew(WORKERS, megabytes << 20, ways, link.namespace))
        meter = _Meter(link, workers)
        naive = NaiveSender(place, "link-naive")
        seconds = interleaved(
            {
                OURS: lambda: meter.deliver(OURS, sender, next(ours)),
                NAIVE: lambda: meter.deliver(NAIVE, naive, next(theirs)),
            },
            repetitions,
        )
    return _rows(work, seconds, meter, repetitions)


class _Meter:
    """Delivers, and reads the link's counters before and after."""

    def __init__(self, link: Link, workers: Crew) -> None:
        self._link, self._workers = link, workers
        self.crossed: dict[str, list[float]] = {OURS: [], NAIVE: []}
        self.stored: list[float] = []

    def deliver(self, way: str, sender: Sender, weights: State) -> float:
        before = self._link.sent_bytes()
        seconds = self._workers.deliver(way, sender, weights)
        self.crossed[way].append((self._link.sent_bytes() - before) / 1e6)
        if isinstance(sender, OurSender) and sender.receipt:
            self.stored.append(sender.receipt.stored_bytes / 1e6)
        return seconds


def _rows(work: str, seconds: dict[str, list[float]], meter: _Meter, repetitions: int) -> list[Row]:
    crossed = {way: found[-repetitions:] for way, found in meter.crossed.items()}  # without the warm-up
    stored = meter.stored[-repetitions:]
    link_seconds = [one * 8e6 / RATE_BITS for one in stored]
    return [
        Row(
            f"{work}: bytes",
            "1 × stored size",
            "1×, not 8× (≤ 1.1×)",
            crossed[OURS],
            stored,
            "MB",
            False,
            1.1,
        ),
        Row(f"{work}: bytes", NAIVE, "", crossed[OURS], crossed[NAIVE], "MB", False, None),
        Row(f"{work}: time", NAIVE, "", seconds[OURS], seconds[NAIVE], "s", False, None),
        Row(
            f"{work}: time",
            "stored size at the link's rate",
            "",
            seconds[OURS],
            link_seconds,
            "s",
            False,
            None,
        ),
    ]
