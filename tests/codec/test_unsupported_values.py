"""Values that cannot travel are refused before anything is sent, with their path."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import pathlib
import re
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch

from rlbroker.codec.image import ImagePlan
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


@dataclasses.dataclass
class _Step:
    reward: float


class _Plain(enum.Enum):
    RED = 1


class _List(list[int]):
    pass


REFUSED: list[tuple[Any, str]] = [
    (object(), "object"),
    ({1, 2}, r"set cannot travel; send list\(\)"),
    (frozenset([1]), r"frozenset cannot travel; send list\(\)"),
    (collections.deque([1]), r"deque cannot travel; send list\(\)"),
    (range(3), r"range cannot travel; send list\(\)"),
    (_List([1]), r"_List cannot travel; send list\(\)"),
    (bytearray(b"x"), r"bytearray cannot travel; send bytes\(\)"),
    (memoryview(b"x"), r"memoryview cannot travel; send bytes\(\)"),
    (1j, r"complex cannot travel; send numpy\.complex128\(\)"),
    (decimal.Decimal(1), r"Decimal cannot travel; send float\(\)"),
    (datetime.date(2026, 1, 1), r"date cannot travel; send isoformat\(\)"),
    (pathlib.PurePosixPath("/x"), r"PurePosixPath cannot travel; send str\(\)"),
    (_Step(1.0), r"_Step cannot travel; send dataclasses\.asdict\(\)"),
    (_Step, "type cannot travel"),
    (_Plain.RED, "_Plain cannot travel; send the value"),
    (torch.nn.Linear(1, 1), r"Linear cannot travel; send state_dict\(\)"),
    (torch.Size([2]), r"torch\.Size cannot travel; send tuple\(\)"),
    (torch.float32, "torch.dtype cannot travel"),
    (lambda: 0, "function"),
    (_Point(1, 2), r"_Point cannot travel; send tuple\(\)"),
    (_Colour.RED, r"would come back as int; send int\(\)"),
    ("\ud800", r"surrogates .*send encode\("),
    (1 << 8191, "int of 8192 bits"),
    ({1.5: 0}, r"the key 1\.5 is of type float"),
    ({True: 0}, "the key True is of type bool"),
    ({(1,): 0}, r"the key \(1,\)"),
    ({"\ud800": 0}, "surrogates"),
    (np.array(["a"]), r"<U1 .*send str\(\) or tolist\(\)"),
    (np.array([b"a"]), r"S1 .*send bytes\(\) or tolist\(\)"),
    (np.array([None]), r"object .*send tolist\(\)"),
    (np.array([(1, 2)], "i4,f4"), "f0.*send its fields"),
    (np.array(["2024"], "datetime64[D]"), r"datetime64\[D\].*send astype"),
    (np.array(["a"], np.dtypes.StringDType()), "StringDType"),
    (np.ones((1, 1)).view(np.matrix), r"matrix cannot travel; send numpy\.asarray\(\)"),
    (np.timedelta64(3, "s"), r"timedelta64\[s\]"),
    (np.str_("a"), "<U1"),
    (np.ma.masked_array([1], [True]), r"MaskedArray cannot travel; send filled\(\)"),
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


def test_a_tree_too_deep_for_the_rest_of_the_stack_is_refused() -> None:
    tree: Any = 1
    for _ in range(60):
        tree = {"x": tree}
    found: list[UnsupportedType] = []

    def descend(levels: int) -> None:
        if levels:
            return descend(levels - 1)
        with pytest.raises(UnsupportedType) as caught:
            encode(tree)
        return found.append(caught.value)

    thread = threading.Thread(target=descend, args=(sys.getrecursionlimit() - 100,))
    thread.start()
    thread.join()
    assert "too deeply" in str(found[0])


def test_a_dictionary_that_changes_while_it_is_read_is_refused() -> None:
    tree: dict[str, Any] = {}

    class Growing:
        def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
            tree["more"] = 1
            return np.ones(1)

    tree |= {"x": Growing(), "y": 2}
    with pytest.raises(UnsupportedType, match="changed while it was read"):
        encode(tree)


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


def _raising_kind() -> Any:
    class Raises(type):
        def __getattr__(cls, name: str) -> Any:
            raise ValueError(f"no {name}\udcff")

    class RaisingKind(metaclass=Raises):  # inside, because pytest asks what a module has
        pass

    return RaisingKind()


class _RaisingClass:
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise ValueError("no class")


class _RaisingRepr:
    def __repr__(self) -> str:
        raise ValueError("no repr")


class _SurrogateRepr:
    def __repr__(self) -> str:
        return "\udcff" * 10_000


class _NoPairs(dict[str, Any]):
    def items(self) -> Any:
        return [1, 2]


class _RaisingItems(dict[str, Any]):
    def items(self) -> Any:
        raise _Speechless


class _Speechless(Exception):
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise ValueError("no class")

    def __str__(self) -> str:
        raise ValueError("no text")


class _Masked:
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.ma.masked_array([1, 2], [True, False])


class _RaisingTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *args: Any, **options: Any) -> Any:
        raise ValueError("no function")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: {_RaisingRepr(): 1}, r"the key <.*_RaisingRepr> is of type .*; keys must be str or int"),
        (lambda: {(1, _RaisingRepr()): 1}, r"the key <tuple> is of type tuple"),
        (lambda: {_SurrogateRepr(): 1}, r"the key (\\udcff)+.{0,5} is of type"),
        (lambda: _NoPairs(x=1), "the items of .*_NoPairs cannot be read"),
        (lambda: _RaisingItems(x=1), "the items of .*_RaisingItems cannot be read: .*_Speechless"),
        (_raising_kind, r"RaisingKind cannot be read: no .*\\udcff"),
        (lambda: _RaisingClass(), "_RaisingClass cannot be read: no class"),
        (lambda: _Masked(), "_Masked gives a MaskedArray, whose mask cannot travel"),
        (lambda: torch.ones(2).as_subclass(_RaisingTensor), "_RaisingTensor cannot travel"),
    ],
)
@pytest.mark.parametrize("plan", [MessagePlan, ImagePlan])
def test_an_object_whose_own_code_raises_is_refused_with_its_path(make: Any, reason: str, plan: Any) -> None:
    for tree, path in ((make(), "the top level"), ({"a": [make()]}, r"\['a'\]\[0\]")):
        with pytest.raises(UnsupportedType, match=f"^{path}: .*{reason}") as refused:
            plan(tree)
        assert len(str(refused.value).encode()) < 700
