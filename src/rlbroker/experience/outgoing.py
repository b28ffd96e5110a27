"""Batches on their way: as bytes, with their number, and with what is known of where they are."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from rlbroker.backend.resp import Pieces
from rlbroker.codec.limits import Limits
from rlbroker.codec.message import encode_pieces
from rlbroker.errors import BatchTooLarge
from rlbroker.types import SendReceipt

#: A message that is not smaller than this part of its arrays was not worth compressing.
WORTHWHILE = 0.97

#: So many batches in a row that did not get smaller, and the next ones are not tried; so many then, at most.
TRIED_IN_VAIN = 4
LONGEST_REST = 63


@dataclass(frozen=True, slots=True)
class Message:
    """A batch as bytes, of which some are the memory of its arrays; they must not change while it is used."""

    pieces: Pieces
    stored_bytes: int
    rows: int
    raw_bytes: int


@dataclass(slots=True)
class PendingBatch:
    """A batch that has its number.

    Attributes:
        fields: of its entry; the last is its message.
        uncertain: whether a try to store it ended in a broken connection, so that it may be there.
        stored: whether the server as it is now is known to have it.
        charged: whether its bytes are in the queue's books.
    """

    sequence: int
    fields: list[Any]
    receipt: SendReceipt
    uncertain: bool = False
    stored: bool = False
    charged: bool = False

    @property
    def size(self) -> int:
        """Bytes of its message."""
        return self.receipt.stored_bytes

    def keep(self) -> None:
        """Have memory of its own: the caller may write to the batch's arrays from now on."""
        if isinstance(self.fields[-1], tuple):
            self.fields[-1] = b"".join(self.fields[-1])


class Packer:
    """Makes messages of batches, and wastes little time on compressing what does not get smaller.

    Safe to use from several threads: at worst a batch more or less is tried.
    """

    def __init__(self, *, compression: bool) -> None:
        """Begin without an opinion.

        Args:
            compression: whether arrays are compressed where that makes them smaller.
        """
        self._compression = compression
        self._in_vain = self._resting = 0

    def pack(self, batch: dict[str, Any]) -> Message:
        """Give the message of a batch.

        Raises:
            UnsupportedType: something in the batch cannot travel; its path is named.
            BatchTooLarge: it holds more than 1 GiB of arrays.
        """
        rows, raw_bytes = shape_of(batch)
        if raw_bytes > Limits().max_raw_bytes:
            raise BatchTooLarge(
                f"the batch holds {raw_bytes:,} bytes; no more than {Limits().max_raw_bytes:,} may travel"
            )
        tries = self._compression and not self._resting
        pieces = encode_pieces(batch, compression=tries)
        stored_bytes = sum(map(len, pieces))
        if tries:
            worthwhile = stored_bytes < raw_bytes * WORTHWHILE
            self._in_vain = 0 if worthwhile else self._in_vain + 1
            if self._in_vain >= TRIED_IN_VAIN:
                self._resting = min(LONGEST_REST, 2**self._in_vain)
        elif self._resting:
            self._resting -= 1
        return Message(pieces, stored_bytes, rows, raw_bytes)


def shape_of(batch: dict[str, Any]) -> tuple[int, int]:
    """Give the leading dimension of the first array or tensor, and the bytes of all of them."""
    rows, raw_bytes = 0, 0
    waiting: deque[Any] = deque([batch])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, dict):
            waiting.extend(node.values())
        elif isinstance(node, (list, tuple)):
            waiting.extend(node)
        elif hasattr(node, "nbytes") and hasattr(node, "shape"):
            raw_bytes += int(node.nbytes)
            rows = rows or (int(node.shape[0]) if len(node.shape) else 0)
    return rows, raw_bytes
