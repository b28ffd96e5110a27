"""How far one learner has read each stream, and what of it is not to be handed out again."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rlbroker.backend.replies import entry_place
from rlbroker.experience.pending import Source
from rlbroker.types import Batch

#: Gaps of one stream that are remembered.
GAPS_KEPT = 1_000

#: An entry's id as what can be compared: incarnation and sequence.
Place = tuple[int, int]

#: The first and the last entry of what was passed over.
Gap = tuple[Place, Place]


@dataclass(slots=True)
class Entry:
    """One entry as it was read, before it is decoded.

    Attributes:
        place: its id, to be compared.
        taken_over: whether another learner had it before.
        came_again: why it is not to be handed out, if it was before.
        deliveries: how often it was handed out before, if a learner died over it; 0 otherwise.
        opened: the batch that is in it, once it was decoded.
    """

    source: Source
    entry_id: str
    fields: dict[bytes, bytes] | None
    taken_over: bool = False
    came_again: str = ""
    deliveries: int = 0
    opened: Batch | None = None
    place: Place = field(init=False)

    def __post_init__(self) -> None:
        """Read its id."""
        self.place = entry_place(self.entry_id)

    @property
    def stored_bytes(self) -> int:
        """Bytes of its batch."""
        return len(self.fields.get(b"data", b"")) if self.fields else 0

    def let_go_of_message(self, opened: Batch) -> None:
        """Keep the batch in place of its message: there is no need for the memory of both."""
        self.opened = opened
        if self.fields:
            self.fields.pop(b"data", None)

    @property
    def batch(self) -> str:
        """Incarnation and sequence of its batch."""
        if self.source.retried and self.fields:
            return self.fields.get(b"entry", b"").decode(errors="replace")
        return self.entry_id


@dataclass
class Stream:
    """How far the collector has read one stream.

    Attributes:
        pending_from: where to go on looking for entries that are pending; None to read what is new.
        fresh: whether the first look at what is pending is not over: it was read by an earlier learner.
        newest_read: nothing up to here is taken again, but for what another learner gave up.
        restored: the part of that which a checkpoint holds.
        handed_out: the last entry that the caller got.
        open: entries up to `restored` that the checkpoint does not hold.
        taken_over: entries that another learner gave up, and we hold.
        restored_too: such entries that the checkpoint holds.
        gaps: what was passed over since then, from and to: other learners read it, or nobody did.
    """

    source: Source
    pending_from: str | None = "-"
    fresh: bool = True
    newest_read: Place = (0, 0)
    restored: Place = (0, 0)
    handed_out: Place = (0, 0)
    open: set[str] = field(default_factory=set)
    taken_over: set[str] = field(default_factory=set)
    restored_too: set[str] = field(default_factory=set)
    gaps: deque[Gap] = field(default_factory=partial(deque, maxlen=GAPS_KEPT))

    def knows(self, entry: Entry) -> bool:
        """Whether an entry was read before, or is in the restored checkpoint."""
        if entry.taken_over:
            return entry.entry_id in self.restored_too
        if entry.place > self.newest_read or entry.entry_id in self.open:
            return False
        return not _within(self.gaps, entry.place)

    def note(self, entry: Entry) -> None:
        """Note that an entry was read."""
        life, number = place = entry.place
        self.open.discard(entry.entry_id)
        if entry.taken_over:
            self.taken_over.add(entry.entry_id)
        if place > self.newest_read:
            before = self.newest_read[1] if life == self.newest_read[0] else number - 1
            if before < number - 1:
                self.gaps.append(((life, before + 1), (life, number - 1)))
            self.newest_read = place
            return
        for first, last in list(self.gaps):
            if first <= place <= last:
                self.gaps.remove((first, last))
                rest = (first, (life, number - 1)), ((life, number + 1), last)
                self.gaps.extend(gap for gap in rest if gap[0] <= gap[1])

    def mark(self, waiting: Set[str], held: Collection[str]) -> dict[str, Any]:
        """Give what a checkpoint is to remember of it.

        That is the last entry that was handed out, those before it that were not, gaps that others may have read,
        and what was taken over from them.

        Args:
            waiting: ids of entries that were read and not handed out.
            held: ids of entries that were not acknowledged.
        """
        self.taken_over.intersection_update(held)
        before = {one for one in waiting if entry_place(one) <= self.handed_out}
        return {
            "through": _id_of(self.handed_out),
            "except": sorted(before | self.open),
            "passed_over": [[_id_of(first), _id_of(last)] for first, last in self.gaps],
            "taken_over": sorted(self.restored_too | self.taken_over - waiting),
        }

    def restore(self, mark: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.newest_read = self.restored = self.handed_out = entry_place(mark["through"])
        self.open, self.restored_too = set(mark["except"]), set(mark["taken_over"])
        self.gaps.extend(_gaps_of(mark))


def covers(mark: Mapping[str, Any], entry_id: str, *, taken_over: bool) -> bool:
    """Whether a checkpoint with this mark holds an entry."""
    if taken_over:
        return entry_id in mark["taken_over"]
    place = entry_place(entry_id)
    read = place <= entry_place(mark["through"]) and entry_id not in mark["except"]
    return read and not _within(_gaps_of(mark), place)


def _gaps_of(mark: Mapping[str, Any]) -> list[Gap]:
    return [(entry_place(first), entry_place(last)) for first, last in mark["passed_over"]]


def _within(gaps: Iterable[Gap], place: Place) -> bool:
    return any(first <= place <= last for first, last in gaps)


def _id_of(place: Place) -> str:
    return f"{place[0]}-{place[1]}"
