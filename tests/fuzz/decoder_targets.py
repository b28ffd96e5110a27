"""The targets of the fuzzer and of the replay of its corpus: every decoder of bytes that another process wrote.

The first byte selects the target, the rest is its input. A target either accepts its input, and the result must survive
another round trip, or raises the one error that it may raise. Any other exception is a finding.
"""

from __future__ import annotations

import msgpack
import numpy as np
import xxhash
from hostile_messages import PRELUDE, forge_with_true_digests, seal

from rlbroker.backend.replies import text_fields, whole_number
from rlbroker.codec import delta
from rlbroker.codec.format import DENSE, SAME, SPARSE
from rlbroker.codec.image import ImageFormat
from rlbroker.codec.limits import Limits
from rlbroker.codec.message import MessageAssembly, decode, encode
from rlbroker.control.inbox import COMMAND_LIMITS
from rlbroker.control.outcomes import Event, WorkerOutcomes, settle
from rlbroker.errors import WireError
from rlbroker.weights.manifest import Manifest, group

#: Small, so that the bound on allocations is tight while fuzzing.
LIMITS = Limits(max_raw_bytes=1 << 20)


def message(data: bytes) -> None:
    """Decode bytes as they are."""
    for limits in (LIMITS, COMMAND_LIMITS):
        _round_trip(data, limits)


def sealed_message(data: bytes) -> None:
    """Decode any header with a correct digest; the first two bytes of the input are the length of the header."""
    header_bytes = int.from_bytes(data[:2], "little")
    _round_trip(seal(data[2 : 2 + header_bytes], data[2 + header_bytes :]), LIMITS)


def _forge_message(data: bytes) -> tuple[bytes, bytes]:
    """Return a message with correct digests, and its body; empty if the header cannot be sealed."""
    header_bytes = int.from_bytes(data[:2], "little")
    body = data[2 + header_bytes :]
    try:
        header_map = msgpack.unpackb(data[2 : 2 + header_bytes], strict_map_key=False)
        return forge_with_true_digests(header_map, body), body
    except Exception:  # noqa: BLE001 - the input is not a header that can be sealed
        return b"", b""


def sealed_segments(data: bytes) -> None:
    """Decode any header and segments with correct digests."""
    whole, _ = _forge_message(data)
    if whole:
        _round_trip(whole, LIMITS)


def weights(data: bytes) -> None:
    """Decode header and segments as a worker decodes weights, and group the segments into chunks."""
    header_bytes = int.from_bytes(data[:2], "little")
    packed = data[2 : 2 + header_bytes]
    body = data[2 + header_bytes :]
    prelude = PRELUDE.pack(b"RLBW", 1, 0, len(packed), len(body), xxhash.xxh3_64_intdigest(packed))
    try:
        assembly = MessageAssembly(prelude + packed, LIMITS)
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


def manifest(data: bytes) -> None:
    """Read the manifest of the latest weights from fields."""
    fields = text_fields(data.split(b"\n")[: len(data.split(b"\n")) // 2 * 2])
    try:
        Manifest.from_fields(fields)
    except WireError:
        return


def answer(data: bytes) -> None:
    """Fold an acknowledgement of a worker into its outcomes."""
    parts = data.split(b"\n")
    fields = text_fields(parts[: len(parts) // 2 * 2])
    whole_number(fields.get("version", ""))
    before = WorkerOutcomes(incarnation=1, member=True, settled=3, applied=3, event="1-1")
    done = settle(before, Event("1-2", 0, fields.get("event", ""), fields, 1.0), {"aaa": 1}, latest=9)
    assert done.worker_outcomes.settled <= 9
    assert WorkerOutcomes.from_fields(done.worker_outcomes.to_fields()) == done.worker_outcomes


def delta_segment(data: bytes) -> None:
    """Apply the stored bytes of a delta, after a byte for the codec, one for the element size, two for the raw size."""
    if len(data) < 4:
        return
    codec = (SAME, DENSE, SPARSE)[data[0] % 3]
    typesize = data[1] or 1
    raw_bytes = (int.from_bytes(data[2:4], "little") or 1) % 5000 + 1
    base = (np.arange(raw_bytes) * 7 % 251).astype(np.uint8)
    # The bytes around the segment in an image must not change.
    image = np.full(raw_bytes + 128, 0xAA, np.uint8)
    out = image[64:-64]
    try:
        delta.apply_unchecked(codec, memoryview(data[4:]), typesize, base, out)
    except WireError:
        assert (out == 0xAA).all()
        return
    finally:
        assert (image[:64] == 0xAA).all()
        assert (image[-64:] == 0xAA).all()
    in_place = base.copy()
    delta.apply_unchecked(codec, memoryview(data[4:]), typesize, in_place, in_place)
    assert (in_place == out).all()
    again, stored = delta.encode(out, base, typesize)
    if again >= SAME:
        delta.apply_unchecked(again, memoryview(stored), typesize, base, in_place)
        assert (in_place == out).all()


def image(data: bytes) -> None:
    """Decode any header and segments with correct digests into an image of zeros, which is also the base."""
    whole, body = _forge_message(data)
    if not whole:
        return
    try:
        image_format = ImageFormat(whole[: len(whole) - len(body)], LIMITS)
        filled = np.zeros(image_format.image_bytes, np.uint8)
        rest = memoryview(body)
        for index, segment in enumerate(image_format.segments):
            image_format.decode_segment(index, rest[: segment.stored_bytes], filled, filled)
            rest = rest[segment.stored_bytes :]
        tree = image_format.tree(filled)
    except WireError:
        return
    again = encode(tree)
    assert encode(decode(again)) == again


TARGETS = (message, sealed_message, sealed_segments, weights, manifest, answer, delta_segment, image)


def feed(data: bytes) -> None:
    """Pass an input to its target."""
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
