"""The signing key: what its signatures bind, and what it refuses to be."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import replace

import pytest

from rlbroker.codec.signing import NotSigned, SigningKey, canonical, chunk_hash
from rlbroker.control import command_signature
from rlbroker.control.outcomes import REFUSED_KEPT, Event, WorkerOutcomes, settle
from rlbroker.types import Missed
from rlbroker.weights.manifest import Manifest, StoredForm

pytestmark = pytest.mark.unit

KEY = SigningKey(b"0123456789abcdef0123456789abcdef")
OTHER = SigningKey(b"another key, which is long enough")
HASHES = hashlib.sha256(b"header").hexdigest() + hashlib.sha256(b"chunk").hexdigest()
FORM = StoredForm(3, 0, "3-1-1", 1, 500, "c0ffee", HASHES)


def test_fields_cannot_be_cut_otherwise() -> None:
    assert canonical(["ab", "c"]) != canonical(["a", "bc"]) != canonical(["abc"]) != canonical(["abc", ""])
    assert canonical([12, 3]) != canonical([1, 23])
    assert canonical([b"x"]) == (1).to_bytes(8, "big") + b"x"


def test_a_signature_is_what_others_can_compute() -> None:
    """As docs/signing.md says, so that another language can check it."""
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
def test_a_stored_form_is_bound_to_all_that_is_said_of_it(change: dict[str, object]) -> None:
    signed = FORM.signed(KEY, "pong")
    signed.check(KEY, "pong")
    with pytest.raises(NotSigned):
        replace(signed, **change).check(KEY, "pong")  # type: ignore[arg-type]  # of any field
    with pytest.raises(NotSigned):
        signed.check(KEY, "pong2")
    with pytest.raises(NotSigned, match="another number of chunks"):
        replace(FORM, hashes=HASHES[:64]).signed(KEY, "pong").check(KEY, "pong")


def test_a_pointer_carries_signatures_and_every_form_counts() -> None:
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


def test_an_image_is_called_what_nobody_without_the_key_can_tell() -> None:
    named = {FORM.name_of_image(key, "pong") for key in (None, KEY, OTHER)}
    assert len(named) == 3
    signed = FORM.signed(KEY, "pong")
    assert signed.name_of_image(KEY, "pong") == FORM.name_of_image(KEY, "pong")
    assert signed.signature.partition(":")[2] not in signed.name_of_image(KEY, "pong")


FIELDS = {"name": "stop", "arguments": "null", "expires_seconds": 1.5, "data": b"\0"}


def checked(**changes: bytes) -> None:
    fields = {**FIELDS, **command_signature.sign_command(KEY, "pong", "c0", FIELDS, {3: 17, 4: 18})}
    sent = {
        name.encode(): one if isinstance(one, bytes) else str(one).encode() for name, one in fields.items()
    }
    sent |= {name.encode(): one for name, one in changes.items()}
    command_signature.check_command(KEY, "pong", "c0", sent, 3, 17)


def test_a_command_is_for_those_lives_only_that_it_was_signed_for() -> None:
    checked()
    for change in ("name", "arguments", "expires_seconds", "data", "signed_for", "signature"):
        with pytest.raises(NotSigned):
            checked(**{change: b"3:17"})
    sent = {
        name.encode(): one.encode()
        for name, one in command_signature.sign_command(
            KEY, "a", "c", dict.fromkeys(FIELDS, ""), {3: 17}
        ).items()
    }
    command_signature.check_command(KEY, "a", "c", sent, 3, 17)
    for worker, incarnation in [(3, 18), (3, 1), (1, 17), (4, 17)]:
        with pytest.raises(NotSigned, match="for others"):
            command_signature.check_command(KEY, "a", "c", sent, worker, incarnation)


def test_what_is_refused_is_recorded_so_often_and_changes_no_other_sum() -> None:
    account = WorkerOutcomes(incarnation=1, member=True, settled=5, applied=5)
    records: list[Missed] = []
    for number in range(REFUSED_KEPT + 20):
        said = {"command": "c", "name": "stop", "outcome": "refused", "detail": "its signature is wrong"}
        settled = settle(account, Event(f"1-{number + 1}", 0, "command", said, 1.0), {}, 5)
        account, records = settled.worker_outcomes, [*records, *settled.missed]
    assert len(records) == REFUSED_KEPT
    assert (account.refused, account.commands_missed, account.settled) == (REFUSED_KEPT + 20, 0, 5)
    assert WorkerOutcomes.from_fields(account.to_fields()) == account
    joined = settle(account, Event("2-1", 0, "joined", {"version": "5"}, 1.0), {}, 5).worker_outcomes
    assert joined.refused == 0


@pytest.mark.parametrize(
    ("version", "why", "settled"), [(999, "refused", 5), (5, "refused", 5), (6, "failed", 6)]
)
def test_a_refused_version_fails_only_if_there_is_one(version: int, why: str, settled: int) -> None:
    account = WorkerOutcomes(incarnation=1, member=True, settled=5, applied=5)
    said = {"version": str(version), "outcome": "refused", "detail": "its signature is wrong"}
    found = settle(account, Event("1-1", 0, "version", said, 1.0), {}, 6)
    [record] = found.missed
    assert (record.first, record.last, record.why) == (version, version, why)
    assert found.worker_outcomes.settled == settled
