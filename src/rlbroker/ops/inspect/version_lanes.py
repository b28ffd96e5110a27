"""Who ran which version when: a lane for each worker, cut into cells of equal time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlbroker.metrics.history import Sample
from rlbroker.ops.inspect.timeline import Timeline
from rlbroker.types import Missed

#: Time for which a sample holds at least, as those of one second may come a little late.
_HELD_SECONDS = 3.0


@dataclass(frozen=True)
class Mark:
    """Versions that one worker missed at about one time, for one reason.

    Attributes:
        lane: place of the worker in `VersionLanes.workers`.
        column: which cell of time.
        count: how many versions.
    """

    lane: int
    column: int
    why: str
    count: int


@dataclass(frozen=True)
class VersionLanes:
    """What workers ran over a span of time.

    Attributes:
        workers: their ids, in order, one for each lane.
        begin: when the first cell begins, seconds since the epoch.
        end: when the last one ends.
        versions: by lane, the version that was run in each cell of time; 0 where nobody knows of one.
        marks: missed versions.
    """

    workers: Sequence[int]
    begin: float
    end: float
    versions: Sequence[Sequence[int]]
    marks: Sequence[Mark]

    @property
    def columns(self) -> int:
        """Cells of each lane."""
        return len(self.versions[0]) if self.versions else 0


def lay_lanes(course: Timeline, columns: int) -> VersionLanes:
    """Cut the span into so many cells, or fewer where samples are further apart, and see who ran what in each."""
    samples = course.samples
    if len(samples) < 2 or course.end <= course.begin:
        return VersionLanes((), course.begin, course.end, (), ())
    begin, end = course.begin, course.end
    columns = max(1, min(columns, round(end - begin)))
    width = (end - begin) / columns
    workers = sorted({worker for one in samples for worker in one.running})
    lanes = {worker: [0] * columns for worker in workers}
    for one, until in zip(samples, _held_until(samples), strict=True):
        # A cell shows what was run last within it: later samples write over earlier ones.
        first = min(columns - 1, int((one.at - begin) / width))
        last = min(columns - 1, max(first, int((until - begin) / width - 1e-9)))
        for worker, version in one.running.items():
            lane = lanes[worker]
            for column in range(first, last + 1):
                lane[column] = version
    place = {worker: number for number, worker in enumerate(workers)}
    return VersionLanes(
        workers, begin, end, list(lanes.values()), _marks(course.records, place, begin, width, columns)
    )


def _held_until(samples: Sequence[Sample]) -> list[float]:
    """Give until when each sample holds: until the next one, but not for much longer than they are apart elsewhere.

    What is longer is a gap: no learner was there to write, or what it wrote was lost.
    """
    found = []
    for number, one in enumerate(samples):
        before = samples[number - 1] if number else None
        after = samples[number + 1] if number + 1 < len(samples) else None
        apart = [abs(one.at - other.at) for other in (before, after) if other and other.epoch == one.epoch]
        until = one.at + max(_HELD_SECONDS, 2.5 * min(apart, default=0.0))
        found.append(min(until, after.at) if after else one.at)
    return found


def _marks(
    records: Sequence[Missed], place: dict[int, int], begin: float, width: float, columns: int
) -> list[Mark]:
    found = Counter[tuple[int, int, str]]()
    for one in records:
        column = int((one.at - begin) / width)
        if one.what == "weights" and one.worker_id in place and 0 <= column <= columns:
            found[place[one.worker_id], min(column, columns - 1), one.why] += one.count
    return [Mark(lane, column, why, count) for (lane, column, why), count in found.items()]
