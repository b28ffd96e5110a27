"""The signing key: what its signatures bind, and what it refuses to be."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import replace

import pytest

from rlbroker.codec.signing import NotSigned, SigningKey, canonical, chunk_hash
from rlbroker.control.command_signature import CommandVerifier, sign_command
from rlbroker.control.outcomes import REFUSED_KEPT, Event, WorkerOutcomes, settle
from rlbroker.types import Missed
from rlbroker.weights.manifest import Manifest, StoredForm

pytestmark = pytest.mark.unit

KEY = SigningKey(b"0123456789abcdef0123456789abcdef")
OTHER = SigningKey(b"another key, which is long enough")
HASHES = hashlib.sha256(b"header").hexdigest() + hashlib.sha256(b"chunk").hexdigest()
FORM = StoredForm(3, 0, "3-1-1", 1, 500, "c0ffee", HASHES)


def test_different_fields_never_give_the_same_bytes() -> None:
    assert canonical(["ab", "c"]) != canonical(["a", "bc"]) != canonical(["abc"]) != canonical(["abc", ""])
    assert canonical([12, 3]) != canonical([1, 23])
    assert canonical([b"x"]) == (1).to_bytes(8, "big") + b"x"


def test_a_signature_can_be_computed_from_its_documentation() -> None:
    """The documented computation gives the same signature, so that other languages can check it."""
    derived = hmac.digest(b"0123456789abcdef0123456789abcdef", canonical(["rlbroker 1", "weights"]), "sha256")
    expected = hmac.digest(derived, canonical(["pong", 7]), "sha256").hex()
    assert KEY.sign("weights", "pong", 7) == f"{KEY.id}:{expected}"
    assert chunk_hash([b"ab", memoryview(b"c")]) == hashlib.sha256(b"abc").hexdigest()


def test_each_purpose_has_a_key_of_its_own() -> None:
    assert len({KEY.sign(purpose, "a", 1) for purpose in ("weights", "command", "image")}) == 3
    with pytest.raises(NotSigned, match="its signature is wrong"):
        KEY.check(KEY.sign("command", "a"), "weights", "a")


def test_a_signature_is_right_wrong_missing_or_of_another_key() -> None:
    KEY.check(KEY.sign("command", "a"), "command", "a")
    for signature, why in [
        ("", "its signature is missing"),
        (KEY.sign("command", "b"), "its signature is wrong"),
        (KEY.sign("command", "a")[:-1], "its signature is wrong"),
        ("ä" * 73, "its signature is wrong"),
        (OTHER.sign("command", "a"), rf"signed with another key \(id {OTHER.id}, expected {KEY.id}\)"),
    ]:
        with pytest.raises(NotSigned, match=why):
            KEY.check(signature, "command", "a")


def test_a_key_shows_its_id_and_not_itself() -> None:
    assert repr(KEY) == f"<SigningKey {KEY.id}>"
    assert len(KEY.id) == 8
    assert KEY.id != OTHER.id


@pytest.mark.parametrize(
    "change",
    [
        {"version": 4},
        {"base": 2},
        {"upload": "3-1-2"},
        {"chunks": 2},
        {"stored_bytes": 501},
        {"digest": "c0ffef"},
        {"hashes": HASHES[:-1] + "x"},
        {"hashes": HASHES[:64]},
        {"signature": ""},
    ],
)
def test_a_signature_covers_every_field_of_a_stored_form(change: dict[str, object]) -> None:
    signed = FORM.signed(KEY, "pong")
    signed.check(KEY, "pong")
    with pytest.raises(NotSigned):
        replace(signed, **change).check(KEY, "pong")  # type: ignore[arg-type]  # of any field
    with pytest.raises(NotSigned):
        signed.check(KEY, "pong2")
    with pytest.raises(NotSigned, match="another number of chunks"):
        replace(FORM, hashes=HASHES[:64]).signed(KEY, "pong").check(KEY, "pong")


def test_a_manifest_is_signed_only_if_each_of_its_forms_is() -> None:
    whole = replace(FORM, version=2, upload="2-1-1").signed(KEY, "pong")
    at = Manifest(replace(FORM, base=2), (whole,), 100, 7, "raw", 1.5).signed(KEY, "pong")
    there = Manifest.from_fields(at.to_fields())
    assert there == at
    there.check(KEY, "pong")
    with pytest.raises(NotSigned):
        at.with_version(9).check(KEY, "pong")
    at.with_version(9).signed(KEY, "pong").check(KEY, "pong")
    with pytest.raises(NotSigned, match="is missing"):
        replace(at, others=(replace(whole, signature=""),)).check(KEY, "pong")
    unsigned = Manifest(FORM, (), 100, 7, "raw", 1.5)
    assert unsigned.to_fields()["signatures"] == ""
    with pytest.raises(NotSigned, match="the learner does not sign"):
        unsigned.check(KEY, "pong")


def test_the_name_of_an_image_cannot_be_guessed_without_the_key() -> None:
    named = {FORM.name_of_image(key, "pong") for key in (None, KEY, OTHER)}
    assert len(named) == 3
    signed = FORM.signed(KEY, "pong")
    assert signed.name_of_image(KEY, "pong") == FORM.name_of_image(KEY, "pong")
    assert signed.signature.partition(":")[2] not in signed.name_of_image(KEY, "pong")


FIELDS = {"name": "stop", "arguments": "null", "expires_seconds": 1.5, "data": b"\0"}


def checked(**changes: bytes) -> None:
    fields = {**FIELDS, **sign_command(KEY, "pong", "c0", FIELDS, {3: 17, 4: 18})}
    sent = {
        name.encode(): one if isinstance(one, bytes) else str(one).encode() for name, one in fields.items()
    }
    sent |= {name.encode(): one for name, one in changes.items()}
    CommandVerifier(KEY, "pong", 3, 17).check("c0", sent)


def test_a_signed_command_is_valid_only_for_its_incarnations() -> None:
    checked()
    for change in ("name", "arguments", "expires_seconds", "data", "signed_for", "signature"):
        with pytest.raises(NotSigned):
            checked(**{change: b"3:17"})
    sent = {
        name.encode(): one.encode()
        for name, one in sign_command(KEY, "a", "c", dict.fromkeys(FIELDS, ""), {3: 17}).items()
    }
    CommandVerifier(KEY, "a", 3, 17).check("c", sent)
    for worker, incarnation in [(3, 18), (3, 1), (1, 17), (4, 17)]:
        with pytest.raises(NotSigned, match="for others"):
            CommandVerifier(KEY, "a", worker, incarnation).check("c", sent)


def test_refusals_are_recorded_up_to_a_limit_and_change_no_other_sum() -> None:
    outcomes = WorkerOutcomes(incarnation=1, member=True, settled=5, applied=5)
    records: list[Missed] = []
    for number in range(REFUSED_KEPT + 20):
        fields = {"command": "c", "name": "stop", "outcome": "refused", "detail": "its signature is wrong"}
        settled = settle(outcomes, Event(f"1-{number + 1}", 0, "command", fields, 1.0), {}, 5)
        outcomes, records = settled.worker_outcomes, [*records, *settled.missed]
    assert len(records) == REFUSED_KEPT
    assert (outcomes.refused, outcomes.commands_missed, outcomes.settled) == (REFUSED_KEPT + 20, 0, 5)
    assert WorkerOutcomes.from_fields(outcomes.to_fields()) == outcomes
    joined = settle(outcomes, Event("2-1", 0, "joined", {"version": "5"}, 1.0), {}, 5).worker_outcomes
    assert joined.refused == 0


@pytest.mark.parametrize(
    ("version", "why", "settled"), [(999, "refused", 5), (5, "refused", 5), (6, "failed", 6)]
)
def test_a_refused_version_fails_only_if_there_is_one(version: int, why: str, settled: int) -> None:
    outcomes = WorkerOutcomes(incarnation=1, member=True, settled=5, applied=5)
    fields = {"version": str(version), "outcome": "refused", "detail": "its signature is wrong"}
    found = settle(outcomes, Event("1-1", 0, "version", fields, 1.0), {}, 6)
    [record] = found.missed
    assert (record.first, record.last, record.why) == (version, version, why)
    assert found.worker_outcomes.settled == settled
