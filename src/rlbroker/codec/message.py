"""One tree as one message, which travels in a single Redis value.

`encode` and `decode` convert a whole message. `MessagePlan` and `MessageAssembly` do the same segment by segment, in
any order and in any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from rlbroker.codec.compression import RAW, compress, decompress
from rlbroker.codec.format import (
    DEFAULT_SEGMENT_BYTES,
    Buffer,
    Lane,
    LanePlan,
    StoredSegment,
    byte_view,
    check_segment,
    digest_of,
    find_body,
    plan_lanes,
    read_header,
    write_header,
)
from rlbroker.codec.leaves import LeafTable, leaf_elements, leaf_maker, normalise_bools
from rlbroker.codec.limits import DEFAULT_LIMITS, Limits
from rlbroker.codec.tree import TreePacker, unpack
from rlbroker.errors import BatchTooLarge, WireError


def encode(tree: object, *, compression: bool = True) -> bytes:
    """Return `tree` as bytes.

    Raises:
        UnsupportedType: a value cannot travel; the error names its path.
    """
    return b"".join(encode_pieces(tree, compression=compression))


def encode_pieces(tree: object, *, compression: bool = True) -> tuple[bytes | memoryview, ...]:
    """Return `tree` as bytes in pieces. Some are memory of the tree, which must not change while they are used.

    Raises:
        UnsupportedType: a value cannot travel; the error names its path.
    """
    return MessagePlan(tree, compression=compression).encode()


def decode(data: Buffer, *, limits: Limits = DEFAULT_LIMITS) -> Any:
    """Return the tree of a message.

    Raises:
        WireError: `data` is not one whole, valid message within `limits`.
    """
    return assemble(data, limits).tree()


def assemble(data: Buffer, limits: Limits = DEFAULT_LIMITS) -> MessageAssembly:
    """Return the leaves of a message, filled in.

    Raises:
        WireError: `data` is not one whole, valid message within `limits`.
    """
    view = byte_view(data)
    end = find_body(view)
    assembly = MessageAssembly(view[:end], limits)
    for index, segment in enumerate(assembly.segments):
        assembly.decode_segment(index, view[end : end + segment.stored_bytes])
        end += segment.stored_bytes
    return assembly


class MessagePlan:
    """The header and the segments of a tree to be written; any thread may encode any segment, in any order.

    Large leaves are not copied. They must not change until the last segment was encoded, and until the bytes of all
    segments that are stored raw were sent.
    """

    def __init__(
        self, tree: object, *, compression: bool = True, segment_bytes: int = DEFAULT_SEGMENT_BYTES
    ) -> None:
        """Find the leaves of `tree`, and cut them into segments.

        Raises:
            UnsupportedType: a value cannot travel; the error names its path.
            BatchTooLarge: the leaves have more bytes than readers take.
            InvalidArgument: `segment_bytes` is out of range.
        """
        table = LeafTable()
        packer = TreePacker(table.add)
        self._tree = packer.pack(tree)
        self._found = packer.found
        self._leaves = table.leaves
        self._compression = compression
        self._lanes = plan_lanes(table.leaves, segment_bytes)
        if self.raw_bytes > DEFAULT_LIMITS.max_raw_bytes:  # before anything is copied
            raise BatchTooLarge(
                f"{self.raw_bytes:,} bytes of arrays; no more than {DEFAULT_LIMITS.max_raw_bytes:,} may travel in one "
                "message: send it in parts"
            )
        elements = [leaf_elements(source) for source in table.sources]
        #: The raw bytes of each segment, and their element size.
        self._segments: list[tuple[memoryview, int]] = []
        for lane in self._lanes:
            raw = _lane_bytes(lane, [elements[number] for number in lane.leaf_numbers])
            self._segments += [(raw[cut : cut + lane.cuts.step], lane.typesize) for cut in lane.cuts]

    @property
    def raw_bytes(self) -> int:
        """Size of all leaves in bytes; each tied one counts once."""
        return sum(lane.raw_bytes for lane in self._lanes)

    @property
    def rows(self) -> int:
        """The leading dimension of the first array or tensor that has one, at the lowest depth; 0 without one."""
        rows, lowest = 0, DEFAULT_LIMITS.max_depth + 1
        for depth, number in self._found:
            leaf = self._leaves[number]
            if depth < lowest and leaf.shape and leaf.shape[0] and leaf.kind != "bytes":
                rows, lowest = leaf.shape[0], depth
        return rows

    @property
    def segment_count(self) -> int:
        """The number of segments."""
        return len(self._segments)

    def encode(self) -> tuple[bytes | memoryview, ...]:
        """Return the whole message in pieces, some of which are memory of the tree."""
        encoded = [self.encode_segment(index) for index in range(len(self._segments))]
        return (self.header([segment for segment, _ in encoded]), *(stored for _, stored in encoded))

    def encode_segment(self, index: int) -> tuple[StoredSegment, bytes | memoryview]:
        """Return the description of segment `index` and its stored bytes: a view of the leaf where stored raw."""
        raw, typesize = self._segments[index]
        codec, stored = compress(raw, typesize) if self._compression else (RAW, raw)
        return StoredSegment(codec, len(raw), len(stored), digest_of(stored)), stored

    def header(self, segments: Sequence[StoredSegment]) -> bytes:
        """Return prelude and header, given the descriptions of all segments in order."""
        return write_header(self._tree, self._leaves, self._lanes, segments)


def _lane_bytes(lane: LanePlan, elements: list[np.ndarray[Any, Any]]) -> memoryview:
    """Return the bytes of a lane: a large leaf's own memory if its layout allows that, a copy of small leaves."""
    if lane.large:
        return np.ascontiguousarray(elements[0]).reshape(-1).view(np.uint8).data
    return memoryview(b"".join(part.tobytes() for part in elements))


class MessageAssembly:
    """The leaves that a header announces, to be filled from segments.

    Every leaf has memory of its own, so that a reference to a small one does not keep the others in memory.
    """

    def __init__(self, header: Buffer, limits: Limits = DEFAULT_LIMITS) -> None:
        """Check the whole header against `limits`, then allocate the leaves.

        Raises:
            WireError: the header is invalid, exceeds `limits`, or is that of a delta.
            IncompatibleFormat: it is of another version of the format.
        """
        checked = read_header(byte_view(header), limits)
        if checked.is_delta:
            raise WireError("this is a delta, which needs the weights that it was made from")
        self._tree = checked.tree
        self._raw_bytes = checked.raw_bytes
        self._segments = checked.segments
        #: For each segment its lane, and where in the lane it starts.
        self._places = [
            (lane, end - segment.raw_bytes)
            for lane in checked.lanes
            for segment, end in zip(
                lane.segments, accumulate(segment.raw_bytes for segment in lane.segments), strict=True
            )
        ]
        self._done = bytearray(len(self._segments))
        self._leaves = checked.leaves
        self._makers = [leaf_maker(leaf) for leaf in checked.leaves]
        try:
            self._elements = [np.empty(leaf.shape, leaf.carrier) for leaf in checked.leaves]
        except MemoryError as error:
            raise WireError(f"no memory for {self._raw_bytes} bytes of arrays") from error

    @property
    def raw_bytes(self) -> int:
        """Size of all leaves in bytes; each tied one counts once."""
        return self._raw_bytes

    @property
    def restored_bytes(self) -> int:
        """Size of all leaves in memory, with their original dtypes."""
        return sum(leaf.restored_bytes for leaf in self._leaves)

    @property
    def segments(self) -> Sequence[StoredSegment]:
        """The descriptions of all segments, in order."""
        return self._segments

    def decode_segment(self, index: int, data: Buffer) -> None:
        """Fill in segment `index` from its stored bytes; raise WireError if they are not the announced ones.

        Safe in several threads. `data` must not change during the call, and may be reused afterwards.
        """
        segment = self._segments[index]
        stored = check_segment(index, segment, data)
        lane, start = self._places[index]
        if len(lane.leaf_numbers) == 1:
            number = lane.leaf_numbers[0]
            out = self._elements[number].reshape(-1).view(np.uint8)[start : start + segment.raw_bytes]
            decompress(segment.codec, stored, lane.typesize, out)
            normalise_bools(self._leaves[number], out)
        else:
            self._fill_small_leaves(lane, segment, stored)
        self._done[index] = 1

    def _fill_small_leaves(self, lane: Lane, segment: StoredSegment, stored: memoryview) -> None:
        if segment.codec == RAW:
            raw = np.frombuffer(stored, np.uint8)
        else:
            raw = np.empty(segment.raw_bytes, np.uint8)
            decompress(segment.codec, stored, lane.typesize, raw)
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
