"""Every metric of a run for Prometheus: its name, its description, and how it is read from a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Final, Generic, Literal, TypeVar, get_args

from rlbroker.experience.counts import LOST
from rlbroker.metrics.history import Sample
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

Source = TypeVar("Source")


@dataclass(frozen=True)
class RunMetric(Generic[Source]):
    """One metric, read from a snapshot, a worker, or the learner's newest sample.

    Attributes:
        name: ends in the unit, or in `_total` for a counter.
        description: one sentence for people.
        read: returns the value, or values by reason; None for no value.
        by_reason: whether `read` returns values by reason.
    """

    name: str
    description: str
    read: Callable[[Source], float | Mapping[str, float] | None]
    by_reason: bool = False

    @property
    def kind(self) -> Literal["counter", "gauge"]:
        """The type of the metric in Prometheus."""
        return "counter" if self.name.endswith("_total") else "gauge"


@dataclass(frozen=True)
class MemberSource:
    """A member of a run in a snapshot."""

    snapshot: Snapshot
    info: WorkerInfo
    status: WorkerStatus

    @property
    def queue_ratio(self) -> float:
        """The batches in its queue as a share of the most that may wait."""
        waiting = self.status.counts.waiting if self.status.counts else 0
        return waiting / self.snapshot.settings.max_queue_size


@dataclass(frozen=True)
class LearnerSource:
    """A snapshot of a run, and the newest sample that its learner wrote."""

    snapshot: Snapshot
    sample: Sample


_Workers = Sequence[WorkerStatus]


def _sum_of(path: str) -> Callable[[_Workers], float]:
    read = attrgetter(path)
    return lambda workers: sum(read(worker) for worker in workers)


def _sum_counts(name: str) -> Callable[[_Workers], float]:
    return lambda workers: sum(getattr(worker.counts, name) for worker in workers if worker.counts)


def _sum_lost(reasons: Sequence[str]) -> Callable[[_Workers], Mapping[str, float]]:
    return lambda workers: {
        reason: sum(worker.counts.lost.get(reason, 0) for worker in workers if worker.counts)
        for reason in reasons
    }


def _sum_missed(workers: _Workers) -> Mapping[str, float]:
    return {why: sum(worker.missed.by_reason.get(why, 0) for worker in workers) for why in _MISSED_REASONS}


#: Metrics of each worker, and of all workers that ever took part: totals must not fall when a worker leaves.
_TOTALS: Final[tuple[RunMetric[_Workers], ...]] = (
    RunMetric("batches_waiting", "Batches in queues that no learner has read.", _sum_counts("waiting")),
    RunMetric(
        "batches_in_hand", "Batches that a learner has read and not acknowledged.", _sum_counts("in_hand")
    ),
    RunMetric("batches_produced_total", "Batches that workers sent.", _sum_counts("produced")),
    RunMetric("batches_delivered_total", "Batches that learners acknowledged.", _sum_counts("delivered")),
    RunMetric(
        "batches_lost_total",
        "Batches that were not delivered and never will be.",
        _sum_lost(LOST_FOR_GOOD),
        by_reason=True,
    ),
    RunMetric(
        "batches_missing",
        "Batches that are lost unless they are retried or resent.",
        _sum_lost(MISSING),
        by_reason=True,
    ),
    RunMetric(
        "batches_duplicate_total",
        "Copies of batches that were discarded because the batch had been read before.",
        _sum_counts("duplicates"),
    ),
    RunMetric("versions_missed_total", "Versions that workers missed.", _sum_missed, by_reason=True),
    RunMetric("commands_missed_total", "Commands that workers did not apply.", _sum_of("missed.commands")),
    RunMetric(
        "commands_waiting",
        "Commands without an answer, counted once for each worker that has not answered.",
        _sum_of("commands_waiting"),
    ),
    RunMetric(
        "commands_oldest_seconds",
        "Age of the oldest command without an answer; 0 without one.",
        lambda workers: max((worker.command_seconds for worker in workers), default=0),
    ),
    RunMetric(
        "dead_letters",
        "Batches that are kept because no learner could use them.",
        _sum_of("dead_letters"),
    ),
)


def _add_totals(
    prefix: str, metrics: Sequence[RunMetric[Source]], workers_of: Callable[[Source], _Workers]
) -> tuple[RunMetric[Source], ...]:
    """Return the metrics with their prefix, and those of `_TOTALS` for the workers of their source."""

    def of_workers(total: RunMetric[_Workers]) -> RunMetric[Source]:
        return RunMetric(
            total.name, total.description, lambda source: total.read(workers_of(source)), total.by_reason
        )

    both = [*metrics, *map(of_workers, _TOTALS)]
    return tuple(replace(metric, name=f"{prefix}_{metric.name}") for metric in both)


def _of_manifest(name: str) -> Callable[[Snapshot], float | None]:
    return lambda snapshot: getattr(snapshot.manifest, name, None)


#: Metrics of a run, read from its snapshot.
RUN_METRICS: Final[tuple[RunMetric[Snapshot], ...]] = _add_totals(
    "rlbroker",
    (
        RunMetric(
            "weights_version",
            "Number of the latest version; 0 before the first.",
            lambda snapshot: snapshot.manifest.version if snapshot.manifest else 0,
        ),
        RunMetric("weights_raw_bytes", "Bytes of the latest version's tensors.", _of_manifest("raw_bytes")),
        RunMetric(
            "weights_stored_bytes",
            "Bytes that a worker downloads for the latest version if it has the one before.",
            _of_manifest("stored_bytes"),
        ),
        RunMetric(
            "weights_published_timestamp_seconds",
            "When the latest version was published, by the learner's clock.",
            _of_manifest("published"),
        ),
        RunMetric(
            "learner_up",
            "Whether the learner sent a heartbeat within its lease.",
            lambda snapshot: snapshot.learner is not None and snapshot.learner.state == "alive",
        ),
        RunMetric(
            "learner_ended",
            "Whether the run has ended: its workers are told to stop.",
            lambda snapshot: snapshot.learner is not None and snapshot.learner.state == "ended",
        ),
        RunMetric(
            "learner_silent_seconds",
            "Time since the learner's last heartbeat, by the server's clock.",
            lambda snapshot: snapshot.learner.last_seen_seconds if snapshot.learner else None,
        ),
        RunMetric(
            "learner_start_timestamp_seconds",
            "When this learner began; its own totals started at 0 then.",
            lambda snapshot: snapshot.learner.epoch / 1000 or None if snapshot.learner else None,
        ),
        RunMetric("workers_alive", "Workers with a heartbeat within their lease.", attrgetter("alive")),
        RunMetric(
            "workers_away",
            "Workers that belong to the run, without a heartbeat within their lease.",
            lambda snapshot: len(snapshot.members) - snapshot.alive,
        ),
        RunMetric("workers_expected", "Workers that the learner expects.", attrgetter("expected_workers")),
        RunMetric(
            "workers_unlisted",
            "Workers that belong to the run and have no metrics of their own, because there are too many.",
            lambda snapshot: max(0, len(snapshot.members) - WORKERS_LISTED),
        ),
        RunMetric(
            "queue_max_batches",
            "Batches that may wait in one worker's queue.",
            attrgetter("settings.max_queue_size"),
        ),
        RunMetric(
            "queue_max_bytes",
            "Bytes that one worker's queue may hold.",
            attrgetter("settings.max_queue_bytes"),
        ),
    ),
    lambda snapshot: list(snapshot.workers.values()),
)

#: Metrics of each worker that belongs to a run.
WORKER_METRICS: Final[tuple[RunMetric[MemberSource], ...]] = _add_totals(
    "rlbroker_worker",
    (
        RunMetric(
            "up",
            "Whether the worker sent a heartbeat within its lease.",
            lambda member: member.info.state == "alive",
        ),
        RunMetric("version", "The version that it runs; 0 for none.", attrgetter("info.version")),
        RunMetric(
            "staleness_versions",
            "Versions published since the one that it runs.",
            attrgetter("info.staleness"),
        ),
        RunMetric(
            "silent_seconds",
            "Time since the worker's last heartbeat, by the server's clock.",
            attrgetter("info.last_seen_seconds"),
        ),
        RunMetric(
            "unpolled_seconds",
            "Time since the worker last called poll or load_weights, at its last heartbeat.",
            attrgetter("info.unpolled_seconds"),
        ),
        RunMetric(
            "problem",
            "Whether the worker cannot load the latest version.",
            lambda member: bool(member.info.problem),
        ),
        RunMetric(
            "fenced_seconds",
            "Time since another process with this worker's id was fenced; absent without one.",
            attrgetter("info.fenced_seconds"),
        ),
        RunMetric(
            "skips_in_a_row",
            "Its latest updates in a row that each skipped a version; 0 if the last one did not.",
            attrgetter("status.missed.skips_in_a_row"),
        ),
        RunMetric(
            "queue_ratio",
            "Batches in its queue as a share of the most that may wait.",
            attrgetter("queue_ratio"),
        ),
        RunMetric(
            "room_seconds_total",
            "Time in which send_experiences waited for room in its queue, of this incarnation.",
            attrgetter("info.room_seconds"),
        ),
    ),
    lambda member: [member.status],
)

#: Metrics of the learner, read from its newest sample: totals since this learner began.
LEARNER_METRICS: Final[tuple[RunMetric[LearnerSource], ...]] = (
    RunMetric(
        "rlbroker_history_age_seconds",
        "Age of the sample from which the learner's totals are read.",
        lambda source: max(0.0, source.snapshot.at - source.sample.at),
    ),
    *(
        RunMetric(f"rlbroker_{name}_total", description, attrgetter(f"sample.{field}"))
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
