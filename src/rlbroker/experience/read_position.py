"""How far a learner has read each stream, and which entries it must not deliver again."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import entry_place
from rlbroker.types import Batch

#: Gaps that are remembered for each stream.
GAPS_KEPT = 1_000

#: An entry's id in a form that can be compared: incarnation and sequence.
Place = tuple[int, int]

#: The first and the last entry of a range that was skipped.
Gap = tuple[Place, Place]


@dataclass(frozen=True)
class Stream:
    """A stream of batches of one worker: those it sends, or its dead letters that are retried.

    Attributes:
        key: the stream's key.
        counts_key: the worker's counts.
        epochs_key: the epochs of the learners that read the worker's streams.
        retried: whether the stream holds dead letters that are retried.
    """

    worker_id: int
    key: str
    counts_key: str
    epochs_key: str
    retried: bool = False

    @classmethod
    def named(cls, name: str, keys: Keys) -> Self:
        """Return the stream with this name in marks."""
        prefix, _, worker = name.rpartition(":")
        number, retried = int(worker), prefix == "again"
        key = keys.again(number) if retried else keys.experiences(number)
        return cls(number, key, keys.counts(number), keys.epochs(number), retried)

    def __hash__(self) -> int:
        """Return the hash of the key, which is unique: cheaper than hashing all fields."""
        return hash(self.key)

    @property
    def keys(self) -> tuple[str, str, str]:
        """The keys that a script needs to remove an entry."""
        return self.key, self.counts_key, self.epochs_key

    @property
    def name(self) -> str:
        """The stream's name in marks."""
        return f"again:{self.worker_id}" if self.retried else str(self.worker_id)


@dataclass(slots=True)
class Entry:
    """One entry of a stream as it was read.

    Attributes:
        fields: as the worker wrote them; None if the entry was deleted while it was pending.
        taken_over: whether it was taken over from another learner.
        repeat_reason: how an entry that was collected before is counted; empty for a new one.
        deliveries: how many learners died after they received it and before they acknowledged it.
        batch: its batch, once decoded.
        place: its id in a form that can be compared.
    """

    stream: Stream
    entry_id: str
    fields: dict[bytes, bytes] | None
    taken_over: bool = False
    repeat_reason: str = ""
    deliveries: int = 0
    batch: Batch | None = None
    place: Place = field(init=False)

    def __post_init__(self) -> None:
        """Parse the id."""
        self.place = entry_place(self.entry_id)

    @property
    def stored_bytes(self) -> int:
        """Bytes of its message."""
        return len(self.fields.get(b"data", b"")) if self.fields else 0

    @property
    def batch_id(self) -> str:
        """Incarnation and sequence of its batch."""
        if self.stream.retried and self.fields:
            return self.fields.get(b"entry", b"").decode(errors="replace")
        return self.entry_id

    def replace_message(self, batch: Batch) -> None:
        """Replace the message with the decoded batch, so that only one of them is in memory."""
        self.batch = batch
        if self.fields:
            self.fields.pop(b"data", None)


@dataclass
class ReadPosition:
    """How far the learner has read one stream.

    Attributes:
        scan_from: where to continue the scan for pending entries; None when the scan is complete.
        first_scan: whether the first scan is incomplete; an earlier learner read what it finds.
        newest_read: the newest entry that was read; earlier entries are new only if they were taken over or skipped.
        restored: the newest entry that the restored checkpoint covers.
        last_collected: the newest entry that `collect` returned.
        excluded: entries up to `restored` that the checkpoint does not cover.
        taken_over: pending entries that were taken over from other learners.
        restored_taken_over: entries taken over from other learners that the checkpoint covers.
        gaps: ranges that were skipped: other learners read them, or they were never read.
    """

    stream: Stream
    scan_from: str | None = "-"
    first_scan: bool = True
    newest_read: Place = (0, 0)
    restored: Place = (0, 0)
    last_collected: Place = (0, 0)
    excluded: set[str] = field(default_factory=set)
    taken_over: set[str] = field(default_factory=set)
    restored_taken_over: set[str] = field(default_factory=set)
    gaps: deque[Gap] = field(default_factory=partial(deque, maxlen=GAPS_KEPT))

    def has_read(self, entry: Entry) -> bool:
        """Return whether an entry was read before, or is covered by the restored checkpoint."""
        if entry.taken_over:
            return entry.entry_id in self.restored_taken_over
        if entry.place > self.newest_read or entry.entry_id in self.excluded:
            return False
        return not _in_gaps(self.gaps, entry.place)

    def is_in_checkpoint(self, entry: Entry) -> bool:
        """Return whether a read entry is pending only because an earlier learner died before acknowledging it."""
        return entry.taken_over or (self.first_scan and entry.place <= self.restored)

    def note_read(self, entry: Entry) -> None:
        """Record that an entry was read."""
        incarnation, number = place = entry.place
        self.excluded.discard(entry.entry_id)
        if entry.taken_over:
            self.taken_over.add(entry.entry_id)
        if place > self.newest_read:
            before = self.newest_read[1] if incarnation == self.newest_read[0] else number - 1
            if before < number - 1:
                self.gaps.append(((incarnation, before + 1), (incarnation, number - 1)))
            self.newest_read = place
            return
        for first, last in list(self.gaps):
            if first <= place <= last:
                self.gaps.remove((first, last))
                rest = (first, (incarnation, number - 1)), ((incarnation, number + 1), last)
                self.gaps.extend(gap for gap in rest if gap[0] <= gap[1])

    def mark(self, unreturned: Set[str], pending: Collection[str]) -> dict[str, Any]:
        """Return the mark of this stream for a checkpoint.

        It names the last entry that was collected, the entries before it that were not, the gaps that other learners
        may have read, and the entries that were taken over from them.

        Args:
            unreturned: ids of entries that were read and that `collect` has not returned.
            pending: ids of the stream's pending entries.
        """
        self.taken_over.intersection_update(pending)
        before = {one for one in unreturned if entry_place(one) <= self.last_collected}
        return {
            "through": _id_of(self.last_collected),
            "except": sorted(before | self.excluded),
            "passed_over": [[_id_of(first), _id_of(last)] for first, last in self.gaps],
            "taken_over": sorted(self.restored_taken_over | self.taken_over - unreturned),
        }

    def restore(self, mark: Mapping[str, Any]) -> None:
        """Continue from the mark of a checkpoint."""
        self.newest_read = self.restored = self.last_collected = entry_place(mark["through"])
        self.excluded, self.restored_taken_over = set(mark["except"]), set(mark["taken_over"])
        self.gaps.extend(_gaps_in(mark))


def covers(mark: Mapping[str, Any], entry_id: str, *, taken_over: bool) -> bool:
    """Return whether a checkpoint with this mark covers an entry."""
    if taken_over:
        return entry_id in mark["taken_over"]
    place = entry_place(entry_id)
    read = place <= entry_place(mark["through"]) and entry_id not in mark["except"]
    return read and not _in_gaps(_gaps_in(mark), place)


def _gaps_in(mark: Mapping[str, Any]) -> list[Gap]:
    return [(entry_place(first), entry_place(last)) for first, last in mark["passed_over"]]


def _in_gaps(gaps: Iterable[Gap], place: Place) -> bool:
    return any(first <= place <= last for first, last in gaps)


def _id_of(place: Place) -> str:
    return f"{place[0]}-{place[1]}"
