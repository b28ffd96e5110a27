"""Lossless differences between two states of one segment.

A segment is an array of words of 1, 2, 4 or 8 bytes, little endian. A difference is taken modulo the word and
*centred*: 0x80 is added to each of its bytes, so that small steps in either direction have the same high bytes. That
costs a reader one addition, and compresses as well as zigzag encoding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlbroker.codec import compression
from rlbroker.codec.format import DENSE, SAME, SPARSE, SPARSE_HEAD, StoredSegment, digest_of
from rlbroker.codec.leaves import Bytes
from rlbroker.errors import WireError

Words = np.ndarray[Any, np.dtype[Any]]

#: The byte for a gap of this many unchanged words that continues in the next byte.
_ESCAPE = 255

#: Where more than this fraction of the words changed, positions cost more than the differences of all words.
_SPARSE_FRACTION = 0.4

#: The number of words that are compared to estimate which fraction has changed.
_SAMPLE_WORDS = 2048

#: Where less than this fraction of the words changed, most groups of eight bytes are unchanged, and it pays to compare
#: groups first.
_RARE_FRACTION = 0.12

#: Bytes and gaps that are processed at a time: enough for few calls, and few enough to stay in the cache.
_BLOCK_BYTES = 1 << 20
_BLOCK_GAPS = 64 << 10

#: The size of the sample from which the compressed size of a segment is estimated.
_ESTIMATE_BYTES = 32 << 10


def word_type(typesize: int, raw_bytes: int) -> np.dtype[Any]:
    """Return the dtype of a segment's words: as wide as its elements where possible, otherwise bytes."""
    word_bytes = {1: 1, 2: 2, 4: 4, 8: 8, 16: 8}.get(typesize, 1)
    return np.dtype(f"<u{word_bytes if raw_bytes % word_bytes == 0 else 1}")


def encode(new: Bytes, base: Bytes, typesize: int) -> tuple[int, bytes | memoryview]:
    """Return (codec, stored bytes) of the smallest way to store `new`, whole or as a delta, as estimated from samples.

    `new` and `base` are equally long, contiguous and do not change during the call. The stored bytes of a raw segment
    are a view of `new`.
    """
    word = word_type(typesize, len(new))
    changes = _find_changes(new, base, word)
    if changes is not None and not len(changes[0]):
        return SAME, b""
    expected_bytes = compression.estimate_stored_bytes(new.data, typesize, _ESTIMATE_BYTES)
    if changes is None:
        difference = _difference(new, base, word).view(np.uint8).data
        if compression.estimate_stored_bytes(difference, word.itemsize, _ESTIMATE_BYTES) < expected_bytes:
            codec, stored = compression.compress(difference, word.itemsize)
            if codec == compression.BLOSC2:
                return DENSE, stored
        return compression.compress(new.data, typesize)
    sparse = _encode_sparse(*changes)
    if len(sparse) < expected_bytes:
        return SPARSE, sparse
    codec, stored = compression.compress(new.data, typesize)
    return (SPARSE, sparse) if len(sparse) < len(stored) else (codec, stored)


def apply(segment: StoredSegment, stored: memoryview, typesize: int, base: Bytes, out: Bytes) -> None:
    """Fill `out`, which may be `base` itself, with the new state.

    Raises:
        WireError: `base` is not the one that the segment announces, and nothing was written; or the stored bytes do
            not lead to the announced result, and the content of `out` is undefined.
    """
    if len(base) != segment.raw_bytes or digest_of(base.data) != segment.base_digest:
        raise WireError("the base of a delta is not the one that it was made from")
    apply_unchecked(segment.codec, stored, typesize, base, out)
    if segment.codec != SAME and digest_of(out.data) != segment.raw_digest:
        raise WireError("a delta did not lead to the announced bytes")


def apply_unchecked(codec: int, stored: memoryview, typesize: int, base: Bytes, out: Bytes) -> None:
    """Apply a delta without the digests of base and result; raise WireError, with `out` unchanged, if it is malformed.

    Callers that have the digests call `apply`.
    """
    word = word_type(typesize, len(out))
    if codec == SPARSE:
        _apply_sparse(stored, base, out, word)
    elif codec == DENSE:
        _apply_dense(stored, base, out, word)
    else:
        _copy(base, out)


def _find_changes(new: Bytes, base: Bytes, word: np.dtype[Any]) -> tuple[Words, Words] | None:
    """Return the positions of changed words and their centred differences; None if there are too many."""
    words = len(new) // word.itemsize
    step = max(words // _SAMPLE_WORDS, 1)
    sample = new.view(word)[::step] != base.view(word)[::step]
    sampled_fraction = np.count_nonzero(sample) / len(sample)
    if sampled_fraction > _SPARSE_FRACTION + 0.1:
        return None
    positions: list[Words] = []
    differences: list[Words] = []
    found = 0
    for start in range(0, len(new), _BLOCK_BYTES):
        new_block, base_block = new[start : start + _BLOCK_BYTES], base[start : start + _BLOCK_BYTES]
        if sampled_fraction < _RARE_FRACTION and len(new_block) % 8 == 0:
            at, difference = _find_rare_changes(new_block, base_block, word)
        else:
            difference = new_block.view(word) - base_block.view(word)
            at = np.flatnonzero(difference != 0)
            difference = difference[at]
        at += start // word.itemsize
        positions.append(at)
        differences.append(difference)
        found += len(at)
        if found > words * _SPARSE_FRACTION:
            return None
    return np.concatenate(positions), np.concatenate(differences) + _bias(word)


def _find_rare_changes(new: Bytes, base: Bytes, word: np.dtype[Any]) -> tuple[Words, Words]:
    """Return positions and differences; compare eight bytes at a time, and single words only where those differ."""
    new_eights, base_eights = new.view(np.uint64), base.view(np.uint64)
    at = np.flatnonzero(new_eights != base_eights)
    difference = new_eights[at].view(word) - base_eights[at].view(word)
    inside = np.flatnonzero(difference != 0)
    per = 8 // word.itemsize
    return at[inside // per] * per + inside % per, difference[inside]


def _bias(word: np.dtype[Any]) -> Any:
    return word.type(int.from_bytes(b"\x80" * word.itemsize, "little"))


def _encode_sparse(positions: Words, differences: Words) -> bytes:
    gaps = _encode_gaps(positions).tobytes()
    _, stored_gaps = compression.compress(memoryview(gaps), 1)
    _, stored_differences = compression.compress(differences.view(np.uint8).data, differences.itemsize)
    head = SPARSE_HEAD.pack(len(positions), len(gaps), len(stored_gaps))
    return b"".join((head, stored_gaps, stored_differences))


def _encode_gaps(positions: Words) -> Bytes:
    """Return the counts of unchanged words before each changed one, as bytes."""
    gaps = np.diff(positions, prepend=-1) - 1
    if gaps.max() < _ESCAPE:
        return gaps.astype(np.uint8)
    escapes = gaps // _ESCAPE
    ends = np.cumsum(escapes + 1) - 1
    written = np.full(int(ends[-1]) + 1, _ESCAPE, np.uint8)
    written[ends] = gaps - escapes * _ESCAPE
    return written


def _apply_sparse(stored: memoryview, base: Bytes, out: Bytes, word: np.dtype[Any]) -> None:
    words = len(out) // word.itemsize
    if len(stored) < SPARSE_HEAD.size:
        raise WireError("a sparse segment is shorter than its head")
    changes, gap_bytes, stored_gap_bytes = SPARSE_HEAD.unpack_from(stored)
    # This bounds what is allocated here to less than twice the segment.
    if not 0 < changes <= words or not changes <= gap_bytes <= changes + words // _ESCAPE:
        raise WireError("a sparse segment claims an impossible number of changes")
    gaps_end = SPARSE_HEAD.size + stored_gap_bytes
    gaps = _decode_part(stored[SPARSE_HEAD.size : gaps_end], gap_bytes, 1)
    differences = _decode_part(stored[gaps_end:], changes * word.itemsize, word.itemsize).view(word)
    ends = gaps != _ESCAPE
    if not ends[-1] or np.count_nonzero(ends) != changes or int(gaps.sum(dtype=np.uint64)) + changes > words:
        raise WireError("the gaps of a sparse segment do not fit it")
    _copy(base, out)
    target = out.view(word)
    bias = _bias(word)
    done = 0
    skipped = 0
    # The checks above ensure that positions only grow and stay within the segment.
    for start in range(0, gap_bytes, _BLOCK_GAPS):
        at = np.cumsum(gaps[start : start + _BLOCK_GAPS], dtype=np.int64)
        skipped_here = int(at[-1])
        if gap_bytes != changes:
            at = at[ends[start : start + _BLOCK_GAPS]]
        at += np.arange(skipped + done, skipped + done + len(at))
        skipped += skipped_here
        target[at] += differences[done : done + len(at)] - bias
        done += len(at)


def _decode_part(stored: memoryview, raw_bytes: int, typesize: int) -> Bytes:
    """Return one part of a sparse segment, which is stored raw exactly if its stored size is its raw size."""
    if len(stored) == raw_bytes:
        return np.frombuffer(stored, np.uint8)
    if len(stored) > raw_bytes:
        raise WireError("a part of a sparse segment is larger than its raw bytes")
    raw = np.empty(raw_bytes, np.uint8)
    compression.decompress_chunk(stored, typesize, raw.data)
    return raw


def _difference(new: Bytes, base: Bytes, word: np.dtype[Any]) -> Words:
    """Return the centred differences of all words."""
    new_words, base_words = new.view(word), base.view(word)
    difference = np.empty_like(new_words)
    bias = _bias(word)
    step = _BLOCK_BYTES // word.itemsize
    for start in range(0, len(new_words), step):
        part = difference[start : start + step]
        np.subtract(new_words[start : start + step], base_words[start : start + step], out=part)
        np.add(part, bias, out=part)
    return difference


def _apply_dense(stored: memoryview, base: Bytes, out: Bytes, word: np.dtype[Any]) -> None:
    difference = np.empty(len(out) // word.itemsize, word)
    compression.decompress_chunk(stored, word.itemsize, difference.view(np.uint8).data)
    new_words, base_words = out.view(word), base.view(word)
    bias = _bias(word)
    step = _BLOCK_BYTES // word.itemsize
    for start in range(0, len(new_words), step):
        part = difference[start : start + step]
        np.subtract(part, bias, out=part)
        np.add(base_words[start : start + step], part, out=new_words[start : start + step])


def _copy(base: Bytes, out: Bytes) -> None:
    if base.__array_interface__["data"][0] != out.__array_interface__["data"][0]:
        np.copyto(out, base)
