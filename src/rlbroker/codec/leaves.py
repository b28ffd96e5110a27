"""The leaves of a tree: arrays, tensors, numpy scalars and long bytes, described in a header and made from bytes."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlbroker.codec import dtypes
from rlbroker.codec.dtypes import ARRAY_CARRIERS, ML_DTYPES, NUMPY_DTYPES, NUMPY_NAMES, TORCH_DTYPES, Array
from rlbroker.codec.foreign import refused_dtype
from rlbroker.codec.refusals import RefusedError
from rlbroker.codec.tensors import MAX_DIMENSIONS, tensor_address, tensor_fault, tensor_name, torch_names
from rlbroker.codec.tree import shorten
from rlbroker.errors import WireError

if TYPE_CHECKING:
    import torch

#: The most bytes that a shape may stand for, with dimensions of 0 counted as 1: numpy and torch count them in an int64.
MAX_EXTENT_BYTES = 1 << 62

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(slots=True)
class Leaf:
    """One array, tensor, numpy scalar or bytes value, as the leaf table describes it.

    Attributes:
        kind: `array`, `tensor`, `scalar` or `bytes`.
        dtype: its name on the wire; a key of the tables in `dtypes`.
        shape: its dimensions.
        carrier: the numpy dtype that holds its bits.
        original: the dtype that it had before it was cast; None if it was not.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    carrier: np.dtype[Any]
    original: str | None = None

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes, as they travel."""
        return math.prod(self.shape) * self.carrier.itemsize

    @property
    def restored_bytes(self) -> int:
        """Size of the elements in bytes, once they have their original dtype again."""
        if self.original is None:
            return self.nbytes
        return math.prod(self.shape) * dtypes.element_bytes(self.kind, self.original)

    @property
    def row(self) -> tuple[object, ...]:
        """The row of this leaf in the leaf table."""
        plain = (self.kind, self.dtype, self.shape)
        return plain if self.original is None else (*plain, self.original)


def read_leaf(kind: object, dtype: object, shape: object, *cast_from: object) -> Leaf:
    """Check one row of a leaf table; raise WireError unless this platform can make such a leaf."""
    carrier: np.dtype[Any] | None = None
    if kind == "tensor":
        carrier = TORCH_DTYPES[dtype].carrier if isinstance(dtype, str) and dtype in TORCH_DTYPES else None
    elif kind in ("array", "scalar", "bytes"):
        carrier = ARRAY_CARRIERS.get(dtype) if isinstance(dtype, str) else None
    else:
        raise WireError(f"a leaf of unknown kind {shorten(kind)}")
    if carrier is None:
        raise WireError(f"the dtype {shorten(dtype)} of a leaf ({kind}) does not exist on this platform")
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS:
        raise WireError("the shape of a leaf is not a list, or too long")
    original: str | None = None
    for before in cast_from:
        if not isinstance(before, str) or not dtypes.is_cast(str(kind), str(dtype), before):
            raise WireError(f"a leaf ({kind}) of {shorten(dtype)} that was {shorten(before)} before")
        original = before
    extent = carrier.itemsize if original is None else dtypes.element_bytes(str(kind), original)
    for dimension in shape:
        if type(dimension) is not int or dimension < 0:
            raise WireError(f"a dimension of a leaf is {shorten(dimension)}")
        extent *= dimension or 1
        if extent > MAX_EXTENT_BYTES:
            raise WireError("the shape of a leaf is larger than any memory")
    if (kind == "scalar" and shape) or (kind == "bytes" and (len(shape) != 1 or dtype != "|u1")):
        raise WireError(f"a leaf ({kind}) with {len(shape)} dimensions")
    return Leaf(kind, dtype, tuple(shape), carrier, original)  # type: ignore[arg-type] # checked above


class LeafTable:
    """The leaves of one tree to be written, numbered as they are found; leaves of the same memory count as one.

    Nothing is copied or cast, except tensors that are conjugated or negated lazily. Each of `sources` has the dtype of
    its leaf's carrier, or one that numpy or torch can convert to it.
    """

    def __init__(self, dtype: str | None = None) -> None:
        """Start without leaves; wider floating arrays and tensors are described as cast to `dtype`."""
        self.leaves: list[Leaf] = []
        self.sources: list[Any] = []
        self._dtype = dtype
        #: The number of each leaf, by its memory. It stays in use as long as this table, so that no address is used
        #: twice: another library's mapping may make new arrays at each access.
        self._numbers: dict[object, int] = {}
        self._resolved: list[Any] = []
        self._torch = sys.modules.get("torch")
        self._tensor_type: Any = getattr(self._torch, "Tensor", None)

    def add(self, value: Any) -> int | None:
        """Return the number of a leaf; None for any other value. Raise RefusedError for a leaf that cannot travel."""
        kind = type(value)
        if kind is np.ndarray:
            return self._add_array(value)
        if kind is bytes:
            flat = np.frombuffer(value, np.uint8)
            return self._append(Leaf("bytes", "|u1", flat.shape, flat.dtype), flat)
        if self._tensor_type is not None and issubclass(kind, self._tensor_type):
            return self._add_tensor(value)
        if issubclass(kind, np.generic):
            name, elements = _as_carrier(np.asarray(value))
            return self._append(Leaf("scalar", name, (), elements.dtype), elements)
        return None

    def _append(self, leaf: Leaf, source: Any, key: object = None) -> int:
        self.leaves.append(leaf)
        self.sources.append(source)
        number = len(self.leaves) - 1
        if key is not None:
            self._numbers[key] = number
        return number

    def _add_array(self, value: Array) -> int:
        name = NUMPY_NAMES.get(value.dtype)
        if name is None:
            name, value = _as_carrier(value)
        key = None
        if value.size:
            key = (value.__array_interface__["data"][0], name, value.shape, value.strides)
            number = self._numbers.get(key)
            if number is not None:
                return number
        else:
            _check_empty(value.shape, value.itemsize)
        target = dtypes.array_target(name, self._dtype) if self._dtype else None
        if target is not None:
            return self._append(Leaf("array", target[0], value.shape, target[1], original=name), value, key)
        return self._append(Leaf("array", name, value.shape, ARRAY_CARRIERS[name]), value, key)

    def _add_tensor(self, value: torch.Tensor) -> int:
        name = tensor_name(self._torch, value)
        key = None
        try:
            shape = tuple(value.shape)
            if 0 in shape:
                _check_empty(shape, value.itemsize)
                value.untyped_storage()  # raises for a sparse one
            else:
                lazy = value.is_conj(), value.is_neg()
                address = tensor_address(value)
                if address is not None:
                    key = (address, value.device, value.dtype, shape, value.stride(), lazy)
                    number = self._numbers.get(key)
                    if number is not None:
                        return number
                if lazy != (False, False):
                    self._resolved.append(value)
                    value = value.detach().resolve_conj().resolve_neg()
        except RuntimeError as error:  # it has no shape, no strides, or no memory
            raise RefusedError(tensor_fault(self._torch, value, error)) from error
        if len(shape) > MAX_DIMENSIONS:
            raise RefusedError(
                f"a tensor of {len(shape)} dimensions cannot travel; the limit is {MAX_DIMENSIONS}; send reshape()"
            )
        target = dtypes.tensor_target(name, self._dtype) if self._dtype else None
        if target is not None:
            leaf = Leaf("tensor", target, shape, TORCH_DTYPES[target].carrier, original=name)
        else:
            leaf = Leaf("tensor", name, shape, TORCH_DTYPES[name].carrier)
        return self._append(leaf, value, key)


def leaf_elements(source: Any) -> Array:
    """Return the elements of a source of a `LeafTable`, on the CPU in its carrier dtype, uncopied where possible."""
    if isinstance(source, np.ndarray):
        return source
    plain = plain_tensor(source)
    elements: Array = (plain if plain.is_cpu else plain.cpu()).numpy()
    return elements


def plain_tensor(source: torch.Tensor) -> torch.Tensor:
    """Return a source of a `LeafTable` as a tensor that numpy can share: detached, in the dtype of its carrier."""
    import torch

    plain = source.detach() if source.requires_grad else source
    view = TORCH_DTYPES[torch_names(torch)[source.dtype]].view
    return plain if view is None else plain.view(getattr(torch, view))


def leaf_maker(leaf: Leaf, *, keep_dtype: bool = False) -> Callable[[Array], object]:
    """Return the function that turns elements, an array of the carrier dtype, into the leaf.

    A leaf that was cast gets its original dtype back, unless `keep_dtype`; bfloat16 arrays always do. Raises
    WireError where torch or ml_dtypes, or the dtype in it, is missing.
    """
    original = leaf.original
    if leaf.kind == "array" and original is not None:
        if leaf.dtype == "bfloat16":
            return lambda elements: dtypes.array_from_bfloat16(elements, original)
        return _return_unchanged if keep_dtype else lambda elements: elements.astype(NUMPY_DTYPES[original])
    if leaf.kind == "array" or leaf.kind == "scalar":
        make = _return_unchanged if leaf.kind == "array" else _make_scalar
        if leaf.dtype not in ML_DTYPES:
            return make
        ml_dtype = _ml_dtype(leaf.dtype)
        return lambda elements: make(elements.view(ml_dtype))
    if leaf.kind == "bytes":
        return np.ndarray.tobytes
    try:
        import torch
    except ImportError as error:
        raise WireError("the message holds tensors, and torch is not installed here") from error
    dtype = _torch_dtype(torch, leaf.dtype)
    if original is not None and not keep_dtype:
        restored = _torch_dtype(torch, original)
        return lambda elements: _make_tensor(torch, leaf, dtype, elements).to(restored)
    return lambda elements: _make_tensor(torch, leaf, dtype, elements)


def normalise_bools(leaf: Leaf, buffer: Bytes) -> None:
    """Make each byte of boolean elements 0 or 1, in place.

    Compiled code relies on that: with other bytes in a mask, numpy and torch miscount what it selects.
    """
    if leaf.carrier.kind == "b":
        np.minimum(buffer, 1, out=buffer)


def _return_unchanged(elements: Array) -> object:
    return elements


def _make_scalar(elements: Array) -> object:
    return elements[()]


def _make_tensor(torch: Any, leaf: Leaf, dtype: Any, elements: Array) -> Any:
    if (
        0 in leaf.shape
    ):  # from a flat array, because torch adopts numpy's strides, which are 0 for empty arrays
        return torch.from_numpy(elements.reshape(-1)).view(dtype).reshape(leaf.shape)
    if elements.flags.writeable:
        tensor = torch.from_numpy(elements)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            tensor = torch.from_numpy(elements)
    return tensor if TORCH_DTYPES[leaf.dtype].view is None else tensor.view(dtype)


def _torch_dtype(torch: Any, name: str) -> Any:
    dtype = getattr(torch, name, None)
    if dtype is None:
        raise WireError(f"the torch that is installed here has no dtype {name}")
    return dtype


def _check_empty(shape: tuple[int, ...], itemsize: int) -> None:
    if math.prod(dimension or 1 for dimension in shape) * itemsize > MAX_EXTENT_BYTES:
        raise RefusedError(f"the empty shape {shape} has dimensions that are too large for a reader")


def _as_carrier(array: Array) -> tuple[str, Array]:
    """Return the name of an array's dtype, and the array in the dtype that carries it."""
    dtype = array.dtype
    name = NUMPY_NAMES.get(dtype)
    if name is not None:
        return name, array
    if dtype.type.__module__ == "ml_dtypes" and dtype.isnative and dtype.name in ML_DTYPES:
        return dtype.name, array.view(ML_DTYPES[dtype.name])
    raise RefusedError(refused_dtype(dtype))


def _ml_dtype(name: str) -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError as error:
        raise WireError(
            f"the message holds arrays of {name}, and ml_dtypes is not installed here; `pip install ml_dtypes`"
        ) from error
    scalar: type[np.generic] | None = getattr(ml_dtypes, name, None)
    if scalar is None:
        raise WireError(f"the ml_dtypes that is installed here has no dtype {name}")
    return np.dtype(scalar)
