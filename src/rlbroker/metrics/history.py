"""The history of a run: samples that its learner writes every second, and the functions that read them.

Samples are kept in three streams (`TIERS`): one a second, one every 30 seconds, and one every ten minutes. A reader
gets the finest samples that are still stored. Most values are sums that only grow, so two samples, however far apart,
describe the time between them: an `Interval`.
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

#: By the seconds between two samples: how many are kept. That is half an hour, twelve hours, and two weeks.
TIERS: Final = {1: 1800, 30: 1440, 600: 2000}

#: The most workers whose version and queue a sample contains, lowest ids first, so that samples stay small.
WORKERS_NAMED: Final = 256

_FINEST: Final = min(TIERS)


@dataclass(frozen=True)
class Sample:
    """The state of a run at one moment, and sums up to then.

    Attributes:
        at: the time by the server's clock, in seconds since the epoch.
        epoch: the epoch of the learner that wrote the sample. Its own sums start at 0.
        version: the latest version.
        alive: members with a heartbeat within their lease.
        away: members without one.
        waiting: batches in the queues that this learner has not read; batches pending at other learners count too.
        in_hand: batches that this learner has read and not acknowledged.
        published: versions that this learner published. This and the following sums count from its start.
        published_raw_bytes: bytes of their tensors.
        published_stored_bytes: bytes sent to the server for them.
        encode_seconds: time spent encoding them, summed over threads; encoding continues while chunks are sent.
        send_seconds: time spent sending chunks, without the time that sending waited for encoding.
        publish_seconds: time from the call of `send_model_weights` until the version was published.
        collected: batches that `collect_experiences` returned.
        rows: rows of these batches.
        collected_raw_bytes: bytes of their tensors.
        collected_stored_bytes: bytes received from the server for them.
        decode_seconds: time spent decoding them.
        wait_seconds: time that `collect_experiences` waited for a first batch: the learner waits for its workers.
        room_seconds: time that `send_experiences` waited for room in a full queue, as reported by the workers and
            summed over those that were members: workers wait for the learner.
        delivered: batches of the run that were acknowledged, as far as this learner knows. If it collects, it learns
            within seconds what other learners acknowledged.
        lost: batches of the run that were counted as lost, as far as this learner knows. The reasons `stale`,
            `corrupt`, `poison` and `trimmed` count at once. What workers count (`dropped_oldest`, `dropped_newest`,
            `stopped`, `fenced`) is known within seconds if this learner collects. `vanished` is not included, because
            it takes a read of every queue. Retried dead letters are subtracted.
        missed: versions of the run that a worker missed, summed over workers.
        staleness: batches collected since this learner started, by staleness: exact below 16, then by powers of two,
            each the lower bound of its bucket.
        running: the version that each member runs, by worker id; the 256 lowest ids at most.
        queued: batches waiting, by worker id, for the same workers; those without any are left out.
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
        """Return the sample as the fields of a stream entry. The entry's id holds the time."""
        return {name: _to_text(getattr(self, name)) for name in _PARSERS}

    @classmethod
    def from_fields(cls, entry_id: str, written: Mapping[str, str]) -> Self | None:
        """Return the sample in a stream entry, or None if the entry does not hold a valid one."""
        try:
            at = entry_place(entry_id)[0] / 1000
            values: dict[str, Any] = {name: parse(written[name]) for name, parse in _PARSERS.items()}
            return cls(at=at, **values)
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True)
class Interval:
    """The time between two samples of one learner."""

    before: Sample
    after: Sample

    @property
    def seconds(self) -> float:
        """The length of the interval."""
        return self.after.at - self.before.at

    def growth(self, name: str) -> float:
        """Return how much a sum grew; 0 if it fell."""
        return float(max(0, getattr(self.after, name) - getattr(self.before, name)))

    def rate(self, name: str) -> float:
        """Return how much a sum grew per second."""
        return self.growth(name) / self.seconds if self.seconds > 0 else 0.0

    def share(self, name: str) -> float:
        """Return the fraction of the interval that went into a sum of seconds.

        It exceeds 1 if several threads or workers spent that time at once.
        """
        return self.rate(name)

    @property
    def staleness(self) -> dict[int, int]:
        """Batches collected in the interval, by staleness, as in `Sample`."""
        before = self.before.staleness
        grown = {bound: count - before.get(bound, 0) for bound, count in self.after.staleness.items()}
        return {bound: count for bound, count in sorted(grown.items()) if count > 0}

    def staleness_quantile(self, q: float) -> float | None:
        """Return a quantile of the staleness of the batches collected in the interval; None without any.

        Args:
            q: which quantile, from 0 to 1. A result of 16 or more is the lower bound of its bucket.
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
        """Mean staleness of the batches collected in the interval; None without any. From 16 on an estimate."""
        counts = self.staleness
        number = sum(counts.values())
        return (
            sum(_bucket_middle(bound) * count for bound, count in counts.items()) / number if number else None
        )


def intervals(samples: Iterable[Sample]) -> list[Interval]:
    """Return the intervals between neighbours, except between samples of different learners."""
    return [
        Interval(before, after)
        for before, after in pairwise(samples)
        if before.epoch == after.epoch and before.at < after.at
    ]


def read_history(
    connection: Connection, keys: Keys, *, since: float = 0.0, count: int | None = None
) -> list[Sample]:
    """Return the samples of a run, oldest first.

    Args:
        since: leave out samples older than this, in seconds since the epoch.
        count: return only this many of the newest one-second samples.
    """
    first = str(int(since * 1000))
    if count is not None:
        reply = connection.execute("XREVRANGE", keys.history(_FINEST), "+", first, "COUNT", count)
        return _parse_samples(reply)[::-1]
    found, last = list[Sample](), "+"
    for seconds in sorted(TIERS):
        older = _parse_samples(connection.execute("XRANGE", keys.history(seconds), first, last))
        found = merge_samples(older, found)
        if found:
            # The coarser streams are read only before the finer samples.
            last = str(max(0, round(found[0].at * 1000) - 1))
    return found


def merge_samples(coarse: Sequence[Sample], fine: Sequence[Sample]) -> list[Sample]:
    """Return the finer samples, preceded by the coarser ones that are older."""
    fine_from = fine[0].at if fine else math.inf
    return [*(sample for sample in coarse if sample.at < fine_from), *fine]


def _parse_samples(reply: Any) -> list[Sample]:
    found = (
        Sample.from_fields(entry_id.decode(errors="replace"), text_fields(written))
        for entry_id, written in reply
    )
    return [sample for sample in found if sample is not None]


def _bucket_middle(bound: int) -> float:
    return bound if bound < EXACT_BELOW else (3 * bound - 1) / 2


def _to_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}:{number}" for key, number in sorted(value.items()))
    return repr(value) if isinstance(value, float) else str(value)


def _parse_whole(text: str) -> int:
    number = whole_number(text)
    if number is None:
        raise ValueError(text)
    return number


def _parse_seconds(text: str) -> float:
    number = seconds_number(text)
    if number is None:
        raise ValueError(text)
    return number


def _parse_pairs(text: str) -> dict[int, int]:
    pairs = (word.partition(":") for word in text.split())
    return {_parse_whole(key): _parse_whole(number) for key, _, number in pairs}


#: By field of a stream entry, in the order in which they are written: its parser.
_PARSERS: Final[Mapping[str, Callable[[str], Any]]] = {
    field.name: {"int": _parse_whole, "float": _parse_seconds}.get(str(field.type), _parse_pairs)
    for field in fields(Sample)
    if field.name != "at"
}
