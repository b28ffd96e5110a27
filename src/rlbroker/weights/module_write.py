"""Writes weights into a torch module: whatever its `load_state_dict` takes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from rlbroker.errors import WeightsMismatch
from rlbroker.weights.module_state import OldState
from rlbroker.weights.target_memory import (
    describe_shared,
    find_shared,
    has_same_bits,
    is_tensor,
    name_some,
    normal_tensors,
    why_unwritable,
)

#: The methods with which a class of modules takes part in saving and loading, and the hooks of a module.
_METHODS = (
    "load_state_dict",
    "_load_from_state_dict",
    "state_dict",
    "_save_to_state_dict",
    "get_extra_state",
    "set_extra_state",
)
_HOOKS = (
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)

#: An entry of a module's metadata that makes `load_state_dict` keep the tensors that it is given.
_ASSIGN = "assign_to_params_buffers"


class ModuleWrite:
    """A load into a module.

    If the module consists of torch's own modules and the weights have the same keys and shapes, the tensors are copied
    here. Otherwise `load_state_dict` decides what it takes. It runs code of the model then, which may fail, or keep
    what it is given: it gets copies, and the old state is saved.
    """

    def __init__(
        self, weights: Mapping[str, Any], module: torch.nn.Module, metadata: Mapping[str, Any] | None
    ) -> None:
        """Check what can be checked before `load_state_dict`; nothing is written yet.

        Args:
            metadata: `_metadata` of the state dict that was sent; None if it had none.

        Raises:
            WeightsMismatch: tensors of the module cannot be written to; the message names the keys.
        """
        self._weights, self._module, self._metadata = weights, module, metadata
        self._own: dict[str, Any] = module.state_dict()
        _check_writable(module, self._own)
        #: Why the weights do not have the keys and shapes of the module.
        self._difference = _find_difference(weights, self._own)
        self._is_copied = not self._difference and _is_plain(module)
        self._shared = find_shared(self._own, weights) if self._is_copied else []
        self._old = None if self._is_copied and not self._shared else OldState(module)

    def run(self) -> str:
        """Write everything; return what is wrong with the result, if anything."""
        if not self._is_copied:
            return self._load_state_dict()
        own, weights = self._own, self._weights
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(weights[key])
        lost = not all(has_same_bits(own[key], weights[key]) for key in self._shared)
        return describe_shared(self._shared) if lost else ""

    def undo(self) -> None:
        """Put the old state back, where it was saved."""
        if self._old:
            self._old.put_back()

    def explain(self, error: Exception) -> str:
        """Return why `load_state_dict` failed."""
        if self._difference and isinstance(error, RuntimeError):  # torch's own, of many lines
            return self._difference
        return f"{type(error).__name__}: {error}"

    def _load_state_dict(self) -> str:
        with normal_tensors():
            state = OrderedDict(copy.deepcopy(dict(self._weights)))
        if self._metadata is not None:
            state._metadata = OrderedDict(  # type: ignore[attr-defined] # as torch does
                (prefix, {name: copy.deepcopy(value) for name, value in values.items() if name != _ASSIGN})
                for prefix, values in self._metadata.items()
            )
        self._module.load_state_dict(state)
        tensors = self._module.state_dict().items()
        unloaded = [
            key for key, value in tensors if is_tensor(value) and not is_lazy(value) and value.is_meta
        ]
        return f"{name_some(unloaded)} stayed on the meta device" if unloaded else ""


def _check_writable(module: torch.nn.Module, own: Mapping[str, Any]) -> None:
    """Raise WeightsMismatch if tensors of a module cannot be written to."""
    assigns = type(module).load_state_dict is not torch.nn.Module.load_state_dict  # may replace meta tensors
    problems = [
        f"{key} {problem}"
        for key, value in own.items()
        if is_tensor(value)
        and not is_lazy(value)
        and not (assigns and value.is_meta)
        and (problem := why_unwritable(value))
    ]
    if problems:
        raise WeightsMismatch(f"the weights cannot be loaded into the model: {name_some(problems)}")


def _find_difference(weights: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Return how keys and shapes differ from those of a module; empty if its tensors can be copied one by one."""
    problems = []
    if missing := [key for key in own if key not in weights]:
        problems.append(f"not in the weights: {name_some(missing)}")
    if unknown := [str(key) for key in weights if key not in own]:
        problems.append(f"not in the model: {name_some(unknown)}")
    different = [
        f"{key} is {_describe(weights[key])} in the weights and {_describe(value)} in the model"
        for key, value in own.items()
        if key in weights and is_tensor(value) and not _is_like(weights[key], value)
    ]
    if different:
        problems.append(name_some(different))
    return "; ".join(problems)


def _is_like(new: Any, old: Any) -> bool:
    """Return whether a tensor can be copied to an old one."""
    return (
        type(new) is torch.Tensor
        and type(old) is torch.Tensor
        and new.shape == old.shape
        and (new.dtype is old.dtype or _can_cast(new.dtype, old.dtype))
    )


@cache
def _can_cast(new: torch.dtype, old: torch.dtype) -> bool:
    try:
        torch.empty(1, dtype=new).to(old)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _describe(value: Any) -> str:
    if not is_tensor(value):
        return type(value).__name__
    return "not initialised" if is_lazy(value) else f"{tuple(value.shape)} ({value.dtype})"


def _is_plain(module: torch.nn.Module) -> bool:
    """Return whether no code but torch's own takes part in saving and loading a module."""
    if "load_state_dict" in module.__dict__:
        return False
    for one in module.modules():
        kind: Any = type(one)
        if not _is_plain_class(kind) or any(map(one.__dict__.get, _HOOKS)):
            return False
    return True


@lru_cache(maxsize=1000)  # bounded, as parametrizations make a class for each module
def _is_plain_class(kind: Any) -> bool:
    return not issubclass(kind, torch.jit.ScriptModule) and all(
        getattr(kind, name).__module__.startswith("torch.nn.modules.") for name in _METHODS
    )
