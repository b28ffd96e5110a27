"""Casts to lower precision for the wire, and back."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from codec_images import LIMITS, decode_image, encode_image, fill_image
from codec_trees import array_of, assert_same, tensor_of
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbroker.codec.dtypes import CAST_DTYPES, TORCH_DTYPES
from rlbroker.codec.image import ImageFormat, ImagePlan
from rlbroker.codec.limits import Limits
from rlbroker.codec.message import decode
from rlbroker.errors import InvalidArgument, WireError

pytestmark = pytest.mark.unit

FLOATS = ["float16", "bfloat16", "float32", "float64"]


def cast_and_back(tree: Any, dtype: str, *, keep_dtype: bool = False) -> Any:
    plan = ImagePlan(tree, dtype=dtype)
    image_format, image = decode_image(*encode_image(plan, fill_image(plan)))
    return image_format.tree(image, keep_dtype=keep_dtype)


def assert_same_numbers(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Same dtype, shape and bits, except for the bits of NaN, which torch chooses by the layout."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    nan = expected.double().isnan()
    assert torch.equal(got.double().isnan(), nan)
    assert_same(got.double().masked_fill(nan, 0), expected.double().masked_fill(nan, 0).contiguous())


@pytest.mark.parametrize("dtype", sorted(CAST_DTYPES))
@pytest.mark.parametrize("rows", [5, 40_000])
def test_wider_floating_tensors_are_cast_as_torch_casts_them(dtype: str, rows: int) -> None:
    """Random bits include NaN, infinities and ties between two neighbours."""
    tree = {name: tensor_of(name, (rows, 3), seed) for seed, name in enumerate(FLOATS)}
    tree["strided"] = tree["float32"].t()
    cast = cast_and_back(tree, dtype, keep_dtype=True)
    back = cast_and_back(tree, dtype)
    bytes_of = TORCH_DTYPES[dtype].carrier.itemsize
    for name, value in tree.items():
        assert back[name].dtype == value.dtype
        if value.itemsize > bytes_of:
            expected = value.to(getattr(torch, dtype))
            assert_same_numbers(cast[name], expected)
            assert_same_numbers(back[name], expected.to(value.dtype))
        else:
            assert_same(cast[name], value)
            assert_same(back[name], value)


@pytest.mark.parametrize("dtype", sorted(CAST_DTYPES))
@pytest.mark.parametrize("rows", [5, 40_000])
def test_floating_arrays_are_cast_where_numpy_has_the_type(dtype: str, rows: int) -> None:
    tree = {name: array_of(name, (rows, 3), 7) for name in ("<f2", "<f4", ">f4", "<f8", ">f8")}
    tree["strided"] = tree["<f4"].T
    tree["scalar-like"] = np.array(1.0 + 2**-9)
    back = cast_and_back(tree, dtype)
    bytes_of = TORCH_DTYPES[dtype].carrier.itemsize
    has_type = CAST_DTYPES[dtype] is not None
    for name, value in tree.items():
        if not has_type or value.itemsize <= bytes_of:
            assert_same(back[name], value.copy())
            continue
        assert back[name].dtype == value.dtype
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about numbers that are too large
            native = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        expected = native.to(getattr(torch, dtype)).to(native.dtype).numpy()
        np.testing.assert_array_equal(back[name], expected)
        assert (np.signbit(back[name]) == np.signbit(value))[~np.isnan(value)].all()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=20))
def test_arrays_are_rounded_to_bfloat16_as_torch_rounds(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    got = cast_and_back({"x": values}, "bfloat16")["x"]
    expected = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(got, expected)


def test_integers_bools_complex_numbers_and_scalars_are_not_cast() -> None:
    tree = {
        "i": torch.arange(5),
        "b": torch.ones(3) > 0,
        "c": torch.randn(4, dtype=torch.complex64),
        "n": np.arange(3),
        "s": np.float64(1.1),
        "f": 1.1,
    }
    assert_same(cast_and_back(tree, "bfloat16"), tree)
    assert_same(cast_and_back(tree, "bfloat16", keep_dtype=True), tree)


@pytest.mark.parametrize("keep_dtype", [True, False])
def test_tied_leaves_are_cast_once_and_stay_tied(keep_dtype: bool) -> None:
    weight = torch.nn.Parameter(torch.randn(300, 100))
    array = np.random.default_rng(1).standard_normal((300, 100))
    tree = {"in": weight, "out": weight.data, "a": array, "b": array[:]}
    assert ImagePlan(tree, dtype="bfloat16").raw_bytes == 2 * 2 * 30_000
    got = cast_and_back(tree, "bfloat16", keep_dtype=keep_dtype)
    assert got["in"] is got["out"]
    assert got["a"] is got["b"]
    assert got["a"].dtype == np.float64


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_scalar_and_empty_shapes_are_cast(shape: tuple[int, ...]) -> None:
    tree = {"t": torch.full(shape, 1.0), "a": np.full(shape, 1.0)}
    assert_same(cast_and_back(tree, "bfloat16"), tree)
    assert cast_and_back(tree, "bfloat16", keep_dtype=True)["t"].dtype == torch.bfloat16


def test_deltas_of_cast_weights_compare_the_cast_values() -> None:
    """A step that is too small for bfloat16 takes no bytes."""
    tree = {"w": torch.ones(100_000)}
    plan = ImagePlan(tree, dtype="bfloat16")
    base = fill_image(plan)
    tree["w"] += 1e-5
    plan = ImagePlan(tree, dtype="bfloat16")
    header, stored = encode_image(plan, fill_image(plan), base)
    assert stored == [b""]
    image_format, image = decode_image(header, stored, base=base)
    assert_same(image_format.tree(image), {"w": torch.ones(100_000)})


@pytest.mark.parametrize("dtype", ["float64", "int8", "float8_e8m0fnu", "bf16", "complex64", ""])
def test_an_unsupported_cast_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(InvalidArgument, match="bfloat16"):
        ImagePlan({}, dtype=dtype)


def test_the_size_after_casting_back_counts_against_the_limit() -> None:
    plan = ImagePlan({"w": torch.zeros(1000, dtype=torch.float64)}, dtype="bfloat16")
    header, _ = encode_image(plan, fill_image(plan))
    ImageFormat(header, Limits(max_raw_bytes=8000))
    with pytest.raises(WireError, match="cast back"):
        ImageFormat(header, Limits(max_raw_bytes=7999))


def test_a_cast_message_is_decoded_like_any_other() -> None:
    plan = ImagePlan({"w": torch.tensor([1.5, 2.5])}, dtype="bfloat16")
    header, stored = encode_image(plan, fill_image(plan))
    assert_same(decode(b"".join([header, *stored])), {"w": torch.tensor([1.5, 2.5])})
    assert ImageFormat(header, LIMITS).raw_bytes == 4
