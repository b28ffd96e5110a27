"""The layout of a message: a fixed prelude, a msgpack header, then the stored segments.

The header is a map. ``tree`` is the nesting, in which extension values name leaves. ``leaves``
describes each leaf: ``[kind, dtype, shape]``, and its original dtype where it was cast. ``lanes`` locates their bytes:
a lane is the bytes of some leaves, one after the other, cut into segments: ``[typesize, leaf numbers, segments]``, and
a segment is ``[codec, raw bytes, stored bytes, digest]``; a delta also has the digests of the raw bytes before and
after. No offset is written anywhere, so none can be wrong: every position follows from the sizes. ``metadata``, where
there is any, belongs to a state dict: plain values by the prefix of a module.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgpack
import xxhash

from rlbroker.codec import compression
from rlbroker.codec.leaves import Leaf, read_leaf
from rlbroker.codec.limits import DEFAULT_LIMITS, FORMAT_VERSION, Limits
from rlbroker.codec.tree import check_packed, ext_hook, pairs_hook, shorten, unpack
from rlbroker.errors import IncompatibleFormat, InvalidArgument, UnsupportedType, WireError

#: Segment codecs of deltas, as numbered on the wire: the base itself, differences of all words, and of some.
SAME = 2
DENSE = 3
SPARSE = 4
#: The head of a sparse segment: number of changed words, raw bytes of the gaps, stored bytes of the gaps.
SPARSE_HEAD = struct.Struct("<III")

MAGIC = b"RLBW"
#: magic, version, reserved, header bytes, body bytes, xxh3_64 of the header
PRELUDE = struct.Struct("<4sHHIQQ")

#: Segments of this size move through Redis 3 to 5 times faster than one large value.
DEFAULT_SEGMENT_BYTES = 4 << 20

#: Smaller leaves share a lane with others of their element size; larger ones are written without a copy.
LARGE_LEAF_BYTES = 64 << 10

Buffer = bytes | bytearray | memoryview

#: The entries that every header has, in order.
_HEADER_KEYS = ["tree", "leaves", "lanes"]

digest_of = xxhash.xxh3_64_intdigest


class StoredSegment(NamedTuple):
    """The description of one segment: its codec, sizes, and xxh3_64 of the stored bytes.

    A delta (codec 2 and above) also has the digests of the raw bytes before and after; they are 0 in others.
    """

    codec: int
    raw_bytes: int
    stored_bytes: int
    digest: int
    base_digest: int = 0
    raw_digest: int = 0

    @property
    def is_raw(self) -> bool:
        """Whether the stored bytes are the raw ones."""
        return self.codec == compression.RAW

    @property
    def is_delta(self) -> bool:
        """Whether a base is needed to decode this segment."""
        return self.codec >= SAME


class Lane(NamedTuple):
    """Bytes of leaves, one after the other, cut into segments.

    A lane has one leaf in any number of segments, or any number of leaves in at most one segment.
    """

    typesize: int
    leaf_numbers: Sequence[int]
    segments: Sequence[StoredSegment]


@dataclass(slots=True)
class Header:
    """A header that passed every check that needs no array bytes."""

    tree: object
    leaves: list[Leaf]
    lanes: list[Lane]
    body_bytes: int
    metadata: dict[str, Any] | None = None

    @property
    def raw_bytes(self) -> int:
        """Size of all leaves in bytes."""
        return sum(segment.raw_bytes for segment in self.segments)

    @property
    def segments(self) -> list[StoredSegment]:
        """The segments of all lanes, in order."""
        return [segment for lane in self.lanes for segment in lane.segments]

    @property
    def is_delta(self) -> bool:
        """Whether any of the segments needs a base to be decoded."""
        return any(segment.is_delta for segment in self.segments)


@dataclass(slots=True)
class LanePlan:
    """A lane to be written: the leaves whose bytes follow one another, and where their segments begin."""

    typesize: int
    leaf_numbers: list[int] = field(default_factory=list)
    raw_bytes: int = 0
    cuts: range = range(0)
    #: Whether it holds one large leaf.
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
    """Plan a lane for each large leaf, and one for all small leaves of an element size.

    Small leaves that are too few to be compressed share one lane, whatever their element size. Raises
    InvalidArgument for a size that no segment can have.
    """
    if segment_bytes < 1 or segment_bytes > compression.MAX_SEGMENT_BYTES:
        raise InvalidArgument(
            f"segment_bytes must be from 1 to {compression.MAX_SEGMENT_BYTES}; got {segment_bytes}"
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
        step = max(segment_bytes // lane.typesize, 1) * lane.typesize  # whole elements
        if len(lane.leaf_numbers) > 1:
            step = max(lane.raw_bytes, 1)
        lane.cuts = range(0, lane.raw_bytes, step)
    return lanes


def write_header(
    tree: object,
    leaves: Sequence[Leaf],
    lanes: Sequence[LanePlan],
    segments: Sequence[StoredSegment],
    metadata: object = None,
) -> bytes:
    """Return prelude and header, given the descriptions of all segments in order.

    Raises UnsupportedType if readers with default limits would refuse them.
    """
    planned = sum(len(lane.cuts) for lane in lanes)
    if len(segments) != planned:
        raise InvalidArgument(f"{len(segments)} segments given; the plan has {planned}")
    rows = iter([segment if segment.is_delta else segment[:4] for segment in segments])
    header_map = {
        "tree": tree,
        "leaves": [leaf.row for leaf in leaves],
        "lanes": [(lane.typesize, lane.leaf_numbers, [next(rows) for _ in lane.cuts]) for lane in lanes],
    }
    if metadata is not None:
        header_map["metadata"] = metadata
    try:
        header: bytes = msgpack.packb(header_map)
    except ValueError as error:  # one value, or all together, exceed the sizes that msgpack can represent
        raise UnsupportedType("the plain values of the tree are too large; send arrays") from error
    if len(header) > DEFAULT_LIMITS.max_header_bytes or len(leaves) > DEFAULT_LIMITS.max_leaves:
        raise UnsupportedType(
            f"the plain values of the tree take {len(header)} bytes and it has {len(leaves)} leaves; "
            f"the limits are {DEFAULT_LIMITS.max_header_bytes} and {DEFAULT_LIMITS.max_leaves}: "
            "send arrays in place of long lists of numbers"
        )
    body_bytes = sum(segment.stored_bytes for segment in segments)
    return PRELUDE.pack(MAGIC, FORMAT_VERSION, 0, len(header), body_bytes, digest_of(header)) + header


def byte_view(data: Buffer) -> memoryview:
    """Return a view of `data` as single bytes, whatever its item type is."""
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def check_segment(index: int, segment: StoredSegment, data: Buffer) -> memoryview:
    """Return `data` as bytes; raise WireError unless it is what segment `index` announces."""
    stored = byte_view(data)
    if len(stored) != segment.stored_bytes:
        raise WireError(
            f"segment {index} has {len(stored)} bytes; the header announced {segment.stored_bytes}"
        )
    if digest_of(stored) != segment.digest:
        raise WireError(f"the digest of segment {index} does not match")
    return stored


def find_body(message: memoryview) -> int:
    """Return the offset of the body; raise WireError unless the message ends exactly where its body ends."""
    end, body_bytes = read_prelude(message)
    if len(message) != end + body_bytes:
        raise WireError(f"a message of {end + body_bytes} bytes arrived as {len(message)}")
    return end


def read_prelude(data: memoryview) -> tuple[int, int]:
    """Return (offset of the end of the header, number of body bytes after it)."""
    if len(data) < PRELUDE.size:
        raise WireError(f"{len(data)} bytes are too short for a message")
    magic, version, reserved, header_bytes, body_bytes, _ = PRELUDE.unpack_from(data)
    if magic != MAGIC:
        raise WireError("this is not a message of rlbroker: the first four bytes are wrong")
    if version != FORMAT_VERSION:
        raise IncompatibleFormat(f"format version {version}; this release reads {FORMAT_VERSION}")
    if reserved:
        raise WireError("the reserved field of the prelude is not zero")
    return PRELUDE.size + header_bytes, body_bytes


def read_header(data: memoryview, limits: Limits) -> Header:
    """Check prelude and header, which are all of `data`, and return the header."""
    end, body_bytes = read_prelude(data)
    if end - PRELUDE.size > limits.max_header_bytes:
        raise WireError(f"a header of {end - PRELUDE.size} bytes; the limit is {limits.max_header_bytes}")
    if end != len(data):
        raise WireError(f"{len(data)} bytes, where prelude and header have {end}")
    packed = data[PRELUDE.size :]
    if not packed:
        raise WireError("the header is empty")
    (digest,) = struct.unpack_from("<Q", data, PRELUDE.size - 8)
    if digest_of(packed) != digest:
        raise WireError("the header's digest does not match")
    header_map = _unpack(packed)
    if type(header_map) is not dict or list(header_map) not in (_HEADER_KEYS, [*_HEADER_KEYS, "metadata"]):
        raise WireError("the header is not a map of tree, leaves and lanes")
    rows = header_map["leaves"]
    if type(rows) is not list or len(rows) > limits.max_leaves:
        raise WireError(f"the leaf table is not a list, or longer than {limits.max_leaves}")
    leaves = [read_leaf(*_check_row(row, "leaf", 3, 4)) for row in rows]
    if sum(leaf.restored_bytes for leaf in leaves if leaf.original is not None) > limits.max_raw_bytes:
        raise WireError(f"more than {limits.max_raw_bytes} bytes of arrays, once cast back")
    lanes = _read_lanes(header_map["lanes"], leaves, limits.max_raw_bytes)
    stored_bytes = sum(segment.stored_bytes for lane in lanes for segment in lane.segments)
    if stored_bytes != body_bytes:
        raise WireError(f"the segments have {stored_bytes} bytes, the body {body_bytes}")
    check_packed(header_map["tree"], len(leaves), limits.max_depth)
    metadata = _read_metadata(header_map["metadata"], limits.max_depth) if "metadata" in header_map else None
    return Header(header_map["tree"], leaves, lanes, body_bytes, metadata)


def _read_metadata(packed: object, max_depth: int) -> dict[str, Any]:
    """Return the metadata of a state dict; raise WireError unless it is plain values by module."""
    check_packed(packed, 0, max_depth)
    if type(packed) is not dict or not all(type(key) is str for key in packed):
        raise WireError("the metadata is not a map of modules")
    if not all(type(values) is dict for values in packed.values()):
        raise WireError("the metadata of a module is not a map")
    return unpack(packed, ())  # type: ignore[no-any-return] # it is a dictionary


def _unpack(packed: memoryview) -> Any:
    try:
        # Skipping allocates nothing, and reaches the end only if every length in the header is backed by that many
        # bytes. Without it, a few nested arrays that claim to be long would take gigabytes.
        skipper = msgpack.Unpacker(max_buffer_size=len(packed))
        skipper.feed(packed)
        skipper.skip()
        return msgpack.unpackb(
            packed,
            strict_map_key=False,  # ints may be keys; pairs_hook is stricter than strict_map_key
            ext_hook=ext_hook,
            object_pairs_hook=pairs_hook,
        )
    except (
        ValueError,
        TypeError,
        msgpack.exceptions.UnpackException,
        msgpack.exceptions.BufferFull,
    ) as error:
        raise WireError(f"the header is not acceptable msgpack: {error!s:.200}") from error


def _check_row(row: object, what: str, *lengths: int) -> list[Any]:
    """Return `row`; raise WireError unless it is a list of one of these lengths."""
    if type(row) is not list or len(row) not in lengths:
        raise WireError(f"a row that describes a {what} is not a list of {' or '.join(map(str, lengths))}")
    return row


def _read_lanes(rows: object, leaves: list[Leaf], max_raw_bytes: int) -> list[Lane]:
    if type(rows) is not list:
        raise WireError("the lanes are not a list")
    lanes: list[Lane] = []
    seen = bytearray(len(leaves))
    total = 0
    for row in rows:
        typesize, numbers, segment_rows = _check_row(row, "lane", 3)
        if type(typesize) is not int or not 0 < typesize <= 255:
            raise WireError(f"a lane with elements of {shorten(typesize)} bytes")
        if type(numbers) is not list or type(segment_rows) is not list:
            raise WireError("the leaves or segments of a lane are not a list")
        for number in numbers:
            if type(number) is not int or not 0 <= number < len(leaves) or seen[number]:
                raise WireError(
                    f"a lane holds leaf {shorten(number)}, which does not exist or has a lane already"
                )
            seen[number] = 1
        if len(numbers) != 1 and len(segment_rows) > 1:
            raise WireError("a lane has several leaves and several segments")
        segments = [_read_segment(segment_row) for segment_row in segment_rows]
        raw_bytes = sum(segment.raw_bytes for segment in segments)
        if raw_bytes != sum(leaves[number].nbytes for number in numbers):
            raise WireError("the segments of a lane do not add up to its leaves")
        total += raw_bytes
        if total > max_raw_bytes:
            raise WireError(f"more than {max_raw_bytes} bytes of arrays")
        lanes.append(Lane(typesize, numbers, segments))
    if not all(seen):
        raise WireError("a leaf is in no lane")
    return lanes


def _read_segment(row: object) -> StoredSegment:
    values = _check_row(row, "segment", 4, 6)
    if any(type(value) is not int for value in values):
        raise WireError("a segment is described by values that are not ints")
    segment = StoredSegment(*values)
    codec, raw_bytes, stored_bytes, *digests = segment
    if not 0 < raw_bytes <= compression.MAX_SEGMENT_BYTES or not all(0 <= one < 1 << 64 for one in digests):
        raise WireError(f"a segment of {raw_bytes} bytes, or an impossible digest")
    if segment.is_delta != (len(values) == 6):
        raise WireError(f"a segment of codec {codec} that is described by {len(values)} values")
    if codec == compression.RAW:
        if stored_bytes != raw_bytes:
            raise WireError("a raw segment whose stored size is not its raw size")
    elif codec == compression.BLOSC2:
        if not compression.CHUNK_HEADER_BYTES <= stored_bytes < raw_bytes:
            raise WireError("a compressed segment whose stored size is impossible")
    elif codec == SAME:
        if stored_bytes or segment.base_digest != segment.raw_digest:
            raise WireError("an unchanged segment that stores something, or is not its base")
    elif codec in (DENSE, SPARSE):
        least = compression.CHUNK_HEADER_BYTES if codec == DENSE else SPARSE_HEAD.size + 2
        if not least <= stored_bytes < raw_bytes:
            raise WireError("a delta whose stored size is impossible")
    else:
        raise WireError(f"a segment of unknown codec {codec}")
    return segment
