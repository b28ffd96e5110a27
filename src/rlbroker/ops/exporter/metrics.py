"""Every figure of a run that Prometheus is given: its name, what it says, and where in a look at the run it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar, get_args

from rlbroker.experience.counts import LOST
from rlbroker.metrics.history import Sample
from rlbroker.ops.inspect.snapshot import Snapshot, WorkerStatus
from rlbroker.types import QueueCounts, Why, WorkerInfo

#: Why a batch is lost for now. Dead letters can be tried again, and workers send again what a server forgot, so
#: that these numbers can fall: a counter that falls would be taken for one that began anew.
MISSING: Final = ("corrupt", "poison", "vanished")

#: Why a batch is lost for good.
LOST_FOR_GOOD: Final = tuple(reason for reason in LOST if reason not in MISSING)

#: Why a version was missed. Others are not named, so that labels stay few whatever somebody wrote.
_WHY: Final = get_args(Why)

Looked = TypeVar("Looked")


@dataclass(frozen=True)
class RunMetric(Generic[Looked]):
    """One figure, as it is read from one look.

    Attributes:
        name: with its unit; of a counter also with `_total`.
        says: what it is, for people.
        of: reads it; None where there is none, or numbers by `reason`.
    """

    name: str
    says: str
    of: Callable[[Looked], float | Mapping[str, float] | None]
    by_reason: bool = False

    @property
    def kind(self) -> Literal["counter", "gauge"]:
        """What Prometheus is told that it is."""
        return "counter" if self.name.endswith("_total") else "gauge"


@dataclass(frozen=True)
class Member:
    """One worker that belongs to a run, in one look at it."""

    snapshot: Snapshot
    info: WorkerInfo
    status: WorkerStatus

    @property
    def counts(self) -> QueueCounts:
        """What became of its batches."""
        return self.status.counts or _NO_BATCHES


_NO_BATCHES: Final = QueueCounts(0, 0, 0, {}, 0)


def _everyone(snapshot: Snapshot) -> list[QueueCounts]:
    """Give the counts of all who ever took part: sums must not fall when a worker leaves."""
    return [status.counts for status in snapshot.workers.values() if status.counts]


def _lost(counts: Iterable[QueueCounts], reasons: Iterable[str]) -> dict[str, float]:
    counts = list(counts)
    return {reason: sum(one.lost.get(reason, 0) for one in counts) for reason in reasons}


def _missed(statuses: Iterable[WorkerStatus]) -> dict[str, float]:
    statuses = list(statuses)
    return {why: sum(one.missed.by_reason.get(why, 0) for one in statuses) for why in _WHY}


def _alive(snapshot: Snapshot) -> int:
    return sum(info.state == "alive" for info in snapshot.members)


#: Of a run as a whole.
RUN_FIGURES: Final[tuple[RunMetric[Snapshot], ...]] = (
    RunMetric(
        "rlbroker_weights_version",
        "Number of the latest version; 0 before the first.",
        lambda look: look.pointer.version if look.pointer else 0,
    ),
    RunMetric(
        "rlbroker_weights_raw_bytes",
        "Bytes of the latest version's tensors.",
        lambda look: look.pointer.raw_bytes if look.pointer else None,
    ),
    RunMetric(
        "rlbroker_weights_stored_bytes",
        "Bytes that a worker downloads for the latest version if it has the one before.",
        lambda look: look.pointer.stored_bytes if look.pointer else None,
    ),
    RunMetric(
        "rlbroker_weights_published_timestamp_seconds",
        "When the latest version was published, by the learner's clock.",
        lambda look: look.pointer.published if look.pointer else None,
    ),
    RunMetric(
        "rlbroker_learner_up",
        "Whether the learner was heard of within its lease.",
        lambda look: look.learner is not None and look.learner.state == "alive",
    ),
    RunMetric(
        "rlbroker_learner_ended",
        "Whether the learner has ended in order: the run is over.",
        lambda look: look.learner is not None and look.learner.state == "ended",
    ),
    RunMetric(
        "rlbroker_learner_silent_seconds",
        "Time since the learner was last heard of, by the server's clock.",
        lambda look: look.learner.last_seen_seconds if look.learner else None,
    ),
    RunMetric(
        "rlbroker_learner_start_timestamp_seconds",
        "When this learner began: its own sums began at 0 then.",
        lambda look: look.learner.epoch / 1000 if look.learner and look.learner.epoch else None,
    ),
    RunMetric("rlbroker_workers_alive", "Workers that were heard of within their lease.", _alive),
    RunMetric(
        "rlbroker_workers_away",
        "Workers that belong to the run and have been silent for longer than their lease.",
        lambda look: len(look.members) - _alive(look),
    ),
    RunMetric(
        "rlbroker_workers_expected",
        "Workers that the learner expects.",
        lambda look: look.expected_workers,
    ),
    RunMetric(
        "rlbroker_workers_unlisted",
        "Workers that belong to the run and have no figures of their own here, as there are so many.",
        lambda look: max(0, len(look.members) - WORKERS_LISTED),
    ),
    RunMetric(
        "rlbroker_queue_max_batches",
        "Batches that may wait in one worker's queue.",
        lambda look: look.settings.max_queue_size,
    ),
    RunMetric(
        "rlbroker_queue_max_bytes",
        "Bytes that one worker's queue may hold.",
        lambda look: look.settings.max_queue_bytes,
    ),
    RunMetric(
        "rlbroker_batches_waiting",
        "Batches in the queues that no learner has read.",
        lambda look: sum(one.waiting for one in _everyone(look)),
    ),
    RunMetric(
        "rlbroker_batches_in_hand",
        "Batches that a learner has read and not acknowledged.",
        lambda look: sum(one.in_hand for one in _everyone(look)),
    ),
    RunMetric(
        "rlbroker_batches_produced_total",
        "Batches that workers sent, whatever became of them; those of workers that left included.",
        lambda look: sum(one.produced for one in _everyone(look)),
    ),
    RunMetric(
        "rlbroker_batches_delivered_total",
        "Batches that learners acknowledged.",
        lambda look: sum(one.delivered for one in _everyone(look)),
    ),
    RunMetric(
        "rlbroker_batches_lost_total",
        "Batches that were not delivered and never will be.",
        lambda look: _lost(_everyone(look), LOST_FOR_GOOD),
        by_reason=True,
    ),
    RunMetric(
        "rlbroker_batches_missing",
        "Batches that are lost unless they are tried, or sent, again.",
        lambda look: _lost(_everyone(look), MISSING),
        by_reason=True,
    ),
    RunMetric(
        "rlbroker_batches_duplicate_total",
        "Copies of batches that had been read before, and were not given out a second time.",
        lambda look: sum(one.duplicates for one in _everyone(look)),
    ),
    RunMetric(
        "rlbroker_versions_missed_total",
        "Versions that workers missed, summed over all that ever took part.",
        lambda look: _missed(look.workers.values()),
        by_reason=True,
    ),
    RunMetric(
        "rlbroker_commands_missed_total",
        "Commands that workers did not do, summed over all that ever took part.",
        lambda look: sum(one.missed.commands for one in look.workers.values()),
    ),
    RunMetric(
        "rlbroker_commands_waiting",
        "Commands without an answer, one for each worker that owes it.",
        lambda look: sum(one.commands_waiting for one in look.workers.values()),
    ),
    RunMetric(
        "rlbroker_commands_oldest_seconds",
        "How long the oldest command without an answer has been waiting; 0 without one.",
        lambda look: max((one.command_seconds for one in look.workers.values()), default=0),
    ),
    RunMetric(
        "rlbroker_dead_letters",
        "Batches that no learner could use and that are kept.",
        lambda look: sum(one.dead_letters for one in look.workers.values()),
    ),
)

#: Workers of one run that have figures of their own, the lowest ids first.
WORKERS_LISTED: Final = 1000

#: Of each worker that belongs to a run.
WORKER_FIGURES: Final[tuple[RunMetric[Member], ...]] = (
    RunMetric(
        "rlbroker_worker_up",
        "Whether the worker was heard of within its lease.",
        lambda one: one.info.state == "alive",
    ),
    RunMetric(
        "rlbroker_worker_version", "The version that it runs; 0 for none.", lambda one: one.info.version
    ),
    RunMetric(
        "rlbroker_worker_staleness_versions",
        "Versions that were published since the one that it runs.",
        lambda one: one.info.staleness,
    ),
    RunMetric(
        "rlbroker_worker_silent_seconds",
        "Time since the worker was last heard of, by the server's clock.",
        lambda one: one.info.last_seen_seconds,
    ),
    RunMetric(
        "rlbroker_worker_unpolled_seconds",
        "Time since the worker last called poll or load_weights, as it said when it was last heard of.",
        lambda one: one.info.unpolled_seconds,
    ),
    RunMetric(
        "rlbroker_worker_problem",
        "Whether something keeps the worker from loading the latest version.",
        lambda one: bool(one.info.problem),
    ),
    RunMetric(
        "rlbroker_worker_fenced_seconds",
        "Time since a second process with this worker's id was turned away; only where one was.",
        lambda one: one.info.fenced_seconds,
    ),
    RunMetric(
        "rlbroker_worker_skips_in_a_row",
        "Its latest updates that each jumped over a version; 0 if the last one did not.",
        lambda one: one.status.missed.skips_in_a_row,
    ),
    RunMetric(
        "rlbroker_worker_batches_waiting",
        "Batches in its queue that no learner has read.",
        lambda one: one.counts.waiting,
    ),
    RunMetric(
        "rlbroker_worker_batches_in_hand",
        "Its batches that a learner has read and not acknowledged.",
        lambda one: one.counts.in_hand,
    ),
    RunMetric(
        "rlbroker_worker_queue_ratio",
        "Which part of the batches that may wait in its queue do wait.",
        lambda one: one.counts.waiting / one.snapshot.settings.max_queue_size,
    ),
    RunMetric(
        "rlbroker_worker_room_seconds_total",
        "Time in which send_experiences waited for room in its queue, since this life of the worker began.",
        lambda one: one.info.room_seconds,
    ),
    RunMetric(
        "rlbroker_worker_batches_produced_total",
        "Batches that it sent, whatever became of them.",
        lambda one: one.counts.produced,
    ),
    RunMetric(
        "rlbroker_worker_batches_delivered_total",
        "Its batches that learners acknowledged.",
        lambda one: one.counts.delivered,
    ),
    RunMetric(
        "rlbroker_worker_batches_lost_total",
        "Its batches that were not delivered and never will be.",
        lambda one: _lost([one.counts], LOST_FOR_GOOD),
        by_reason=True,
    ),
    RunMetric(
        "rlbroker_worker_batches_missing",
        "Its batches that are lost unless they are tried, or sent, again.",
        lambda one: _lost([one.counts], MISSING),
        by_reason=True,
    ),
    RunMetric(
        "rlbroker_worker_batches_duplicate_total",
        "Copies of its batches that were not given out a second time.",
        lambda one: one.counts.duplicates,
    ),
    RunMetric(
        "rlbroker_worker_versions_missed_total",
        "Versions that it missed.",
        lambda one: _missed([one.status]),
        by_reason=True,
    ),
    RunMetric(
        "rlbroker_worker_commands_missed_total",
        "Commands that it did not do.",
        lambda one: one.status.missed.commands,
    ),
    RunMetric(
        "rlbroker_worker_commands_waiting",
        "Commands that it has not answered.",
        lambda one: one.status.commands_waiting,
    ),
    RunMetric(
        "rlbroker_worker_commands_oldest_seconds",
        "How long the oldest of them has been waiting; 0 without one.",
        lambda one: one.status.command_seconds,
    ),
    RunMetric(
        "rlbroker_worker_dead_letters",
        "Its batches that no learner could use and that are kept.",
        lambda one: one.status.dead_letters,
    ),
)


def _sum_of(field: str) -> Callable[[tuple[Snapshot, Sample]], Any]:
    return lambda looked: getattr(looked[1], field)


#: Of the learner, from the newest entry of the run's history: sums since this learner began.
LEARNER_FIGURES: Final[tuple[RunMetric[tuple[Snapshot, Sample]], ...]] = (
    RunMetric(
        "rlbroker_history_age_seconds",
        "Age of the entry in the run's history from which the learner's sums are taken.",
        lambda looked: max(0.0, looked[0].at - looked[1].at),
    ),
    RunMetric("rlbroker_versions_published_total", "Versions published.", _sum_of("published")),
    RunMetric(
        "rlbroker_published_raw_bytes_total",
        "Bytes of the tensors of published versions.",
        _sum_of("published_raw_bytes"),
    ),
    RunMetric(
        "rlbroker_published_stored_bytes_total",
        "Bytes that went to the server for them.",
        _sum_of("published_stored_bytes"),
    ),
    RunMetric(
        "rlbroker_publish_encode_seconds_total",
        "Time spent encoding weights, summed over threads.",
        _sum_of("encode_seconds"),
    ),
    RunMetric(
        "rlbroker_publish_send_seconds_total",
        "Time spent sending encoded weights to the server.",
        _sum_of("send_seconds"),
    ),
    RunMetric(
        "rlbroker_publish_seconds_total",
        "Time from calls of send_model_weights until the version was out.",
        _sum_of("publish_seconds"),
    ),
    RunMetric(
        "rlbroker_batches_collected_total",
        "Batches that collect_experiences gave to the training.",
        _sum_of("collected"),
    ),
    RunMetric("rlbroker_rows_collected_total", "Rows of these batches.", _sum_of("rows")),
    RunMetric(
        "rlbroker_collected_raw_bytes_total",
        "Bytes of the tensors of these batches.",
        _sum_of("collected_raw_bytes"),
    ),
    RunMetric(
        "rlbroker_collected_stored_bytes_total",
        "Bytes that came from the server for them.",
        _sum_of("collected_stored_bytes"),
    ),
    RunMetric(
        "rlbroker_collect_decode_seconds_total",
        "Time spent decoding batches.",
        _sum_of("decode_seconds"),
    ),
    RunMetric(
        "rlbroker_collect_wait_seconds_total",
        "Time in which collect_experiences had nothing to give: the learner waits for its workers.",
        _sum_of("wait_seconds"),
    ),
    RunMetric(
        "rlbroker_room_seconds_total",
        "Time in which workers waited for room in their queues, summed over them: they wait for the learner.",
        _sum_of("room_seconds"),
    ),
)
