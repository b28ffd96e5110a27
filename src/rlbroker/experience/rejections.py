"""Decodes batches for the learner, and removes from the queue those that cannot be delivered."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from rlbroker.backend.replies import entry_place, seconds_number, whole_number
from rlbroker.codec.message import assemble
from rlbroker.errors import WireError
from rlbroker.experience.dead_letters import DeadLetters
from rlbroker.experience.pending import PendingEntries, Takeover
from rlbroker.experience.read_position import Entry
from rlbroker.types import Batch

logger = logging.getLogger("rlbroker")

#: After this many deliveries to learners that died, and in any case at its last delivery, a batch is returned alone, so
#: that other batches are not blamed for a death.
SUSPECT_AFTER = 2


class Unpacker:
    """Makes batches of entries, and removes those that cannot be delivered. Not thread-safe."""

    def __init__(
        self,
        pending: PendingEntries,
        dead_letters: DeadLetters,
        takeover: Takeover,
        *,
        max_staleness: int | None,
        max_deliveries: int | None,
        latest_version: Callable[[], int],
    ) -> None:
        """Set the limits.

        Args:
            dead_letters: where corrupt and poison batches go.
            takeover: counts deliveries on the server.
            max_staleness: staler batches are counted and not delivered; None for no limit.
            max_deliveries: deliveries after which a batch is poison; None for no limit.
            latest_version: returns the version that staleness is measured from.
        """
        self._pending, self._dead_letters, self._takeover = pending, dead_letters, takeover
        self._max_staleness, self._max_deliveries = max_staleness, max_deliveries
        self._suspect_after = (
            SUSPECT_AFTER if max_deliveries is None else max(1, min(SUSPECT_AFTER, max_deliveries - 1))
        )
        self._latest_version = latest_version
        #: Seconds spent on decoding since the caller reset it.
        self.decode_seconds = 0.0

    def is_suspect(self, entry: Entry) -> bool:
        """Return whether learners died over this batch so often that it must be returned alone."""
        return entry.deliveries >= self._suspect_after

    def unpack(self, entry: Entry, *, of_a_round: bool = False) -> Batch | None:
        """Return the batch of an entry; count it and return None if it cannot be delivered.

        Args:
            of_a_round: whether the caller asked for the version of this batch, so that it is not stale.
        """
        if entry.outcome == "stale":
            pass  # an earlier call has decided that, and the server may have counted it
        elif entry.is_repeat:
            worker = entry.stream.worker_id
            logger.info("worker %d: batch %s came again: %s", worker, entry.batch_id, entry.outcome)
        elif entry.fields is None:
            entry.outcome = "trimmed"
        elif self._is_poison(entry):
            self._bury(entry, "poison", "each learner that collected it died before it acknowledged it")
            return None
        else:
            try:
                batch = self._decode(entry, entry.fields)
            except (WireError, KeyError, ValueError) as error:
                self._bury(entry, "corrupt", f"{type(error).__name__}: {error}")
                return None
            if of_a_round or self._max_staleness is None or batch.staleness <= self._max_staleness:
                return batch if self._count_delivery(entry) else None
            entry.outcome = "stale"
        self._pending.acknowledge([entry])
        return None

    def _bury(self, entry: Entry, reason: str, detail: str) -> None:
        logger.warning(
            "worker %d: batch %s becomes a dead letter: %s", entry.stream.worker_id, entry.batch_id, detail
        )
        self._dead_letters.bury(entry, reason, detail)

    def _is_poison(self, entry: Entry) -> bool:
        return self._max_deliveries is not None and entry.deliveries >= self._max_deliveries

    def _count_delivery(self, entry: Entry) -> bool:
        """Count one more delivery of a batch that a learner died over; return False if another learner has it now."""
        consumer, deliveries = self._pending.consumers[entry.taken_over], entry.deliveries + 1
        if deliveries == 1 or self._takeover.count_delivery(
            entry.stream, entry.entry_id, consumer, deliveries
        ):
            return True
        self._pending.remove([entry], {})
        return False

    def _decode(self, entry: Entry, fields: Mapping[bytes, bytes]) -> Batch:
        began = time.perf_counter()
        try:
            message = assemble(fields[b"data"])
            content = message.tree()
        finally:
            self.decode_seconds += time.perf_counter() - began
        if not isinstance(content, dict):
            raise WireError("a batch must be a dictionary")
        batch = Batch(content)
        batch.worker_id = entry.stream.worker_id
        batch.incarnation, batch.sequence = (
            entry_place(entry.batch_id) if entry.stream.retried else entry.place
        )
        batch.version = _parse_integer(fields, b"version")
        batch.staleness = max(0, self._latest_version() - batch.version)
        batch.rows = _parse_integer(fields, b"rows")
        # Measured, not read from the entry: it bounds what one call decodes, and a few stored bytes can decode to a
        # gigabyte of zeros.
        batch.raw_bytes = message.restored_bytes
        batch.stored_bytes = entry.stored_bytes
        batch.sent_at = _parse_seconds(fields, b"sent_at")
        batch.received_at = time.time()
        batch.held_as = (entry.stream.name, entry.entry_id)
        return batch


def _parse_integer(fields: Mapping[bytes, bytes], name: bytes) -> int:
    number = whole_number(fields[name].decode("ascii", "replace"))
    if number is None:
        raise WireError(f"the batch's {name.decode()} is not a valid integer")
    return number


def _parse_seconds(fields: Mapping[bytes, bytes], name: bytes) -> float:
    seconds = seconds_number(fields[name].decode("ascii", "replace"))
    if seconds is None:
        raise WireError(f"the batch's {name.decode()} is not a valid time")
    return seconds
