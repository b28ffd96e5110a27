"""Arrays, tensors, numpy scalars and long bytes: taken apart into bytes, and made from bytes again."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlbroker.errors import WireError
from rlbroker.wire.dtypes import NUMPY_DTYPES, NUMPY_NAMES, TORCH_DTYPES
from rlbroker.wire.tree import RefusedError, brief

if TYPE_CHECKING:
    import torch

#: The most dimensions of a numpy array, and so of a leaf.
MAX_DIMENSIONS = 64
#: The product of a shape's dimensions other than zero, in bytes: what numpy and torch count in an int64.
_MAX_EXTENT_BYTES = 1 << 62

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(slots=True)
class Leaf:
    """One array, tensor, numpy scalar or bytes value, described as in the leaf table.

    ``kind`` is "array", "tensor", "scalar" or "bytes"; ``dtype`` a name of the tables in dtypes; ``carrier``
    the numpy dtype that holds its bits.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    carrier: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return math.prod(self.shape) * self.carrier.itemsize


class LeafTaker:
    """Recognises leaves, and ties: two that are the same memory count as one."""

    def __init__(self) -> None:
        """Start without leaves."""
        #: Each distinct leaf with its elements: an array of the carrier dtype, of any layout.
        self.leaves: list[tuple[Leaf, np.ndarray[Any, Any]]] = []
        self._numbers: dict[object, int] = {}
        self._torch = sys.modules.get("torch")

    def take(self, value: Any) -> int:
        """Return the number of a leaf; raise RefusedError for anything else."""
        kind = type(value)
        if kind is np.ndarray:
            return self._take_array(value)
        if isinstance(value, np.generic):
            name = _numpy_name(value.dtype)
            return self._add(Leaf("scalar", name, (), NUMPY_DTYPES[name]), np.asarray(value))
        if kind is bytes:
            flat = np.frombuffer(value, np.uint8)
            return self._add(Leaf("bytes", "|u1", flat.shape, flat.dtype), flat)
        tensor_type = getattr(self._torch, "Tensor", None)
        if tensor_type is not None and isinstance(value, tensor_type):
            return self._take_tensor(value)
        raise RefusedError(_why_not(value))

    def _add(self, leaf: Leaf, elements: np.ndarray[Any, Any]) -> int:
        self.leaves.append((leaf, elements))
        return len(self.leaves) - 1

    def _take_array(self, value: np.ndarray[Any, Any]) -> int:
        name = _numpy_name(value.dtype)
        key = None
        if value.size:
            key = (value.__array_interface__["data"][0], name, value.shape, value.strides)
            number = self._numbers.get(key)
            if number is not None:
                return number
        else:
            _check_empty(value.shape, value.itemsize)
        number = self._add(Leaf("array", name, value.shape, NUMPY_DTYPES[name]), value)
        if key is not None:
            self._numbers[key] = number
        return number

    def _take_tensor(self, value: torch.Tensor) -> int:
        torch: Any = self._torch
        reason = _tensor_fault(torch, value)
        if reason:
            raise RefusedError(reason)
        dtype = value.dtype
        shape = tuple(value.shape)
        key = None
        if 0 not in shape:
            # Keys live as long as the tree, whose tensors keep their memory: an address is not used twice.
            key = (value.data_ptr(), value.device, dtype, shape, value.stride())
            number = self._numbers.get(key)
            if number is not None:
                return number
        else:
            _check_empty(shape, dtype.itemsize)
        name = str(dtype)[6:]
        carrier, view = TORCH_DTYPES[name]
        plain = value.detach() if value.requires_grad else value
        if plain.device.type != "cpu":
            plain = plain.cpu()
        if plain.is_neg() or plain.is_conj():
            plain = plain.resolve_conj().resolve_neg()
        elements = (plain if view is None else plain.view(getattr(torch, view))).numpy()
        number = self._add(Leaf("tensor", name, shape, carrier), elements)
        if key is not None:
            self._numbers[key] = number
        return number


def _check_empty(shape: tuple[int, ...], itemsize: int) -> None:
    if math.prod(dimension or 1 for dimension in shape) * itemsize > _MAX_EXTENT_BYTES:
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
        return f"a tensor of {value.dim()} dimensions cannot travel; {MAX_DIMENSIONS} is the most"
    return None


def _why_not(value: object) -> str:
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


def read_leaf(kind: object, dtype: object, shape: object) -> Leaf:
    """Check one row of a leaf table; raise WireError unless a reader here could make it."""
    if kind == "tensor":
        carrier = TORCH_DTYPES[dtype].carrier if isinstance(dtype, str) and dtype in TORCH_DTYPES else None
    elif kind in ("array", "scalar", "bytes"):
        carrier = NUMPY_DTYPES.get(dtype) if isinstance(dtype, str) else None
    else:
        raise WireError(f"a leaf of unknown kind {brief(kind)}")
    if carrier is None:
        raise WireError(f"the dtype {brief(dtype)} of a leaf ({kind}) does not exist on this platform")
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS:
        raise WireError("the shape of a leaf is not a list, or too long")
    extent = carrier.itemsize
    for dimension in shape:
        if type(dimension) is not int or dimension < 0:
            raise WireError(f"a dimension of a leaf is {brief(dimension)}")
        extent *= dimension or 1
        if extent > _MAX_EXTENT_BYTES:
            raise WireError("the shape of a leaf is larger than any memory")
    if (kind == "scalar" and shape) or (kind == "bytes" and (len(shape) != 1 or dtype != "|u1")):
        raise WireError(f"a leaf ({kind}) with {len(shape)} dimensions")
    return Leaf(kind, dtype, tuple(shape), carrier)  # type: ignore[arg-type]


def leaf_maker(leaf: Leaf) -> Callable[[np.ndarray[Any, Any]], object]:
    """Return what turns elements, an own array of the carrier dtype, into the leaf.

    Raises WireError where torch, or the dtype in it, is missing.
    """
    if leaf.kind == "array":
        return _as_is
    if leaf.kind == "scalar":
        return _scalar
    if leaf.kind == "bytes":
        return np.ndarray.tobytes
    try:
        import torch
    except ImportError as error:
        raise WireError("the message holds tensors, and torch is not installed here") from error
    dtype = getattr(torch, leaf.dtype, None)
    if dtype is None:
        raise WireError(f"the torch that is installed here has no dtype {leaf.dtype}")
    if 0 in leaf.shape:  # From a flat array, as torch takes over numpy's strides, which are 0 for empty ones.
        return lambda elements: torch.from_numpy(elements.reshape(-1)).view(dtype).reshape(leaf.shape)
    if TORCH_DTYPES[leaf.dtype].view is None:
        return torch.from_numpy
    return lambda elements: torch.from_numpy(elements).view(dtype)


def _as_is(elements: np.ndarray[Any, Any]) -> object:
    return elements


def _scalar(elements: np.ndarray[Any, Any]) -> object:
    return elements[()]
