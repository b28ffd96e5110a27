"""The element types of the wire format, their names there, and the casts to lower precision.

The tables are allow-lists: a name from the wire is looked up, never parsed. The torch table does not need torch, so
that sizes can be checked without importing it. A cast rounds to nearest, ties to even, as torch does; NaN stays NaN.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from rlbroker.errors import InvalidArgument

Array = np.ndarray[Any, np.dtype[Any]]

#: Byte orders as numpy writes them: little endian, big endian.
ORDERS: tuple[Literal["<"], Literal[">"]] = ("<", ">")


def _long_double_tag() -> str | None:
    """Return the layout of this platform's ``long double``, which numpy calls f16 whatever its bits mean."""
    mantissa_bits = np.finfo(np.longdouble).nmant
    return {63: "x87", 112: "quad", 105: "dd", 106: "dd"}.get(int(mantissa_bits))


def _numpy_dtypes() -> dict[str, np.dtype[Any]]:
    table = {name: np.dtype(name) for name in ("|b1", "|i1", "|u1")}
    for code in ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"):
        for order in ORDERS:
            table[order + code] = np.dtype(order + code)
    tag = _long_double_tag()
    # Where long double is a plain double (tag None), it is called f8, by numpy and here.
    if tag is not None:
        for kind, scalar in (("f", np.longdouble), ("c", np.clongdouble)):
            native = np.dtype(scalar)
            for order in ORDERS:
                table[f"{order}{tag}-{kind}{native.itemsize}"] = native.newbyteorder(order)
    return table


#: Wire name to numpy dtype. Long doubles carry the name of their real layout, which differs by platform.
NUMPY_DTYPES = _numpy_dtypes()

#: numpy dtype to wire name.
NUMPY_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}

#: The dtypes that the package ml_dtypes adds to numpy, by its names, and the numpy dtype that carries their bits. Those
#: of less than a byte are absent: the rest of each byte is undefined.
ML_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float8_e3m4": np.dtype("u1"),
    "float8_e4m3": np.dtype("u1"),
    "float8_e4m3b11fnuz": np.dtype("u1"),
    "float8_e4m3fn": np.dtype("u1"),
    "float8_e4m3fnuz": np.dtype("u1"),
    "float8_e5m2": np.dtype("u1"),
    "float8_e5m2fnuz": np.dtype("u1"),
    "float8_e8m0fnu": np.dtype("u1"),
}

#: Wire name of every dtype of an array to the numpy dtype that carries its elements.
ARRAY_CARRIERS = NUMPY_DTYPES | ML_DTYPES


def is_carried_as_bits(kind: str, name: str) -> bool:
    """Return whether the carrier of a leaf has its bits only, because numpy itself lacks the dtype `name`."""
    return TORCH_DTYPES[name].view is not None if kind == "tensor" else name in ML_DTYPES


class TorchDtype(NamedTuple):
    """The numpy dtype that carries the bits of a torch dtype.

    Attributes:
        carrier: a numpy dtype of the same size.
        view: name of the torch dtype that equals the carrier; None where torch and numpy share the dtype and no
            reinterpretation is needed.
    """

    carrier: np.dtype[Any]
    view: str | None


def _torch_dtypes() -> dict[str, TorchDtype]:
    shared = {
        "bool": "|b1",
        "uint8": "|u1",
        "int8": "|i1",
        "uint16": "<u2",
        "int16": "<i2",
        "uint32": "<u4",
        "int32": "<i4",
        "uint64": "<u8",
        "int64": "<i8",
        "float16": "<f2",
        "float32": "<f4",
        "float64": "<f8",
        "complex64": "<c8",
        "complex128": "<c16",
    }
    one_byte = [
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "float4_e2m1fn_x2",
        "bits8",
        "bits1x8",
        "bits2x4",
        "bits4x2",
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
    ]
    table = {name: TorchDtype(np.dtype(code), None) for name, code in shared.items()}
    table |= {name: TorchDtype(np.dtype("u1"), "uint8") for name in one_byte}
    table |= {name: TorchDtype(np.dtype("<i2"), "int16") for name in ("bfloat16", "bits16")}
    table["complex32"] = TorchDtype(np.dtype("<i4"), "int32")
    return table


#: Wire name (torch's own, without ``torch.``) to its carrier. Quantised dtypes are absent: their elements mean nothing
#: without the scales.
TORCH_DTYPES = _torch_dtypes()

_FLOATING_TORCH = frozenset(name for name in TORCH_DTYPES if name.startswith(("float", "bfloat")))

#: The dtypes to which floating leaves can be cast, by torch's names, with numpy's name for the same type where there
#: is one. float8_e8m0fnu is absent, because it has neither signs nor zero.
CAST_DTYPES: dict[str, str | None] = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "bfloat16",
    "float8_e4m3fn": None,
    "float8_e4m3fnuz": None,
    "float8_e5m2": None,
    "float8_e5m2fnuz": None,
}

#: Carries bfloat16 elements, which are the upper halves of float32.
BFLOAT16_CARRIER = ML_DTYPES["bfloat16"]

#: The number of elements that `cast_array` buffers at a time.
_BLOCK_ELEMENTS = 1 << 16


def check_cast_dtype(dtype: str) -> None:
    """Raise InvalidArgument unless floating leaves can be cast to `dtype`."""
    if dtype not in CAST_DTYPES:
        raise InvalidArgument(f"dtype must be one of {', '.join(CAST_DTYPES)}; got {dtype!r}")


def tensor_target(name: str, dtype: str) -> str | None:
    """Return the dtype to which a tensor of dtype `name` is cast; None if that would save nothing."""
    wider = name in _FLOATING_TORCH and element_bytes("tensor", name) > element_bytes("tensor", dtype)
    return dtype if wider else None


def array_target(name: str, dtype: str) -> tuple[str, np.dtype[Any]] | None:
    """Return (wire name, carrier) of the dtype that an array of dtype `name` is cast to; None if it is not cast."""
    target = CAST_DTYPES[dtype]
    source = NUMPY_DTYPES.get(name)
    if target is None or source is None or source.kind != "f":
        return None
    carrier = BFLOAT16_CARRIER if target == "bfloat16" else NUMPY_DTYPES[target]
    return (target, carrier) if source.itemsize > carrier.itemsize else None


def is_cast(kind: str, dtype: str, original: str) -> bool:
    """Return whether casting a leaf of `kind` from dtype `original` can give the wire dtype `dtype`."""
    if kind == "tensor":
        return dtype in CAST_DTYPES and tensor_target(original, dtype) == dtype
    if kind != "array" or original not in NUMPY_DTYPES:
        return False
    carrier = BFLOAT16_CARRIER if dtype == "bfloat16" else NUMPY_DTYPES.get(dtype)
    return any(array_target(original, name) == (dtype, carrier) for name in CAST_DTYPES)


def element_bytes(kind: str, name: str) -> int:
    """Return the size of one element of dtype `name`, of a tensor or of an array."""
    return TORCH_DTYPES[name].carrier.itemsize if kind == "tensor" else NUMPY_DTYPES[name].itemsize


def cast_array(source: Array, out: Array) -> None:
    """Fill `out`, which is flat, with the elements of a floating array of any layout."""
    to_bfloat16 = out.dtype == BFLOAT16_CARRIER
    done = 0
    # Values that are too large become infinite, as in torch, without a warning.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for block in np.nditer(
            source,
            flags=["external_loop", "buffered", "zerosize_ok"],
            op_dtypes=[np.dtype("<f4") if to_bfloat16 else out.dtype],
            casting="same_kind",
            order="C",
            buffersize=_BLOCK_ELEMENTS,
        ):
            part: Array = block  # type: ignore[assignment] # with one operand, nditer yields arrays, not tuples
            out[done : done + len(part)] = _bfloat16_bits(part) if to_bfloat16 else part
            done += len(part)


def array_from_bfloat16(bits: Array, original: str) -> Array:
    """Return an array of the dtype `original`, given the bits of bfloat16 elements."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)  # in place: otherwise numpy turns an array without dimensions into a scalar
    return wide.view(np.float32).astype(NUMPY_DTYPES[original])


def _bfloat16_bits(values: Array) -> Array:
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    # Rounding could carry a NaN's payload into its sign, or turn the NaN into an infinity.
    return np.where(np.isnan(values), (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)
