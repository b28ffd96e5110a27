"""The history of a run: figures that its learner writes each second, and how to read them.

They are kept in three streams (`TIERS`): each second, each half minute and each ten minutes. Whoever reads gets
the finest that is still there. Most figures are sums that only grow, so that two samples, however far apart, tell
what happened in between: `Interval` does that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Final, Self

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import entry_place, seconds_number, text_fields, whole_number
from rlbroker.metrics.counters import EXACT_BELOW

#: Seconds between two samples, and how many are kept: half an hour, twelve hours, two weeks.
TIERS: Final = {1: 1800, 30: 1440, 600: 2000}

#: Workers whose version and queue a sample names, the lowest ids first: it must stay small.
WORKERS_NAMED: Final = 256

_FINEST: Final = min(TIERS)


@dataclass(frozen=True)
class Sample:
    """The figures of one moment.

    Attributes:
        at: when it was, by the server's clock, seconds since the epoch.
        epoch: of the learner that wrote it. Its own sums begin at 0 with each epoch.
        version: the latest version.
        alive: workers that were heard of within their lease.
        away: members that were not.
        waiting: batches in the queues that this learner has not read. What other learners hold counts too.
        in_hand: batches that it has read and not acknowledged.
        published: versions that this learner published, as the further sums since it began.
        published_raw_bytes: bytes of their tensors.
        published_stored_bytes: bytes that went to the server for them.
        encode_seconds: encoding them, summed over threads: it goes on while earlier chunks are sent.
        send_seconds: sending chunks, without the time that sending waited for encoding.
        publish_seconds: from the call of `send_model_weights` until the version was out.
        collected: batches given out by `collect_experiences`.
        rows: rows of these batches.
        collected_raw_bytes: bytes of their tensors.
        collected_stored_bytes: bytes that came from the server for them.
        decode_seconds: decoding what was read.
        wait_seconds: in which `collect_experiences` had nothing to give and waited for the server: the learner waits
            for its workers.
        room_seconds: in which `send_experiences` waited for room in a full queue, as workers say, summed over those
            that were members: workers wait for the learner.
        delivered: batches of the run that were acknowledged, as far as this learner knows: what other learners
            acknowledge is noticed within seconds, if this one collects.
        lost: batches of the run that were counted for another reason, as far as it knows: `stale`, `corrupt`, `poison`
            and `trimmed` at once, what workers count (`dropped_oldest`, `dropped_newest`, `stopped`, `fenced`) within
            seconds, if this learner collects. Without `vanished`, which takes a look at every queue. Dead letters
            that are tried again are taken off.
        missed: versions of the run that some worker missed, summed over workers.
        staleness: batches collected since this learner began, by staleness: exact below 16; from there on by powers of
            two, each standing for itself and all up to the next.
        running: version that each member runs, by worker id; the 256 lowest ids at most.
        queued: batches waiting by worker id, of the same workers, where there are any.
    """

    at: float
    epoch: int
    version: int
    alive: int
    away: int
    waiting: int
    in_hand: int
    published: int
    published_raw_bytes: int
    published_stored_bytes: int
    encode_seconds: float
    send_seconds: float
    publish_seconds: float
    collected: int
    rows: int
    collected_raw_bytes: int
    collected_stored_bytes: int
    decode_seconds: float
    wait_seconds: float
    room_seconds: float
    delivered: int
    lost: int
    missed: int
    staleness: Mapping[int, int]
    running: Mapping[int, int]
    queued: Mapping[int, int]

    def to_fields(self) -> dict[str, str]:
        """Give the sample as the fields of a stream entry, whose id says when it was."""
        return {name: _text(getattr(self, name)) for name in _WRITTEN}

    @classmethod
    def from_fields(cls, entry_id: str, written: Mapping[str, str]) -> Self | None:
        """Give the sample of a stream entry; None if it is none, whatever is in it."""
        try:
            at = entry_place(entry_id)[0] / 1000
            read: dict[str, Any] = {name: value_of(written[name]) for name, value_of in _WRITTEN.items()}
            return cls(at=at, **read)
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True)
class Interval:
    """What happened between two samples of one learner."""

    before: Sample
    after: Sample

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.after.at - self.before.at

    def growth(self, name: str) -> float:
        """Give by how much a sum grew; never less than 0."""
        return float(max(0, getattr(self.after, name) - getattr(self.before, name)))

    def rate(self, name: str) -> float:
        """Give by how much a sum grew each second."""
        return self.growth(name) / self.seconds if self.seconds > 0 else 0.0

    def share(self, name: str) -> float:
        """Give which part of the time something took, from a sum of seconds.

        More than 1 where several threads or workers did it at once.
        """
        return self.rate(name)

    @property
    def staleness(self) -> dict[int, int]:
        """Batches collected in between, by staleness, as in `Sample`."""
        before = self.before.staleness
        grown = {bound: count - before.get(bound, 0) for bound, count in self.after.staleness.items()}
        return {bound: count for bound, count in sorted(grown.items()) if count > 0}

    def staleness_quantile(self, q: float) -> float | None:
        """Give the staleness that this part of the batches collected in between did not exceed; None without any.

        From 16 on it is a lower bound.
        """
        counts = self.staleness
        wanted, seen = q * sum(counts.values()), 0
        for bound, count in counts.items():
            seen += count
            if seen >= wanted:
                return float(bound)
        return None

    @property
    def mean_staleness(self) -> float | None:
        """Mean staleness of the batches collected in between; None without any. From 16 on it is estimated."""
        counts = self.staleness
        number = sum(counts.values())
        return sum(_middle(bound) * count for bound, count in counts.items()) / number if number else None


def intervals(samples: Iterable[Sample]) -> list[Interval]:
    """Give what happened between neighbours; sums of different learners do not compare."""
    return [
        Interval(before, after)
        for before, after in pairwise(samples)
        if before.epoch == after.epoch and before.at < after.at
    ]


def read_history(
    connection: Connection, keys: Keys, *, since: float = 0.0, count: int | None = None
) -> list[Sample]:
    """Give the samples of a run, oldest first.

    Args:
        connection: way to the server.
        keys: names of the run's keys.
        since: seconds since the epoch; older ones are left out.
        count: give only so many of the newest, each second's.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    first = str(int(since * 1000))
    if count is not None:
        reply = connection.execute("XREVRANGE", keys.history(_FINEST), "+", first, "COUNT", count)
        return _samples(reply)[::-1]
    found, last = list[Sample](), "+"
    for seconds in sorted(TIERS):
        older = _samples(connection.execute("XRANGE", keys.history(seconds), first, last))
        found = joined(older, found)
        if found:
            # Only what is older than the finer ones is left to look for.
            last = str(max(0, round(found[0].at * 1000) - 1))
    return found


def joined(coarse: Sequence[Sample], fine: Sequence[Sample]) -> list[Sample]:
    """Give the finer samples, and before them the coarser ones that are older."""
    begins = fine[0].at if fine else math.inf
    return [*(one for one in coarse if one.at < begins), *fine]


def _samples(reply: Any) -> list[Sample]:
    found = (
        Sample.from_fields(entry_id.decode(errors="replace"), text_fields(written))
        for entry_id, written in reply
    )
    return [sample for sample in found if sample is not None]


def _middle(bound: int) -> float:
    return bound if bound < EXACT_BELOW else (3 * bound - 1) / 2


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}:{number}" for key, number in sorted(value.items()))
    return repr(value) if isinstance(value, float) else str(value)


def _whole(text: str) -> int:
    number = whole_number(text)
    if number is None:
        raise ValueError(text)
    return number


def _seconds(text: str) -> float:
    number = seconds_number(text)
    if number is None:
        raise ValueError(text)
    return number


def _pairs(text: str) -> dict[int, int]:
    pairs = (word.partition(":") for word in text.split())
    return {_whole(key): _whole(number) for key, _, number in pairs}


#: What is written, in this order, and how it is read.
_WRITTEN: Final[Mapping[str, Callable[[str], Any]]] = {
    one.name: {"int": _whole, "float": _seconds}.get(str(one.type), _pairs)
    for one in fields(Sample)
    if one.name != "at"
}
