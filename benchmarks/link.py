"""Weights to eight workers of one host behind a 1 Gbit/s link: the bytes on the link, and the time."""

from __future__ import annotations

import contextlib
import functools
import itertools

from benchmarks.measure import Row, interleaved, progress
from benchmarks.models import State, training_steps
from benchmarks.network import RATE_BITS, Link, two_hosts, unavailable
from benchmarks.peers.naive import NaiveReceiver, NaiveSender
from benchmarks.receiving_workers import MakeReceiver, ReceivingWorkers, Sender, start_receiving_workers
from benchmarks.rlbroker_transport import RlbrokerReceiver, RlbrokerSender, open_learner, temporary_host_cache
from rlbroker.local import RedisServer

WORKERS = 8
RLBROKER, NAIVE = "ours", "naive Redis (pickle, one key)"


def run(url: str, *, quick: bool, repetitions: int) -> list[Row]:
    """Return the rows of the link. `url` is not used: the server must listen on the link's address."""
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
    rlbroker_steps, naive_steps = itertools.cycle(steps), itertools.cycle(steps)
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(two_hosts())
        server = stack.enter_context(RedisServer(bind=link.address))
        server_url = server.network_url
        assert server_url is not None
        sender = RlbrokerSender(
            stack.enter_context(open_learner(server_url, "link", workers=WORKERS, host_cache=False))
        )
        transports: dict[str, MakeReceiver] = {
            RLBROKER: functools.partial(
                RlbrokerReceiver, server_url, "link", stack.enter_context(temporary_host_cache())
            ),
            NAIVE: functools.partial(NaiveReceiver, server_url, "link-naive"),
        }
        workers = stack.enter_context(
            start_receiving_workers(WORKERS, megabytes << 20, transports, link.namespace)
        )
        meter = _LinkMeter(link, workers)
        naive = NaiveSender(server_url, "link-naive")
        seconds = interleaved(
            {
                RLBROKER: lambda: meter.deliver(RLBROKER, sender, next(rlbroker_steps)),
                NAIVE: lambda: meter.deliver(NAIVE, naive, next(naive_steps)),
            },
            repetitions,
        )
    return _rows(work, seconds, meter, repetitions)


class _LinkMeter:
    """Delivers weights, and counts the bytes that cross the link."""

    def __init__(self, link: Link, workers: ReceivingWorkers) -> None:
        self._link, self._workers = link, workers
        self.megabytes: dict[str, list[float]] = {RLBROKER: [], NAIVE: []}
        self.stored_megabytes: list[float] = []

    def deliver(self, transport: str, sender: Sender, weights: State) -> float:
        before = self._link.sent_bytes()
        seconds = self._workers.deliver(transport, sender, weights)
        self.megabytes[transport].append((self._link.sent_bytes() - before) / 1e6)
        if isinstance(sender, RlbrokerSender) and sender.receipt:
            self.stored_megabytes.append(sender.receipt.stored_bytes / 1e6)
        return seconds


def _rows(work: str, seconds: dict[str, list[float]], meter: _LinkMeter, repetitions: int) -> list[Row]:
    crossed = {transport: found[-repetitions:] for transport, found in meter.megabytes.items()}  # no warm-up
    stored = meter.stored_megabytes[-repetitions:]
    link_seconds = [megabytes * 8e6 / RATE_BITS for megabytes in stored]
    return [
        Row(
            f"{work}: bytes",
            "1 × stored size",
            "1×, not 8× (≤ 1.1×)",
            crossed[RLBROKER],
            stored,
            "MB",
            False,
            1.1,
        ),
        Row(f"{work}: bytes", NAIVE, "", crossed[RLBROKER], crossed[NAIVE], "MB", False, None),
        Row(f"{work}: time", NAIVE, "", seconds[RLBROKER], seconds[NAIVE], "s", False, None),
        Row(
            f"{work}: time",
            "stored size at the link's rate",
            "",
            seconds[RLBROKER],
            link_seconds,
            "s",
            False,
            None,
        ),
    ]
