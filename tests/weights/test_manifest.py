"""The stored forms of versions: which stay, and by which of them a worker comes to the latest."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from rlbroker.errors import WireError
from rlbroker.weights.manifest import MAX_DELTAS, Manifest, StoredForm, choose_others, needs_full

pytestmark = pytest.mark.unit


def full(version: int, size: int = 100) -> StoredForm:
    return StoredForm(version, 0, f"{version}-1-1", 1, size, "d")


def delta(version: int, size: int = 1, base: int | None = None) -> StoredForm:
    return StoredForm(version, version - 1 if base is None else base, f"{version}-1-2", 1, size, "d")


def pointer(latest: StoredForm, *others: StoredForm) -> Manifest:
    return Manifest(latest, others, 100, 1, "blosc2", 1.0)


def path(at: Manifest, held: int = 0) -> list[str]:
    return [form.upload for form in at.path(held)]


def test_a_new_worker_takes_the_full_version_and_what_follows() -> None:
    assert path(pointer(delta(3), full(1), delta(2))) == ["1-1-1", "2-1-2", "3-1-2"]


def test_a_worker_that_has_a_version_of_the_chain_takes_what_follows() -> None:
    at = pointer(delta(3), full(1), delta(2))
    assert path(at, held=2) == ["3-1-2"]
    assert path(at, held=1) == ["2-1-2", "3-1-2"]


def test_the_fewest_bytes_win() -> None:
    at = pointer(delta(4, 60), full(1), delta(2, 60), delta(3, 60), full(4, 100))
    assert path(at, held=1) == ["4-1-1"]
    assert path(at, held=2) == ["4-1-1"]
    assert path(at, held=3) == ["4-1-2"]


def test_what_leads_nowhere_is_refused() -> None:
    with pytest.raises(WireError, match="no stored form leads to version 3"):
        pointer(delta(3), full(1)).path()
    assert path(pointer(delta(3), full(1)), held=2) == ["3-1-2"]


def test_who_has_the_latest_needs_nothing() -> None:
    assert path(pointer(delta(5), full(4)), held=5) == []


def test_a_full_version_ends_what_was_before_unless_deltas_lead_to_it() -> None:
    before = (full(1), delta(2), delta(3))
    assert choose_others(full(4), None, before) == ()
    assert choose_others(delta(4), full(4), before) == (delta(2), delta(3), full(4))


def test_late_workers_keep_deltas_only_while_they_are_smaller_than_a_full_version() -> None:
    before = (full(1), delta(2, 40), delta(3, 40), delta(4, 40))
    assert choose_others(delta(5, 40), full(5), before) == (delta(3, 40), delta(4, 40), full(5))


def test_a_pointer_comes_back_from_its_fields() -> None:
    at = Manifest(delta(3), (full(1), delta(2)), 100, 7, "blosc2", 1.5, (full(9, 5),))
    assert Manifest.from_fields(at.to_fields()) == at
    assert at.numbered(8).latest.version == 8
    assert Manifest.from_fields({}) is None


@pytest.mark.parametrize("field", ["others", "dropped", "digest", "upload", "base"])
def test_what_no_learner_writes_is_refused(field: str) -> None:
    fields = pointer(delta(3), full(1), delta(2)).to_fields()
    with pytest.raises(WireError):
        Manifest.from_fields({**fields, field: "1:2:3"})
    with pytest.raises(WireError):
        Manifest.from_fields({name: value for name, value in fields.items() if name != field})


@pytest.mark.parametrize(
    "written",
    [
        {"upload": "../../3"},
        {"upload": "3 1"},
        {"upload": "3" * 500},
        {"digest": "\u00e9"},
        {"digest": ""},
        {"chunks": "999999999999"},
        {"others": "1:0:1-1-1:600000:9:d 2:1:2-1-2:600000:9:d"},
    ],
)
def test_what_would_become_a_name_of_a_file_or_too_many_keys_is_refused(written: dict[str, str]) -> None:
    with pytest.raises(WireError):
        Manifest.from_fields({**pointer(delta(3), full(1), delta(2)).to_fields(), **written})


def test_every_worker_comes_to_the_latest_whatever_was_published() -> None:
    """By simulation: bounded forms, a way for everyone, and never one that is dearer than the full version."""
    for seed in range(20):
        chance = random.Random(seed)
        forms: Sequence[StoredForm] = ()
        for version in range(1, 120):
            if not forms or chance.random() < 0.02:
                latest, whole = full(version, chance.randrange(50, 150)), None
            else:
                latest = delta(version, chance.randrange(1, 60))
                whole = full(version) if needs_full(latest, forms) else None
            at = pointer(latest, *choose_others(latest, whole, forms))
            forms = at.forms
            assert len(forms) <= 2 * MAX_DELTAS + 2
            cost = sum(form.stored_bytes for form in at.path())
            for held in chance.sample(range(version), min(version, 5)):
                assert sum(form.stored_bytes for form in at.path(held)) <= cost
            chain = [form.version for form in at.path(version - 1)]
            assert chain[-1] == version
