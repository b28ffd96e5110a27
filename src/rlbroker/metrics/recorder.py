"""Writes the history of a run: one sample each second, made of what the learner remembers and one look."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlbroker.backend.connection import Argument, Connection, flat
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import seconds_number, whole_number
from rlbroker.errors import PeerError
from rlbroker.metrics.counters import Metrics
from rlbroker.metrics.history import TIERS, WORKERS_NAMED, Sample

logger = logging.getLogger("rlbroker")

#: What a worker may say that it waited beyond the time since it last said so: what it says is not looked at often.
_SLACK_SECONDS = 10.0


@dataclass(frozen=True)
class RunState:
    """What the learner knows of its run without asking.

    Attributes:
        version: the latest.
        alive: workers by id that were heard of within their lease.
        away: members that were not.
        everyone: whoever ever took part.
        in_hand: batches that this learner holds, by worker.
        delivered: batches.
        lost: batches.
        missed: versions.
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
class _Waits:
    """How long one life of a worker has waited for room, as it said last, and when it first said so much."""

    incarnation: int
    seconds: float
    since: float


class Recorder:
    """Takes the samples of one learner. For one thread at a time.

    A fault of the server's, a full one or a missing right among them, costs a sample and nothing else.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        metrics: Metrics,
        *,
        epoch: int,
        known: Callable[[], RunState],
    ) -> None:
        """Begin a history, or go on with the one of the learner before.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            metrics: what this learner does.
            epoch: the learner's epoch.
            known: gives what it knows of its run.
        """
        self._connection, self._keys = connection, keys
        self._metrics, self._epoch, self._known = metrics, epoch, known
        self._due = {seconds: Deadline(0) for seconds in TIERS}
        self._waits: dict[int, _Waits] = {}
        self._room_seconds = 0.0
        self._began = False
        self._broken = False

    def record(self, *, write: bool = True, last: bool = False) -> Sample | None:
        """Take a sample and write it where it is due; give it, or None if that could not be done.

        Args:
            write: whether this learner is the one that writes the history.
            last: whether no further one follows, so that all streams get it.
        """
        if self._broken:
            return None
        try:
            sample = self._take()
            if write:
                self._write(sample, last=last)
        except PeerError as error:
            logger.debug("no figures for the history: %s", error)
            return None
        except Exception:  # the learner's work is worth more than its history
            self._broken = True
            logger.exception("the history of the run %r ends here", self._keys.run)
            return None
        return sample

    def _take(self) -> Sample:
        known = self._known()
        members, everyone = sorted(known.alive | known.away), sorted(known.everyone)
        time, *replies = self._connection.ask_once(
            [
                ("TIME",),
                *(("XLEN", self._keys.experiences(worker)) for worker in everyone),
                *(
                    ("HMGET", self._keys.heartbeat(worker), "incarnation", "version", "room_seconds")
                    for worker in members
                ),
            ]
        )
        if isinstance(time, PeerError):
            raise time
        at = int(time[0]) + int(time[1]) / 1e6
        # What a worker has put where its batches or its heartbeat belong may be anything.
        lengths = dict(zip(everyone, replies[: len(everyone)], strict=True))
        queued = {
            worker: length - known.in_hand.get(worker, 0)
            for worker, length in lengths.items()
            if isinstance(length, int) and length > known.in_hand.get(worker, 0)
        }
        running = {}
        for worker, said in zip(members, replies[len(everyone) :], strict=True):
            incarnation, version, waited = map(_text, (None,) * 3 if isinstance(said, PeerError) else said)
            running[worker] = whole_number(version) or 0
            if incarnation and waited:
                self._note_wait(worker, whole_number(incarnation) or 0, seconds_number(waited) or 0.0, at)
        self._waits = {worker: waits for worker, waits in self._waits.items() if worker in known.everyone}
        self._began = True
        sums = self._metrics.totals()
        own: dict[str, Any] = {name: int(sums.get(name, 0)) for name in _COUNTS}
        own |= {name: round(sums.get(name, 0.0), 4) for name in _SECONDS}
        return Sample(
            at=at,
            epoch=self._epoch,
            version=known.version,
            alive=len(known.alive),
            away=len(known.away),
            waiting=sum(queued.values()),
            in_hand=sum(known.in_hand.values()),
            **own,
            room_seconds=round(self._room_seconds, 4),
            delivered=known.delivered,
            lost=known.lost,
            missed=known.missed,
            staleness=self._metrics.staleness_counts(),
            running=dict(list(running.items())[:WORKERS_NAMED]),
            queued={worker: queued[worker] for worker in everyone[:WORKERS_NAMED] if worker in queued},
        )

    def _note_wait(self, worker: int, incarnation: int, seconds: float, at: float) -> None:
        """Add what a worker says it has waited since it last said so; it cannot have waited for longer than that."""
        waits = self._waits.get(worker)
        if waits is None or waits.incarnation != incarnation:
            # What it waited before this learner began is none of its figures.
            known = 0.0 if self._began else seconds
            waits = self._waits[worker] = _Waits(incarnation, known, waits.since if waits else at)
        if seconds > waits.seconds:
            self._room_seconds += min(seconds - waits.seconds, max(0.0, at - waits.since) + _SLACK_SECONDS)
            waits.seconds, waits.since = seconds, at

    def _write(self, sample: Sample, *, last: bool) -> None:
        due = [seconds for seconds, deadline in self._due.items() if last or seconds == 1 or deadline.over]
        said = flat(sample.to_fields())
        commands: list[list[Argument]] = [
            ["XADD", self._keys.history(seconds), "MAXLEN", "~", TIERS[seconds], "*", *said]
            for seconds in due
        ]
        replies = self._connection.ask_once(commands)
        for seconds in due:
            self._due[seconds] = Deadline(seconds)
        for reply in replies:
            if isinstance(reply, PeerError):
                raise reply


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


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else ""
