"""Mappings, arrays and dtypes of other libraries: they arrive as dictionaries and numpy arrays, or are refused."""

from __future__ import annotations

import subprocess
import sys
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from codec_images import image_round_trip
from codec_trees import assert_same

from rlbroker import Batch
from rlbroker.codec.describe import describe
from rlbroker.codec.dtypes import ML_DTYPES
from rlbroker.codec.message import decode, encode
from rlbroker.errors import UnsupportedType, WireError

pytestmark = pytest.mark.unit

RoundTrip = Callable[[Any], Any]

ROUND_TRIPS = pytest.mark.parametrize(
    "round_trip", [lambda tree: decode(encode(tree)), image_round_trip], ids=["message", "image"]
)


class FrozenDict(Mapping[str, Any]):
    """As in flax: neither a dictionary nor one of its subclasses."""

    def __init__(self, items: dict[str, Any]) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        value = self._items[key]
        return FrozenDict(value) if isinstance(value, dict) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class TensorDict(FrozenDict):
    """As in tensordict: its length is its batch size, it iterates over rows, and its items are not all tensors."""

    batch_size = (3,)

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("rows, not keys")

    def to_dict(self) -> dict[str, Any]:
        return self._items


class TensorClass:
    """As a tensorclass: no mapping."""

    batch_size = (3,)

    def to_dict(self) -> dict[str, Any]:
        return {"x": torch.ones(3), "name": "text"}


class Lazy(FrozenDict):
    """As an open file: makes a new array at each access."""

    def __getitem__(self, key: str) -> Any:
        return np.full(3, self._items[key])


class SubDict(dict[str, Any]):
    pass


@ROUND_TRIPS
@pytest.mark.parametrize(
    "wrap",
    [MappingProxyType, FrozenDict, UserDict, OrderedDict, SubDict, ChainMap, TensorDict, Batch, Counter],
    ids=lambda kind: kind.__name__,
)
def test_any_mapping_comes_back_as_a_dictionary_at_any_depth(round_trip: RoundTrip, wrap: Any) -> None:
    tree = {"b": np.ones(3), "a": torch.zeros(2), "n": 3}
    assert_same(round_trip(wrap(tree)), tree)
    assert_same(round_trip({"x": [wrap(tree)]}), {"x": [tree]})


@ROUND_TRIPS
def test_nested_mappings_and_lazy_ones_travel(round_trip: RoundTrip) -> None:
    assert_same(round_trip(FrozenDict({"a": {"b": {"c": 1}}})), {"a": {"b": {"c": 1}}})
    assert_same(round_trip(TensorClass()), {"x": torch.ones(3), "name": "text"})
    assert_same(round_trip(defaultdict(list, {1: (2,)})), {1: (2,)})
    lazy = {f"k{number}": float(number) for number in range(300)}
    got = round_trip(Lazy(lazy))
    assert {key: value.tolist() for key, value in got.items()} == {
        key: [value] * 3 for key, value in lazy.items()
    }


def test_lazy_tensors_that_are_made_at_each_access_are_not_tied() -> None:
    class Conjugates(FrozenDict):
        def __getitem__(self, key: str) -> Any:
            return torch.full((1000,), complex(0, self._items[key])).conj()

    numbers = {str(number): float(number) for number in range(100)}
    got = decode(encode(Conjugates(numbers)))
    assert {key: value[0].imag.item() for key, value in got.items()} == {
        key: -number for key, number in numbers.items()
    }


def test_a_file_of_numpy_travels(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.arange(3), b=np.ones((2, 2)))
    with np.load(tmp_path / "x.npz") as file:
        assert_same(decode(encode(file)), {"a": np.arange(3), "b": np.ones((2, 2))})


class Twice(FrozenDict):
    def items(self) -> Any:
        return [("a", 1), ("a", 2)]


class Endless(FrozenDict):
    def items(self) -> Any:
        number = 0
        while True:
            number += 1
            yield number, 1


class Broken(FrozenDict):
    def items(self) -> Any:
        raise OSError("the file is gone")


class Within(FrozenDict):
    def items(self) -> Any:
        return [("again", self)]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Twice, r"^\['x'\]: a key occurs twice"),
        (Endless, r"^\['x'\]: more than 1500000 values"),
        (Broken, r"^\['x'\]: the items of .*Broken cannot be read: the file is gone"),
        (Within, r"^\['x'\]\['again'\]\['again'\].*contains itself"),
    ],
)
def test_a_mapping_that_cannot_be_a_dictionary_is_refused(kind: type[FrozenDict], reason: str) -> None:
    with pytest.raises(UnsupportedType, match=reason):
        encode({"x": kind({})})


class Array:
    """As the arrays of other libraries: offers `__array__`."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self._array


class Interface:
    def __init__(self, array: Any) -> None:
        self.__array_interface__ = array.__array_interface__
        self._array = array

    @property
    def __array_interface__(self) -> Any:
        return self._interface

    @__array_interface__.setter
    def __array_interface__(self, value: Any) -> None:
        self._interface = value


class OnlyDlpack:
    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


class OnGpu(OnlyDlpack):
    """As CuPy: refuses an implicit copy, and gives one through DLPack when asked for the CPU."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __dlpack__(self, *, dl_device: Any = None, **options: Any) -> Any:
        if dl_device != (1, 0):
            raise BufferError("the array is on a GPU")
        return self._array.__dlpack__(dl_device=dl_device, **options)


@ROUND_TRIPS
@pytest.mark.parametrize("wrap", [Array, Interface, OnlyDlpack, OnGpu])
@pytest.mark.parametrize("shape", [(), (3,), (200, 100)])
def test_what_offers_an_array_comes_back_as_one(
    round_trip: RoundTrip, wrap: Any, shape: tuple[int, ...]
) -> None:
    array = np.random.default_rng(0).random(shape)
    assert_same(round_trip({"x": wrap(array), "y": array}), {"x": array, "y": array})


def test_arrays_that_numpy_maps_from_files_travel(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(4, 5))
    mapped[:] = 3
    read_only = np.memmap(tmp_path / "x", np.float32, "r", shape=(4, 5))
    expected = np.full((4, 5), 3, np.float32)
    assert_same(decode(encode([mapped, read_only, read_only[::2]])), [expected, expected, expected[::2]])


class Unreadable:
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        raise RuntimeError("Array has been deleted\nwith a second line")


class Speechless(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Silent:
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        raise Speechless


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Unreadable(), "numpy cannot read .*Unreadable: Array has been deleted; send a numpy array of it"),
        (Silent(), "numpy cannot read .*Silent: Speechless; send"),
        (Array(np.array([None])), "object cannot travel"),
        (Array(np.array(["text"])), r"<U4 cannot travel; .*send str\(\) or tolist\(\)"),
        (Array, "type cannot travel"),
    ],
)
def test_an_array_that_numpy_cannot_read_is_refused_with_its_path(value: Any, reason: str) -> None:
    with pytest.raises(UnsupportedType, match=rf"^\['x'\]\[0\]: .*{reason}"):
        encode({"x": [value]})


# The dtypes of ml_dtypes


def ml_array(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, ML_DTYPES[name].itemsize), np.uint8)
    return bits.view(ML_DTYPES[name]).reshape(shape).view(getattr(ml_dtypes, name))


@ROUND_TRIPS
@pytest.mark.parametrize("name", sorted(ML_DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (300, 70)])
def test_each_dtype_of_ml_dtypes_keeps_its_bits(
    round_trip: RoundTrip, name: str, shape: tuple[int, ...]
) -> None:
    array = ml_array(name, shape)
    got = round_trip({"x": array, "same": array, "strided": array[..., ::-1] if shape else array})
    assert got["x"].dtype == np.dtype(getattr(ml_dtypes, name))
    assert got["x"].shape == shape
    assert got["x"].tobytes() == array.tobytes()
    assert got["x"].flags.writeable
    assert got["x"] is got["same"] or not array.size
    if shape:
        assert got["strided"].tobytes() == array[..., ::-1].tobytes()


def test_scalars_of_ml_dtypes_travel() -> None:
    got = decode(encode({"x": ml_dtypes.bfloat16(1.5), "y": ml_dtypes.float8_e5m2(2)}))
    assert (type(got["x"]), got["x"]) == (ml_dtypes.bfloat16, 1.5)
    assert (type(got["y"]), got["y"]) == (ml_dtypes.float8_e5m2, 2)


@pytest.mark.parametrize("name", ["int4", "uint4", "int2", "float4_e2m1fn", "float6_e2m3fn"])
def test_dtypes_of_less_than_a_byte_are_refused_by_name(name: str) -> None:
    array = np.zeros(4, getattr(ml_dtypes, name))
    with pytest.raises(UnsupportedType, match=rf"^\['x'\]: the dtype {name} of ml_dtypes .*send astype"):
        encode({"x": array})


def test_every_dtype_of_ml_dtypes_travels_or_is_refused_by_name() -> None:
    for name, kind in vars(ml_dtypes).items():
        if isinstance(kind, type) and issubclass(kind, np.generic):
            array = np.zeros(3, kind)
            if name in ML_DTYPES:
                assert decode(encode(array)).dtype == array.dtype
            else:
                with pytest.raises(UnsupportedType, match=f"the dtype {name} of ml_dtypes"):
                    encode(array)
    swapped = np.zeros(2, np.dtype(ml_dtypes.bfloat16).newbyteorder(">"))
    with pytest.raises(UnsupportedType, match="bfloat16"):
        encode(swapped)


def test_weights_of_ml_dtypes_are_not_cast() -> None:
    array = ml_array("bfloat16", (64,))
    for dtype in ("bfloat16", "float16", "float8_e5m2"):
        assert image_round_trip({"x": array}, dtype=dtype)["x"].tobytes() == array.tobytes()


def test_without_ml_dtypes_the_reader_gets_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    message = encode({"x": ml_array("bfloat16", (3,))})
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(WireError, match="arrays of bfloat16, and ml_dtypes is not installed here"):
        decode(message)
    assert describe(message)[0].dtype == "bfloat16"


def test_a_dtype_that_this_ml_dtypes_lacks_is_a_wire_error(monkeypatch: pytest.MonkeyPatch) -> None:
    message = encode({"x": ml_array("float8_e3m4", (3,))})
    monkeypatch.delattr(ml_dtypes, "float8_e3m4")
    with pytest.raises(WireError, match="no dtype float8_e3m4"):
        decode(message)


def test_ml_dtypes_is_not_imported_until_an_array_needs_it() -> None:
    message = encode({"x": ml_array("bfloat16", (3,))})
    program = f"""
import sys
import numpy as np
from rlbroker.codec.message import decode, encode
decode(encode({{"x": np.ones(3)}}))
assert "ml_dtypes" not in sys.modules
assert decode({message!r})["x"].dtype.name == "bfloat16"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
