"""Values that cannot travel are refused before anything is sent, with their path."""

from __future__ import annotations

import collections
import enum
import re
from typing import Any

import numpy as np
import pytest
import torch

from rlbroker.codec.limits import Limits
from rlbroker.codec.message import MessagePlan, decode, encode
from rlbroker.errors import InvalidArgument, UnsupportedType

pytestmark = pytest.mark.unit


class _Colour(enum.IntEnum):
    RED = 1


_Point = collections.namedtuple("_Point", "x y")


def _quantised() -> torch.Tensor:
    with pytest.warns(UserWarning, match="quantize"):
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def _nested() -> torch.Tensor:
    with pytest.warns(UserWarning, match="nested"):
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


class _Subclass(torch.Tensor):
    pass


REFUSED: list[tuple[Any, str]] = [
    (object(), "object"),
    ({1, 2}, "set"),
    (bytearray(b"x"), "bytearray"),
    (1j, "complex"),
    (lambda: 0, "function"),
    (_Point(1, 2), r"_Point cannot travel; send tuple\(\)"),
    (_Colour.RED, r"would come back as int; send int\(\)"),
    ("\ud800", "surrogates"),
    (1 << 8191, "int of 8192 bits"),
    ({1.5: 0}, r"the key 1\.5 is of type float"),
    ({True: 0}, "the key True is of type bool"),
    ({(1,): 0}, r"the key \(1,\)"),
    ({"\ud800": 0}, "surrogates"),
    (np.array(["a"]), "<U1"),
    (np.array([b"a"]), "S1"),
    (np.array([None]), "object"),
    (np.array([(1, 2)], "i4,f4"), "f0"),
    (np.array(["2024"], "datetime64[D]"), r"datetime64\[D\]"),
    (np.timedelta64(3, "s"), r"timedelta64\[s\]"),
    (np.str_("a"), "<U1"),
    (np.ma.masked_array([1], [True]), "MaskedArray"),
    (np.rec.array([1.0]), "recarray"),
    (torch.ones(3).to_sparse(), "sparse"),
    (torch.ones(2, device="meta"), "meta"),
    (torch.ones(2).as_subclass(_Subclass), "_Subclass"),
    (torch.nn.UninitializedParameter(), "UninitializedParameter"),
    (torch.zeros((1,) * 65), "65 dimensions"),
]


@pytest.mark.parametrize(
    ("value", "reason"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_unsupported_value_is_refused_with_its_path(value: Any, reason: str) -> None:
    with pytest.raises(UnsupportedType, match=rf"^\['a'\]\[1\]\[7\]: .*{reason}"):
        encode({"a": (0, {7: value})})


@pytest.mark.parametrize("make", [_quantised, _nested])
def test_quantised_and_nested_tensors_are_refused_by_name(make: Any) -> None:
    with pytest.raises(UnsupportedType, match=rf"^\['x'\]: a {make.__name__[1:]} tensor"):
        encode({"x": make()})


def _jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


@pytest.mark.filterwarnings("ignore:.*nested:UserWarning")
def test_a_jagged_tensor_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedType, match=r"^\['x'\]: a nested tensor .* send its parts"):
        encode({"x": _jagged()})


def test_an_unsupported_value_at_the_top_level_is_refused() -> None:
    with pytest.raises(UnsupportedType, match=r"^the top level: a value of type object"):
        encode(object())


def test_a_tree_that_contains_itself_is_refused() -> None:
    loop: list[Any] = [1]
    loop.append({"again": loop})
    with pytest.raises(UnsupportedType, match=re.escape("[1]['again'][1]['again']") + ".*contains itself"):
        encode(loop)


def test_nesting_has_the_same_limit_in_both_directions() -> None:
    tree: Any = 1
    for _ in range(64):
        tree = [tree]
    assert decode(encode(tree)) == tree
    with pytest.raises(UnsupportedType, match="deeper than 64"):
        encode([tree])


def test_a_tree_of_very_many_paths_is_refused_in_bounded_time() -> None:
    tree: Any = [0] * 10
    for _ in range(30):
        tree = [tree] * 40
    with pytest.raises(UnsupportedType, match="use arrays"):
        encode(tree)


def test_values_too_large_for_a_header_are_refused() -> None:
    with pytest.raises(UnsupportedType, match="send arrays"):
        encode({"x": ["a" * 9_000_000] * 2})
    with pytest.raises(UnsupportedType, match="too long; send bytes"):
        encode({"x": "a" * 20_000_000})


def test_an_empty_shape_that_no_reader_accepts_is_refused() -> None:
    with pytest.raises(UnsupportedType, match="too large for a reader"):
        encode({"x": torch.empty(0, dtype=torch.uint8).as_strided((0, 1 << 40, 1 << 40), (0, 0, 0))})


@pytest.mark.parametrize("segment_bytes", [0, -1, 1 << 31])
def test_an_impossible_segment_size_is_refused(segment_bytes: int) -> None:
    with pytest.raises(InvalidArgument, match="segment_bytes"):
        MessagePlan({}, segment_bytes=segment_bytes)


def test_a_depth_limit_beyond_pythons_recursion_limit_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="max_depth"):
        Limits(max_depth=1000)


def test_a_header_needs_the_description_of_every_segment() -> None:
    with pytest.raises(InvalidArgument, match="0 segments given; the plan has 1"):
        MessagePlan(np.ones(9)).header([])
