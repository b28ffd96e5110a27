"""The memory of the tensors and arrays that weights are loaded into: whether it can be written, and what shares it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from operator import itemgetter
from typing import Any, TypeGuard, TypeVar

import numpy as np

#: An error names this many keys and counts the others.
_KEYS_NAMED = 5

#: A path into a nested dictionary.
Path = tuple[object, ...]

Key = TypeVar("Key")


def is_tensor(value: object) -> bool:
    """Return whether a value is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_array(value: object) -> TypeGuard[np.ndarray[Any, Any]]:
    """Return whether a value is a numpy array."""
    return isinstance(value, np.ndarray)


def is_plain(value: object) -> bool:
    """Return whether no code but torch's or numpy's own writes to a tensor or an array."""
    torch = sys.modules.get("torch")
    return type(value) is np.ndarray or (
        torch is not None and type(value) in (torch.Tensor, torch.nn.Parameter)
    )


def normal_tensors() -> AbstractContextManager[Any]:
    """Return a block whose new tensors can be written to later, also if the caller is in torch's inference mode."""
    torch = sys.modules.get("torch")
    return nullcontext() if torch is None else torch.inference_mode(False)


def no_grad() -> AbstractContextManager[Any]:
    """Return a block in which leaves that require gradients can be overwritten."""
    torch = sys.modules.get("torch")
    return nullcontext() if torch is None else torch.no_grad()


def gradients_are_on() -> bool:
    """Return whether torch computes gradients in this thread."""
    torch = sys.modules.get("torch")
    return torch is None or bool(torch.is_grad_enabled())


def turn_gradients(*, on: bool) -> None:
    """Make torch compute gradients in this thread, or not."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.is_grad_enabled() != on:
        torch.set_grad_enabled(on)


def why_unwritable(value: Any) -> str:
    """Return why a tensor or an array cannot be overwritten in place; empty if it can."""
    if is_array(value):
        if isinstance(value, np.ma.MaskedArray):
            return "is a masked array, whose mask the weights do not have; give its data"
        base: Any = value
        while is_array(base):
            if not base.flags.writeable:
                return "is a read-only array"
            base = base.base
        overlaps = not value.flags.c_contiguous and _overlaps_itself(
            value.shape, value.strides, value.itemsize
        )
        return "overlaps itself; give an array of its own memory" if overlaps else ""
    if value.is_meta:
        return "is on the meta device, and so has no memory; call to_empty(device=…) on the model before"
    if value.is_inference():
        import torch

        if not torch.is_inference_mode_enabled():
            return "was made in torch.inference_mode(); make it outside"
    if value.layout is not sys.modules["torch"].strided or value.is_quantized:
        return f"is not a dense tensor ({value.layout}, {value.dtype})"
    if value._is_zerotensor():
        return "is a zero tensor, which is immutable; call clone() on it"
    needed = value.nbytes
    if not value.is_contiguous():
        if _overlaps_itself(value.shape, value.stride(), 1):
            return "overlaps itself; call contiguous() on the expanded tensor"
        start, end = _extent(value)
        needed = end - start
    if needed and value.storage_offset() * value.itemsize + needed > value.untyped_storage().nbytes():
        return "has lost its memory: its storage was resized"
    return ""


def find_shared(values: Mapping[Key, Any], sources: Mapping[Key, Any]) -> list[Key]:
    """Return the keys of tensors and arrays that share memory, except where their sources are tied in the same way."""
    extents = []
    for key, value in values.items():
        start, end = _extent(value)
        if start < end:
            extents.append((start, end, key))
    extents.sort(key=itemgetter(0, 1))
    found: dict[Key, None] = {}
    last_end, last_key = 0, None
    for start, end, key in extents:
        if start < last_end and last_key is not None:
            last = values[last_key]
            if sources[key] is not sources[last_key] or not _is_same_view(last, values[key]):
                found |= {last_key: None, key: None}
        if end > last_end:
            last_end, last_key = end, key
    return list(found)


def has_same_bits(value: Any, source: Any) -> bool:
    """Return whether a tensor or an array has the elements of a source of its kind, once cast to its dtype."""
    if is_array(value):
        return np.ascontiguousarray(value).tobytes() == np.ascontiguousarray(source, value.dtype).tobytes()
    return bool((_bytes_of(value) == _bytes_of(source.to(value))).all())


def overwrite(value: Any, source: Any) -> None:
    """Write the elements of a source into a tensor or an array of its kind."""
    if is_array(value):
        value[...] = source
    else:
        value.copy_(source)


def duplicate(value: Any) -> Any:
    """Return a copy of a tensor or an array."""
    return np.array(value) if is_array(value) else value.detach().clone()


def restore(value: Any, old: Any) -> None:
    """Write old elements back, past the methods of a subclass; those may refuse even the elements that they have."""
    if is_array(value):
        np.ndarray.__setitem__(value, ..., old)
        return
    with sys.modules["torch"]._C.DisableTorchFunctionSubclass(), suppress(Exception):
        value.copy_(old)


def name_some(names: Sequence[str]) -> str:
    """Return a few names, and the number of the others."""
    rest = len(names) - _KEYS_NAMED
    return ", ".join(names[:_KEYS_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def describe_shared(names: Sequence[str]) -> str:
    """Return the problem with keys of which one has overwritten another."""
    return f"{name_some(names)} share memory in the model, but not in the weights"


def dotted(path: Path) -> str:
    """Return a path as it is named in errors."""
    return ".".join(map(str, path))


def _extent(value: Any) -> tuple[int, int]:
    """Return the first address of the elements of a tensor or an array, and the address after them."""
    if is_array(value):
        if not value.size:
            return 0, 0
        start, strides, unit = value.__array_interface__["data"][0], value.strides, 1
        steps = ((length - 1) * stride for length, stride in zip(value.shape, strides, strict=True))
        start += sum(step for step in steps if step < 0)
    elif value.is_contiguous():
        start = value.data_ptr()
        return start, start + value.nbytes  # 0 bytes without elements
    else:
        if not value.numel():
            return 0, 0
        start, strides, unit = value.data_ptr(), value.stride(), value.itemsize
    distance = sum((length - 1) * abs(stride) for length, stride in zip(value.shape, strides, strict=True))
    return start, start + distance * unit + value.itemsize


def _is_same_view(one: Any, other: Any) -> bool:
    """Return whether two tensors or arrays, of which the memory overlaps, are the same elements."""
    if type(one) is not type(other) or one.dtype != other.dtype or one.shape != other.shape:
        return False
    if is_array(one):
        return bool(
            one.__array_interface__["data"] == other.__array_interface__["data"]
            and one.strides == other.strides
        )
    return bool(one.data_ptr() == other.data_ptr() and one.stride() == other.stride())


def _overlaps_itself(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Return whether elements may share memory: a dimension is repeated, or steps into the one below it."""
    span = itemsize
    for stride, length in sorted(
        (abs(stride), length) for length, stride in zip(shape, strides, strict=True)
    ):
        if length > 1 and stride < span:
            return True
        span += (length - 1) * stride
    return False


def _bytes_of(tensor: Any) -> Any:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(sys.modules["torch"].uint8)
