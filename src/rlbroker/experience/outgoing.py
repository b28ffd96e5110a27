"""Batches on their way out: packed into messages, numbered, and kept until they are confirmed."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, SupportsIndex

import numpy as np

from rlbroker.backend.resp import Pieces
from rlbroker.codec.message import MessagePlan
from rlbroker.codec.refusals import shorten_object
from rlbroker.errors import InvalidArgument
from rlbroker.types import SendReceipt

#: Compression is worthwhile if the message is smaller than this fraction of its arrays.
WORTHWHILE = 0.97

#: After this many batches in a row that compression did not shrink, it is skipped for a number of batches that doubles
#: up to a maximum.
INCOMPRESSIBLE_TRIES = 4
MOST_SKIPPED = 63

#: The most rows that a batch can be said to have: counts add them up.
MOST_ROWS: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class Message:
    """A batch as bytes. Some of the pieces are the memory of its arrays, which must not change while they are used."""

    pieces: Pieces
    stored_bytes: int
    rows: int
    raw_bytes: int


@dataclass(slots=True)
class PendingBatch:
    """A batch that has a number.

    Attributes:
        fields: the fields of its entry; the last value is its message.
        uncertain: whether it may have been stored without an answer.
        confirmed: whether it has reached its level; at level `learner`, whether the server has it.
        accepted: whether the call that sent it is over, so that its caller does not send it again.
    """

    sequence: int
    fields: list[Any]
    receipt: SendReceipt
    uncertain: bool = False
    confirmed: bool = False
    accepted: bool = False

    @property
    def stored_bytes(self) -> int:
        """Bytes of its message."""
        return self.receipt.stored_bytes

    def copy_message(self) -> None:
        """Copy the message when the call that sent it ends: the caller may write to the batch's arrays from then on."""
        self.accepted = True
        if isinstance(self.fields[-1], tuple):
            self.fields[-1] = b"".join(self.fields[-1])


class PendingBatches:
    """The batches of one worker that have not reached their level. Each change is one assignment, or may be repeated.

    Attributes:
        newest: the last batch that got a number; None before the first.
        kept: batches that level `learner` keeps until the learner has acknowledged them.
    """

    def __init__(self) -> None:
        """Begin without batches."""
        self.newest: PendingBatch | None = None
        self.kept: deque[PendingBatch] = deque()
        self._kept_bytes: int | None = 0  #: None while it must be measured

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.kept) + (self.unconfirmed is not None)

    def __iter__(self) -> Iterator[PendingBatch]:
        """Iterate in the order of their numbers."""
        unconfirmed = self.unconfirmed
        yield from (batch for batch in self.kept if batch is not unconfirmed)
        if unconfirmed is not None:
            yield unconfirmed

    @property
    def sequence(self) -> int:
        """The number of the newest batch; 0 before the first."""
        return self.newest.sequence if self.newest is not None else 0

    @property
    def unconfirmed(self) -> PendingBatch | None:
        """The newest batch, if it is not confirmed."""
        return self.newest if self.newest is not None and not self.newest.confirmed else None

    @property
    def kept_bytes(self) -> int:
        """Bytes of the messages of the kept batches."""
        if self._kept_bytes is None:
            self._kept_bytes = sum(batch.stored_bytes for batch in self.kept)
        return self._kept_bytes

    def confirm(self, batch: PendingBatch, *, keep: bool) -> None:
        """Note that the newest batch is confirmed; keep it, or release its memory."""
        if keep and not (self.kept and self.kept[-1] is batch):
            batch.copy_message()
            self._kept_bytes, known = None, self.kept_bytes
            self.kept.append(batch)
            self._kept_bytes = known + batch.stored_bytes
        batch.confirmed = True
        if not keep:
            batch.fields = []

    def release_oldest(self, is_safe: Callable[[PendingBatch], bool]) -> None:
        """Release kept batches, oldest first, up to the first one that is not safe."""
        while self.kept and is_safe(self.kept[0]):
            self._kept_bytes, known = None, self.kept_bytes
            self._kept_bytes = known - self.kept.popleft().stored_bytes

    def release_all(self, is_dropped: Callable[[PendingBatch], bool]) -> None:
        """Release all kept batches that were dropped."""
        self._kept_bytes = None
        self.kept = deque(batch for batch in self.kept if not is_dropped(batch))

    def discard(self, batch: PendingBatch) -> None:
        """Release one batch, but not its number."""
        self.release_all(lambda other: other is batch)
        batch.confirmed = True

    def clear(self) -> None:
        """Release all batches, but not their numbers."""
        self._kept_bytes = None
        self.kept = deque()
        if self.newest is not None:
            self.newest.confirmed = True


class Packer:
    """Packs batches into messages; compresses rarely while compression does not shrink them.

    Safe to use from several threads: a race only changes which batches are tried.
    """

    def __init__(self, *, compression: bool) -> None:
        """Begin by compressing, if compression is on."""
        self._compression = compression
        self._incompressible = self._skipping = 0

    def pack(self, batch: Mapping[str, Any], rows: SupportsIndex | None = None) -> Message:
        """Return the message of a batch.

        Args:
            rows: the number of rows, if it is not the leading dimension of the first array or tensor.

        Raises:
            InvalidArgument: `rows` is not a number of rows.
            UnsupportedType: something in the batch cannot travel; its path is named.
            BatchTooLarge: it holds more than 1 GiB of arrays.
        """
        known_rows = None if rows is None else _check_rows(rows)
        compress = self._compression and not self._skipping
        plan = MessagePlan(batch, compression=compress)
        pieces, raw_bytes = plan.encode(), plan.raw_bytes
        stored_bytes = sum(map(len, pieces))
        if compress:
            worthwhile = stored_bytes < raw_bytes * WORTHWHILE
            self._incompressible = 0 if worthwhile else self._incompressible + 1
            if self._incompressible >= INCOMPRESSIBLE_TRIES:
                self._skipping = min(MOST_SKIPPED, 2**self._incompressible)
        elif self._skipping:
            self._skipping -= 1
        return Message(pieces, stored_bytes, plan.rows if known_rows is None else known_rows, raw_bytes)


def _check_rows(rows: SupportsIndex) -> int:
    """Return a number of rows as an int; raise InvalidArgument if it is not one."""
    try:
        number = -1 if issubclass(type(rows), bool | np.bool) else operator.index(rows)
    except Exception:  # noqa: BLE001 - its own code may raise whatever it likes
        number = -1
    if not 0 <= number <= MOST_ROWS:
        raise InvalidArgument(f"rows must be an integer from 0 to {MOST_ROWS}; got {shorten_object(rows)}")
    return number
