"""Waits until workers have applied or missed a version, for the receipts of the learner that published it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import SupportsIndex

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.keys import Keys
from rlbroker.config import check_timeout_seconds, check_worker_ids
from rlbroker.control.ledger import Ledger
from rlbroker.control.settlements import (
    POLL_SECONDS,
    UNKNOWN_WORKER,
    WAITING,
    Settlements,
    unknown_workers,
)
from rlbroker.errors import Fenced
from rlbroker.membership.incarnations import read_incarnations
from rlbroker.membership.roster import Roster
from rlbroker.types import Outcome


class VersionWaiter:
    """Waits for the outcomes of versions. Receipts keep it, so it does not refer to the learner's client."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        roster: Roster,
        ledger: Ledger,
        settlements: Settlements,
        *,
        check: Callable[[], None],
    ) -> None:
        """Prepare to wait.

        Args:
            settlements: notified by the ledger.
            check: raises if the learner cannot continue: it was closed, or replaced.
        """
        self._connection, self._keys, self._roster = connection, keys, roster
        self._ledger, self._settlements, self._check = ledger, settlements, check

    def wait(
        self,
        version_within: Callable[[float], int],
        timeout: float | None,
        worker_ids: Iterable[SupportsIndex] | None,
    ) -> dict[int, Outcome]:
        """Return what became of a version, by worker, once that is settled or the timeout is over.

        Args:
            version_within: returns the version once it is published; 0 if it is not within some seconds.
            timeout, worker_ids: as in `PublishReceipt.wait_applied`.
        """
        self._check()
        wanted = None if worker_ids is None else check_worker_ids("worker_ids", worker_ids)
        deadline = Deadline(
            self._connection.timeout_seconds if timeout is None else check_timeout_seconds("timeout", timeout)
        )
        version = version_within(deadline.remaining)
        with within(deadline):
            members = read_incarnations(self._connection, self._keys).members
        settled = self._ledger.versions.workers(version)
        workers = sorted({*members, *settled}) if wanted is None else wanted
        unknown = [worker for worker in workers if worker not in members and worker not in settled]
        if unknown and unknown == workers:
            raise unknown_workers(self._keys.run, unknown, members)
        incarnations = {
            worker: members[worker].number if worker in members else 0
            for worker in workers
            if worker not in unknown
        }
        question = _Question(version, incarnations, dict.fromkeys(unknown, UNKNOWN_WORKER), deadline)
        return self._settlements.wait(lambda: self._answer(question), deadline)

    def _answer(self, question: _Question) -> dict[int, Outcome]:
        """Return the outcomes as they are; all are `waiting` while the version is not published."""
        self._check()
        if not self._roster.leads:
            raise Fenced(
                f"a newer learner publishes in the run {self._keys.run!r}; ask its receipts what is applied"
            )
        if question.next_settling.over:
            # The background thread does this too, but learns only with its next heartbeat of workers that joined.
            self._ledger.settle(list(question.incarnations), question.deadline)
            question.next_settling = Deadline(POLL_SECONDS)
        version = question.version
        found = {
            worker: self._ledger.version_outcome(worker, version, incarnation) if version else WAITING
            for worker, incarnation in question.incarnations.items()
        }
        return found | question.unknown


@dataclass
class _Question:
    """What one call waits for: a version at workers that were members in an incarnation."""

    version: int
    incarnations: Mapping[int, int]
    unknown: dict[int, Outcome]
    deadline: Deadline
    next_settling: Deadline = field(default_factory=lambda: Deadline(0))
