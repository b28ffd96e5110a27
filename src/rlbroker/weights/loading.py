"""Copies received weights into what the user trains or plays with: a torch module, or a dictionary."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from rlbroker.errors import UnsupportedType, WeightsMismatch

if TYPE_CHECKING:
    import torch

#: What torch calls the extra state of a module.
_EXTRA_STATE = "_extra_state"

#: How many keys an error names before it only counts them.
_KEYS_NAMED = 5


def load(weights: Any, target: Any) -> None:
    """Copy weights into a target; nothing is changed unless all of them fit. The target keeps its dtypes.

    Args:
        weights: what was received; it stays as it is, and is not kept.
        target: a `torch.nn.Module`, or a dictionary. An empty dictionary is filled; in one that is not, tensors
            and arrays are overwritten in place and other values replaced.

    Raises:
        WeightsMismatch: keys are missing or too many, or shapes or kinds differ; they are named.
        UnsupportedType: the target is neither.
    """
    check_target(target)
    if not isinstance(target, MutableMapping):
        _load_module(weights, target)
    elif target:
        _check(weights, target)
        _overwrite(weights, target)
    elif isinstance(weights, Mapping):
        target.update(copy.deepcopy(weights))  # their own memory is shared
    else:
        raise WeightsMismatch(f"the weights are a {type(weights).__name__}, not a dictionary")


def check_target(target: Any) -> None:
    """Refuse what weights cannot be loaded into.

    Raises:
        UnsupportedType: it is neither a module nor a dictionary.
    """
    torch = sys.modules.get("torch")
    if not isinstance(target, MutableMapping) and not (torch and isinstance(target, torch.nn.Module)):
        raise UnsupportedType(
            f"weights are loaded into a torch.nn.Module or a dictionary, not a {type(target).__name__}"
        )


def _load_module(weights: Any, module: torch.nn.Module) -> None:
    own = module.state_dict()
    _check(weights, own)
    # All else is copied by torch; a module's extra state it may keep as it is.
    module.load_state_dict(
        {key: copy.deepcopy(value) if key.endswith(_EXTRA_STATE) else value for key, value in weights.items()}
    )


def _overwrite(weights: Mapping[str, Any], target: MutableMapping[str, Any]) -> None:
    for key, value in weights.items():
        if isinstance(value, Mapping):
            _overwrite(value, target[key])
        elif hasattr(value, "shape") and hasattr(target[key], "shape"):
            torch = sys.modules.get("torch")
            if torch is not None and isinstance(target[key], torch.Tensor):
                with torch.no_grad():
                    target[key].copy_(value)
            else:
                target[key][...] = value
        else:
            target[key] = copy.deepcopy(value)  # it may hold tensors in memory that is not theirs for long


def _check(weights: Any, target: Mapping[str, Any]) -> None:
    if not isinstance(weights, Mapping):
        raise WeightsMismatch(f"the weights are a {type(weights).__name__}, not a dictionary")
    theirs, ours = _shapes(weights), _shapes(target)
    problems = []
    if missing := [key for key in ours if key not in theirs]:
        problems.append(f"not in the weights: {_some(missing)}")
    if unknown := [key for key in theirs if key not in ours]:
        problems.append(f"not in the model: {_some(unknown)}")
    different = [
        f"{key} is {theirs[key]} in the weights and {ours[key]} in the model"
        for key in ours
        if key in theirs and theirs[key] != ours[key]
    ]
    if different:
        problems.append(_some(different))
    if problems:
        raise WeightsMismatch("the received weights do not fit the model; " + "; ".join(problems))


def _shapes(tree: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """Give the shape of each tensor and array by its path, and the kind of everything else."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _shapes(value, f"{path}{key}.")
        else:
            shape = getattr(value, "shape", None)
            found[f"{path}{key}"] = type(value).__name__ if shape is None else str(tuple(shape))
    return found


def _some(names: list[str]) -> str:
    rest = len(names) - _KEYS_NAMED
    return ", ".join(names[:_KEYS_NAMED]) + (f" and {rest} more" if rest > 0 else "")
