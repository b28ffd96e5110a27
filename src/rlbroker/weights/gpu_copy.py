"""Copies weights from a GPU to pinned host memory, on a CUDA stream of their own.

The training stream waits for the copies on the GPU, because its next kernels may overwrite the weights. The host does
not wait.
"""

from __future__ import annotations

import sys
from typing import Any

from rlbroker.codec.image import ImagePlan
from rlbroker.codec.leaves import Bytes


class Copies:
    """The leaves of a plan as private copies that are still being made, or as they are."""

    def __init__(self, events: list[Any] | None = None) -> None:
        """Keep the CUDA events that the copies complete; None if nothing is being copied."""
        self._events = events

    @property
    def pending(self) -> bool:
        """Whether the plan has private copies that are still being made, so that reading them can be deferred."""
        return self._events is not None

    def fill(self, plan: ImagePlan, array: Bytes) -> None:
        """Write the image of the plan, once its copies are complete."""
        for event in self._events or ():
            event.synchronize()
        self._events = None
        plan.fill(array)


class GpuCopy:
    """Copies leaves to pinned memory, which is reused for the next version."""

    def __init__(self) -> None:
        """Begin without memory."""
        self._buffers: list[Any] = []
        self._streams: dict[Any, Any] = {}

    def start(self, plan: ImagePlan) -> Copies:
        """Start copying the leaves of a plan if one is on a CUDA device; otherwise leave them as they are.

        Call `fill` of the last returned copies first: their memory is reused.
        """
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized() or not any(map(_is_on_gpu, plan.sources)):
            return Copies()
        used = 0
        devices = set()
        for number, source in enumerate(plan.sources):
            if not isinstance(source, torch.Tensor):
                plan.sources[number] = source.copy()
            elif not _is_on_gpu(source):
                plan.sources[number] = source.detach().clone()
            else:
                if source.device not in devices:
                    devices.add(source.device)
                    self._stream(torch, source.device).wait_stream(torch.cuda.current_stream(source.device))
                plan.sources[number] = self._copy_pinned(torch, source.detach(), used)
                used += 1
        del self._buffers[used:]
        events = []
        for device in devices:
            stream = self._streams[device]
            event = torch.cuda.Event()
            event.record(stream)
            # The next training step may change the weights: it starts after the copies.
            torch.cuda.current_stream(device).wait_event(event)
            events.append(event)
        return Copies(events)

    def _copy_pinned(self, torch: Any, tensor: Any, position: int) -> Any:
        buffer = self._buffer(torch, tensor, position)
        stream = self._streams[tensor.device]
        with torch.cuda.stream(stream):
            buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        return buffer

    def _stream(self, torch: Any, device: Any) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _buffer(self, torch: Any, tensor: Any, position: int) -> Any:
        """Return pinned memory for a tensor: if it fits, that of the tensor at this position in the last version."""
        if position == len(self._buffers):
            self._buffers.append(None)
        found = self._buffers[position]
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._buffers[position] = found
        return found


def _is_on_gpu(source: Any) -> bool:
    return bool(getattr(source, "is_cuda", False))
