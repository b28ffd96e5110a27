"""The old state of a module whose own code loads weights, to put it back if that code fails."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict, deque
from contextlib import suppress
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from rlbroker.weights.target_memory import duplicate, is_array, is_tensor, overwrite, restore

#: How deep containers and objects in the attributes of modules are saved, and how many values are looked at.
_MAX_DEPTH = 16
_MAX_LOOKS = 100_000

#: How many values of one container are looked at: a long list of numbers must not use up all looks.
_MAX_INSIDE = 1000

#: Containers, whose methods are called past those of their subclasses. OrderedDict is before its base.
_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque, bytearray)

#: Objects of these packages may be in use by other threads: locks, queues, loggers.
_FOREIGN = sys.stdlib_module_names | {"numpy", "torch"}


class OldState:
    """The state of a module, of which `load_state_dict` may change anything.

    It has the parameters and buffers, and the attributes of all modules with the containers, arrays, tensors and
    plain objects in them.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        """Copy the state; the copy takes the memory of the module again."""
        modules = list(module.modules())
        self._extra = [
            (one, _copy(one.get_extra_state()))
            for one in modules
            if type(one).get_extra_state is not torch.nn.Module.get_extra_state
        ]
        self._attributes: list[tuple[Any, dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any, list[Any]]] = []
        self._values: list[_OldValue] = []
        #: What was visited. The objects are kept, as another one could get the same id.
        self._seen: dict[int, Any] = {id(one): one for one in modules}
        self._looks = 0
        for value in (*module.parameters(), *module.buffers()):
            self._save_value(value)
        for one in modules:
            self._save_attributes(one, 0)

    def put_back(self) -> None:
        """Restore everything. May be called again, after an interrupt."""
        for one, extra in self._extra:
            with suppress(Exception):  # the state that a module begins with may not be one that it accepts
                one.set_extra_state(extra)
        for one, attributes in self._attributes:
            one.__dict__.update(attributes)
            for name in one.__dict__.keys() - attributes.keys():
                del one.__dict__[name]
        for container, base, old in self._containers:
            with suppress(BufferError):  # a memoryview holds the size of a bytearray
                base.clear(container)
                extend = base.extend if base in (list, deque, bytearray) else base.update
                extend(container, old)
        with torch.no_grad():
            for value in self._values:
                with suppress(Exception):  # one that cannot be put back does not keep the others
                    value.put_back()

    def _save_attributes(self, one: Any, depth: int) -> None:
        self._attributes.append((one, dict(one.__dict__)))
        for value in list(one.__dict__.values()):
            self._save(value, depth + 1)

    def _save(self, value: Any, depth: int) -> None:
        self._looks += 1
        if depth > _MAX_DEPTH or self._looks > _MAX_LOOKS or id(value) in self._seen:
            return
        if is_tensor(value) or is_array(value):
            self._save_value(value)
            return
        if isinstance(value, tuple):
            self._seen[id(value)] = value
            for one in islice(tuple.__iter__(value), _MAX_INSIDE):
                self._save(one, depth + 1)
        elif isinstance(value, _CONTAINERS):
            self._seen[id(value)] = value
            self._save_container(value, depth)
        if _is_plain_object(value):
            self._seen[id(value)] = value
            self._save_attributes(value, depth)

    def _save_value(self, value: Any) -> None:
        self._seen[id(value)] = value
        self._values.append(_OldValue(value))

    def _save_container(self, value: Any, depth: int) -> None:
        base = next(filter(partial(isinstance, value), _CONTAINERS))
        is_dictionary = isinstance(value, dict)
        old = list(base.items(value) if is_dictionary else base.__iter__(value))
        self._containers.append((value, base, old))
        if isinstance(value, bytearray):
            return
        for one in islice(old, _MAX_INSIDE):
            self._save(one[1] if is_dictionary else one, depth + 1)


class _OldValue:
    """The memory, elements and gradient of a tensor or an array; of a lazy tensor, that it has no memory yet."""

    def __init__(self, value: Any) -> None:
        self._value, self._class = value, type(value)
        self._is_lazy = is_tensor(value) and is_lazy(value)
        self._data = value.data if is_tensor(value) else None
        self._elements = None if self._is_lazy or getattr(value, "is_meta", False) else duplicate(value)
        self._is_leaf = is_tensor(value) and value.is_leaf
        self._requires_grad = self._is_leaf and value.requires_grad
        self._grad = value.grad if self._is_leaf else None
        self._grad_elements = None if self._grad is None else duplicate(self._grad)

    def put_back(self) -> None:
        if self._data is not None and (
            self._is_lazy
            or self._value.shape != self._data.shape
            or self._value.dtype != self._data.dtype
            or self._value.data_ptr() != self._data.data_ptr()
        ):
            self._value.data = self._data
        if self._is_lazy:
            self._value.__class__ = self._class
        if self._is_leaf:
            self._put_back_gradient()
        if self._elements is not None:
            restore(self._value, self._elements)

    def _put_back_gradient(self) -> None:
        if self._value.requires_grad != self._requires_grad:
            self._value.requires_grad_(self._requires_grad)
        if self._value.grad is not self._grad:
            self._value.grad = self._grad
        if self._grad is not None:
            overwrite(self._grad, self._grad_elements)


def _is_plain_object(value: Any) -> bool:
    """Return whether a value is an object whose attributes are its state, and are its own."""
    kind = type(value)
    if kind is SimpleNamespace:
        return True
    is_foreign = str(kind.__module__).partition(".")[0] in _FOREIGN
    is_other = isinstance(value, (type, torch.nn.Module))
    return not is_foreign and not is_other and isinstance(getattr(value, "__dict__", None), dict)


def _copy(value: Any) -> Any:
    """Return a deep copy, or the value itself if it cannot be copied."""
    try:
        return copy.deepcopy(value)
    except (TypeError, ValueError, RuntimeError, AttributeError, copy.Error):
        return value
