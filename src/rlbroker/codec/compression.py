"""How the bytes of one segment are stored: raw, or as one blosc2 chunk.

A chunk from the wire reaches blosc2 only after its own header was found to be, byte for byte, one that
this module writes for the declared sizes: blosc2 trusts the sizes in there when it writes to our buffer.
"""

from __future__ import annotations

import struct
from typing import Any

import blosc2
import numpy as np

from rlbroker.errors import WireError

#: Segment codecs, as numbered on the wire.
RAW = 0
BLOSC2 = 1

#: Sizes in a blosc2 chunk are 32-bit and signed; half of that leaves room for its overhead.
MAX_SEGMENT_BYTES = 1 << 30

#: Below this a call of blosc2 (some 15 microseconds each way) costs more than the bytes it saves.
MIN_COMPRESS_BYTES = 2048

#: A stored segment must be smaller than this part of the raw one, else it is stored raw.
_WORTHWHILE = 0.97

#: Larger segments are first tried on a sample, so that noise costs almost nothing. The sample grows with the
#: segment, to see repetition at a distance such as that of equal frames.
_SAMPLE_ABOVE_BYTES = 128 << 10
_SAMPLE_BYTES = 16 << 10
_SAMPLE_PART = 32

CHUNK_HEADER_BYTES = 32
#: version, versionlz, flags, typesize, nbytes, blocksize, cbytes
_CHUNK_START = struct.Struct("<BBBBiii")
#: zstd with an extended header, blocks split into streams or not; not copied verbatim, no delta.
_CHUNK_FLAGS = frozenset((0x85, 0x95))
#: One SHUFFLE filter, codec zstd without parameters, then blosc2_flags: nothing, or "all zeros". Everything
#: else is refused, such as dictionaries, lazy chunks, and "uninitialised", which would show our old memory.
_CHUNK_TAILS = frozenset(
    bytes([1, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, flags]) for flags in (0x00, 0x10)
)
#: Elements of one byte may also come without the filter.
_CHUNK_TAILS_OF_BYTES = _CHUNK_TAILS | {b"\0" + tail[1:] for tail in _CHUNK_TAILS}

# Nothing is left to blosc2's defaults, which a program may change.
_PARAMETERS: dict[str, Any] = {
    "codec": blosc2.Codec.ZSTD,
    "codec_meta": 0,
    "clevel": 1,
    "use_dict": False,
    "nthreads": 1,
    "blocksize": 0,
    "splitmode": blosc2.SplitMode.AUTO_SPLIT,
    "filters": [blosc2.Filter.SHUFFLE.value],
    "filters_meta": [0],
    "tuner": blosc2.Tuner.STUNE,
}

#: There is nothing to shuffle in single bytes, and blosc2 would copy them one by one. What they hold is often
#: frames, which resemble one another at a distance: large blocks see it.
_OF_BYTES: dict[str, Any] = {"filters": [blosc2.Filter.NOFILTER.value], "blocksize": 512 << 10}

# Off by default in blosc2: without it, threads that encode or decode segments would wait for each other.
blosc2.set_releasegil(True)


def compress(raw: memoryview, typesize: int) -> tuple[int, bytes | memoryview]:
    """Return (codec, stored bytes); the stored bytes are `raw` itself where compressing does not pay."""
    size = len(raw)
    if size < MIN_COMPRESS_BYTES:
        return RAW, raw
    if size > _SAMPLE_ABOVE_BYTES:
        sample = _sample(raw, typesize, max(_SAMPLE_BYTES, size // _SAMPLE_PART))
        if len(_chunk(sample, typesize)) > len(sample) * _WORTHWHILE:
            return RAW, raw
    stored = _chunk(raw, typesize)
    # The second test: could we read it back? BLOSC_* variables in the environment change what blosc2 writes.
    if len(stored) > size * _WORTHWHILE or _chunk_fault(stored, size, typesize):
        return RAW, raw
    return BLOSC2, stored


def guess(raw: memoryview, typesize: int, sample_bytes: int) -> int:
    """Return about how many bytes `compress` would leave, from a look at `sample_bytes` of them."""
    if len(raw) < MIN_COMPRESS_BYTES:
        return len(raw)
    sample = raw if len(raw) <= sample_bytes else _sample(raw, typesize, sample_bytes)
    return min(len(_chunk(sample, typesize)) * len(raw) // len(sample), len(raw))


def decompress(stored: memoryview, typesize: int, out: memoryview) -> None:
    """Fill `out` from one blosc2 chunk; raise WireError unless it is exactly such a chunk of ours.

    `stored` must not change during the call.
    """
    fault = _chunk_fault(stored, len(out), typesize)
    if fault:
        raise WireError(f"a compressed segment is not acceptable: {fault}")
    try:
        blosc2.decompress2(stored, dst=out, nthreads=1)
    except (ValueError, RuntimeError) as error:
        raise WireError("a compressed segment does not decompress") from error


def restore(codec: int, stored: memoryview, typesize: int, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Fill `out` from a segment of codec RAW or BLOSC2; raise WireError as `decompress` does."""
    if codec == RAW:
        out[:] = np.frombuffer(stored, np.uint8)
    else:
        decompress(stored, typesize, out.data)


def _chunk(raw: bytes | memoryview, typesize: int) -> bytes:
    parameters = _PARAMETERS | _OF_BYTES if typesize == 1 else _PARAMETERS
    chunk: bytes = blosc2.compress2(raw, typesize=typesize, **parameters)
    return chunk


def _chunk_fault(stored: bytes | memoryview, raw_bytes: int, typesize: int) -> str | None:
    if len(stored) < CHUNK_HEADER_BYTES:
        return "it is shorter than a chunk's header"
    version, version_lz, flags, chunk_typesize, nbytes, blocksize, cbytes = _CHUNK_START.unpack_from(stored)
    if (version, version_lz) != (5, 1) or flags not in _CHUNK_FLAGS:
        return "its version or flags are unknown"
    tails = _CHUNK_TAILS_OF_BYTES if typesize == 1 else _CHUNK_TAILS
    if bytes(stored[_CHUNK_START.size : CHUNK_HEADER_BYTES]) not in tails:
        return "its codec, filters or flags are not the ones of this format"
    if nbytes != raw_bytes or cbytes != len(stored) or chunk_typesize != typesize:
        return "its sizes are not the declared ones"
    if not 0 < blocksize <= nbytes:
        return "its block size is impossible"
    return None


def _sample(raw: memoryview, typesize: int, sample_bytes: int) -> bytes:
    half = sample_bytes // 2 // typesize * typesize
    starts = (len(raw) // 4 // typesize * typesize, len(raw) * 3 // 4 // typesize * typesize)
    return b"".join(raw[start : start + half] for start in starts)
