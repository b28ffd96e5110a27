"""Every metric of a run for Prometheus: its name, its description, and where its value is in a snapshot or sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, get_args

from rlbroker.experience.counts import LOST
from rlbroker.ops.inspect.snapshot import Snapshot, WorkerStatus
from rlbroker.types import Why, WorkerInfo

#: Reasons of losses that can be undone: dead letters can be retried, and workers resend what a server lost. They are
#: gauges, because the numbers can fall: to Prometheus a counter that falls has been reset.
MISSING: Final = ("corrupt", "poison", "vanished")

#: Reasons of losses that are final.
LOST_FOR_GOOD: Final = tuple(reason for reason in LOST if reason not in MISSING)

#: Reasons of missed versions. Others are omitted: a worker could add any number of labels with them.
_MISSED_REASONS: Final = get_args(Why)

#: Workers of one run with their own metrics: those with the lowest ids.
WORKERS_LISTED: Final = 1000


@dataclass(frozen=True)
class RunMetric:
    """One metric.

    Attributes:
        name: ends in the unit, or in `_total` for a counter.
        description: one sentence for people.
        source: the path of the value, such as `manifest.raw_bytes`, or a function that returns it; None for no value.
        reasons: the keys of the value if it is a mapping; empty for one number.
        combine: set if the metric combines the values of workers, each read from its `WorkerStatus`.
    """

    name: str
    description: str
    source: str | Callable[[Any], float | None]
    reasons: tuple[str, ...] = ()
    combine: Callable[[Iterable[float]], float] | None = None

    def read(self, source: Any, workers: Iterable[WorkerStatus]) -> Mapping[str, float]:
        """Return the value by reason, or as that of the reason `""`; nothing for no value.

        Args:
            source: what the metric is read from, unless it combines the values of workers.
            workers: the workers; one without a value counts as 0.
        """
        if self.combine:
            found = [self._find(worker) for worker in workers]
            if self.reasons:
                return {why: self.combine(one.get(why, 0) for one in found if one) for why in self.reasons}
            return {"": self.combine([0, *filter(None, found)])}
        value = self._find(source)
        return {} if value is None else {"": value}

    def _find(self, value: Any) -> Any:
        if not isinstance(self.source, str):
            return self.source(value)
        for name in self.source.split("."):
            value = getattr(value, name, None)
        return value


#: Metrics of each worker, and of all workers that ever took part: totals must not fall when a worker leaves.
_TOTALS: Final = (
    RunMetric("batches_waiting", "Batches in queues that no learner has read.", "counts.waiting"),
    RunMetric("batches_in_hand", "Batches that a learner has read and not acknowledged.", "counts.in_hand"),
    RunMetric("batches_produced_total", "Batches that workers sent.", "counts.produced"),
    RunMetric("batches_delivered_total", "Batches that learners acknowledged.", "counts.delivered"),
    RunMetric(
        "batches_lost_total",
        "Batches that were not delivered and never will be.",
        "counts.lost",
        LOST_FOR_GOOD,
    ),
    RunMetric(
        "batches_missing",
        "Batches that are lost unless they are retried or resent.",
        "counts.lost",
        MISSING,
    ),
    RunMetric(
        "batches_duplicate_total",
        "Copies of batches that were discarded because the batch had been read before.",
        "counts.duplicates",
    ),
    RunMetric("versions_missed_total", "Versions that workers missed.", "missed.by_reason", _MISSED_REASONS),
    RunMetric("commands_missed_total", "Commands that workers did not apply.", "missed.commands"),
    RunMetric(
        "commands_waiting",
        "Commands without an answer, counted once for each worker that has not answered.",
        "commands_waiting",
    ),
    RunMetric(
        "commands_oldest_seconds",
        "Age of the oldest command without an answer; 0 without one.",
        "command_seconds",
        combine=max,
    ),
    RunMetric("dead_letters", "Batches that are kept because no learner could use them.", "dead_letters"),
)


def _with_totals(prefix: str, *metrics: RunMetric) -> tuple[RunMetric, ...]:
    """Return the metrics and `_TOTALS`, with a prefix before their names."""
    totals = [replace(total, combine=total.combine or sum) for total in _TOTALS]
    return tuple(replace(metric, name=f"{prefix}_{metric.name}") for metric in (*metrics, *totals))


#: Metrics of a run, read from its snapshot.
RUN_METRICS: Final = _with_totals(
    "rlbroker",
    RunMetric("weights_version", "Number of the latest version; 0 before the first.", "version"),
    RunMetric("weights_raw_bytes", "Bytes of the latest version's tensors.", "manifest.raw_bytes"),
    RunMetric(
        "weights_stored_bytes",
        "Bytes that a worker downloads for the latest version if it has the one before.",
        "manifest.stored_bytes",
    ),
    RunMetric(
        "weights_published_timestamp_seconds",
        "When the latest version was published, by the learner's clock.",
        "manifest.published",
    ),
    RunMetric(
        "learner_up",
        "Whether the learner sent a heartbeat within its lease.",
        lambda snapshot: snapshot.learner_state == "alive",
    ),
    RunMetric(
        "learner_ended",
        "Whether the run has ended: its workers are told to stop.",
        lambda snapshot: snapshot.learner is not None and snapshot.learner.run_ended,
    ),
    RunMetric(
        "learner_silent_seconds",
        "Time since the learner's last heartbeat, by the server's clock.",
        "learner.last_seen_seconds",
    ),
    RunMetric(
        "learner_start_timestamp_seconds",
        "When this learner began; its own totals started at 0 then.",
        lambda snapshot: snapshot.learner.epoch / 1000 or None if snapshot.learner else None,
    ),
    RunMetric("workers_alive", "Workers with a heartbeat within their lease.", "alive"),
    RunMetric(
        "workers_away",
        "Workers that belong to the run, without a heartbeat within their lease.",
        lambda snapshot: len(snapshot.members) - snapshot.alive,
    ),
    RunMetric("workers_expected", "Workers that the learner expects.", "expected_workers"),
    RunMetric(
        "workers_unlisted",
        "Workers that belong to the run and have no metrics of their own, because there are too many.",
        lambda snapshot: max(0, len(snapshot.members) - WORKERS_LISTED),
    ),
    RunMetric("queue_max_batches", "Batches that may wait in one worker's queue.", "settings.max_queue_size"),
    RunMetric("queue_max_bytes", "Bytes that one worker's queue may hold.", "settings.max_queue_bytes"),
)


@dataclass(frozen=True)
class Member:
    """A member of a run in a snapshot."""

    snapshot: Snapshot
    info: WorkerInfo
    status: WorkerStatus


#: Metrics of each worker that belongs to a run, read from a `Member`.
WORKER_METRICS: Final = _with_totals(
    "rlbroker_worker",
    RunMetric(
        "up",
        "Whether the worker sent a heartbeat within its lease.",
        lambda member: member.info.state == "alive",
    ),
    RunMetric("version", "The version that it runs; 0 for none.", "info.version"),
    RunMetric("staleness_versions", "Versions published since the one that it runs.", "info.staleness"),
    RunMetric(
        "silent_seconds",
        "Time since the worker's last heartbeat, by the server's clock.",
        "info.last_seen_seconds",
    ),
    RunMetric(
        "unpolled_seconds",
        "Time since the worker last called poll or load_weights, at its last heartbeat.",
        "info.unpolled_seconds",
    ),
    RunMetric(
        "problem",
        "Whether the worker cannot load the latest version.",
        lambda member: bool(member.info.problem),
    ),
    RunMetric(
        "fenced_seconds",
        "Time since another process with this worker's id was fenced; absent without one.",
        "info.fenced_seconds",
    ),
    RunMetric(
        "skips_in_a_row",
        "Its latest updates in a row that each skipped a version; 0 if the last one did not.",
        "status.missed.skips_in_a_row",
    ),
    RunMetric(
        "queue_ratio",
        "Batches in its queue as a share of the most that may wait.",
        lambda member: member.status.waiting / member.snapshot.settings.max_queue_size,
    ),
    RunMetric(
        "room_seconds_total",
        "Time in which send_experiences waited for room in its queue, of this incarnation.",
        "info.room_seconds",
    ),
)

#: Metrics of the learner, read from a snapshot's time and its newest sample: totals since this learner began.
LEARNER_METRICS: Final = (
    RunMetric(
        "rlbroker_history_age_seconds",
        "Age of the sample from which the learner's totals are read.",
        lambda reading: max(0.0, reading.snapshot.at - reading.sample.at),
    ),
    *(
        RunMetric(f"rlbroker_{name}_total", description, f"sample.{field}")
        for name, field, description in (
            ("versions_published", "published", "Versions published."),
            ("published_raw_bytes", "published_raw_bytes", "Bytes of the tensors of published versions."),
            (
                "published_stored_bytes",
                "published_stored_bytes",
                "Bytes that were sent to the server for them.",
            ),
            ("publish_encode_seconds", "encode_seconds", "Time spent encoding weights, summed over threads."),
            ("publish_send_seconds", "send_seconds", "Time spent sending encoded weights to the server."),
            (
                "publish_seconds",
                "publish_seconds",
                "Time from calls of send_model_weights until the version was published.",
            ),
            ("batches_collected", "collected", "Batches that collect_experiences returned."),
            ("rows_collected", "rows", "Rows of these batches."),
            ("collected_raw_bytes", "collected_raw_bytes", "Bytes of the tensors of these batches."),
            (
                "collected_stored_bytes",
                "collected_stored_bytes",
                "Bytes that were received from the server for them.",
            ),
            ("collect_decode_seconds", "decode_seconds", "Time spent decoding batches."),
            (
                "collect_wait_seconds",
                "wait_seconds",
                "Time in which collect_experiences waited for batches: the learner waits for its workers.",
            ),
            (
                "room_seconds",
                "room_seconds",
                "Time in which workers waited for room in their queues, summed over workers: they wait for the "
                "learner.",
            ),
        )
    ),
)
