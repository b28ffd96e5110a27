"""Copies weights from a GPU to pinned host memory, on a CUDA stream of their own.

The training stream waits for the copies on the GPU, because its next kernels may overwrite the weights. The host does
not wait.
"""

from __future__ import annotations

import sys
from typing import Any

from rlbroker.codec.image import ImagePlan
from rlbroker.weights.host_cache.image_files import Bytes


class HostTree:
    """A tree whose tensors are in host memory, or will be when `fill` reads them."""

    def __init__(self, tree: Any, copied: _Events | None = None) -> None:
        """Wrap a tree, and the events that its copies complete; None if nothing is being copied."""
        self.tree, self._copied = tree, copied

    @property
    def pending(self) -> bool:
        """Whether the tree is a private copy that is still being made, so that reading it can be deferred."""
        return self._copied is not None

    def fill(self, plan: ImagePlan, array: Bytes) -> None:
        """Write the image of the tree, once its copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        plan.fill(array)


class GpuCopy:
    """Copies trees to pinned memory, which is reused for the next version."""

    def __init__(self) -> None:
        """Begin without memory."""
        self._buffers: list[Any] = []
        self._streams: dict[Any, Any] = {}

    def to_host(self, tree: Any) -> HostTree:
        """Start copying a tree that has tensors on CUDA devices; wrap any other tree without a copy.

        Call `fill` of the last returned tree first: its memory is reused.
        """
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized() or not _is_on_gpu(tree):
            return HostTree(tree)
        return _TreeCopy(torch, self._buffers, self._streams).start(tree)


class _TreeCopy:
    """The copy of one tree."""

    def __init__(self, torch: Any, buffers: list[Any], streams: dict[Any, Any]) -> None:
        self._torch, self._buffers, self._streams = torch, buffers, streams
        self._used = 0
        self._copies: dict[object, Any] = {}
        self._devices: set[Any] = set()

    def start(self, tree: Any) -> HostTree:
        copied = self._visit(tree)
        del self._buffers[self._used :]
        events = []
        for device in self._devices:
            stream = self._streams[device]
            event = self._torch.cuda.Event()
            event.record(stream)
            # The next training step may change the weights: it starts after the copies.
            self._torch.cuda.current_stream(device).wait_event(event)
            events.append(event)
        return HostTree(copied, _Events(events))

    def _visit(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._visit(one) for key, one in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._visit(one) for one in value)
        if type(value) in (self._torch.Tensor, self._torch.nn.Parameter) and not value.is_quantized:
            return self._copy(value.detach())
        return value.copy() if hasattr(value, "__array_interface__") else value

    def _copy(self, tensor: Any) -> Any:
        """Copy a tensor, or return the copy of an earlier tensor in the same memory, so that both stay tied."""
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
        buffer = self._next_buffer(tensor)
        with torch.cuda.stream(self._streams[device]):
            buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._streams[device])
        return buffer

    def _next_buffer(self, tensor: Any) -> Any:
        """Return pinned memory for a tensor: if it fits, that of the tensor at the same position in the last tree."""
        if self._used == len(self._buffers):
            self._buffers.append(None)
        found = self._buffers[self._used]
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            found = self._torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._buffers[self._used] = found
        self._used += 1
        return found


class _Events:
    """The CUDA events of all devices."""

    def __init__(self, events: list[Any]) -> None:
        self._events = events

    def synchronize(self) -> None:
        for event in self._events:
            event.synchronize()


def _is_on_gpu(value: Any) -> bool:
    """Return whether a tree has a tensor on a CUDA device."""
    if isinstance(value, dict):
        return any(map(_is_on_gpu, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_is_on_gpu, value))
    return bool(getattr(value, "is_cuda", False))
