"""Read positions: which entries are known, and the marks that users keep in their checkpoints."""

from __future__ import annotations

import pytest

from rlbroker.backend.keys import Keys
from rlbroker.experience.read_position import Entry, ReadPosition, Stream, covers

pytestmark = pytest.mark.unit

STREAM = Stream.named("3", Keys("run"))


def entry(entry_id: str, *, taken_over: bool = False) -> Entry:
    return Entry(STREAM, entry_id, {b"data": b"x"}, taken_over=taken_over)


def position_after(*entry_ids: str) -> ReadPosition:
    """Return the position after these entries were read."""
    position = ReadPosition(STREAM)
    for entry_id in entry_ids:
        position.note_read(entry(entry_id))
    return position


@pytest.mark.parametrize("name", ["3", "again:3"])
def test_a_stream_is_found_by_its_name_in_marks(name: str) -> None:
    stream = Stream.named(name, Keys("run"))
    assert (stream.name, stream.worker_id, stream.retried) == (name, 3, name.startswith("again:"))


def test_a_mark_names_what_was_not_collected_skipped_and_taken_over() -> None:
    """Checkpoints of earlier releases hold marks of this form."""
    position = position_after("1-1", "1-4", "2-1")
    position.note_read(entry("1-2", taken_over=True))
    assert position.mark({"1-1", "2-1"}, {"1-2"}) == {
        "through": "2-1",
        "except": ["1-1", "2-1"],
        "passed_over": [["1-3", "1-3"]],
        "taken_over": ["1-2"],
    }


def test_a_restored_position_knows_exactly_what_its_mark_covers() -> None:
    position = position_after("1-1", "1-2", "1-5")
    mark = position.mark({"1-1"}, set())
    restored = ReadPosition(STREAM)
    restored.restore(mark)
    for entry_id, known in (("1-1", False), ("1-2", True), ("1-3", False), ("1-5", True), ("1-6", False)):
        assert restored.has_read(entry(entry_id)) is known, entry_id
        assert covers(mark, entry_id, taken_over=False) is known, entry_id
        assert not restored.has_read(entry(entry_id, taken_over=True)), entry_id


def test_an_entry_of_a_new_incarnation_leaves_no_gap() -> None:
    position = position_after("1-1", "2-1", "2-2")
    assert position.mark(set(), set())["passed_over"] == []


def test_noting_an_entry_again_changes_nothing() -> None:
    position = position_after("1-1", "1-4", "1-3", "2-1")
    before = position.mark(set(), set())
    for entry_id in ("1-1", "1-4", "1-3", "2-1"):
        position.note_read(entry(entry_id))
    assert position.mark(set(), set()) == before
