"""Rounds: which batches belong to one, which workers it waits for, and why batches are missing. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from rlbroker.config import check_count, check_positive_int, check_worker_ids
from rlbroker.errors import InvalidArgument, RoundIncomplete
from rlbroker.types import WorkerInfo

#: What becomes of a batch that was read: it belongs to the round, it is too old, or it stays for later calls.
Verdict = Literal["take", "stale", "keep"]

#: The most missing workers that a message names.
NAMED = 5

#: What a message says and advises if workers are missing because they were told to stop.
RUN_ENDED = "the run was ended by a command, so workers stop at once: start the learner again to open it"


@dataclass(frozen=True)
class Round:
    """What a caller asks for: batches of exactly one version, the same number of each worker.

    Attributes:
        version: the version that produced them.
        per_worker: how many of each worker.
        workers: the workers; None for all that are alive.
        partial: whether the caller takes what there is at the timeout.
    """

    version: int
    per_worker: int = 1
    workers: frozenset[int] | None = None
    partial: bool = False

    @classmethod
    def parse(
        cls,
        version: int,
        per_worker: int,
        workers: Iterable[int] | None,
        *,
        latest: int | None,
        partial: bool,
    ) -> Round:
        """Return a round of checked values.

        Args:
            latest: the latest version, which the round's may not exceed; None if the caller does not publish.

        Raises:
            InvalidArgument: a value cannot work.
        """
        version = check_count("version", version)
        if latest is not None and version > latest:
            raise InvalidArgument(
                f"version {version} is not published, the latest is {latest}; name a published version, or none"
            )
        chosen: frozenset[int] | None = None
        if workers is not None:
            chosen = frozenset(check_worker_ids("workers", workers))
            if not chosen:
                raise InvalidArgument("workers is empty; name at least one worker, or None for all")
        return cls(version, check_positive_int("per_worker", per_worker), chosen, bool(partial))


class Progress:
    """How far a round has come in one call, as far as the batches show that were read.

    A round has members: the workers that were named, or those that were alive when it began. Of the latter, one that
    is no longer alive is not waited for; one that joined later is not a member. As long as no member is left to wait
    for and none has sent all of its batches, the round begins again with those that are alive.

    Attributes:
        round: what the caller asked for.
        members: the workers of the round.
        counts: how many of its batches were gathered, by worker.
        ahead: by worker, the newer version of a batch that it has sent. It sends none of the round's any more.
    """

    def __init__(self, asked: Round) -> None:
        """Begin without members that are alive."""
        self.round = asked
        self.members: frozenset[int] = asked.workers or frozenset()
        self.counts: Counter[int] = Counter()
        self.ahead: dict[int, int] = {}
        self._alive: Collection[int] = ()

    def begin(self, alive: Collection[int], gathered: Iterable[tuple[int, int]]) -> None:
        """Begin a look at all batches that were read.

        Args:
            alive: the workers that are alive now.
            gathered: worker and version of the batches that were read and are not in the caller's hands.
        """
        self._alive, self.ahead, self.counts = alive, {}, Counter()
        for worker, version in gathered:
            if version == self.round.version:
                self.counts[worker] += 1
            elif version > self.round.version:
                self.ahead.setdefault(worker, version)
        if self.round.workers is None and not self.awaited and not self.complete:
            # Also those that have sent batches to an earlier call and are no longer alive.
            self.members = frozenset(alive) | frozenset(self.counts)

    def judge(self, worker: int, version: int | None) -> Verdict:
        """Return what becomes of a worker's next batch.

        Args:
            version: what produced it; None if it does not say, so that it must be unpacked to know more.
        """
        if not self.covers(worker):
            return "keep"
        if version is not None and version < self.round.version:
            return "stale"
        if version is not None and version > self.round.version:
            self.ahead.setdefault(worker, version)
            return "keep"
        is_wanted = worker in self.members and self.counts[worker] < self.round.per_worker
        return "take" if is_wanted else "keep"

    def covers(self, worker: int) -> bool:
        """Return whether the caller asked for this worker, so that older batches of it are stale."""
        return self.round.workers is None or worker in self.round.workers

    @property
    def complete(self) -> frozenset[int]:
        """The members whose batches were all gathered."""
        return frozenset([one for one in self.members if self.counts[one] >= self.round.per_worker])

    @property
    def possible(self) -> frozenset[int]:
        """The members that lack batches, and may still send them if they are alive."""
        return frozenset([one for one in self.members - self.complete if one not in self.ahead])

    @property
    def awaited(self) -> frozenset[int]:
        """The members that the round waits for."""
        return self.possible if self.round.workers is not None else self.possible & frozenset(self._alive)

    @property
    def lost(self) -> frozenset[int]:
        """The members that the round does without, because they are no longer alive."""
        return self.possible - self.awaited

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to wait for."""
        return not self.awaited and bool(self.complete or self.ahead.keys() & self.members)

    @property
    def is_complete(self) -> bool:
        """Whether all members that are waited for have sent their batches."""
        return self.is_over and not self.missing

    @property
    def missing(self) -> frozenset[int]:
        """The members that keep the round from being complete."""
        return self.members - self.complete - (self.lost if self.is_over else frozenset())

    @property
    def most(self) -> int:
        """The most batches that one worker lacks."""
        return max([self.round.per_worker - self.counts[one] for one in self.possible], default=1)

    def choose(self, gathered: Iterable[tuple[int, int]]) -> list[int]:
        """Return the indexes of the gathered batches that make up the round, in the order of the worker ids.

        A worker that lacks some of its batches is left out, unless the caller takes what there is.
        """
        found: dict[int, list[int]] = {}
        for index, (worker, version) in enumerate(gathered):
            if version == self.round.version and worker in self.members:
                found.setdefault(worker, []).append(index)
        whole = self.members if self.round.partial else self.complete
        return [
            index
            for worker in sorted(found)
            if worker in whole
            for index in found[worker][: self.round.per_worker]
        ]

    def incomplete(
        self,
        seconds: float,
        *,
        roster: Iterable[WorkerInfo],
        everyone: Collection[int],
        unreachable: Collection[int] = (),
        ended: bool = False,
    ) -> RoundIncomplete:
        """Return the error that names the missing workers, with the reasons.

        Args:
            seconds: how long the call waited.
            roster: the members of the run.
            everyone: all workers that the run ever had.
            unreachable: workers whose queue is on a server that does not answer.
            ended: whether a command has ended the run, so that workers stop.
        """
        infos = {info.worker_id: info for info in roster}
        missing = {
            worker: "the server of its queue does not answer"
            if worker in unreachable
            else self._reason(worker, infos.get(worker), worker in everyone)
            for worker in sorted(self.missing)
        }
        if not missing:
            return RoundIncomplete(
                f"no worker was alive within {seconds:g} s for a round of version {self.round.version}; "
                f"{RUN_ENDED if ended else 'start workers, or wait longer'}"
            )
        reasons = [f"worker {worker}: {reason}" for worker, reason in list(missing.items())[:NAMED]]
        more = [f"and {len(missing) - NAMED} more"] if len(missing) > NAMED else []
        gathered = sum([min(self.counts[one], self.round.per_worker) for one in self.members])
        return RoundIncomplete(
            f"the round of version {self.round.version} has {gathered} of "
            f"{len(self.members) * self.round.per_worker} batches ({'; '.join([*reasons, *more])}). What was gathered "
            f"comes with the next call; {RUN_ENDED if ended else 'use partial=True to take what there is'}",
            missing,
        )

    def _reason(self, worker: int, info: WorkerInfo | None, known: bool) -> str:
        version = self.round.version
        if worker in self.ahead:
            return f"it has moved on, its next batch is of version {self.ahead[worker]}"
        if info is None:
            return "it left the run" if known else "it never joined"
        if info.state == "away":
            return f"away, last seen {info.last_seen_seconds:.1f} s ago"
        if self.counts[worker]:
            return f"it has sent {self.counts[worker]} of {self.round.per_worker} batches"
        if info.version < version:
            return f"at its last heartbeat it still ran version {info.version}"
        if info.version > version:
            return f"it runs version {info.version} already"
        return "its queue is empty"


def names_of(lost: Iterable[int], away: Collection[int]) -> str:
    """Return a text that names the workers that a round does without, and why."""
    return ", ".join([f"{worker} ({'away' if worker in away else 'left'})" for worker in sorted(lost)])
