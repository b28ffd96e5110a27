"""Messages as a damaged link or a hostile peer could send them.

The promise under test: every input decodes or raises WireError.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import torch
import xxhash

from rlbroker.codec.limits import Limits
from rlbroker.codec.message import decode
from rlbroker.errors import WireError

PRELUDE = struct.Struct("<4sHHIQQ")


def samples() -> dict[str, Any]:
    """Return small trees that together use every part of the format."""
    rng = np.random.default_rng(0)
    return {
        "plain": {"n": None, "f": 1.5, "i": -3, "big": 1 << 70, "s": "é", "t": (1, [()]), 5: b"x", "e": {}},
        "small leaves": {"a": np.arange(6.0).reshape(2, 3), "m": torch.ones(3) > 0, "s": np.float32(2)},
        "empty leaves": [np.empty((0, 3)), torch.empty(2, 0), np.int8(3)],
        "bundles": {"x": np.arange(700), "y": torch.arange(400).int(), "z": bytes(5000), "h": torch.ones(9)},
        "large": {
            "w": torch.arange(20_000).float(),
            "noise": rng.standard_normal(9_000),
            "0": np.zeros(80_000),
        },
        "ties": [tied := torch.ones(4), tied, {"again": tied}],
    }


def is_decodable(data: bytes | bytearray | memoryview, limits: Limits = Limits()) -> bool:  # noqa: B008
    """Return whether `data` decodes; any exception but WireError passes through and fails the test."""
    try:
        decode(data, limits=limits)
    except WireError:
        return False
    return True


def try_every_damage(message: bytes, every: int = 1) -> None:
    """Decode the whole message, which succeeds, and each truncation, extension and flipped byte, which must not."""
    assert is_decodable(message)
    assert is_decodable(bytearray(message))
    assert not is_decodable(message + b"\0")
    assert not is_decodable(message + message)
    assert not is_decodable(b"\0" + message)
    damaged = bytearray(message)
    for position in range(0, len(message), every):
        assert not is_decodable(message[:position])
        for flip in (0x01, 0x80, 0xFF):
            damaged[position] ^= flip
            assert not is_decodable(damaged), f"byte {position} xor {flip:#x} went unnoticed"
            damaged[position] ^= flip


def split_message(message: bytes) -> tuple[bytes, bytes]:
    """Return (packed header, body)."""
    end = PRELUDE.size + PRELUDE.unpack_from(message)[3]
    return message[PRELUDE.size : end], message[end:]


def seal(packed: bytes, body: bytes = b"") -> bytes:
    """Return a message with a correct prelude for any header."""
    digest = xxhash.xxh3_64_intdigest(packed)
    return PRELUDE.pack(b"RLBW", 1, 0, len(packed), len(body), digest) + packed + body


def read_header_map(message: bytes) -> Any:
    """Return the header as plain msgpack values."""
    return msgpack.unpackb(split_message(message)[0], strict_map_key=False)


def forge(header_map: Any, body: bytes = b"") -> bytes:
    """Return a message with this header and a correct prelude."""
    return seal(msgpack.packb(header_map), body)


def forge_with_true_digests(header_map: Any, body: bytes) -> bytes:
    """Return a message with the correct digest of each segment's bytes in `body`."""
    start = 0
    for lane in header_map["lanes"]:
        for segment in lane[2]:
            segment[3] = xxhash.xxh3_64_intdigest(body[start : start + segment[2]])
            start += segment[2]
    return forge(header_map, body)


def change_header(message: bytes, change: Callable[[Any], None]) -> bytes:
    """Return `message` with a changed header and a correct prelude."""
    header_map = read_header_map(message)
    change(header_map)
    return forge(header_map, split_message(message)[1])
