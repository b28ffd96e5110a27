"""The reading half: segments, decoded one by one in any thread, become the leaves of a tree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from rlbroker.codec import compression
from rlbroker.codec.format import Buffer, Lane, StoredSegment, byte_view, checked_bytes, read_header
from rlbroker.codec.leaves import leaf_maker, normalise_bools
from rlbroker.codec.limits import DEFAULT_LIMITS, Limits
from rlbroker.codec.tree import unpack
from rlbroker.errors import WireError


class Assembly:
    """What a header announces, to be filled with segments.

    Every leaf owns its memory, so that keeping a small one does not keep the others.
    """

    def __init__(self, header: Buffer, limits: Limits = DEFAULT_LIMITS) -> None:
        """Check the whole header against `limits`, then allocate the leaves.

        Raises WireError, and IncompatibleFormat for another version of the format.
        """
        facts = read_header(byte_view(header), limits)
        if facts.is_delta:
            raise WireError("this is a delta, which needs the weights that it was made from")
        self._tree = facts.tree
        self._raw_bytes = facts.raw_bytes
        self._segments = facts.segments
        #: For each segment its lane, and where in the lane it starts.
        self._places = [
            (lane, end - segment.raw_bytes)
            for lane in facts.lanes
            for segment, end in zip(
                lane.segments, accumulate(segment.raw_bytes for segment in lane.segments), strict=True
            )
        ]
        self._done = bytearray(len(self._segments))
        self._leaves = facts.leaves
        self._makers = [leaf_maker(leaf) for leaf in facts.leaves]
        try:
            self._elements = [np.empty(leaf.shape, leaf.carrier) for leaf in facts.leaves]
        except MemoryError as error:
            raise WireError(f"no memory for {self._raw_bytes} bytes of arrays") from error

    @property
    def raw_bytes(self) -> int:
        """Size of all leaves in bytes, each tied one counted once."""
        return self._raw_bytes

    @property
    def segments(self) -> Sequence[StoredSegment]:
        """The facts of each segment, in order."""
        return self._segments

    def decode_segment(self, index: int, data: Buffer) -> None:
        """Fill in segment `index` from its stored bytes; raise WireError if they are not the announced ones.

        Safe in several threads. `data` must not change during the call, and may be reused afterwards.
        """
        segment = self._segments[index]
        stored = checked_bytes(index, segment, data)
        lane, start = self._places[index]
        if len(lane.leaf_numbers) == 1:
            number = lane.leaf_numbers[0]
            out = self._elements[number].reshape(-1).view(np.uint8)[start : start + segment.raw_bytes]
            compression.restore(segment.codec, stored, lane.typesize, out)
            normalise_bools(self._leaves[number], out)
        else:
            self._fill_bundle(lane, segment, stored)
        self._done[index] = 1

    def _fill_bundle(self, lane: Lane, segment: StoredSegment, stored: memoryview) -> None:
        if segment.codec == compression.RAW:
            raw = np.frombuffer(stored, np.uint8)
        else:
            raw = np.empty(segment.raw_bytes, np.uint8)
            compression.restore(segment.codec, stored, lane.typesize, raw)
        start = 0
        for number in lane.leaf_numbers:
            leaf = self._leaves[number]
            elements = self._elements[number]
            if elements.nbytes:
                elements[...] = np.ndarray(leaf.shape, leaf.carrier, raw, start)
                start += elements.nbytes
                if leaf.carrier.kind == "b":
                    normalise_bools(leaf, elements.view(np.uint8))

    def tree(self) -> Any:
        """Return the tree; raise WireError while a segment is missing."""
        missing = self._done.find(0)
        if missing >= 0:
            raise WireError(f"segment {missing} of {len(self._segments)} is missing")
        leaves = [make(elements) for make, elements in zip(self._makers, self._elements, strict=True)]
        return unpack(self._tree, leaves)
