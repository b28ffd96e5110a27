"""The objects that a learner consists of, and how they take a run over."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.text import counted
from rlbroker.codec.limits import FORMAT_VERSION
from rlbroker.codec.signing import SigningKey
from rlbroker.control.commands import CommandSender
from rlbroker.control.ledger import Ledger
from rlbroker.control.settlements import Settlements
from rlbroker.control.version_waiter import VersionWaiter
from rlbroker.experience.collector import Collector
from rlbroker.experience.counts import read_counts
from rlbroker.experience.dead_letters import DeadLetters
from rlbroker.experience.pending import PendingEntries, Takeover
from rlbroker.experience.rate_limiter import RateLimiter
from rlbroker.learner.options import LearnerOptions
from rlbroker.learner.shards import choose_shards
from rlbroker.membership.roster import Roster
from rlbroker.metrics.counters import Metrics
from rlbroker.metrics.history_recorder import Recorder, RunState
from rlbroker.weights.host_cache import ImageStore
from rlbroker.weights.publisher import Publisher

logger = logging.getLogger("rlbroker")


@dataclass(frozen=True)
class LearnerParts:
    """The objects that one learner consists of. `Maintenance` does its background work with them.

    Attributes:
        roster: the run and its members.
        publisher: the run's weights.
        pending: batches that the learner has read and not acknowledged.
        commands: the commands that the learner sends.
        ledger: what the workers acknowledged.
        applied: tells receipts which workers have applied their version.
        dead_letters: batches that no learner could use.
        takeover: pending batches that another learner abandoned, and the renewal of this learner's own.
        rate_limiter: the balance of collecting and sampling.
        collector: reads the workers' batches.
        recorder: writes the history.
        settlements: wakes the calls that wait for answers of workers.
    """

    roster: Roster
    publisher: Publisher
    pending: PendingEntries
    commands: CommandSender
    ledger: Ledger
    applied: VersionWaiter
    dead_letters: DeadLetters
    takeover: Takeover
    rate_limiter: RateLimiter
    collector: Collector
    recorder: Recorder
    settlements: Settlements

    @classmethod
    def open(
        cls,
        connection: Connection,
        keys: Keys,
        options: LearnerOptions,
        *,
        images: ImageStore,
        signing_key: SigningKey | None,
        check: Callable[[], None],
    ) -> Self:
        """Open the run, take it over from earlier learners of this name, and return the parts that work on it.

        Args:
            keys: the run's keys; on a Cluster they are spread over the run's shards here.
            options: the learner's settings.
            images: where the latest weights are kept.
            signing_key: signs weights and commands; None for no signatures.
            check: raises if the learner cannot continue; called while it waits for batches or outcomes.
        """
        metrics = Metrics()
        roster = Roster(
            connection,
            keys,
            options.run_settings,
            learner_name=options.learner_name,
            publishes=options.publishes,
            key=signing_key,
        )
        # First, because every other part fences earlier learners by this epoch.
        epoch = roster.open(
            wire_format=FORMAT_VERSION,
            num_workers=options.num_workers,
            shards=choose_shards(connection, keys, options.shards),
        )
        publisher = Publisher(connection, keys, epoch=epoch, images=images, metrics=metrics, key=signing_key)
        pending = PendingEntries(connection, keys, name=options.learner_name, epoch=epoch)
        settlements = Settlements()
        commands = CommandSender(connection, keys, epoch=epoch, key=signing_key, settlements=settlements)
        ledger = Ledger(
            connection,
            keys,
            epoch=epoch,
            last_version=lambda: publisher.last_tried,
            signed=signing_key is not None,
            note_outcomes=commands.note_outcomes,
            settlements=settlements,
        )
        applied = VersionWaiter(connection, keys, roster, ledger, settlements, check=check)
        dead_letters = DeadLetters(connection, keys, pending, max_bytes=options.run_settings.max_queue_bytes)
        takeover = Takeover(connection, pending, take_over_seconds=options.take_over_seconds)
        rate_limiter = RateLimiter(options.samples_per_insert)
        collector = Collector(
            connection,
            keys,
            pending,
            dead_letters,
            takeover,
            rate_limiter,
            metrics,
            acknowledge=options.acknowledge,
            max_staleness=options.max_staleness,
            max_deliveries=options.max_deliveries,
            roster=roster,
            latest_version=lambda: publisher.latest_version,
            check=check,
        )
        recorder = Recorder(
            connection,
            keys,
            metrics,
            epoch=epoch,
            read_state=partial(_read_state, roster, publisher, pending, ledger),
        )
        parts = cls(
            roster,
            publisher,
            pending,
            commands,
            ledger,
            applied,
            dead_letters,
            takeover,
            rate_limiter,
            collector,
            recorder,
            settlements,
        )
        parts._take_over(publishes=options.publishes)
        if options.publishes:
            _warn_of_earlier_training(connection, keys, roster, publisher.latest_version)
        return parts

    def _take_over(self, *, publishes: bool) -> None:
        """Fence earlier learners of this name, and remember what they left on the server."""
        workers = self.roster.ids()
        self.pending.fence_older(workers)  # from here on no acknowledgement of an earlier learner is accepted
        if publishes:
            self.commands.remember()
            self.ledger.remember(workers)


def _warn_of_earlier_training(connection: Connection, keys: Keys, roster: Roster, version: int) -> None:
    """Warn that the run has data of an earlier learner: intended after a crash, a mistake for a new training."""
    if not roster.existed:
        return
    counts = read_counts(connection, keys, roster.ids()).values()
    batches = sum(count.waiting + count.in_hand for count in counts)
    if version or batches:
        logger.warning(
            "the run %r continues: version %d, %s waiting. For a new training, choose another run name",
            keys.run,
            version,
            counted(batches, "batch", "batches"),
        )


def _read_state(roster: Roster, publisher: Publisher, pending: PendingEntries, ledger: Ledger) -> RunState:
    delivered, lost = pending.totals()
    return RunState(
        version=publisher.latest_version,
        alive=roster.alive,
        away=roster.away,
        everyone=roster.everyone,
        in_hand=pending.count_by_worker(),
        delivered=delivered,
        lost=lost,
        missed=ledger.missed_versions,
    )
