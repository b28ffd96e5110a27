"""The writing half: what a tree consists of, and its segments, encoded one by one in any thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlbroker.errors import InvalidArgument
from rlbroker.wire import compress
from rlbroker.wire.format import StoredSegment, digest_of, write_header
from rlbroker.wire.leaves import Leaf, LeafTaker
from rlbroker.wire.tree import TreePacker

#: Segments of this size move through Redis 3 to 5 times faster than one large value.
DEFAULT_SEGMENT_BYTES = 4 << 20

#: Leaves below this share a lane with others of their element size; larger ones are not copied by the plan.
LARGE_LEAF_BYTES = 64 << 10


@dataclass(slots=True)
class _Lane:
    typesize: int
    leaf_numbers: list[int] = field(default_factory=list)
    parts: list[bytes | memoryview] = field(default_factory=list)
    raw_bytes: int = 0

    def add(self, number: int, part: bytes | memoryview) -> None:
        self.leaf_numbers.append(number)
        self.parts.append(part)
        self.raw_bytes += len(part)


class Plan:
    """How a tree is written: a header, and segments that any thread may encode in any order.

    Large leaves are referred to, not copied: they must not change until the last segment was encoded and,
    for a segment that is stored raw, until its bytes were sent.
    """

    def __init__(self, tree: object, *, compression: bool, segment_bytes: int) -> None:
        """See `plan`."""
        if segment_bytes < 1 or segment_bytes > compress.MAX_SEGMENT_BYTES:
            raise InvalidArgument(
                f"segment_bytes={segment_bytes}; from 1 to {compress.MAX_SEGMENT_BYTES} works"
            )
        taker = LeafTaker()
        self._tree = TreePacker(taker.take).pack(tree)
        self._leaves: list[Leaf] = [leaf for leaf, _ in taker.leaves]
        self._compression = compression
        self._lanes = _lanes(taker.leaves, min(LARGE_LEAF_BYTES, segment_bytes), segment_bytes)
        #: What segment i holds, raw, and its element size.
        self._segments: list[tuple[memoryview, int]] = []
        self._segment_counts: list[int] = []
        for lane in self._lanes:
            raw = memoryview(lane.parts[0] if len(lane.parts) == 1 else b"".join(lane.parts))
            cuts = range(0, lane.raw_bytes, max(segment_bytes // lane.typesize, 1) * lane.typesize)
            if len(lane.leaf_numbers) > 1:
                cuts = range(0, lane.raw_bytes, max(lane.raw_bytes, 1))
            self._segments += [(raw[cut : cut + cuts.step], lane.typesize) for cut in cuts]
            self._segment_counts.append(len(cuts))

    @property
    def raw_bytes(self) -> int:
        """Size of all leaves in bytes, each tied one counted once."""
        return sum(lane.raw_bytes for lane in self._lanes)

    @property
    def segment_count(self) -> int:
        """How many segments there are."""
        return len(self._segments)

    def segment_raw_bytes(self, index: int) -> int:
        """Size of segment `index` before compression."""
        return len(self._segments[index][0])

    def encode_segment(self, index: int) -> tuple[StoredSegment, bytes | memoryview]:
        """Return the facts of segment `index`, and its stored bytes: a view of the leaf where stored raw."""
        raw, typesize = self._segments[index]
        codec, stored = compress.compress(raw, typesize) if self._compression else (compress.RAW, raw)
        return StoredSegment(codec, len(raw), len(stored), digest_of(stored)), stored

    def header(self, segments: Sequence[StoredSegment]) -> bytes:
        """Return prelude and header, given the facts of all segments in order."""
        if len(segments) != len(self._segments):
            raise InvalidArgument(f"{len(segments)} segments given; the plan has {len(self._segments)}")
        lanes = []
        first = 0
        for lane, count in zip(self._lanes, self._segment_counts, strict=True):
            lanes.append((lane.typesize, lane.leaf_numbers, segments[first : first + count]))
            first += count
        return write_header(self._tree, self._leaves, lanes)


def plan(tree: object, *, compression: bool = True, segment_bytes: int = DEFAULT_SEGMENT_BYTES) -> Plan:
    """Take `tree` apart for writing; raise UnsupportedType, which names the path, for what cannot travel."""
    return Plan(tree, compression=compression, segment_bytes=segment_bytes)


def _lanes(
    leaves: list[tuple[Leaf, np.ndarray[Any, Any]]], large_bytes: int, segment_bytes: int
) -> list[_Lane]:
    """Give each large leaf a lane, and the small ones of one element size a lane together.

    Small leaves that are too few to be compressed share one lane whatever their element size.
    """
    small_bytes = sum(elements.nbytes for _, elements in leaves if elements.nbytes < large_bytes)
    mixed = small_bytes < compress.MIN_COMPRESS_BYTES
    lanes: list[_Lane] = []
    open_lanes: dict[int, _Lane] = {}
    for number, (leaf, elements) in enumerate(leaves):
        typesize = leaf.carrier.itemsize
        nbytes = elements.nbytes
        if nbytes >= large_bytes:
            lane = _Lane(typesize)
            lanes.append(lane)
            lane.add(number, np.ascontiguousarray(elements).reshape(-1).view(np.uint8).data)
            continue
        if mixed:
            typesize = 1
        open_lane = open_lanes.get(typesize)
        if open_lane is None or open_lane.raw_bytes + nbytes > segment_bytes:
            open_lane = open_lanes[typesize] = _Lane(typesize)
            lanes.append(open_lane)
        open_lane.add(number, elements.tobytes())
    return lanes
