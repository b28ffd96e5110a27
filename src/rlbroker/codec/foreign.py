"""Values of other libraries: what travels in their place, and which call helps where nothing can.

They are recognised by what they offer, so that no library is imported, or named, for it.
"""

from __future__ import annotations

import dataclasses
import enum
import numbers
import sys
from array import array as typed_array
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import numpy as np

from rlbroker.codec.dtypes import Array
from rlbroker.codec.refusals import RefusedError, first_line, type_name


def is_mapping(value: Any) -> bool:
    """Return whether a value travels as a dictionary. One that raises when it is asked does not."""
    if issubclass(type(value), dict):
        return True
    try:
        return isinstance(value, Mapping) or _is_tensor_dictionary(value)
    except Exception:  # noqa: BLE001 - its `__class__` or metaclass may raise whatever it likes
        return False


def has_method(value: Any, name: str) -> bool:
    """Return whether a value has a method. One that raises when it is asked has none."""
    try:
        return callable(getattr(value, name, None))
    except Exception:  # noqa: BLE001 - its `__getattr__` may raise whatever it likes
        return False


def read_foreign(value: Any, most: int) -> list[tuple[object, Any]] | Array:
    """Return the items of any mapping, but no more than `most`, or the array of an object that offers one.

    Raises RefusedError for anything else, and for objects whose own code raises.
    """
    try:
        return _read_items(value, most) if is_mapping(value) else _read_array(value)
    except (RefusedError, RecursionError):
        raise
    except Exception as error:
        raise RefusedError(f"{type_name(value)} cannot be read: {first_line(error)}") from error


def is_empty(mapping: Any) -> bool:
    """Return whether a mapping has no items; one that raises when it is asked is not empty.

    A TensorDict has no truth value, and its length is its batch size.
    """
    if issubclass(type(mapping), dict):
        return not mapping
    try:
        return len(mapping.keys()) == 0
    except Exception:  # noqa: BLE001 - its own code may raise whatever it likes
        return False


def _read_items(value: Any, most: int) -> list[tuple[object, Any]]:
    try:
        found = value.to_dict() if _is_tensor_dictionary(value) else value
        if not isinstance(found, Mapping):
            raise RefusedError(f"a value of type {type_name(value)} cannot travel; send to_dict() of it")
        items = found.items()
        return [(key, item) for key, item in islice(items, most)]  # what is no pair raises here
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(f"the items of {type_name(value)} cannot be read: {first_line(error)}") from error


def _is_tensor_dictionary(value: Any) -> bool:
    """Return whether a value is a TensorDict or a tensorclass.

    Only the first is a `Mapping`, with a length of its own and items that are not all tensors.
    """
    kind = type(value)
    return hasattr(kind, "batch_size") and hasattr(kind, "to_dict")


def _read_array(value: Any) -> Array:
    kind = type(value)
    if isinstance(value, np.memmap):
        return np.asarray(value)
    readers: list[Callable[[Any], Array]] = []
    if not isinstance(value, np.ndarray | bool | int | float | str | bytes):
        if hasattr(kind, "__array__") or hasattr(kind, "__array_interface__"):
            readers.append(np.asanyarray)
        if hasattr(kind, "__dlpack__"):  # some refuse `__array__` because it would copy from a GPU
            readers.append(_from_dlpack)
        if hasattr(kind, "__jax_array__"):  # the variables of Flax NNX
            readers.append(_from_jax)
    if not readers:
        raise RefusedError(_why_refused(value))
    faults = []
    for read in readers:
        try:
            array = read(value)
            break
        except Exception as error:  # noqa: BLE001 - other libraries raise what they like
            faults.append(error)
    else:
        reason = first_line(faults[0])
        raise RefusedError(
            f"numpy cannot read {type_name(value)}: {reason}; {_help_reading(kind, reason)}"
        ) from faults[0]
    if isinstance(array, np.ma.MaskedArray):
        raise RefusedError(
            f"{type_name(value)} gives a MaskedArray, whose mask cannot travel; send its data and mask"
        )
    return np.asarray(array)


def _from_dlpack(value: Any) -> Array:
    array: Array
    try:
        array = np.from_dlpack(value)
    except (BufferError, RuntimeError):  # it is on another device
        array = np.from_dlpack(value, device="cpu")
    return array


def _from_jax(value: Any) -> Array:
    return np.asanyarray(value.__jax_array__())


def _help_reading(kind: type, reason: str) -> str:
    """Return what to send instead of an array that numpy could not read. JAX's own texts name a call for the rest."""
    if not kind.__module__.startswith("jax"):
        return "send a numpy array of it"
    if "Tracer" in kind.__name__:
        return "send it outside of the function that JAX transforms"
    if "PRNG" in kind.__name__:
        return "send jax.random.key_data() of it"
    if "deleted" in reason:
        return "send it before it is deleted or donated"
    return "send jax.device_get() of it"


def refused_dtype(dtype: np.dtype[Any]) -> str:
    """Return why arrays and scalars of a numpy dtype cannot travel, and what to send instead."""
    if dtype.type.__module__ == "ml_dtypes":
        return f'the dtype {dtype.name} of ml_dtypes cannot travel; send astype("int8") or astype("float32")'
    if dtype.kind == "V" and not dtype.names:
        return f'the numpy dtype {dtype!s} has no numbers; send view("uint8"), or bytes() of a scalar'
    call = {
        "O": "tolist(), or an array of numbers",
        "U": "str() or tolist()",
        "S": "bytes() or tolist()",
        "M": 'astype("int64")',
        "m": 'astype("int64")',
        "V": "its fields, each as an array",
    }.get(dtype.kind, "an array of numbers")
    return f"the numpy dtype {dtype!s} cannot travel; only booleans and numbers can: send {call}"


def _why_refused(value: object) -> str:
    name = type_name(value)
    if isinstance(value, np.ma.MaskedArray):
        return f"the array subclass {name} cannot travel; send filled() of it, or its data and mask"
    if isinstance(value, np.ndarray):
        return f"the array subclass {name} cannot travel; send numpy.asarray() of it, or its parts"
    if isinstance(value, tuple):
        call = "tuple() of it, or _asdict()" if hasattr(value, "_asdict") else "tuple() of it"
        return f"the tuple type {name} cannot travel; send {call}{_or_leaves(value)}"
    if isinstance(value, bool | int | float | str | bytes):
        base = next(base.__name__ for base in type(value).__mro__[1:] if base.__module__ == "builtins")
        return f"a value of type {name} would come back as {base}; send {base}() of it"
    helpful = _call_for(value)
    if helpful:
        return f"a value of type {name} cannot travel; send {helpful} of it{_or_leaves(value)}"
    return (
        f"a value of type {name} cannot travel; dictionaries, lists, tuples, None, bool, int, float, str, "
        "bytes, numpy arrays and scalars, torch tensors, and objects with __array__ can"
    )


def _or_leaves(value: Any) -> str:
    """Return the call for a whole tree, if JAX knows a value as a node of its trees: an optimizer's state, a module."""
    try:
        is_node = not sys.modules["jax"].tree_util.all_leaves([value])
    except Exception:  # noqa: BLE001 - JAX is not imported, or the value's own code raises
        return ""
    return "; or jax.tree.leaves() of the whole tree" if is_node else ""


def _call_for(value: Any) -> str | None:
    """Return the call that turns a value into one that travels; None if there is none that always does."""
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return "dataclasses.asdict()"
    if isinstance(value, enum.Enum):
        return "the value"
    if isinstance(value, bytearray) or (isinstance(value, memoryview) and value.format == "B"):
        return "bytes()"
    if isinstance(value, memoryview | typed_array):
        return "numpy.asarray()"
    if isinstance(value, SimpleNamespace) or type(value).__module__ == "argparse":
        return "vars()"
    if isinstance(value, complex):
        return "numpy.complex128()"
    if isinstance(value, numbers.Number):
        return "float()"
    for method in ("state_dict", "_asdict", "to_dict", "toarray", "isoformat", "total_seconds", "getvalue"):
        if callable(getattr(type(value), method, None)):
            return f"{method}()"
    if isinstance(value, Iterable):
        return "list()"
    return "str()" if hasattr(type(value), "__fspath__") or isinstance(value, UUID) else None
