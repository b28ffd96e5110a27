"""Weights on a GPU, on their way to the host: copied to pinned memory on a stream of their own.

The stream of the training waits, on the GPU, until the copies are made, as its next kernels may overwrite the
weights; the program does not wait for it.
"""

from __future__ import annotations

import sys
from typing import Any

from rlbroker.codec.image import ImagePlan
from rlbroker.weights.image_store import Bytes


class Staged:
    """A tree whose tensors are in host memory once `fill` reads them."""

    def __init__(self, tree: Any, copied: Any = None) -> None:
        """Take a tree, and the event after which its copies are made; None if there are none."""
        self.tree, self._copied = tree, copied

    @property
    def pending(self) -> bool:
        """Whether the tree is our own copy, which is still being made: reading it can be put off."""
        return self._copied is not None

    def fill(self, plan: ImagePlan, array: Bytes) -> None:
        """Write the image of the tree, once its copies are made."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        plan.fill(array)


class GpuCopy:
    """Pinned memory, kept from one version to the next."""

    def __init__(self) -> None:
        """Take no memory yet."""
        self._buffers: list[Any] = []
        self._streams: dict[Any, Any] = {}

    def take(self, tree: Any) -> Staged:
        """Begin to copy what is on CUDA devices; a tree without such tensors is taken as it is.

        The one before must have been filled in, as its memory is used again.
        """
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized() or not _on_gpu(tree):
            return Staged(tree)
        return _Copying(torch, self._buffers, self._streams).copy(tree)


class _Copying:
    """One tree, being copied."""

    def __init__(self, torch: Any, buffers: list[Any], streams: dict[Any, Any]) -> None:
        self._torch, self._buffers, self._streams = torch, buffers, streams
        self._used = 0
        self._copies: dict[object, Any] = {}
        self._devices: set[Any] = set()

    def copy(self, tree: Any) -> Staged:
        copied = self._visit(tree)
        del self._buffers[self._used :]
        events = []
        for device in self._devices:
            stream = self._streams[device]
            event = self._torch.cuda.Event()
            event.record(stream)
            # What the training does next may change the weights: it begins after the copies.
            self._torch.cuda.current_stream(device).wait_event(event)
            events.append(event)
        return Staged(copied, _All(events))

    def _visit(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._visit(one) for key, one in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._visit(one) for one in value)
        if type(value) in (self._torch.Tensor, self._torch.nn.Parameter) and not value.is_quantized:
            return self._copy(value.detach())
        return value.copy() if hasattr(value, "__array_interface__") else value

    def _copy(self, tensor: Any) -> Any:
        """Copy a tensor; one that is the same memory as an earlier one, only once: it stays tied."""
        key = tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()
        if key not in self._copies:
            if tensor.is_cuda:
                self._copies[key] = self._copy_pinned(tensor)
            else:
                self._copies[key] = tensor.clone()
        return self._copies[key]

    def _copy_pinned(self, tensor: Any) -> Any:
        torch, device = self._torch, tensor.device
        if device not in self._devices:
            self._devices.add(device)
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            self._streams[device].wait_stream(torch.cuda.current_stream(device))
        buffer = self._buffer(tensor)
        with torch.cuda.stream(self._streams[device]):
            buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._streams[device])
        return buffer

    def _buffer(self, tensor: Any) -> Any:
        """Give the pinned memory that the tensor at this place had last time, if it fits."""
        if self._used == len(self._buffers):
            self._buffers.append(None)
        found = self._buffers[self._used]
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            found = self._torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._buffers[self._used] = found
        self._used += 1
        return found


def _on_gpu(value: Any) -> bool:
    """Whether a tree holds anything on a CUDA device."""
    if isinstance(value, dict):
        return any(map(_on_gpu, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_on_gpu, value))
    return bool(getattr(value, "is_cuda", False))


class _All:
    """Several events as one."""

    def __init__(self, events: list[Any]) -> None:
        self._events = events

    def synchronize(self) -> None:
        for event in self._events:
            event.synchronize()
