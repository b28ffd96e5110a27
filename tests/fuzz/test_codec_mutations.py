"""Any bytes from the wire decode or raise WireError, and nothing else ever happens."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
from hostile_messages import (
    forge,
    forge_with_true_digests,
    is_decodable,
    read_header_map,
    samples,
    seal,
    split_message,
    try_every_damage,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbroker.codec.describe import describe
from rlbroker.codec.image import ImageFormat
from rlbroker.codec.limits import Limits
from rlbroker.codec.message import encode
from rlbroker.errors import WireError

pytestmark = pytest.mark.unit

SAMPLES = samples()
MESSAGES = {name: encode(tree) for name, tree in SAMPLES.items()}
LIMITS = Limits(max_raw_bytes=4 << 20, max_leaves=1000)

messages = st.sampled_from(list(MESSAGES.values()))
odd_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.integers(-2, 70)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(
        ["tensor", "array", "scalar", "bytes", "float32", "bfloat16", "<f4", "|b1", "|u1", "<c16"]
    )
    | st.binary(max_size=4)
    | st.builds(msgpack.ExtType, st.integers(0, 5), st.binary(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_no_damage_goes_unnoticed(name: str) -> None:
    message = MESSAGES[name]
    try_every_damage(message, every=1 if len(message) < 2000 else len(message) // 500)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_a_wire_error(data: bytes) -> None:
    assert not is_decodable(data)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=100))
def test_a_random_header_is_harmless(packed: bytes) -> None:
    is_decodable(seal(packed), LIMITS)


@settings(max_examples=700, deadline=None)
@given(messages, st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_mutated_header_with_a_true_digest_is_harmless(
    message: bytes, edits: list[tuple[float, int]]
) -> None:
    packed, body = split_message(message)
    mutated = bytearray(packed)
    for where, value in edits:
        mutated[int(where * (len(mutated) - 1))] = value
    is_decodable(seal(bytes(mutated), body), LIMITS)
    describe_safely(seal(bytes(mutated)))
    describe_safely(seal(bytes(mutated), body))


@settings(max_examples=700, deadline=None)
@given(messages, st.data())
def test_a_header_with_any_value_replaced_is_harmless(message: bytes, data: st.DataObject) -> None:
    header_map = read_header_map(message)
    node = header_map
    for _ in range(data.draw(st.integers(1, 6))):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        if isinstance(node[key], list | dict) and data.draw(st.integers(0, 4)):
            node = node[key]
            continue
        node[key] = data.draw(odd_values)
        break
    forgery = forge(header_map, split_message(message)[1])
    is_decodable(forgery, LIMITS)
    describe_safely(forgery)


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from([MESSAGES["bundles"], MESSAGES["large"]]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.booleans(),
)
def test_mutated_chunks_with_true_digests_are_harmless(
    message: bytes, edits: list[tuple[float, int]], near_the_start: bool
) -> None:
    """Chunk headers are checked before blosc2 reads them; an error of blosc2 itself becomes a WireError too."""
    header_map = read_header_map(message)
    body = bytearray(split_message(message)[1])
    starts = [0]
    for lane in header_map["lanes"]:
        starts += [starts[-1] + segment[2] for segment in lane[2]]
    for where, value in edits:
        if near_the_start:
            start = starts[int(where * (len(starts) - 2))]
            body[start + int(where * 1e6) % 80] = value
        else:
            body[int(where * (len(body) - 1))] = value
    is_decodable(forge_with_true_digests(header_map, bytes(body)), LIMITS)


def describe_safely(data: bytes) -> None:
    """List the contents of a message, and of its header alone; any exception but WireError fails the test."""
    header = data[: len(data) - len(split_message(data)[1])]
    with contextlib.suppress(WireError):
        describe(data)
    with contextlib.suppress(WireError):
        ImageFormat(header, Limits(), arrays_only=True).contents()
