"""One tree as one string of bytes, for what travels in a single Redis value."""

from __future__ import annotations

from typing import Any

from rlbroker.codec.assembly import Assembly
from rlbroker.codec.compression import BLOSC2
from rlbroker.codec.contents import Content, contents_of
from rlbroker.codec.format import Buffer, byte_view, checked_bytes, read_header, split_header
from rlbroker.codec.limits import DEFAULT_LIMITS, Limits
from rlbroker.codec.plan import plan
from rlbroker.codec.tree import describe_packed
from rlbroker.codec.version import FORMAT_VERSION
from rlbroker.errors import WireError


def encode(tree: object, *, compression: bool = True) -> bytes:
    """Return `tree` as bytes; raise UnsupportedType, which names the path, for what cannot travel."""
    return b"".join(encode_pieces(tree, compression=compression))


def encode_pieces(tree: object, *, compression: bool = True) -> tuple[bytes | memoryview, ...]:
    """Return `tree` as bytes in pieces, of which some are its own memory: it must not change while they are used.

    Raises UnsupportedType, which names the path, for what cannot travel.
    """
    parts = plan(tree, compression=compression)
    encoded = [parts.encode_segment(index) for index in range(parts.segment_count)]
    header = parts.header([segment for segment, _ in encoded])
    return (header, *(stored for _, stored in encoded))


def decode(data: Buffer, *, limits: Limits = DEFAULT_LIMITS) -> Any:
    """Return the tree that `data` holds; raise WireError for anything but a whole, sound message."""
    view = byte_view(data)
    end = _header_end(view)
    assembly = Assembly(view[:end], limits)
    for index, segment in enumerate(assembly.segments):
        assembly.decode_segment(index, view[end : end + segment.stored_bytes])
        end += segment.stored_bytes
    return assembly.tree()


def describe(data: Buffer, *, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """Return what a message, or the header of a plan alone, holds, ready for JSON.

    Needs neither torch nor the array bytes, which it does not check.
    """
    view = byte_view(data)
    end, _ = split_header(view)
    if len(view) != end:
        end = _header_end(view)
    header = read_header(view[:end], limits)
    return {
        "format_version": FORMAT_VERSION,
        "header_bytes": end,
        "raw_bytes": header.raw_bytes,
        "stored_bytes": header.body_bytes,
        "segments": len(header.segments),
        "compressed_segments": sum(segment.codec == BLOSC2 for segment in header.segments),
        "delta_segments": sum(segment.is_delta for segment in header.segments),
        "values": describe_packed(header.tree, header.leaves),
    }


def contents(data: Buffer, *, limits: Limits = DEFAULT_LIMITS) -> list[Content]:
    """Return what a whole message holds, leaf by leaf; raise WireError if it is cut short or damaged.

    Needs no torch: nothing is decompressed, but the digest of every segment is checked.
    """
    view = byte_view(data)
    end = _header_end(view)
    header = read_header(view[:end], limits)
    for index, segment in enumerate(header.segments):
        checked_bytes(index, segment, view[end : end + segment.stored_bytes])
        end += segment.stored_bytes
    return contents_of(header)


def _header_end(view: memoryview) -> int:
    end, body_bytes = split_header(view)
    if len(view) != end + body_bytes:
        raise WireError(f"a message of {end + body_bytes} bytes came as {len(view)}")
    return end
