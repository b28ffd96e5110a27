"""The writing half: what a tree consists of, and its segments, encoded one by one in any thread."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlbroker.codec.compression import RAW, compress
from rlbroker.codec.format import StoredSegment, digest_of
from rlbroker.codec.lanes import DEFAULT_SEGMENT_BYTES, LanePlan, plan_lanes, write_planned
from rlbroker.codec.taking import Elements, LeafTaker, elements_of
from rlbroker.codec.tree import TreePacker


class Plan:
    """How a tree is written: a header, and segments that any thread may encode in any order.

    Large leaves are referred to, not copied: they must not change until the last segment was encoded and,
    for a segment that is stored raw, until its bytes were sent.
    """

    def __init__(self, tree: object, *, compression: bool, segment_bytes: int) -> None:
        """See `plan`."""
        taker = LeafTaker()
        self._tree = TreePacker(taker.take).pack(tree)
        self._leaves = taker.leaves
        self._compression = compression
        self._lanes = plan_lanes(taker.leaves, segment_bytes)
        elements = [elements_of(source) for source in taker.sources]
        #: What segment i holds, raw, and its element size.
        self._segments: list[tuple[memoryview, int]] = []
        for lane in self._lanes:
            raw = _lane_bytes(lane, [elements[number] for number in lane.leaf_numbers])
            self._segments += [(raw[cut : cut + lane.cuts.step], lane.typesize) for cut in lane.cuts]

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
        codec, stored = compress(raw, typesize) if self._compression else (RAW, raw)
        return StoredSegment(codec, len(raw), len(stored), digest_of(stored)), stored

    def header(self, segments: Sequence[StoredSegment]) -> bytes:
        """Return prelude and header, given the facts of all segments in order."""
        return write_planned(self._tree, self._leaves, self._lanes, segments)


def plan(tree: object, *, compression: bool = True, segment_bytes: int = DEFAULT_SEGMENT_BYTES) -> Plan:
    """Take `tree` apart for writing; raise UnsupportedType, which names the path, for what cannot travel."""
    return Plan(tree, compression=compression, segment_bytes=segment_bytes)


def _lane_bytes(lane: LanePlan, elements: list[Elements]) -> memoryview:
    """Return the bytes of a lane: a large leaf's own memory if its layout allows, a copy of small ones."""
    if lane.large:
        return np.ascontiguousarray(elements[0]).reshape(-1).view(np.uint8).data
    return memoryview(b"".join(part.tobytes() for part in elements))
