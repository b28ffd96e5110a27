"""How far a learner has read each stream, and which entries it must not deliver again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Self

from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import entry_place, whole_number

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


@dataclass(slots=True, eq=False)
class Entry:
    """One entry of a stream, from being read until the server has deleted it: the state of a batch at the learner.

    It waits in the queue of `EntryReader` until `collect` has made a batch of it, which is then `collected`. Whatever
    becomes of it, it is acknowledged with an `outcome`, and forgotten when the server has answered that.

    Attributes:
        fields: as the worker wrote them; None if the entry was deleted while it was pending, or is collected.
        taken_over: whether it was taken over from another learner.
        deliveries: how many learners died after they received it and before they acknowledged it.
        collected: whether `collect` has made a batch of it, and has returned that or is about to.
        outcome: how it is counted. Known from the start for a repeat: an entry that was collected before.
        place: its id in a form that can be compared.
        stored_bytes: bytes of its message.
    """

    stream: Stream
    entry_id: str
    fields: dict[bytes, bytes] | None
    taken_over: bool = False
    deliveries: int = 0
    collected: bool = False
    outcome: str = ""
    place: Place = field(init=False)
    stored_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Parse the id, and measure the message."""
        self.place = entry_place(self.entry_id)
        self.stored_bytes = len(self.fields.get(b"data", b"")) if self.fields else 0

    @property
    def is_repeat(self) -> bool:
        """Whether it was collected before, perhaps by an earlier learner, so that it is only acknowledged."""
        return not self.collected and self.outcome in ("delivered", "duplicate")

    @property
    def version(self) -> int | None:
        """The version that produced its batch; None if the entry does not say, or its fields are gone."""
        text = self.fields.get(b"version") if self.fields else None
        return None if text is None else whole_number(text.decode("ascii", "replace"))

    @property
    def batch_id(self) -> str:
        """Incarnation and sequence of its batch."""
        if self.stream.retried and self.fields:
            return self.fields.get(b"entry", b"").decode(errors="replace")
        return self.entry_id


@dataclass
class ReadPosition:
    """How far the learner has read one stream.

    Attributes:
        scan_from: where to continue the scan for pending entries; None when the scan is complete.
        first_scan: whether the first scan is incomplete; an earlier learner read what it finds.
        newest_read: the newest entry that was read; earlier entries are new only if they were taken over or skipped.
        restored: the newest entry that the restored checkpoint covers.
        excluded: entries up to `restored` that the checkpoint does not cover.
        restored_taken_over: entries taken over from other learners that the checkpoint covers.
        gaps: ranges that were skipped: other learners read them, or they were never read.
    """

    stream: Stream
    scan_from: str | None = "-"
    first_scan: bool = True
    newest_read: Place = (0, 0)
    restored: Place = (0, 0)
    excluded: set[str] = field(default_factory=set)
    restored_taken_over: set[str] = field(default_factory=set)
    gaps: tuple[Gap, ...] = ()

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
        """Record that an entry was read. Harmless to repeat, also after an interrupt."""
        incarnation, number = place = entry.place
        self.excluded.discard(entry.entry_id)
        if place > self.newest_read:
            before = self.newest_read[1] if incarnation == self.newest_read[0] else number - 1
            gap = ((incarnation, before + 1), (incarnation, number - 1))
            if before < number - 1 and gap not in self.gaps:
                self.gaps = (*self.gaps, gap)[-GAPS_KEPT:]
            self.newest_read = place
        elif _in_gaps(self.gaps, place):
            rest = list[Gap]()
            for first, last in self.gaps:
                if first <= place <= last:
                    parts = (first, (incarnation, number - 1)), ((incarnation, number + 1), last)
                    rest += [gap for gap in parts if gap[0] <= gap[1]]
                else:
                    rest.append((first, last))
            self.gaps = tuple(rest[-GAPS_KEPT:])

    def mark(self, unreturned: Set[str], taken_over: Set[str]) -> dict[str, Any]:
        """Return the mark of this stream for a checkpoint.

        It names the last entry that was read, the entries before it that `collect` has not returned, the gaps that
        other learners may have read, and the entries that were taken over from them.

        Args:
            unreturned: ids of entries that were read and that `collect` has not returned.
            taken_over: ids of pending entries that were taken over from other learners.
        """
        return {
            "through": _id_of(self.newest_read),
            "except": sorted(unreturned | self.excluded),
            "passed_over": [[_id_of(first), _id_of(last)] for first, last in self.gaps],
            "taken_over": sorted(self.restored_taken_over | taken_over - unreturned),
        }

    def restore(self, mark: Mapping[str, Any]) -> None:
        """Continue from the mark of a checkpoint."""
        self.newest_read = self.restored = entry_place(mark["through"])
        self.excluded, self.restored_taken_over = set(mark["except"]), set(mark["taken_over"])
        self.gaps = tuple(_gaps_in(mark)[-GAPS_KEPT:])


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
