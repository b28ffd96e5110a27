"""The writer of a run's history: one sample a second, to Redis and to the user's scalar logs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlbroker.backend.connection import Argument, Connection, flat
from rlbroker.backend.deadline import ONE_TRY, Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import seconds_number, whole_number
from rlbroker.errors import PeerError, raise_again
from rlbroker.metrics.counters import Metrics
from rlbroker.metrics.history import TIERS, WORKERS_NAMED, Sample
from rlbroker.metrics.tensorboard import ScalarLog

logger = logging.getLogger("rlbroker")

#: A worker may report this much more waiting than the time since its last report, because its value is read late.
_SLACK_SECONDS = 10.0

#: The sums of `Metrics` that a sample contains: whole numbers, and seconds.
_COUNTS = (
    "published",
    "published_raw_bytes",
    "published_stored_bytes",
    "collected",
    "rows",
    "collected_raw_bytes",
    "collected_stored_bytes",
)
_SECONDS = ("encode_seconds", "send_seconds", "publish_seconds", "decode_seconds", "wait_seconds")


@dataclass(frozen=True)
class RunState:
    """What a learner knows of its run without asking the server.

    Attributes:
        version: the latest version.
        alive: ids of the members with a heartbeat within their lease.
        away: ids of the other members.
        everyone: ids of all workers that ever took part.
        in_hand: batches that this learner has read and not acknowledged, by worker.
        delivered: batches of the run that were acknowledged.
        lost: batches of the run that were counted as lost.
        missed: versions that a worker missed, summed over workers.
    """

    version: int
    alive: frozenset[int]
    away: frozenset[int]
    everyone: frozenset[int]
    in_hand: Mapping[int, int]
    delivered: int
    lost: int
    missed: int


@dataclass
class _RoomWait:
    """The time that one incarnation of a worker waited for room, as last reported, and when that value was new."""

    incarnation: int
    seconds: float
    since: float


class Recorder:
    """Takes the samples of one learner. Not thread-safe, except for `add_log` and `end_logs`.

    A server fault, such as a full server or a missing right, costs one sample and nothing else.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        metrics: Metrics,
        *,
        epoch: int,
        read_state: Callable[[], RunState],
    ) -> None:
        """Start a history, or continue the one of an earlier learner.

        Args:
            metrics: the sums of this learner.
            read_state: returns what the learner knows of its run.
        """
        self._connection, self._keys = connection, keys
        self._metrics, self._epoch, self._read_state = metrics, epoch, read_state
        self._due = {seconds: Deadline(0) for seconds in TIERS}
        self._room_waits: dict[int, _RoomWait] = {}
        self._room_seconds = 0.0
        self._has_sampled = False
        self._broken = False
        self._logs: list[ScalarLog] = []

    def add_log(self, log: ScalarLog) -> None:
        """Offer every further sample to this log too."""
        self._logs.append(log)

    def end_logs(self, deadline: Deadline) -> None:
        """Stop all logs, and wait for calls of their writers that have begun."""
        for log in self._logs:
            log.end(deadline.remaining)

    def record(self, *, write: bool = True, last: bool = False) -> Sample | None:
        """Take a sample, write it to the streams where it is due, and offer it to the logs.

        Args:
            write: whether this learner is the one that writes the history.
            last: whether no further sample follows, so that all streams get this one.

        Returns:
            The sample; None if none was taken, because it had no reader or because that failed.
        """
        if self._broken or not (write or self._logs):
            return None
        try:
            sample = self._take_sample()
            if write:
                self._write(sample, last=last)
        except PeerError as error:
            logger.debug("no sample for the history: %s", str(error))
            return None
        except Exception:  # a bug in the history must not end the learner's background work
            self._broken = True
            logger.exception("the history of the run %r ends here", self._keys.run)
            return None
        for log in self._logs:
            log.offer(sample)
        return sample

    def _take_sample(self) -> Sample:
        state = self._read_state()
        members, everyone = sorted(state.alive | state.away), sorted(state.everyone)
        time, *replies = self._connection.execute_all(
            [
                ("TIME",),
                *(("XLEN", self._keys.experiences(worker)) for worker in everyone),
                *(
                    ("HMGET", self._keys.heartbeat(worker), "incarnation", "version", "room_seconds")
                    for worker in members
                ),
            ],
            strict=False,
            deadline=ONE_TRY,
        )
        if isinstance(time, PeerError):
            raise_again(time)
        at = int(time[0]) + int(time[1]) / 1e6
        queued = _count_queued(everyone, replies[: len(everyone)], state.in_hand)
        running = self._read_heartbeats(members, replies[len(everyone) :], at)
        self._room_waits = {
            worker: wait for worker, wait in self._room_waits.items() if worker in state.everyone
        }
        self._has_sampled = True
        sums = self._metrics.totals()
        own: dict[str, Any] = {name: int(sums.get(name, 0)) for name in _COUNTS}
        own |= {name: round(sums.get(name, 0.0), 4) for name in _SECONDS}
        return Sample(
            at=at,
            epoch=self._epoch,
            version=state.version,
            alive=len(state.alive),
            away=len(state.away),
            waiting=sum(queued.values()),
            in_hand=sum(state.in_hand.values()),
            **own,
            room_seconds=round(self._room_seconds, 4),
            delivered=state.delivered,
            lost=state.lost,
            missed=state.missed,
            staleness=self._metrics.staleness_counts(),
            running=dict(list(running.items())[:WORKERS_NAMED]),
            queued={worker: queued[worker] for worker in everyone[:WORKERS_NAMED] if worker in queued},
        )

    def _read_heartbeats(self, members: Sequence[int], replies: Sequence[Any], at: float) -> dict[int, int]:
        """Return the version that each member runs, and add up the time that they waited for room."""
        running = {}
        for worker, reply in zip(members, replies, strict=True):
            # A worker may have written anything in place of its heartbeat.
            values = (None,) * 3 if isinstance(reply, PeerError) else reply
            incarnation, version, waited = map(_decode, values)
            running[worker] = whole_number(version) or 0
            if incarnation and waited:
                seconds = seconds_number(waited) or 0.0
                self._add_room_wait(worker, whole_number(incarnation) or 0, seconds, at)
        return running

    def _add_room_wait(self, worker: int, incarnation: int, seconds: float, at: float) -> None:
        """Add the time that a worker waited since its last report, but no more than has passed since then."""
        wait = self._room_waits.get(worker)
        if wait is None or wait.incarnation != incarnation:
            # Waiting from before this learner started does not count.
            counted = 0.0 if self._has_sampled else seconds
            wait = self._room_waits[worker] = _RoomWait(incarnation, counted, wait.since if wait else at)
        if seconds > wait.seconds:
            self._room_seconds += min(seconds - wait.seconds, max(0.0, at - wait.since) + _SLACK_SECONDS)
            wait.seconds, wait.since = seconds, at

    def _write(self, sample: Sample, *, last: bool) -> None:
        due = [seconds for seconds, deadline in self._due.items() if last or seconds == 1 or deadline.over]
        fields = flat(sample.to_fields())
        commands: list[list[Argument]] = [
            ["XADD", self._keys.history(seconds), "MAXLEN", "~", TIERS[seconds], "*", *fields]
            for seconds in due
        ]
        replies = self._connection.execute_all(commands, strict=False, deadline=ONE_TRY)
        for seconds in due:
            self._due[seconds] = Deadline(seconds)
        for reply in replies:
            if isinstance(reply, PeerError):
                raise_again(reply)


def _count_queued(
    workers: Sequence[int], replies: Sequence[Any], in_hand: Mapping[int, int]
) -> dict[int, int]:
    """Return the batches that wait, by worker; without workers that have none, or no stream of batches."""
    return {
        worker: length - in_hand.get(worker, 0)
        for worker, length in zip(workers, replies, strict=True)
        if isinstance(length, int) and length > in_hand.get(worker, 0)
    }


def _decode(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else ""
