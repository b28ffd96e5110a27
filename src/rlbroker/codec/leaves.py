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
from rlbroker.codec.dtypes import NUMPY_DTYPES, NUMPY_NAMES, TORCH_DTYPES, Array
from rlbroker.codec.tree import RefusedError, shorten
from rlbroker.errors import WireError

if TYPE_CHECKING:
    import torch

#: The most dimensions of a numpy array, and so of a leaf.
MAX_DIMENSIONS = 64
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
    if kind == "array" and dtype == "bfloat16" and cast_from:
        carrier: np.dtype[Any] | None = dtypes.BFLOAT16_CARRIER
    elif kind == "tensor":
        carrier = TORCH_DTYPES[dtype].carrier if isinstance(dtype, str) and dtype in TORCH_DTYPES else None
    elif kind in ("array", "scalar", "bytes"):
        carrier = NUMPY_DTYPES.get(dtype) if isinstance(dtype, str) else None
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

    Nothing is copied or cast: `sources` has the array or tensor of each of `leaves`.
    """

    def __init__(self, dtype: str | None = None) -> None:
        """Start without leaves; wider floating arrays and tensors are described as cast to `dtype`."""
        self.leaves: list[Leaf] = []
        self.sources: list[Any] = []
        self._dtype = dtype
        #: The number of each leaf, by its memory.
        self._numbers: dict[object, int] = {}
        self._torch = sys.modules.get("torch")

    def add(self, value: Any) -> int:
        """Return the number of a leaf; raise RefusedError for any other value."""
        kind = type(value)
        if kind is np.ndarray:
            return self._add_array(value)
        if isinstance(value, np.generic):
            name = _numpy_name(value.dtype)
            return self._append(Leaf("scalar", name, (), NUMPY_DTYPES[name]), np.asarray(value))
        if kind is bytes:
            flat = np.frombuffer(value, np.uint8)
            return self._append(Leaf("bytes", "|u1", flat.shape, flat.dtype), flat)
        tensor_type = getattr(self._torch, "Tensor", None)
        if tensor_type is not None and isinstance(value, tensor_type):
            return self._add_tensor(value)
        raise RefusedError(_why_refused(value))

    def _append(self, leaf: Leaf, source: Any, key: object = None) -> int:
        self.leaves.append(leaf)
        self.sources.append(source)
        number = len(self.leaves) - 1
        if key is not None:
            self._numbers[key] = number
        return number

    def _add_array(self, value: Array) -> int:
        name = _numpy_name(value.dtype)
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
        return self._append(Leaf("array", name, value.shape, NUMPY_DTYPES[name]), value, key)

    def _add_tensor(self, value: torch.Tensor) -> int:
        fault = _tensor_fault(self._torch, value)
        if fault:
            raise RefusedError(fault)
        shape = tuple(value.shape)
        key = None
        if 0 not in shape:
            # The tree outlives the table and keeps the memory of its tensors: no address is used twice.
            key = (value.data_ptr(), value.device, value.dtype, shape, value.stride())
            number = self._numbers.get(key)
            if number is not None:
                return number
        else:
            _check_empty(shape, value.dtype.itemsize)
        name = str(value.dtype)[6:]
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
    elements: Array = plain_tensor(source).cpu().numpy()
    return elements


def plain_tensor(source: torch.Tensor) -> torch.Tensor:
    """Return a tensor that numpy can share: detached, lazy conjugation resolved, in the dtype of its carrier."""
    import torch

    plain = source.detach() if source.requires_grad else source
    if plain.is_neg() or plain.is_conj():
        plain = plain.resolve_conj().resolve_neg()
    view = TORCH_DTYPES[str(source.dtype)[6:]].view
    return plain if view is None else plain.view(getattr(torch, view))


def leaf_maker(leaf: Leaf, *, keep_dtype: bool = False) -> Callable[[Array], object]:
    """Return the function that turns elements, an array of the carrier dtype, into the leaf.

    A leaf that was cast gets its original dtype back, unless `keep_dtype`; bfloat16 arrays always do. Raises
    WireError where torch, or the dtype in it, is missing.
    """
    original = leaf.original
    if leaf.kind == "array":
        if leaf.dtype == "bfloat16" and original is not None:
            return lambda elements: dtypes.array_from_bfloat16(elements, original)
        if original is not None and not keep_dtype:
            return lambda elements: elements.astype(NUMPY_DTYPES[original])
        return _return_unchanged
    if leaf.kind == "scalar":
        return _make_scalar
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


def _numpy_name(dtype: np.dtype[Any]) -> str:
    name = NUMPY_NAMES.get(dtype)
    if name is None:
        raise RefusedError(f"the numpy dtype {dtype!s} cannot travel; only booleans and numbers can")
    return name


def _tensor_fault(torch: Any, value: torch.Tensor) -> str | None:
    kind = type(value)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        return (
            f"a tensor of the subclass {kind.__module__}.{kind.__qualname__} cannot travel; send a plain one"
        )
    if value.is_quantized:
        return f"a quantised tensor ({value.dtype}) cannot travel; send dequantize() or int_repr()"
    if value.is_nested:
        return "a nested tensor cannot travel; send its parts as a list"
    if value.layout is not torch.strided:
        return f"a sparse tensor ({value.layout}) cannot travel; send to_dense() or its parts"
    if value.device.type == "meta":
        return "a tensor on the meta device has no values to send"
    if str(value.dtype)[6:] not in TORCH_DTYPES:
        return f"the torch dtype {value.dtype} cannot travel"
    if value.dim() > MAX_DIMENSIONS:
        return f"a tensor of {value.dim()} dimensions cannot travel; the limit is {MAX_DIMENSIONS}"
    return None


def _why_refused(value: object) -> str:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    if isinstance(value, np.ndarray):
        return f"the array subclass {name} cannot travel; send numpy.asarray() of it, or its parts"
    if isinstance(value, dict):
        return f"the dictionary type {name} cannot travel; send dict() of it"
    if isinstance(value, tuple):
        return f"the tuple type {name} cannot travel; send tuple() of it, or _asdict()"
    if isinstance(value, bool | int | float | str | bytes):
        base = next(base.__name__ for base in kind.__mro__[1:] if base.__module__ == "builtins")
        return f"a value of type {name} would come back as {base}; send {base}() of it"
    return (
        f"a value of type {name} cannot travel; dictionaries, lists, tuples, None, bool, int, float, str, "
        "bytes, numpy arrays and scalars, and torch tensors can"
    )
