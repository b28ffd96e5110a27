"""Arrays, tensors, numpy scalars and long bytes are found in a tree, and taken apart into bytes."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from rlbroker.codec import casts
from rlbroker.codec.dtypes import NUMPY_DTYPES, NUMPY_NAMES, TORCH_DTYPES
from rlbroker.codec.leaves import MAX_DIMENSIONS, MAX_EXTENT_BYTES, Leaf
from rlbroker.codec.tree import RefusedError

if TYPE_CHECKING:
    import torch

#: Elements of a carrier dtype, of any layout.
Elements = np.ndarray[Any, np.dtype[Any]]


class LeafTaker:
    """Recognises leaves, and ties: two that are the same memory count as one.

    Nothing is copied or cast here: for each leaf, `sources` has the array or tensor that it is.
    """

    def __init__(self, dtype: str | None = None) -> None:
        """Start without leaves; wider floating arrays and tensors are described as cast to `dtype`."""
        self.leaves: list[Leaf] = []
        self.sources: list[Any] = []
        self._dtype = dtype
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

    def _add(self, leaf: Leaf, source: Any, key: object = None) -> int:
        self.leaves.append(leaf)
        self.sources.append(source)
        number = len(self.leaves) - 1
        if key is not None:
            self._numbers[key] = number
        return number

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
        target = casts.array_cast(name, self._dtype) if self._dtype else None
        if target is not None:
            return self._add(Leaf("array", target[0], value.shape, target[1], original=name), value, key)
        return self._add(Leaf("array", name, value.shape, NUMPY_DTYPES[name]), value, key)

    def _take_tensor(self, value: torch.Tensor) -> int:
        reason = _tensor_fault(self._torch, value)
        if reason:
            raise RefusedError(reason)
        shape = tuple(value.shape)
        key = None
        if 0 not in shape:
            # Keys live as long as the tree, whose tensors keep their memory: an address is not used twice.
            key = (value.data_ptr(), value.device, value.dtype, shape, value.stride())
            number = self._numbers.get(key)
            if number is not None:
                return number
        else:
            _check_empty(shape, value.dtype.itemsize)
        name = str(value.dtype)[6:]
        target = casts.tensor_cast(name, self._dtype) if self._dtype else None
        if target is not None:
            leaf = Leaf("tensor", target, shape, TORCH_DTYPES[target].carrier, original=name)
        else:
            leaf = Leaf("tensor", name, shape, TORCH_DTYPES[name].carrier)
        return self._add(leaf, value, key)


def elements_of(source: Any) -> Elements:
    """Return what a taken leaf holds, on the CPU and of its carrier dtype, without a copy where possible."""
    if isinstance(source, np.ndarray):
        return source
    plain = plain_tensor(source)
    elements: Elements = plain.cpu().numpy()
    return elements


def plain_tensor(source: torch.Tensor) -> torch.Tensor:
    """Return a tensor as numpy and integer copies can take it: detached, resolved, in the dtype of its carrier."""
    import torch

    plain = source.detach() if source.requires_grad else source
    if plain.is_neg() or plain.is_conj():
        plain = plain.resolve_conj().resolve_neg()
    view = TORCH_DTYPES[str(source.dtype)[6:]].view
    return plain if view is None else plain.view(getattr(torch, view))


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
