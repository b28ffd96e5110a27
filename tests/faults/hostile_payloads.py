"""Payloads that a hostile worker or a damaged disk can put in place of a batch."""

from __future__ import annotations

import random

import msgpack
import xxhash

from rlbroker.codec.message import encode

PRELUDE_BYTES = 28


def make_decompression_bomb() -> bytes:
    """Return a small message that claims a gigabyte: zeros with a correct digest."""
    message = encode({"zeros": bytes(1 << 20)})
    header_bytes = int.from_bytes(message[8:12], "little")
    manifest = msgpack.unpackb(message[PRELUDE_BYTES : PRELUDE_BYTES + header_bytes], strict_map_key=False)
    for lane in manifest["lanes"]:
        for segment in lane[2]:
            segment[1] = 1 << 30
    packed = msgpack.packb(manifest)
    body = message[PRELUDE_BYTES + header_bytes :]
    prelude = message[:8] + len(packed).to_bytes(4, "little") + len(body).to_bytes(8, "little")
    sealed: bytes = prelude + xxhash.xxh3_64_intdigest(packed).to_bytes(8, "little") + packed + body
    return sealed


def make_hostile_payload(chance: random.Random) -> bytes:
    """Return a message that is damaged in a random way."""
    message = bytearray(encode({"number": 1, "pad": bytes(range(256)) * 20}))
    kind = chance.choice(["bomb", "flip", "truncated", "future", "noise", "empty", "pickle"])
    if kind == "bomb":
        return make_decompression_bomb()
    if kind == "flip":
        message[chance.randrange(len(message))] ^= 1 << chance.randrange(8)
    elif kind == "truncated":
        del message[chance.randrange(len(message)) :]
    elif kind == "future":
        message[4:6] = (99).to_bytes(2, "little")
    elif kind == "noise":
        message = bytearray(chance.randbytes(chance.randrange(1, 4000)))
    elif kind == "empty":
        message = bytearray()
    else:
        message = bytearray(b"cos\nsystem\n(S'true'\ntR.")
    return bytes(message)
