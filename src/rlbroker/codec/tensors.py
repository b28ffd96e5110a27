"""Tensors as leaves: their dtypes, their memory, and why some cannot travel. Imports torch nowhere."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from rlbroker.codec.dtypes import TORCH_DTYPES
from rlbroker.codec.refusals import RefusedError, first_line, type_name

if TYPE_CHECKING:
    import torch

#: The most dimensions of a numpy array, and so of a leaf.
MAX_DIMENSIONS = 64


@cache
def torch_names(module: Any) -> dict[Any, str]:
    """Return the name on the wire of each dtype of this torch that can travel."""
    return {getattr(module, name): name for name in TORCH_DTYPES if hasattr(module, name)}


def tensor_name(module: Any, value: torch.Tensor) -> str:
    """Return the name on the wire of a tensor's dtype; raise RefusedError for a kind of tensor that cannot travel."""
    kind = type(value)
    if kind is not module.Tensor and kind is not module.nn.Parameter:
        raise RefusedError(_subclass_fault(value))
    name = torch_names(module).get(value.dtype)
    if name is None or value.is_meta:
        raise RefusedError(tensor_fault(module, value))
    return name


def tensor_address(value: torch.Tensor) -> int | None:
    """Return the address of a tensor that has elements; None on a device without addresses, such as XLA.

    Raises RefusedError if its storage does not hold all of them: reading them would send other memory of the process.
    Raises RuntimeError if it has no storage.
    """
    storage = value.untyped_storage()
    start, itemsize = storage.data_ptr(), value.itemsize
    if not start and not (value.is_cpu or value.is_cuda):
        return None
    offset = int(value.storage_offset()) * itemsize
    if value.is_contiguous():
        end = offset + value.nbytes
    else:
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        end = offset + (last + 1) * itemsize
    if not start or end > storage.nbytes():
        raise RefusedError(
            f"a tensor whose storage was freed or shrunk: it needs {end} bytes and has {storage.nbytes()}; "
            "send it before its storage is resized, or gather its shards (FSDP) first"
        )
    return start + offset


_NESTED = "a nested tensor cannot travel; send its parts as a list: unbind() of it"


def _subclass_fault(value: Any) -> str:
    call = "as_subclass(torch.Tensor)"
    try:
        if value.is_nested:
            return _NESTED
        if hasattr(value, "full_tensor"):
            call = "full_tensor() or to_local()"
    except Exception:  # noqa: BLE001 - its `__torch_function__` may raise whatever it likes
        pass
    return f"a tensor of the subclass {type_name(value)} cannot travel; send a plain one: {call} of it"


def tensor_fault(module: Any, value: torch.Tensor, error: RuntimeError | None = None) -> str:
    """Return why a tensor cannot travel, and what to send instead; `error` is what torch said about it."""
    if value.is_nested:
        return _NESTED
    if value.is_quantized:
        return f"a quantised tensor ({value.dtype}) cannot travel; send dequantize() or int_repr() of it"
    if value.layout is not module.strided:
        return f"a tensor of the layout {value.layout} cannot travel; send to_dense() of it, or its parts"
    if value.is_meta:
        return "a tensor on the meta device has no values to send; send the real one"
    if value.dtype not in torch_names(module):
        return f"the torch dtype {value.dtype} cannot travel"
    if value._is_zerotensor():
        return "a ZeroTensor has no memory; send clone() of it"
    reason = f": {first_line(error)}" if error else ""
    return f"a tensor that has no values of its own here (is this inside torch.func?){reason}; send the result outside"
