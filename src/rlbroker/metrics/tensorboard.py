"""The scalars of a run for TensorBoard, computed from the samples of its history."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final, Protocol

from rlbroker.config import check_positive_seconds
from rlbroker.errors import InvalidArgument
from rlbroker.metrics.history import Interval, Sample

logger = logging.getLogger("rlbroker")

#: The tags that are written, with their meaning. Rates, shares and means are those of the time since the last write;
#: a tag without a value for that time is left out.
TAGS: Final = {
    "rlbroker/version": "the latest version",
    "rlbroker/workers_alive": "members with a heartbeat within their lease",
    "rlbroker/workers_away": "the other members",
    "rlbroker/batches_waiting": "batches in the queues",
    "rlbroker/batches_in_hand": "batches collected and not acknowledged",
    "rlbroker/batches_lost": "batches that were not delivered, in the whole run",
    "rlbroker/versions_missed": "versions missed, summed over workers, in the whole run",
    "rlbroker/steps_per_second": "rows collected per second",
    "rlbroker/batches_per_second": "batches collected per second",
    "rlbroker/collected_bytes_per_second": "bytes of tensors collected per second",
    "rlbroker/published_bytes_per_second": "bytes of weights stored per second",
    "rlbroker/versions_per_second": "versions published per second",
    "rlbroker/wait_share": "fraction of the time that the learner waited for batches",
    "rlbroker/room_share": "fraction of the time that a worker waited for room in its queue, mean over workers",
    "rlbroker/publish_seconds": "time from the call until the version was published, mean over versions",
    "rlbroker/staleness_mean": "mean staleness of the batches collected",
    "rlbroker/staleness_p50": "median staleness",
    "rlbroker/staleness_p95": "95th percentile of the staleness",
}


class SummaryWriter(Protocol):
    """The interface of TensorBoard's `SummaryWriter` that is used."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> Any:
        """Write one value under a tag, at a training step."""


class ScalarTarget:
    """The user's writer and step. They may refer to the learner, so nothing but the learner refers to this."""

    def __init__(self, writer: SummaryWriter, step: Callable[[], int] | None) -> None:
        """Check what the user gave.

        Args:
            writer: has `add_scalar(tag, value, step)`.
            step: returns the training step; None for the rows collected so far.

        Raises:
            InvalidArgument: the writer has no `add_scalar`, or `step` is not callable.
        """
        if not callable(getattr(writer, "add_scalar", None)):
            raise InvalidArgument(
                f"log_to takes a writer with add_scalar, such as TensorBoard's SummaryWriter; got "
                f"{type(writer).__name__}"
            )
        if step is not None and not callable(step):
            raise InvalidArgument(
                f"step must be a function that returns the training step; got {type(step).__name__}"
            )
        self.writer, self.step = writer, step


class ScalarLog:
    """Writes scalars with the user's writer, in a thread of its own, so that a slow disk does not delay the run."""

    def __init__(self, target: ScalarTarget, *, every_seconds: float) -> None:
        """Start the thread, which waits for samples.

        Args:
            target: where to write to, for as long as something else refers to it.
            every_seconds: the time between two writes; at least the time between two samples.

        Raises:
            InvalidArgument: `every_seconds` is not a positive number.
        """
        check_positive_seconds("every_seconds", every_seconds)
        self._target, self._every_seconds = weakref.ref(target), every_seconds
        self._last_written: Sample | None = None
        #: Not a bounded queue: an interrupt of `end` would leave its lock, and the next `end` would hang.
        self._intervals: queue.SimpleQueue[Interval | None] = queue.SimpleQueue()
        self._ended = False
        self._thread = threading.Thread(target=self._write_all, name="rlbroker-scalars", daemon=True)
        self._thread.start()

    def offer(self, sample: Sample) -> None:
        """Write the scalars since the last write if that is due. Never wait."""
        if self._last_written is None:
            self._last_written = sample
        # Samples do not arrive exactly on the second: one that is a little early counts.
        elif sample.at - self._last_written.at > self._every_seconds - 0.5 and not self._ended:
            if not self._intervals.empty():  # the writer is slow: the next interval includes this one
                return
            self._intervals.put(Interval(self._last_written, sample))
            self._last_written = sample

    def end(self, timeout_seconds: float) -> None:
        """Stop writing, and wait for a call of the writer that has begun."""
        self._ended = True
        self._intervals.put(None)
        self._thread.join(timeout_seconds)

    def _write_all(self) -> None:
        while (interval := self._intervals.get()) is not None and self._write(interval):
            pass
        self._ended = True

    def _write(self, interval: Interval) -> bool:
        """Write the scalars of an interval; return whether to continue."""
        target = self._target()
        if target is None or self._ended:
            return False
        try:
            step = interval.after.rows if target.step is None else int(target.step())
            for name, value in compute_scalars(interval).items():
                if self._ended:
                    return False
                target.writer.add_scalar(name, value, step)
        except Exception:  # an error of the user's writer must not end the run
            logger.exception("stopped writing scalars to %s", type(target.writer).__name__)
            return False
        return True


def compute_scalars(interval: Interval) -> dict[str, float]:
    """Return the values of an interval by tag, for each of `TAGS` that has one."""
    after, mean_staleness = interval.after, interval.mean_staleness
    values: dict[str, float] = {
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
        values["room_share"] = interval.share("room_seconds") / (after.alive + after.away)
    if published := interval.growth("published"):
        values["publish_seconds"] = interval.growth("publish_seconds") / published
    if mean_staleness is not None:
        values["staleness_mean"] = mean_staleness
        values["staleness_p50"] = interval.staleness_quantile(0.5) or 0.0
        values["staleness_p95"] = interval.staleness_quantile(0.95) or 0.0
    return {f"rlbroker/{name}": value for name, value in values.items()}
