"""Arrays, tensors, numpy scalars and long bytes: described in a header, and made from their bytes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlbroker.codec import casts
from rlbroker.codec.dtypes import NUMPY_DTYPES, TORCH_DTYPES
from rlbroker.codec.tree import brief
from rlbroker.errors import WireError

#: The most dimensions of a numpy array, and so of a leaf.
MAX_DIMENSIONS = 64
#: The product of a shape's dimensions other than zero, in bytes: what numpy and torch count in an int64.
MAX_EXTENT_BYTES = 1 << 62

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(slots=True)
class Leaf:
    """One array, tensor, numpy scalar or bytes value, described as in the leaf table.

    ``kind`` is "array", "tensor", "scalar" or "bytes"; ``dtype`` a name of the tables in dtypes; ``carrier``
    the numpy dtype that holds its bits; ``original`` the dtype that it had before it was cast, if it was.
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
        return math.prod(self.shape) * casts.original_bytes(self.kind, self.original)

    @property
    def row(self) -> tuple[object, ...]:
        """Its row in the leaf table."""
        plain = (self.kind, self.dtype, self.shape)
        return plain if self.original is None else (*plain, self.original)


def read_leaf(kind: object, dtype: object, shape: object, *cast_from: object) -> Leaf:
    """Check one row of a leaf table; raise WireError unless a reader here could make it."""
    if kind == "array" and dtype == "bfloat16" and cast_from:
        carrier: np.dtype[Any] | None = casts.BFLOAT16_CARRIER
    elif kind == "tensor":
        carrier = TORCH_DTYPES[dtype].carrier if isinstance(dtype, str) and dtype in TORCH_DTYPES else None
    elif kind in ("array", "scalar", "bytes"):
        carrier = NUMPY_DTYPES.get(dtype) if isinstance(dtype, str) else None
    else:
        raise WireError(f"a leaf of unknown kind {brief(kind)}")
    if carrier is None:
        raise WireError(f"the dtype {brief(dtype)} of a leaf ({kind}) does not exist on this platform")
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS:
        raise WireError("the shape of a leaf is not a list, or too long")
    original: str | None = None
    for before in cast_from:
        if not isinstance(before, str) or not casts.may_be_cast(str(kind), str(dtype), before):
            raise WireError(f"a leaf ({kind}) of {brief(dtype)} that was {brief(before)} before")
        original = before
    extent = carrier.itemsize if original is None else casts.original_bytes(str(kind), original)
    for dimension in shape:
        if type(dimension) is not int or dimension < 0:
            raise WireError(f"a dimension of a leaf is {brief(dimension)}")
        extent *= dimension or 1
        if extent > MAX_EXTENT_BYTES:
            raise WireError("the shape of a leaf is larger than any memory")
    if (kind == "scalar" and shape) or (kind == "bytes" and (len(shape) != 1 or dtype != "|u1")):
        raise WireError(f"a leaf ({kind}) with {len(shape)} dimensions")
    return Leaf(kind, dtype, tuple(shape), carrier, original)  # type: ignore[arg-type]


def leaf_maker(leaf: Leaf, *, keep_dtype: bool = False) -> Callable[[np.ndarray[Any, Any]], object]:
    """Return what turns elements, an array of the carrier dtype, into the leaf.

    A leaf that was cast gets its original dtype back, unless `keep_dtype`; bfloat16 arrays always do. Raises
    WireError where torch, or the dtype in it, is missing.
    """
    original = leaf.original
    if leaf.kind == "array":
        if leaf.dtype == "bfloat16" and original is not None:
            return lambda elements: casts.array_from_bfloat16(elements, original)
        if original is not None and not keep_dtype:
            return lambda elements: elements.astype(NUMPY_DTYPES[original])
        return _as_is
    if leaf.kind == "scalar":
        return _scalar
    if leaf.kind == "bytes":
        return np.ndarray.tobytes
    try:
        import torch
    except ImportError as error:
        raise WireError("the message holds tensors, and torch is not installed here") from error
    dtype = _torch_dtype(torch, leaf.dtype)
    if original is not None and not keep_dtype:
        restored = _torch_dtype(torch, original)
        return lambda elements: _tensor(torch, leaf, dtype, elements).to(restored)
    return lambda elements: _tensor(torch, leaf, dtype, elements)


def _torch_dtype(torch: Any, name: str) -> Any:
    dtype = getattr(torch, name, None)
    if dtype is None:
        raise WireError(f"the torch that is installed here has no dtype {name}")
    return dtype


def _tensor(torch: Any, leaf: Leaf, dtype: Any, elements: np.ndarray[Any, Any]) -> Any:
    if 0 in leaf.shape:  # From a flat array, as torch takes over numpy's strides, which are 0 for empty ones.
        return torch.from_numpy(elements.reshape(-1)).view(dtype).reshape(leaf.shape)
    if elements.flags.writeable:
        tensor = torch.from_numpy(elements)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            tensor = torch.from_numpy(elements)
    return tensor if TORCH_DTYPES[leaf.dtype].view is None else tensor.view(dtype)


def _as_is(elements: np.ndarray[Any, Any]) -> object:
    return elements


def _scalar(elements: np.ndarray[Any, Any]) -> object:
    return elements[()]


def normalise_bools(leaf: Leaf, buffer: Bytes) -> None:
    """Make each byte of boolean elements 0 or 1, in place.

    Compiled code counts on it: a mask that holds other bytes makes numpy and torch miscount what it selects.
    """
    if leaf.carrier.kind == "b":
        np.minimum(buffer, 1, out=buffer)
