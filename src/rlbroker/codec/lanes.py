"""Which leaves lie together, and where their bytes are cut: shared by all who write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlbroker.codec import compression
from rlbroker.codec.format import StoredSegment, write_header
from rlbroker.codec.leaves import Leaf
from rlbroker.errors import InvalidArgument

#: Segments of this size move through Redis 3 to 5 times faster than one large value.
DEFAULT_SEGMENT_BYTES = 4 << 20

#: Leaves below this share a lane with others of their element size; larger ones are not copied by the plan.
LARGE_LEAF_BYTES = 64 << 10


@dataclass(slots=True)
class LanePlan:
    """Leaves whose bytes follow one another, and the starts of the segments that they are cut into."""

    typesize: int
    leaf_numbers: list[int] = field(default_factory=list)
    raw_bytes: int = 0
    cuts: range = range(0)
    #: It holds one leaf, which is large.
    large: bool = False

    def add(self, number: int, raw_bytes: int) -> None:
        """Append a leaf."""
        self.leaf_numbers.append(number)
        self.raw_bytes += raw_bytes

    @property
    def segment_sizes(self) -> list[int]:
        """Raw sizes of the segments."""
        return [min(self.cuts.step, self.raw_bytes - cut) for cut in self.cuts]


def plan_lanes(leaves: Sequence[Leaf], segment_bytes: int) -> list[LanePlan]:
    """Give each large leaf a lane, and the small ones of one element size a lane together.

    Small leaves that are too few to be compressed share one lane whatever their element size. Raises
    InvalidArgument for a size that no segment can have.
    """
    if segment_bytes < 1 or segment_bytes > compression.MAX_SEGMENT_BYTES:
        raise InvalidArgument(
            f"segment_bytes={segment_bytes}; from 1 to {compression.MAX_SEGMENT_BYTES} works"
        )
    large_bytes = min(LARGE_LEAF_BYTES, segment_bytes)
    small_bytes = sum(leaf.nbytes for leaf in leaves if leaf.nbytes < large_bytes)
    mixed = small_bytes < compression.MIN_COMPRESS_BYTES
    lanes: list[LanePlan] = []
    open_lanes: dict[int, LanePlan] = {}
    for number, leaf in enumerate(leaves):
        typesize = leaf.carrier.itemsize
        nbytes = leaf.nbytes
        if nbytes >= large_bytes:
            lane = LanePlan(typesize, large=True)
            lanes.append(lane)
            lane.add(number, nbytes)
            continue
        if mixed:
            typesize = 1
        open_lane = open_lanes.get(typesize)
        if open_lane is None or open_lane.raw_bytes + nbytes > segment_bytes:
            open_lane = open_lanes[typesize] = LanePlan(typesize)
            lanes.append(open_lane)
        open_lane.add(number, nbytes)
    for lane in lanes:
        whole_elements = max(segment_bytes // lane.typesize, 1) * lane.typesize
        lane.cuts = range(0, lane.raw_bytes, whole_elements)
        if len(lane.leaf_numbers) > 1:
            lane.cuts = range(0, lane.raw_bytes, max(lane.raw_bytes, 1))
    return lanes


def write_planned(
    tree: object, leaves: Sequence[Leaf], lanes: Sequence[LanePlan], segments: Sequence[StoredSegment]
) -> bytes:
    """Return prelude and header, given the facts of all segments in order."""
    planned = sum(len(lane.cuts) for lane in lanes)
    if len(segments) != planned:
        raise InvalidArgument(f"{len(segments)} segments given; the plan has {planned}")
    rows = []
    first = 0
    for lane in lanes:
        rows.append((lane.typesize, lane.leaf_numbers, segments[first : first + len(lane.cuts)]))
        first += len(lane.cuts)
    return write_header(tree, leaves, rows)
