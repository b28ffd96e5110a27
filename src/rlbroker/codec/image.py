"""Weights as one flat buffer, the *image*: a learner keeps one of its latest version, and a worker decodes into one.

The lanes of a header lie in an image one after the other, each from a multiple of 64 bytes on. The next version of the
same layout can be encoded as a difference between two images, and applied in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray

from rlbroker.codec import delta, dtypes
from rlbroker.codec.compression import RAW, compress, decompress
from rlbroker.codec.describe import Content, describe_header
from rlbroker.codec.format import (
    DEFAULT_SEGMENT_BYTES,
    LARGE_LEAF_BYTES,
    Buffer,
    StoredSegment,
    byte_view,
    check_segment,
    digest_of,
    plan_lanes,
    read_header,
    write_header,
)
from rlbroker.codec.leaves import Bytes, Leaf, LeafTable, leaf_maker, normalise_bools, plain_tensor
from rlbroker.codec.limits import Limits
from rlbroker.codec.tree import TreePacker, pack_metadata, unpack
from rlbroker.errors import InvalidArgument, WireError

#: Lanes begin at multiples of this: one cache line, and enough for any element.
_ALIGNMENT = 64

#: Torch copies up to this many elements in the calling thread. It divides more among threads and waits for the slowest
#: one, which takes many times as long as the copy on a busy machine.
_UNSHARED_ELEMENTS = 32_768


class EncodedSegment(NamedTuple):
    """One segment to be sent: its description, its stored bytes, and xxh3_64 of its raw bytes."""

    segment: StoredSegment
    stored: bytes | memoryview
    raw_digest: int


class _LaneLayout(NamedTuple):
    """The part of a lane that writer and reader both know."""

    typesize: int
    leaf_numbers: Sequence[int]
    #: Raw sizes of its segments.
    sizes: Sequence[int]


class _Place(NamedTuple):
    """The bytes of an image that hold one segment, and their element size."""

    start: int
    end: int
    typesize: int


class _Geometry:
    """The places of lanes and segments in an image."""

    def __init__(self, leaves: Sequence[Leaf], lanes: Sequence[_LaneLayout]) -> None:
        self.lane_starts: list[int] = []
        self.places: list[_Place] = []
        end = 0
        for lane in lanes:
            end += -end % _ALIGNMENT
            self.lane_starts.append(end)
            for size in lane.sizes:
                self.places.append(_Place(end, end + size, lane.typesize))
                end += size
        self.image_bytes = end + -end % _ALIGNMENT
        described = [(leaf.kind, leaf.dtype, leaf.shape) for leaf in leaves]
        self.layout = xxhash.xxh3_128_digest(msgpack.packb((described, lanes)))

    def segment_view(self, index: int, image: Bytes) -> Bytes:
        """Return the bytes of segment `index` in an image of this geometry."""
        self.check(image)
        place = self.places[index]
        return image[place.start : place.end]

    def check(self, image: Bytes) -> None:
        """Raise InvalidArgument unless `image` is a contiguous array of the right size."""
        if image.dtype != np.uint8 or image.shape != (self.image_bytes,) or not image.flags.c_contiguous:
            raise InvalidArgument(
                f"an image of shape {image.shape} and dtype {image.dtype}; "
                f"it must be {self.image_bytes} contiguous bytes (uint8)"
            )


class ImagePlan:
    """The image of a tree, and the header and segments to be written from it.

    After `fill` the tree may change. Any thread may encode any segment from the image, in any order.

    Attributes:
        image_bytes: size of the image.
        raw_bytes: size of all leaves as they travel; each tied one counts once.
        segment_count: number of segments.
        sources: the array or tensor of each leaf; copies may take their places before `fill`.
        layout: 16 bytes; equal for two images exactly if one can be a delta to the other.
    """

    def __init__(
        self,
        tree: object,
        *,
        dtype: str | None = None,
        segment_bytes: int = DEFAULT_SEGMENT_BYTES,
        metadata: object = None,
    ) -> None:
        """Find the leaves of `tree`, without a copy. `fill` casts floating leaves wider than `dtype` to it.

        `metadata` is that of a state dict: plain values by module prefix.

        Raises:
            UnsupportedType: a value cannot travel; the error names its path.
            InvalidArgument: `dtype` is not the torch name of a floating type of at most 4 bytes.
        """
        if dtype is not None:
            dtypes.check_cast_dtype(dtype)
        table = LeafTable(dtype)
        self._tree = TreePacker(table.add).pack(tree)
        self._metadata = None if metadata is None else pack_metadata(metadata)
        self._leaves = table.leaves
        self.sources: list[Any] = table.sources
        self._lanes = plan_lanes(table.leaves, segment_bytes)
        self._geometry = _Geometry(
            self._leaves,
            [_LaneLayout(lane.typesize, lane.leaf_numbers, lane.segment_sizes) for lane in self._lanes],
        )
        self.image_bytes: int = self._geometry.image_bytes
        self.raw_bytes: int = sum(lane.raw_bytes for lane in self._lanes)
        self.segment_count: int = len(self._geometry.places)
        self.layout: bytes = self._geometry.layout

    def fill(self, image: NDArray[np.uint8]) -> None:
        """Copy every leaf into `image`, cast if a dtype was given; bytes between the lanes become 0.

        Can be called once: the plan then drops the leaves, so that the caller may reuse their memory.
        """
        self._geometry.check(image)
        end = 0
        for lane, start in zip(self._lanes, self._geometry.lane_starts, strict=True):
            image[end:start] = 0
            end = start
            for number in lane.leaf_numbers:
                leaf = self._leaves[number]
                place = image[end : end + leaf.nbytes]
                end += leaf.nbytes
                if lane.large:
                    _write_leaf(leaf, self.sources[number], place)
                elif leaf.nbytes:  # small leaves may lie at any address, and torch relies on alignment
                    aligned = np.empty(leaf.nbytes, np.uint8)
                    _write_leaf(leaf, self.sources[number], aligned)
                    place[:] = aligned
        image[end:] = 0
        self.sources = []

    def encode_segment(
        self,
        index: int,
        image: NDArray[np.uint8],
        *,
        compression: bool,
        base: NDArray[np.uint8] | None = None,
        base_digest: int = 0,
    ) -> EncodedSegment:
        """Return segment `index` of a filled image, as a difference to image `base` if that is smaller.

        `base_digest` is the raw digest of this segment in `base`; it is computed if it is 0. Without `compression` the
        segment is stored raw, as a view of `image`, which must not change until it was sent.
        """
        raw = self._geometry.segment_view(index, image)
        typesize = self._geometry.places[index].typesize
        raw_digest = digest_of(raw.data)
        before_digest = 0
        codec: int = RAW
        stored: bytes | memoryview = raw.data
        if compression and base is not None:
            base_raw = self._geometry.segment_view(index, base)
            codec, stored = delta.encode(raw, base_raw, typesize)
            before_digest = base_digest or digest_of(base_raw.data)
        elif compression:
            codec, stored = compress(raw.data, typesize)
        digest = raw_digest if codec == RAW else digest_of(stored)
        segment = StoredSegment(codec, len(raw), len(stored), digest)
        if segment.is_delta:
            segment = segment._replace(base_digest=before_digest, raw_digest=raw_digest)
        return EncodedSegment(segment, stored, raw_digest)

    def header(self, segments: Sequence[StoredSegment]) -> bytes:
        """Return prelude and header, given the descriptions of all segments in order."""
        return write_header(self._tree, self._leaves, self._lanes, segments, self._metadata)


class ImageFormat:
    """The image that a header describes: its size, how its segments are filled in, and its contents.

    Attributes:
        image_bytes: size of the image.
        raw_bytes: size of all leaves as they travel; each tied one counts once.
        segments: the descriptions of all segments, in order.
        layout: 16 bytes, as in `ImagePlan`.
        metadata: that of the state dict, as in `ImagePlan`; None if it had none.
        is_delta: whether a base is needed to decode the segments.
    """

    def __init__(self, header: Buffer, limits: Limits, *, arrays_only: bool = False) -> None:
        """Check the whole header against `limits`; nothing large is allocated.

        With `arrays_only`, `tree` must not be called, and tensors need no torch.

        Raises:
            WireError: the header is invalid, or exceeds `limits`.
            IncompatibleFormat: it is of another version of the format.
        """
        checked = read_header(byte_view(header), limits)
        self._header = checked
        self._makers = [] if arrays_only else [leaf_maker(leaf) for leaf in checked.leaves]
        lanes = [
            _LaneLayout(lane.typesize, lane.leaf_numbers, [segment.raw_bytes for segment in lane.segments])
            for lane in checked.lanes
        ]
        self._geometry = _Geometry(checked.leaves, lanes)
        self.image_bytes: int = self._geometry.image_bytes
        self.raw_bytes: int = checked.raw_bytes
        self.segments: Sequence[StoredSegment] = checked.segments
        self.layout: bytes = self._geometry.layout
        self.metadata: dict[str, Any] | None = checked.metadata
        self.is_delta: bool = checked.is_delta

    def segment_view(self, index: int, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the bytes of segment `index` in `image`, into which those of a raw segment can be received."""
        return self._geometry.segment_view(index, image)

    def decode_segment(
        self, index: int, data: Buffer, image: NDArray[np.uint8], base: NDArray[np.uint8] | None = None
    ) -> None:
        """Fill in segment `index` of `image` from its stored bytes.

        A delta needs `base`, an image of the same layout, which may be `image` itself. `data` of a raw segment may lie
        in its place already. Safe in several threads, for different segments.

        Raises:
            WireError: `base` is not the one that the delta was made from, and nothing was written; or the stored bytes
                are invalid, and the content of this segment of the image is undefined.
        """
        segment = self.segments[index]
        out = self._geometry.segment_view(index, image)
        stored = check_segment(index, segment, data)
        typesize = self._geometry.places[index].typesize
        if segment.is_delta:
            if base is None or base.shape != image.shape:
                raise WireError(f"segment {index} is a delta, and its base is missing or of another size")
            delta.apply(segment, stored, typesize, self._geometry.segment_view(index, base), out)
        elif not _is_in_place(stored, out):
            decompress(segment.codec, stored, typesize, out)

    def contents(self) -> list[Content]:
        """Return the contents of the image, leaf by leaf."""
        return describe_header(self._header)

    def arrays(self, image: NDArray[np.uint8]) -> list[NDArray[Any]]:
        """Return the elements of each leaf, by its number, in the numpy dtype that carries its bits.

        They are views of `image`, all of whose segments must have been filled in.
        """
        self._geometry.check(image)
        found: list[NDArray[Any]] = [image[:0]] * len(self._header.leaves)
        for lane, start in zip(self._header.lanes, self._geometry.lane_starts, strict=True):
            place = start
            for number in lane.leaf_numbers:
                leaf = self._header.leaves[number]
                found[number] = np.ndarray(leaf.shape, leaf.carrier, image, place)
                place += leaf.nbytes
        return found

    def tree(self, image: NDArray[np.uint8], *, keep_dtype: bool = False) -> Any:
        """Return the tree of an image, all of whose segments must have been filled in.

        Large leaves are views of `image`; small leaves and bools are copies. Leaves that were cast are cast back,
        unless `keep_dtype`; bfloat16 arrays always are. Tensors that view an image mapped read-only must not be written
        to: torch does not know read-only memory, so the process would crash.
        """
        makers = self._makers
        if keep_dtype:
            makers = [leaf_maker(leaf, keep_dtype=True) for leaf in self._header.leaves]
        leaves: list[object] = [None] * len(makers)
        arrays = self.arrays(image)
        for lane in self._header.lanes:
            for number in lane.leaf_numbers:
                leaf, elements = self._header.leaves[number], arrays[number]
                if len(lane.leaf_numbers) > 1 or leaf.nbytes < LARGE_LEAF_BYTES or leaf.carrier.kind == "b":
                    elements = elements.copy()
                    normalise_bools(leaf, elements.reshape(-1).view(np.uint8))
                leaves[number] = makers[number](elements)
        return unpack(self._header.tree, leaves)


def _write_leaf(leaf: Leaf, source: Any, place: Bytes) -> None:
    """Copy the elements of a leaf into its place, which is aligned and of the same size."""
    if isinstance(source, np.ndarray):
        elements = place.view(leaf.carrier)
        if leaf.original is None:
            np.copyto(elements.reshape(leaf.shape), source)
        else:
            dtypes.cast_array(source, elements)
    else:
        import torch

        # As integers where possible, so that no bit of a NaN changes.
        plain = plain_tensor(source) if leaf.original is None else source.detach()
        dtype = plain.dtype if leaf.original is None else getattr(torch, leaf.dtype)
        out = torch.from_numpy(place).view(dtype)
        if plain.is_contiguous() and plain.device.type == "cpu":
            flat = plain.reshape(-1)
            for piece in range(0, len(flat), _UNSHARED_ELEMENTS):
                end = piece + _UNSHARED_ELEMENTS
                out[piece:end].copy_(flat[piece:end])
        else:
            out.reshape(leaf.shape).copy_(plain)
    normalise_bools(leaf, place)


def _is_in_place(stored: memoryview, out: Bytes) -> bool:
    address = np.frombuffer(stored, np.uint8).__array_interface__["data"][0]
    return bool(address == out.__array_interface__["data"][0])
