"""Redis's replies as plain values, and values that another program wrote."""

from __future__ import annotations

import pytest

from rlbroker import errors
from rlbroker.backend.replies import (
    default_if_wrong_type,
    parsing,
    pending_count,
    raise_first_error,
    stream_entries,
    text_fields,
)

pytestmark = pytest.mark.unit


def test_replies_have_the_same_shape_with_every_protocol() -> None:
    entries = [(b"1-1", {b"a": b"b"}), (b"1-2", {})]
    expected = [("s", [("1-1", {b"a": b"b"}), ("1-2", None)])]
    assert stream_entries([[b"s", entries]]) == expected
    assert stream_entries({b"s": [entries]}) == stream_entries({b"s": entries}) == expected
    as_sent = [[b"1-1", [b"a", b"b"]], [b"1-2", None]]
    assert stream_entries([[b"s", as_sent]]) == stream_entries({b"s": as_sent}) == expected
    assert stream_entries({b"s": [[]]}) == stream_entries([[b"s", []]]) == [("s", [])]
    assert stream_entries(None) == stream_entries({}) == []
    assert text_fields([b"a", b"1"]) == text_fields({b"a": b"1"}) == {"a": "1"}
    assert pending_count([3, None, None, None]) == pending_count({"pending": 3}) == 3


@pytest.mark.parametrize(
    "error", [ValueError("not a number"), KeyError("epoch"), errors.InvalidArgument("size")]
)
def test_foreign_data_is_an_error_that_names_its_key(error: Exception) -> None:
    message = r"rlb:\{a\}:meta holds data that rlbroker does not write"
    with pytest.raises(errors.WireError, match=message), parsing("rlb:{a}:meta"):
        raise error


def test_a_refusal_within_a_block_that_parses_stays_what_it_is() -> None:
    with pytest.raises(errors.Fenced), parsing("rlb:{a}:meta"):
        raise errors.Fenced("a newer learner")


def test_a_key_of_the_wrong_type_counts_as_empty_and_another_refusal_is_raised() -> None:
    assert default_if_wrong_type({"a": "1"}, {}) == {"a": "1"}
    assert default_if_wrong_type(errors.WrongKeyType("a set"), {}) == {}
    with pytest.raises(errors.AccessDenied):
        default_if_wrong_type(errors.AccessDenied("may not read"), {})


def test_the_first_refusal_among_replies_is_raised() -> None:
    assert raise_first_error(iter([1, None])) == [1, None]
    with pytest.raises(errors.ServerFault, match="first"):
        raise_first_error([1, errors.ServerFault("first"), errors.ServerFault("second")])
