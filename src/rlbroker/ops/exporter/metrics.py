"""Every metric of a run for Prometheus: its name, its description, and how it is read from a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar, get_args

from rlbroker.experience.counts import LOST
from rlbroker.metrics.history import Sample
from rlbroker.ops.inspect.snapshot import Snapshot, WorkerStatus
from rlbroker.types import QueueCounts, Why, WorkerInfo

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
    def counts(self) -> QueueCounts:
        """The counts of its batches."""
        return self.status.counts or _NO_BATCHES


@dataclass(frozen=True)
class LearnerSource:
    """A snapshot of a run, and the newest sample that its learner wrote."""

    snapshot: Snapshot
    sample: Sample


_NO_BATCHES: Final = QueueCounts(0, 0, 0, {}, 0)


def _all_counts(snapshot: Snapshot) -> list[QueueCounts]:
    """Return the counts of all workers that ever took part: totals must not fall when a worker leaves."""
    return [status.counts for status in snapshot.workers.values() if status.counts]


def _sum_lost(counts: Iterable[QueueCounts], reasons: Iterable[str]) -> dict[str, float]:
    counts = list(counts)
    return {reason: sum(one.lost.get(reason, 0) for one in counts) for reason in reasons}


def _sum_missed(statuses: Iterable[WorkerStatus]) -> dict[str, float]:
    statuses = list(statuses)
    return {why: sum(status.missed.by_reason.get(why, 0) for status in statuses) for why in _MISSED_REASONS}


#: Metrics of a run, read from its snapshot.
RUN_METRICS: Final[tuple[RunMetric[Snapshot], ...]] = (
    RunMetric(
        "rlbroker_weights_version",
        "Number of the latest version; 0 before the first.",
        lambda snapshot: snapshot.manifest.version if snapshot.manifest else 0,
    ),
    RunMetric(
        "rlbroker_weights_raw_bytes",
        "Bytes of the latest version's tensors.",
        lambda snapshot: snapshot.manifest.raw_bytes if snapshot.manifest else None,
    ),
    RunMetric(
        "rlbroker_weights_stored_bytes",
        "Bytes that a worker downloads for the latest version if it has the one before.",
        lambda snapshot: snapshot.manifest.stored_bytes if snapshot.manifest else None,
    ),
    RunMetric(
        "rlbroker_weights_published_timestamp_seconds",
        "When the latest version was published, by the learner's clock.",
        lambda snapshot: snapshot.manifest.published if snapshot.manifest else None,
    ),
    RunMetric(
        "rlbroker_learner_up",
        "Whether the learner sent a heartbeat within its lease.",
        lambda snapshot: snapshot.learner is not None and snapshot.learner.state == "alive",
    ),
    RunMetric(
        "rlbroker_learner_ended",
        "Whether the learner ended normally: the run is over.",
        lambda snapshot: snapshot.learner is not None and snapshot.learner.state == "ended",
    ),
    RunMetric(
        "rlbroker_learner_silent_seconds",
        "Time since the learner's last heartbeat, by the server's clock.",
        lambda snapshot: snapshot.learner.last_seen_seconds if snapshot.learner else None,
    ),
    RunMetric(
        "rlbroker_learner_start_timestamp_seconds",
        "When this learner began; its own totals started at 0 then.",
        lambda snapshot: (
            snapshot.learner.epoch / 1000 if snapshot.learner and snapshot.learner.epoch else None
        ),
    ),
    RunMetric(
        "rlbroker_workers_alive",
        "Workers with a heartbeat within their lease.",
        lambda snapshot: snapshot.alive,
    ),
    RunMetric(
        "rlbroker_workers_away",
        "Workers that belong to the run, without a heartbeat within their lease.",
        lambda snapshot: len(snapshot.members) - snapshot.alive,
    ),
    RunMetric(
        "rlbroker_workers_expected",
        "Workers that the learner expects.",
        lambda snapshot: snapshot.expected_workers,
    ),
    RunMetric(
        "rlbroker_workers_unlisted",
        "Workers that belong to the run and have no metrics of their own, because there are too many.",
        lambda snapshot: max(0, len(snapshot.members) - WORKERS_LISTED),
    ),
    RunMetric(
        "rlbroker_queue_max_batches",
        "Batches that may wait in one worker's queue.",
        lambda snapshot: snapshot.settings.max_queue_size,
    ),
    RunMetric(
        "rlbroker_queue_max_bytes",
        "Bytes that one worker's queue may hold.",
        lambda snapshot: snapshot.settings.max_queue_bytes,
    ),
    RunMetric(
        "rlbroker_batches_waiting",
        "Batches in the queues that no learner has read.",
        lambda snapshot: sum(one.waiting for one in _all_counts(snapshot)),
    ),
    RunMetric(
        "rlbroker_batches_in_hand",
        "Batches that a learner has read and not acknowledged.",
        lambda snapshot: sum(one.in_hand for one in _all_counts(snapshot)),
    ),
    RunMetric(
        "rlbroker_batches_produced_total",
        "Batches that workers sent, of workers that left too.",
        lambda snapshot: sum(one.produced for one in _all_counts(snapshot)),
    ),
    RunMetric(
        "rlbroker_batches_delivered_total",
        "Batches that learners acknowledged.",
        lambda snapshot: sum(one.delivered for one in _all_counts(snapshot)),
    ),
    RunMetric(
        "rlbroker_batches_lost_total",
        "Batches that were not delivered and never will be.",
        lambda snapshot: _sum_lost(_all_counts(snapshot), LOST_FOR_GOOD),
        by_reason=True,
    ),
    RunMetric(
        "rlbroker_batches_missing",
        "Batches that are lost unless they are retried or resent.",
        lambda snapshot: _sum_lost(_all_counts(snapshot), MISSING),
        by_reason=True,
    ),
    RunMetric(
        "rlbroker_batches_duplicate_total",
        "Copies of batches that were discarded because the batch had been read before.",
        lambda snapshot: sum(one.duplicates for one in _all_counts(snapshot)),
    ),
    RunMetric(
        "rlbroker_versions_missed_total",
        "Versions that workers missed, of workers that left too.",
        lambda snapshot: _sum_missed(snapshot.workers.values()),
        by_reason=True,
    ),
    RunMetric(
        "rlbroker_commands_missed_total",
        "Commands that workers did not apply, of workers that left too.",
        lambda snapshot: sum(one.missed.commands for one in snapshot.workers.values()),
    ),
    RunMetric(
        "rlbroker_commands_waiting",
        "Commands without an answer, counted once for each worker that has not answered.",
        lambda snapshot: sum(one.commands_waiting for one in snapshot.workers.values()),
    ),
    RunMetric(
        "rlbroker_commands_oldest_seconds",
        "Age of the oldest command without an answer; 0 without one.",
        lambda snapshot: max((one.command_seconds for one in snapshot.workers.values()), default=0),
    ),
    RunMetric(
        "rlbroker_dead_letters",
        "Batches that are kept because no learner could use them.",
        lambda snapshot: sum(one.dead_letters for one in snapshot.workers.values()),
    ),
)

#: Metrics of each worker that belongs to a run.
WORKER_METRICS: Final[tuple[RunMetric[MemberSource], ...]] = (
    RunMetric(
        "rlbroker_worker_up",
        "Whether the worker sent a heartbeat within its lease.",
        lambda member: member.info.state == "alive",
    ),
    RunMetric(
        "rlbroker_worker_version", "The version that it runs; 0 for none.", lambda member: member.info.version
    ),
    RunMetric(
        "rlbroker_worker_staleness_versions",
        "Versions published since the one that it runs.",
        lambda member: member.info.staleness,
    ),
    RunMetric(
        "rlbroker_worker_silent_seconds",
        "Time since the worker's last heartbeat, by the server's clock.",
        lambda member: member.info.last_seen_seconds,
    ),
    RunMetric(
        "rlbroker_worker_unpolled_seconds",
        "Time since the worker last called poll or load_weights, at its last heartbeat.",
        lambda member: member.info.unpolled_seconds,
    ),
    RunMetric(
        "rlbroker_worker_problem",
        "Whether the worker cannot load the latest version.",
        lambda member: bool(member.info.problem),
    ),
    RunMetric(
        "rlbroker_worker_fenced_seconds",
        "Time since another process with this worker's id was fenced; absent without one.",
        lambda member: member.info.fenced_seconds,
    ),
    RunMetric(
        "rlbroker_worker_skips_in_a_row",
        "Its latest updates in a row that each skipped a version; 0 if the last one did not.",
        lambda member: member.status.missed.skips_in_a_row,
    ),
    RunMetric(
        "rlbroker_worker_batches_waiting",
        "Batches in its queue that no learner has read.",
        lambda member: member.counts.waiting,
    ),
    RunMetric(
        "rlbroker_worker_batches_in_hand",
        "Its batches that a learner has read and not acknowledged.",
        lambda member: member.counts.in_hand,
    ),
    RunMetric(
        "rlbroker_worker_queue_ratio",
        "Batches in its queue as a share of the most that may wait.",
        lambda member: member.counts.waiting / member.snapshot.settings.max_queue_size,
    ),
    RunMetric(
        "rlbroker_worker_room_seconds_total",
        "Time in which send_experiences waited for room in its queue, of this incarnation.",
        lambda member: member.info.room_seconds,
    ),
    RunMetric(
        "rlbroker_worker_batches_produced_total",
        "Batches that it sent.",
        lambda member: member.counts.produced,
    ),
    RunMetric(
        "rlbroker_worker_batches_delivered_total",
        "Its batches that learners acknowledged.",
        lambda member: member.counts.delivered,
    ),
    RunMetric(
        "rlbroker_worker_batches_lost_total",
        "Its batches that were not delivered and never will be.",
        lambda member: _sum_lost([member.counts], LOST_FOR_GOOD),
        by_reason=True,
    ),
    RunMetric(
        "rlbroker_worker_batches_missing",
        "Its batches that are lost unless they are retried or resent.",
        lambda member: _sum_lost([member.counts], MISSING),
        by_reason=True,
    ),
    RunMetric(
        "rlbroker_worker_batches_duplicate_total",
        "Copies of its batches that were discarded because the batch had been read before.",
        lambda member: member.counts.duplicates,
    ),
    RunMetric(
        "rlbroker_worker_versions_missed_total",
        "Versions that it missed.",
        lambda member: _sum_missed([member.status]),
        by_reason=True,
    ),
    RunMetric(
        "rlbroker_worker_commands_missed_total",
        "Commands that it did not apply.",
        lambda member: member.status.missed.commands,
    ),
    RunMetric(
        "rlbroker_worker_commands_waiting",
        "Commands that it has not answered.",
        lambda member: member.status.commands_waiting,
    ),
    RunMetric(
        "rlbroker_worker_commands_oldest_seconds",
        "Age of the oldest of them; 0 without one.",
        lambda member: member.status.command_seconds,
    ),
    RunMetric(
        "rlbroker_worker_dead_letters",
        "Its batches that are kept because no learner could use them.",
        lambda member: member.status.dead_letters,
    ),
)


def _total_of(field: str) -> Callable[[LearnerSource], Any]:
    return lambda source: getattr(source.sample, field)


#: Metrics of the learner, read from its newest sample: totals since this learner began.
LEARNER_METRICS: Final[tuple[RunMetric[LearnerSource], ...]] = (
    RunMetric(
        "rlbroker_history_age_seconds",
        "Age of the sample from which the learner's totals are read.",
        lambda source: max(0.0, source.snapshot.at - source.sample.at),
    ),
    RunMetric("rlbroker_versions_published_total", "Versions published.", _total_of("published")),
    RunMetric(
        "rlbroker_published_raw_bytes_total",
        "Bytes of the tensors of published versions.",
        _total_of("published_raw_bytes"),
    ),
    RunMetric(
        "rlbroker_published_stored_bytes_total",
        "Bytes that were sent to the server for them.",
        _total_of("published_stored_bytes"),
    ),
    RunMetric(
        "rlbroker_publish_encode_seconds_total",
        "Time spent encoding weights, summed over threads.",
        _total_of("encode_seconds"),
    ),
    RunMetric(
        "rlbroker_publish_send_seconds_total",
        "Time spent sending encoded weights to the server.",
        _total_of("send_seconds"),
    ),
    RunMetric(
        "rlbroker_publish_seconds_total",
        "Time from calls of send_model_weights until the version was published.",
        _total_of("publish_seconds"),
    ),
    RunMetric(
        "rlbroker_batches_collected_total",
        "Batches that collect_experiences returned.",
        _total_of("collected"),
    ),
    RunMetric("rlbroker_rows_collected_total", "Rows of these batches.", _total_of("rows")),
    RunMetric(
        "rlbroker_collected_raw_bytes_total",
        "Bytes of the tensors of these batches.",
        _total_of("collected_raw_bytes"),
    ),
    RunMetric(
        "rlbroker_collected_stored_bytes_total",
        "Bytes that were received from the server for them.",
        _total_of("collected_stored_bytes"),
    ),
    RunMetric(
        "rlbroker_collect_decode_seconds_total",
        "Time spent decoding batches.",
        _total_of("decode_seconds"),
    ),
    RunMetric(
        "rlbroker_collect_wait_seconds_total",
        "Time in which collect_experiences waited for batches: the learner waits for its workers.",
        _total_of("wait_seconds"),
    ),
    RunMetric(
        "rlbroker_room_seconds_total",
        "Time in which workers waited for room in their queues, summed over workers: they wait for the learner.",
        _total_of("room_seconds"),
    ),
)
