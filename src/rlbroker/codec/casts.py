"""Lower precision on the way out: which leaves are cast, how, and back.

Casting rounds to nearest, ties to even, as torch does; NaN stays NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlbroker.codec.dtypes import NUMPY_DTYPES, TORCH_DTYPES
from rlbroker.errors import InvalidArgument

#: What floating leaves can be cast to, by torch's names, with the numpy name of the same type where there is one.
#: float8_e8m0fnu is absent, as it has neither signs nor zero.
CAST_DTYPES: dict[str, str | None] = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "bfloat16",
    "float8_e4m3fn": None,
    "float8_e4m3fnuz": None,
    "float8_e5m2": None,
    "float8_e5m2fnuz": None,
}

#: A numpy array's elements cast to bfloat16, for which numpy has no dtype: the upper halves of float32.
BFLOAT16_CARRIER = np.dtype("<u2")

_FLOATING_TORCH = frozenset(name for name in TORCH_DTYPES if name.startswith(("float", "bfloat")))
_BLOCK_ELEMENTS = 1 << 16

Array = np.ndarray[Any, np.dtype[Any]]


def check_dtype(dtype: str) -> None:
    """Raise InvalidArgument unless floating leaves can be cast to `dtype`."""
    if dtype not in CAST_DTYPES:
        raise InvalidArgument(f"dtype={dtype!r}; {', '.join(CAST_DTYPES)} work")


def tensor_cast(name: str, dtype: str) -> str | None:
    """Return what a tensor of dtype `name` is cast to, None if nothing would be saved."""
    wider = name in _FLOATING_TORCH and _torch_bytes(name) > _torch_bytes(dtype)
    return dtype if wider else None


def array_cast(name: str, dtype: str) -> tuple[str, np.dtype[Any]] | None:
    """Return wire name and carrier of what an array of dtype `name` is cast to, None if it stays as it is."""
    target = CAST_DTYPES[dtype]
    source = NUMPY_DTYPES[name]
    if target is None or source.kind != "f":
        return None
    carrier = BFLOAT16_CARRIER if target == "bfloat16" else NUMPY_DTYPES[target]
    return (target, carrier) if source.itemsize > carrier.itemsize else None


def may_be_cast(kind: str, dtype: str, original: str) -> bool:
    """Return whether a leaf of `kind` and `dtype` on the wire may have been `original` before."""
    if kind == "tensor":
        return dtype in CAST_DTYPES and tensor_cast(original, dtype) == dtype
    if kind != "array" or original not in NUMPY_DTYPES:
        return False
    return any(array_cast(original, name) == (dtype, _carrier(dtype)) for name in CAST_DTYPES)


def original_bytes(kind: str, original: str) -> int:
    """Return the element size of `original`."""
    return _torch_bytes(original) if kind == "tensor" else NUMPY_DTYPES[original].itemsize


def cast_array(source: Array, out: Array) -> None:
    """Fill `out`, flat, with the elements of a floating array of any layout."""
    to_bfloat16 = out.dtype == BFLOAT16_CARRIER
    done = 0
    # Too large becomes infinite, as in torch, which is nothing to warn of.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for block in np.nditer(
            source,
            flags=["external_loop", "buffered", "zerosize_ok"],
            op_dtypes=[np.dtype("<f4") if to_bfloat16 else out.dtype],
            casting="same_kind",
            order="C",
            buffersize=_BLOCK_ELEMENTS,
        ):
            part: Array = block  # type: ignore[assignment] # of one operand it is an array, which its type does not say
            out[done : done + len(part)] = _bfloat16_bits(part) if to_bfloat16 else part
            done += len(part)


def array_from_bfloat16(bits: Array, original: str) -> Array:
    """Return an array of the dtype `original`, given the bits of bfloat16 elements."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)  # In place, as numpy makes a scalar of a new array without dimensions.
    return wide.view(np.float32).astype(NUMPY_DTYPES[original])


def _bfloat16_bits(values: Array) -> Array:
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    # Rounding could carry a NaN's payload into its sign, or lose it altogether.
    return np.where(np.isnan(values), (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


def _carrier(dtype: str) -> np.dtype[Any] | None:
    return BFLOAT16_CARRIER if dtype == "bfloat16" else NUMPY_DTYPES.get(dtype)


def _torch_bytes(name: str) -> int:
    return TORCH_DTYPES[name].carrier.itemsize
