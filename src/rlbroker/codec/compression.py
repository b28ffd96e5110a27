"""The storage of one segment's bytes: raw, or as one blosc2 chunk.

blosc2 trusts the sizes in a chunk's own header when it writes to the caller's buffer. A chunk from the wire therefore
reaches it only after each field of that header was found to be one that this module writes for the declared sizes.
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

#: In smaller segments, a call of blosc2 (about 15 microseconds each way) costs more than the bytes that it saves.
MIN_COMPRESS_BYTES = 2048

#: A segment is stored compressed only if that leaves at most this fraction of its raw bytes.
_WORTHWHILE_RATIO = 0.97

#: For larger segments a sample is compressed first, so that incompressible data costs almost nothing. The sample grows
#: with the segment, to find repetition at a distance, such as equal frames.
_SAMPLE_ABOVE_BYTES = 128 << 10
_SAMPLE_BYTES = 16 << 10
_SAMPLE_DIVISOR = 32

CHUNK_HEADER_BYTES = 32
#: version, versionlz, flags, typesize, nbytes, blocksize, cbytes
_CHUNK_START = struct.Struct("<BBBBiii")
#: zstd with an extended header, its blocks split into streams or not; neither a verbatim copy nor blosc2's own delta.
_CHUNK_FLAGS = frozenset((0x85, 0x95))
#: One SHUFFLE filter, codec zstd without parameters, then blosc2_flags: nothing, or "all zeros". Everything else is
#: refused: dictionaries, lazy chunks, and "uninitialised", which would expose old memory of the reader.
_CHUNK_TAILS = frozenset(
    bytes([1, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, flags]) for flags in (0x00, 0x10)
)
#: Chunks of single bytes may also come without the filter.
_BYTE_CHUNK_TAILS = _CHUNK_TAILS | {b"\0" + tail[1:] for tail in _CHUNK_TAILS}

#: Every parameter is set, because a program may change blosc2's defaults.
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

#: For elements of one byte. The shuffle filter would only copy them, one by one. They are often frames, which resemble
#: one another at a distance that only large blocks span.
_BYTE_PARAMETERS: dict[str, Any] = _PARAMETERS | {
    "filters": [blosc2.Filter.NOFILTER.value],
    "blocksize": 512 << 10,
}

# Off by default in blosc2: threads that encode or decode segments would wait for each other.
blosc2.set_releasegil(True)


def compress(raw: memoryview, typesize: int) -> tuple[int, bytes | memoryview]:
    """Return (codec, stored bytes); the stored bytes are `raw` itself where compression does not pay."""
    size = len(raw)
    if size < MIN_COMPRESS_BYTES:
        return RAW, raw
    if size > _SAMPLE_ABOVE_BYTES:
        sample = _take_sample(raw, typesize, max(_SAMPLE_BYTES, size // _SAMPLE_DIVISOR))
        if len(_compress_chunk(sample, typesize)) > len(sample) * _WORTHWHILE_RATIO:
            return RAW, raw
    stored = _compress_chunk(raw, typesize)
    # BLOSC_* variables in the environment change what blosc2 writes: a reader would refuse such a chunk.
    if len(stored) > size * _WORTHWHILE_RATIO or _chunk_fault(stored, size, typesize):
        return RAW, raw
    return BLOSC2, stored


def estimate_stored_bytes(raw: memoryview, typesize: int, sample_bytes: int) -> int:
    """Estimate how many bytes `compress` would leave, from a sample of `sample_bytes`."""
    if len(raw) < MIN_COMPRESS_BYTES:
        return len(raw)
    sample = raw if len(raw) <= sample_bytes else _take_sample(raw, typesize, sample_bytes)
    return min(len(_compress_chunk(sample, typesize)) * len(raw) // len(sample), len(raw))


def decompress(
    codec: int, stored: memoryview, typesize: int, out: np.ndarray[Any, np.dtype[np.uint8]]
) -> None:
    """Fill `out` from a segment of codec RAW or BLOSC2; raise WireError as `decompress_chunk` does."""
    if codec == RAW:
        out[:] = np.frombuffer(stored, np.uint8)
    else:
        decompress_chunk(stored, typesize, out.data)


def decompress_chunk(stored: memoryview, typesize: int, out: memoryview) -> None:
    """Fill `out` from one blosc2 chunk; raise WireError unless this format can hold such a chunk.

    `stored` must not change during the call.
    """
    fault = _chunk_fault(stored, len(out), typesize)
    if fault:
        raise WireError(f"a compressed segment is not acceptable: {fault}")
    try:
        blosc2.decompress2(stored, dst=out, nthreads=1)
    except (ValueError, RuntimeError) as error:
        raise WireError("a compressed segment does not decompress") from error


def _compress_chunk(raw: bytes | memoryview, typesize: int) -> bytes:
    parameters = _BYTE_PARAMETERS if typesize == 1 else _PARAMETERS
    chunk: bytes = blosc2.compress2(raw, typesize=typesize, **parameters)
    return chunk


def _chunk_fault(stored: bytes | memoryview, raw_bytes: int, typesize: int) -> str | None:
    """Return what makes a chunk's header unacceptable; None if it is acceptable."""
    if len(stored) < CHUNK_HEADER_BYTES:
        return "it is shorter than a chunk's header"
    version, version_lz, flags, chunk_typesize, nbytes, blocksize, cbytes = _CHUNK_START.unpack_from(stored)
    if (version, version_lz) != (5, 1) or flags not in _CHUNK_FLAGS:
        return "its version or flags are unknown"
    tails = _BYTE_CHUNK_TAILS if typesize == 1 else _CHUNK_TAILS
    if bytes(stored[_CHUNK_START.size : CHUNK_HEADER_BYTES]) not in tails:
        return "its codec, filters or flags are not those of this format"
    if nbytes != raw_bytes or cbytes != len(stored) or chunk_typesize != typesize:
        return "its sizes are not the declared ones"
    if not 0 < blocksize <= nbytes:
        return "its block size is impossible"
    return None


def _take_sample(raw: memoryview, typesize: int, sample_bytes: int) -> bytes:
    """Return a sample of whole elements: half from one quarter into `raw`, half from three quarters."""
    half = sample_bytes // 2 // typesize * typesize
    starts = (len(raw) // 4 // typesize * typesize, len(raw) * 3 // 4 // typesize * typesize)
    return b"".join(raw[start : start + half] for start in starts)
