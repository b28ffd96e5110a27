"""What the fuzzer and the replay of its corpus feed: every decoder of bytes that another process wrote.

The first byte chooses the target, the rest is its input. Each target either accepts its input, and then what it
accepted survives another round, or raises the one error that it may raise; anything else escapes and is a find.
"""

from __future__ import annotations

import msgpack
import numpy as np
import xxhash
from hostile_messages import PRELUDE, sealed, with_true_digests

from rlbroker.backend.replies import text_fields, whole_number
from rlbroker.codec import delta
from rlbroker.codec.assembly import Assembly
from rlbroker.codec.format import DENSE, SAME, SPARSE
from rlbroker.codec.image import ImageFormat
from rlbroker.codec.limits import Limits
from rlbroker.codec.message import decode, encode
from rlbroker.control.inbox import COMMAND_LIMITS
from rlbroker.control.outcomes import Event, WorkerOutcomes, settle
from rlbroker.errors import WireError
from rlbroker.weights.manifest import Manifest, group

#: Small, so that what a message may ask for is a sharp bound also while fuzzing.
LIMITS = Limits(max_raw_bytes=1 << 20)


def message(data: bytes) -> None:
    """Decode bytes as they are."""
    for limits in (LIMITS, COMMAND_LIMITS):
        _round_trip(data, limits)


def sealed_message(data: bytes) -> None:
    """Decode what has a true digest over any header: the first two bytes say how long the header is."""
    header_bytes = int.from_bytes(data[:2], "little")
    _round_trip(sealed(data[2 : 2 + header_bytes], data[2 + header_bytes :]), LIMITS)


def _with_true_digests(data: bytes) -> tuple[bytes, bytes]:
    """Give a message whose digests are true, and its body; nothing where that cannot be."""
    header_bytes = int.from_bytes(data[:2], "little")
    body = data[2 + header_bytes :]
    try:
        manifest = msgpack.unpackb(data[2 : 2 + header_bytes], strict_map_key=False)
        return with_true_digests(manifest, body), body
    except Exception:  # noqa: BLE001 - not ours: the input is no header that could be sealed
        return b"", b""


def sealed_segments(data: bytes) -> None:
    """Decode what has true digests over header and segments, as far as the header can be read."""
    whole, _ = _with_true_digests(data)
    if whole:
        _round_trip(whole, LIMITS)


def weights(data: bytes) -> None:
    """Take a header as a worker takes that of weights, and lay out its chunks."""
    header_bytes = int.from_bytes(data[:2], "little")
    packed = data[2 : 2 + header_bytes]
    body = data[2 + header_bytes :]
    prelude = PRELUDE.pack(b"RLBW", 1, 0, len(packed), len(body), xxhash.xxh3_64_intdigest(packed))
    try:
        assembly = Assembly(prelude + packed, LIMITS)
        assert sum(map(len, group((one.stored_bytes for one in assembly.segments), 64))) == len(
            assembly.segments
        )
        rest = memoryview(body)
        for index, segment in enumerate(assembly.segments):
            assembly.decode_segment(index, rest[: segment.stored_bytes])
            rest = rest[segment.stored_bytes :]
        assembly.tree()
    except WireError:
        return


def pointer(data: bytes) -> None:
    """Read the pointer to the latest weights from fields."""
    fields = text_fields(data.split(b"\n")[: len(data.split(b"\n")) // 2 * 2])
    try:
        Manifest.from_fields(fields)
    except WireError:
        return


def answer(data: bytes) -> None:
    """Fold what a worker acknowledged."""
    parts = data.split(b"\n")
    fields = text_fields(parts[: len(parts) // 2 * 2])
    whole_number(fields.get("version", ""))
    before = WorkerOutcomes(incarnation=1, member=True, settled=3, applied=3, event="1-1")
    done = settle(before, Event("1-2", 0, fields.get("event", ""), fields, 1.0), {"aaa": 1}, latest=9)
    assert done.worker_outcomes.settled <= 9
    assert WorkerOutcomes.from_fields(done.worker_outcomes.to_fields()) == done.worker_outcomes


def delta_segment(data: bytes) -> None:
    """Apply the stored bytes of a delta: codec, element size and raw bytes (two) come first."""
    if len(data) < 4:
        return
    codec = (SAME, DENSE, SPARSE)[data[0] % 3]
    typesize = data[1] or 1
    raw_bytes = (int.from_bytes(data[2:4], "little") or 1) % 5000 + 1
    base = (np.arange(raw_bytes) * 7 % 251).astype(np.uint8)
    # What lies around the segment in an image must stay as it is.
    image = np.full(raw_bytes + 128, 0xAA, np.uint8)
    out = image[64:-64]
    try:
        delta.restore(codec, memoryview(data[4:]), typesize, base, out)
    except WireError:
        assert (out == 0xAA).all()
        return
    finally:
        assert (image[:64] == 0xAA).all()
        assert (image[-64:] == 0xAA).all()
    in_place = base.copy()
    delta.restore(codec, memoryview(data[4:]), typesize, in_place, in_place)
    assert (in_place == out).all()
    again, stored = delta.encode(out, base, typesize)
    if again >= SAME:
        delta.restore(again, memoryview(stored), typesize, base, in_place)
        assert (in_place == out).all()


def image(data: bytes) -> None:
    """Fill an image of zeros, or change it, given any header with true digests of the stored bytes."""
    whole, body = _with_true_digests(data)
    if not whole:
        return
    try:
        form = ImageFormat(whole[: len(whole) - len(body)], LIMITS)
        filled = np.zeros(form.image_bytes, np.uint8)
        rest = memoryview(body)
        for index, segment in enumerate(form.segments):
            form.decode_segment(index, rest[: segment.stored_bytes], filled, filled)
            rest = rest[segment.stored_bytes :]
        tree = form.tree(filled)
    except WireError:
        return
    again = encode(tree)
    assert encode(decode(again)) == again


TARGETS = (message, sealed_message, sealed_segments, weights, pointer, answer, delta_segment, image)


def feed(data: bytes) -> None:
    """Give an input to its target."""
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


def _round_trip(data: bytes, limits: Limits) -> None:
    try:
        tree = decode(data, limits=limits)
    except WireError:
        return
    again = encode(tree)
    # Bits, not values: NaN is not equal to itself.
    assert encode(decode(again)) == again
