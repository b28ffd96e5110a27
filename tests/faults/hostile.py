"""What a worker or a damaged disk can write in the place of a batch."""

from __future__ import annotations

import random

import msgpack
import xxhash

from rlbroker.codec.message import encode

PRELUDE_BYTES = 28


def bomb() -> bytes:
    """A small message that claims a gigabyte: a run of zeros under a true digest."""
    whole = encode({"zeros": bytes(1 << 20)})
    header_bytes = int.from_bytes(whole[8:12], "little")
    manifest = msgpack.unpackb(whole[PRELUDE_BYTES : PRELUDE_BYTES + header_bytes], strict_map_key=False)
    for lane in manifest["lanes"]:
        for segment in lane[2]:
            segment[1] = 1 << 30
    packed = msgpack.packb(manifest)
    body = whole[PRELUDE_BYTES + header_bytes :]
    prelude = whole[:8] + len(packed).to_bytes(4, "little") + len(body).to_bytes(8, "little")
    sealed: bytes = prelude + xxhash.xxh3_64_intdigest(packed).to_bytes(8, "little") + packed + body
    return sealed


def hostile(chance: random.Random) -> bytes:
    """Damage a sound message in one of the ways that the scenario names."""
    sound = bytearray(encode({"number": 1, "pad": bytes(range(256)) * 20}))
    kind = chance.choice(["bomb", "flip", "truncated", "future", "noise", "empty", "pickle"])
    if kind == "bomb":
        return bomb()
    if kind == "flip":
        sound[chance.randrange(len(sound))] ^= 1 << chance.randrange(8)
    elif kind == "truncated":
        del sound[chance.randrange(len(sound)) :]
    elif kind == "future":
        sound[4:6] = (99).to_bytes(2, "little")
    elif kind == "noise":
        sound = bytearray(chance.randbytes(chance.randrange(1, 4000)))
    elif kind == "empty":
        sound = bytearray()
    else:
        sound = bytearray(b"cos\nsystem\n(S'true'\ntR.")
    return bytes(sound)
