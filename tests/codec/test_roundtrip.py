"""Any tree comes back from a message unchanged: types, dtypes, bits."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from codec_trees import any_tree, array_of, assert_same, segments_of, tensor_of
from hypothesis import given, settings

from rlbroker.codec.compression import RAW
from rlbroker.codec.describe import Content, describe, ties
from rlbroker.codec.dtypes import NUMPY_DTYPES, TORCH_DTYPES
from rlbroker.codec.message import decode, encode
from rlbroker.errors import WireError

pytestmark = pytest.mark.unit


def round_trip(tree: Any, **options: Any) -> Any:
    return decode(encode(tree, **options))


@settings(max_examples=150, deadline=None)
@given(any_tree)
def test_any_tree_comes_back_unchanged(tree: Any) -> None:
    assert_same(round_trip(tree), tree)


@settings(max_examples=30, deadline=None)
@given(any_tree)
def test_any_tree_comes_back_without_compression(tree: Any) -> None:
    assert_same(round_trip(tree, compression=False), tree)


def test_a_message_of_the_ancestor_travels_as_it_is() -> None:
    message = {
        "worker_id": 3,
        "experiences": {
            "obs": torch.randn(64, 4, 9),
            "actions": torch.randint(0, 9, (64,)),
            "rewards": torch.randn(64),
            "log_probs": torch.randn(64),
            "values": torch.randn(64),
            "dones": torch.rand(64) < 0.1,
            "legal_masks": np.ones((64, 9), bool),
        },
        "batch_size": 64,
        "timestamp": 1722222222.25,
        "steps_collected": 640,
        "games_played": 2,
    }
    assert_same(round_trip(message), message)


def test_every_torch_dtype_travels_or_is_quantised() -> None:
    """A dtype of a new torch fails here until it is in the table or refused."""
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    quantised = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
    assert {str(dtype) for dtype in dtypes - quantised} == {f"torch.{name}" for name in TORCH_DTYPES}


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (300, 70)])
def test_each_torch_dtype_keeps_its_bits(name: str, shape: tuple[int, ...]) -> None:
    tensor = tensor_of(name, shape, seed=1)
    assert_same(round_trip({"x": tensor}), {"x": tensor})


def test_every_numeric_numpy_dtype_is_known() -> None:
    """A numeric type of a new numpy fails here until it is in the table."""
    dtypes = [np.dtype(kind) for kind in np.sctypeDict.values()]
    numeric = {dtype for dtype in dtypes if issubclass(dtype.type, np.number | np.bool) and dtype.kind != "m"}
    assert len(numeric) >= 14
    assert numeric <= set(NUMPY_DTYPES.values())
    assert {dtype.newbyteorder() for dtype in numeric} <= set(NUMPY_DTYPES.values())


@pytest.mark.parametrize("name", sorted(NUMPY_DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (300, 70)])
def test_each_numpy_dtype_keeps_its_bits_and_byte_order(name: str, shape: tuple[int, ...]) -> None:
    array = array_of(name, shape, seed=1)
    assert_same(round_trip({"x": array}), {"x": array})


def test_a_long_double_names_its_layout() -> None:
    [content] = describe(encode(np.longdouble(1)))
    assert content.dtype not in ("<f16", ">f16")


@pytest.mark.parametrize("rows", [4, 400])
def test_strided_memory_travels_as_its_elements(rows: int) -> None:
    base = np.arange(rows * 60 * 2, dtype=np.float64).reshape(rows, 60, 2)
    tensor = torch.from_numpy(base.copy())
    tree = {
        "transposed": base.T,
        "stepped": base[::2, ::-3],
        "fortran": np.asfortranarray(base[:, :, 0]),
        "broadcast": np.broadcast_to(np.float32(3), (rows, 50)),
        "zero-d": base[0, 1, 1, ...],
        "tensor transposed": tensor.transpose(0, 2),
        "tensor expanded": tensor[:, :1].expand(rows, 60, 2),
        "tensor stepped": tensor[::2, 1::3],
        "bfloat16 stepped": tensor.bfloat16()[:, ::2],
    }
    assert_same(
        round_trip(tree),
        {
            key: np.ascontiguousarray(x) if isinstance(x, np.ndarray) and x.ndim else x
            for key, x in tree.items()
        },
    )


@pytest.mark.parametrize("rows", [3, 30_000])
def test_lazily_conjugated_and_negated_tensors_are_resolved(rows: int) -> None:
    numbers = torch.randn(rows, dtype=torch.complex64)
    tree = {
        "conj": numbers.conj(),
        "neg": numbers.conj().imag,
        "half": numbers.to(torch.complex64).conj()[::2],
    }
    assert tree["conj"].is_conj()
    assert tree["neg"].is_neg()
    assert_same(round_trip(tree), tree)


def test_state_dicts_and_parameters_come_back_as_plain_dicts_and_tensors() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    state = model.state_dict()
    got = round_trip({"state": state, "parameters": dict(model.named_parameters())})
    assert type(got["state"]) is dict
    assert_same(got["state"], dict(state))
    assert_same(got["parameters"], {name: p.data for name, p in model.named_parameters()})
    model.load_state_dict(got["state"])


def test_ordered_and_default_dictionaries_come_back_as_dict() -> None:
    got = round_trip([OrderedDict(b=1, a=2), defaultdict(int, z=3)])
    assert_same(got, [{"b": 1, "a": 2}, {"z": 3}])


@pytest.mark.parametrize(
    "value",
    [
        *[0, -1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), -(1 << 63) - 1, 1 << 8190, -(1 << 8191)],
        *[True, None, "", "é", "\x00", "😀", b"", b"\x00\xff", bytes(1023), bytes(1024), bytes(300_000)],
        *[(), [], {}, ((),), [()], {1: 2, "1": 3, 1 << 70: 4}],
    ],
    ids=lambda value: (
        f"{type(value).__name__}-{str(value)[:12]}" if not isinstance(value, int) else hex(value)[:9]
    ),
)
def test_plain_values_keep_their_type_and_value(value: object) -> None:
    assert_same(round_trip(value), value)
    assert_same(round_trip({"k": [value]}), {"k": [value]})


def test_a_large_leaf_of_either_kind_survives_beside_small_ones() -> None:
    tree = {f"w{i}": tensor_of("float32", (i * 100, 99), i) for i in range(8)}
    tree |= {f"b{i}": tensor_of("bfloat16", (i * 60, 70), i) for i in range(8)}
    assert_same(round_trip(tree), tree)


def test_constant_and_sparse_arrays_are_stored_small() -> None:
    for array in (np.zeros(500_000, np.float32), np.full(500_000, 7, np.int64), np.arange(500_000)):
        assert len(encode(array)) < array.nbytes / 20
        assert_same(round_trip(array), array)


def test_noise_is_stored_raw_and_never_grows_by_more_than_the_header() -> None:
    noise = array_of("|u1", (500_000,), seed=3)
    assert {segment.codec for segment in segments_of(encode(noise))} == {RAW}
    assert len(encode(noise)) < noise.nbytes + 200


def test_repetition_beyond_a_frame_is_found() -> None:
    """Equal frames of noise compress, although no part within a frame does."""
    frame = array_of("|u1", (84, 84, 4), seed=3)
    assert len(encode(np.stack([frame] * 200))) < 200 * frame.nbytes / 1.1


def test_a_description_names_every_leaf_and_plain_value() -> None:
    tied = torch.zeros(2, 3)
    tree = {"a": [tied, (), (1, tied)], 7: {"x": np.float32(1), "e": {}, "l": []}, "n": None}
    contents = describe(encode(tree))
    assert contents == [
        Content(("a", 0), "tensor", "float32", (2, 3), 24, leaf=0),
        Content(("a", 1), "tuple", value=()),
        Content(("a", 2, 0), "int", value=1),
        Content(("a", 2, 1), "tensor", "float32", (2, 3), 24, leaf=0),
        Content((7, "x"), "scalar", "<f4", (), 4, leaf=1),
        Content((7, "e"), "dict", value={}),
        Content((7, "l"), "list", value=[]),
        Content(("n",), "NoneType"),
    ]
    assert ties(contents) == {"a.2.1": "a.0"}


def test_torch_is_not_imported_until_a_tensor_is_met() -> None:
    message = encode({"x": torch.ones(2)})
    program = f"""
import sys
import numpy as np
from rlbroker.codec.describe import describe
from rlbroker.codec.message import decode, encode
decode(encode({{"x": np.ones(3)}}))
assert describe({message!r})[0].dtype == "float32"
assert "torch" not in sys.modules
decode({message!r})
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_tensors_without_torch_are_a_wire_error(monkeypatch: pytest.MonkeyPatch) -> None:
    message = encode({"x": torch.ones(2)})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WireError, match="torch is not installed"):
        decode(message)


def test_a_dtype_that_this_torch_lacks_is_a_wire_error(monkeypatch: pytest.MonkeyPatch) -> None:
    message = encode({"x": torch.ones(2).bfloat16()})
    monkeypatch.delattr(torch, "bfloat16")
    with pytest.raises(WireError, match="no dtype bfloat16"):
        decode(message)
