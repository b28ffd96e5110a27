"""Manifests: which stored forms stay, and the path by which a worker reaches the latest version."""

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


def manifest_of(latest: StoredForm, *others: StoredForm) -> Manifest:
    return Manifest(latest, others, 100, 1, "blosc2", 1.0)


def path(manifest: Manifest, from_version: int = 0) -> list[str]:
    return [form.upload for form in manifest.path(from_version)]


def test_a_new_worker_takes_the_full_version_and_the_deltas_after_it() -> None:
    assert path(manifest_of(delta(3), full(1), delta(2))) == ["1-1-1", "2-1-2", "3-1-2"]


def test_a_worker_that_has_a_version_of_the_chain_takes_the_deltas_after_it() -> None:
    manifest = manifest_of(delta(3), full(1), delta(2))
    assert path(manifest, from_version=2) == ["3-1-2"]
    assert path(manifest, from_version=1) == ["2-1-2", "3-1-2"]


def test_the_path_with_the_fewest_bytes_is_taken() -> None:
    manifest = manifest_of(delta(4, 60), full(1), delta(2, 60), delta(3, 60), full(4, 100))
    assert path(manifest, from_version=1) == ["4-1-1"]
    assert path(manifest, from_version=2) == ["4-1-1"]
    assert path(manifest, from_version=3) == ["4-1-2"]


def test_a_broken_chain_is_an_error_for_workers_that_need_it() -> None:
    manifest = manifest_of(delta(3), full(1))
    with pytest.raises(WireError, match="no stored form leads to version 3"):
        manifest.path()
    assert path(manifest, from_version=2) == ["3-1-2"]


def test_a_worker_that_has_the_latest_needs_nothing() -> None:
    assert path(manifest_of(delta(5), full(4)), from_version=5) == []


def test_a_full_version_replaces_earlier_forms_unless_deltas_lead_to_it() -> None:
    before = (full(1), delta(2), delta(3))
    assert choose_others(full(4), None, before) == ()
    assert choose_others(delta(4), full(4), before) == (delta(2), delta(3), full(4))


def test_earlier_deltas_stay_only_while_they_are_smaller_than_a_full_version() -> None:
    before = (full(1), delta(2, 40), delta(3, 40), delta(4, 40))
    assert choose_others(delta(5, 40), full(5), before) == (delta(3, 40), delta(4, 40), full(5))


def test_a_manifest_is_the_same_after_a_round_trip_through_its_fields() -> None:
    manifest = Manifest(delta(3), (full(1), delta(2)), 100, 7, "blosc2", 1.5, (full(9, 5),))
    assert Manifest.from_fields(manifest.to_fields()) == manifest
    assert manifest.with_version(8).latest.version == 8
    assert Manifest.from_fields({}) is None


@pytest.mark.parametrize("field", ["others", "dropped", "digest", "upload", "base"])
def test_missing_and_invalid_fields_are_refused(field: str) -> None:
    fields = manifest_of(delta(3), full(1), delta(2)).to_fields()
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
def test_fields_that_would_become_file_names_or_too_many_keys_are_refused(written: dict[str, str]) -> None:
    with pytest.raises(WireError):
        Manifest.from_fields({**manifest_of(delta(3), full(1), delta(2)).to_fields(), **written})


def test_every_worker_reaches_the_latest_version_whatever_was_published() -> None:
    """In a simulation the forms are bounded, and no path costs more than that of a new worker."""
    for seed in range(20):
        chance = random.Random(seed)
        forms: Sequence[StoredForm] = ()
        for version in range(1, 120):
            if not forms or chance.random() < 0.02:
                latest, besides = full(version, chance.randrange(50, 150)), None
            else:
                latest = delta(version, chance.randrange(1, 60))
                besides = full(version) if needs_full(latest, forms) else None
            manifest = manifest_of(latest, *choose_others(latest, besides, forms))
            forms = manifest.forms
            assert len(forms) <= 2 * MAX_DELTAS + 2
            cost = sum(form.stored_bytes for form in manifest.path())
            for decoded in chance.sample(range(version), min(version, 5)):
                assert sum(form.stored_bytes for form in manifest.path(decoded)) <= cost
            chain = [form.version for form in manifest.path(version - 1)]
            assert chain[-1] == version
