"""The element types that travel, by the names they have on the wire.

Both tables are allow-lists: a name from the wire is looked up, never parsed. The torch table does not need
torch, so that sizes can be checked (and a message described) without importing it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

#: Byte orders as numpy writes them: little endian, big endian.
ORDERS: tuple[Literal["<"], Literal[">"]] = ("<", ">")


def _long_double_tag() -> str | None:
    """Name this platform's ``long double``, which numpy calls f16 whatever its bits mean."""
    mantissa_bits = np.finfo(np.longdouble).nmant
    return {63: "x87", 112: "quad", 105: "dd", 106: "dd"}.get(int(mantissa_bits))


def _numpy_dtypes() -> dict[str, np.dtype[Any]]:
    table = {name: np.dtype(name) for name in ("|b1", "|i1", "|u1")}
    for code in ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"):
        for order in ORDERS:
            table[order + code] = np.dtype(order + code)
    tag = _long_double_tag()
    # Where long double is a plain double (tag None), numpy calls it f8 and so do we.
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


class TorchDtype(NamedTuple):
    """How the bits of a torch dtype pass through numpy.

    ``carrier`` is a numpy dtype of the same size. ``view`` is the name of the torch dtype that equals the
    carrier, or None where torch and numpy share the dtype and no reinterpretation is needed.
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


#: Wire name (torch's own, without ``torch.``) to the way its bits travel. Quantised dtypes are absent: their
#: values mean nothing without scales that live outside the elements.
TORCH_DTYPES = _torch_dtypes()
