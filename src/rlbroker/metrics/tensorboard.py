"""Figures of a run for TensorBoard, made of the samples of its history."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol

from rlbroker.metrics.history import Interval, Sample

logger = logging.getLogger("rlbroker")

#: What each tag says, of what happened since the last time. Those that have nothing to say then are left out.
TAGS: Final = {
    "rlbroker/version": "the latest version",
    "rlbroker/workers_alive": "workers heard of within their lease",
    "rlbroker/workers_away": "members that were not",
    "rlbroker/batches_waiting": "batches in the queues",
    "rlbroker/batches_in_hand": "batches collected and not acknowledged",
    "rlbroker/batches_lost": "batches that were not delivered, in the whole run",
    "rlbroker/versions_missed": "versions missed, summed over workers, in the whole run",
    "rlbroker/steps_per_second": "rows collected each second",
    "rlbroker/batches_per_second": "batches collected each second",
    "rlbroker/collected_bytes_per_second": "bytes of tensors collected each second",
    "rlbroker/published_bytes_per_second": "bytes of weights stored each second",
    "rlbroker/versions_per_second": "versions published each second",
    "rlbroker/wait_share": "part of the time in which the learner waited for batches",
    "rlbroker/room_share": "part of the time in which a worker waited for room in its queue, mean over workers",
    "rlbroker/publish_seconds": "from the call until a version was out, mean over versions",
    "rlbroker/staleness_mean": "mean staleness of the batches collected",
    "rlbroker/staleness_p50": "median staleness",
    "rlbroker/staleness_p95": "staleness that 95 % of the batches did not exceed",
}


class SummaryWriter(Protocol):
    """What TensorBoard's `SummaryWriter` has, and others of its kind."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> Any:
        """Note one figure."""


class ScalarLog:
    """Writes figures with a writer of the user's, in a thread of its own: a slow disk must not hold up the run."""

    def __init__(
        self, writer: SummaryWriter, *, step: Callable[[], int] | None, every_seconds: float
    ) -> None:
        """Begin to wait for samples.

        Args:
            writer: has `add_scalar(tag, value, step)`.
            step: gives the training step; rows collected so far by default.
            every_seconds: how often to write; not more often than samples come.
        """
        self._writer, self._step, self._every_seconds = writer, step, every_seconds
        self._before: Sample | None = None
        self._offered: queue.Queue[Interval | None] = queue.Queue(1)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="rlbroker-scalars", daemon=True)
        self._thread.start()

    def offer(self, sample: Sample) -> None:
        """Write what happened since the last time, if it is time again; never waits."""
        if self._before is None:
            self._before = sample
        # Samples come nearly on the second: one that is a little early is meant.
        elif sample.at - self._before.at > self._every_seconds - 0.5 and not self._ended.is_set():
            try:
                self._offered.put_nowait(Interval(self._before, sample))
            except queue.Full:  # the writer is slow: the next interval is longer
                return
            self._before = sample

    def end(self, timeout_seconds: float) -> None:
        """Write nothing any more; wait for a call that is under way."""
        self._ended.set()
        with suppress(queue.Full):  # then the thread looks at the flag when it takes what is there
            self._offered.put_nowait(None)
        self._thread.join(timeout_seconds)

    def _work(self) -> None:
        while (interval := self._offered.get()) is not None and not self._ended.is_set():
            try:
                step = interval.after.rows if self._step is None else int(self._step())
                for name, value in scalars(interval).items():
                    if self._ended.is_set():
                        return
                    self._writer.add_scalar(name, value, step)
            except Exception:  # the run is worth more than its figures
                logger.exception("figures are not written to %s any more", type(self._writer).__name__)
                self._ended.set()
                return


def scalars(interval: Interval) -> dict[str, float]:
    """Give the figures of an interval by tag, each of `TAGS` that has something to say."""
    after, mean_staleness = interval.after, interval.mean_staleness
    found: dict[str, float] = {
        "version": after.version,
        "workers_alive": after.alive,
        "workers_away": after.away,
        "batches_waiting": after.waiting,
        "batches_in_hand": after.in_hand,
        "batches_lost": after.lost,
        "versions_missed": after.missed,
        "steps_per_second": interval.rate("rows"),
        "batches_per_second": interval.rate("collected"),
        "collected_bytes_per_second": interval.rate("collected_raw_bytes"),
        "published_bytes_per_second": interval.rate("published_stored_bytes"),
        "versions_per_second": interval.rate("published"),
        "wait_share": interval.share("wait_seconds"),
    }
    if after.alive + after.away:
        found["room_share"] = interval.share("room_seconds") / (after.alive + after.away)
    if published := interval.growth("published"):
        found["publish_seconds"] = interval.growth("publish_seconds") / published
    if mean_staleness is not None:
        found["staleness_mean"] = mean_staleness
        found["staleness_p50"] = interval.staleness_quantile(0.5) or 0.0
        found["staleness_p95"] = interval.staleness_quantile(0.95) or 0.0
    return {f"rlbroker/{name}": value for name, value in found.items()}
