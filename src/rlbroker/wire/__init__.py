"""Values to bytes and back: the wire format of weights and batches.

Pure: no Redis, clock, thread or environment. `encode` and `decode` make and read one message; `plan` and
`Assembly` are their halves, for those who store the segments apart. `ImagePlan` and `ImageFormat` write and read
weights that lie in one flat buffer, whole or as a difference to another. The format is in docs/wire-format.md.
"""

from rlbroker.wire.assembly import Assembly
from rlbroker.wire.format import FORMAT_VERSION, StoredSegment
from rlbroker.wire.image import EncodedSegment, ImageFormat, ImagePlan
from rlbroker.wire.limits import Limits
from rlbroker.wire.message import decode, describe, encode, encode_pieces
from rlbroker.wire.plan import Plan, plan

__all__ = [
    "FORMAT_VERSION",
    "Assembly",
    "EncodedSegment",
    "ImageFormat",
    "ImagePlan",
    "Limits",
    "Plan",
    "StoredSegment",
    "decode",
    "describe",
    "encode",
    "encode_pieces",
    "plan",
]
