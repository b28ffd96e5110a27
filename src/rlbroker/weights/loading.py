"""Copies received weights into a torch module or a dictionary."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from rlbroker.errors import UnsupportedType, WeightsMismatch

if TYPE_CHECKING:
    import torch

#: The name that torch gives to the extra state of a module.
_EXTRA_STATE = "_extra_state"

#: An error names this many keys and counts the others.
_KEYS_NAMED = 5


def load(weights: Any, target: Any) -> None:
    """Copy weights into a target, which keeps its dtypes. Nothing is changed unless all of them fit.

    Args:
        weights: the received weights; they are neither changed nor kept.
        target: a `torch.nn.Module` or a dictionary. An empty dictionary is filled; in any other, tensors and arrays
            are overwritten in place and other values are replaced.

    Raises:
        WeightsMismatch: keys are missing or unknown, or shapes or kinds differ; the message names them.
        UnsupportedType: the target is neither a module nor a dictionary.
    """
    check_target(target)
    if not isinstance(target, MutableMapping):
        _load_module(weights, target)
    elif target:
        _check_fits(weights, target)
        _overwrite(weights, target)
    elif isinstance(weights, Mapping):
        target.update(copy.deepcopy(weights))  # the received weights are in memory that other processes share
    else:
        raise WeightsMismatch(f"the weights are a {type(weights).__name__}, not a dictionary")


def check_target(target: Any) -> None:
    """Raise `UnsupportedType` unless the target is a module or a dictionary."""
    torch = sys.modules.get("torch")
    if not isinstance(target, MutableMapping) and not (torch and isinstance(target, torch.nn.Module)):
        raise UnsupportedType(
            f"weights are loaded into a torch.nn.Module or a dictionary, not a {type(target).__name__}"
        )


def _load_module(weights: Any, module: torch.nn.Module) -> None:
    own = module.state_dict()
    _check_fits(weights, own)
    # torch copies everything else; a module may keep its extra state as it is.
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
            target[key] = copy.deepcopy(value)  # it may hold tensors whose memory will be reused


def _check_fits(weights: Any, target: Mapping[str, Any]) -> None:
    if not isinstance(weights, Mapping):
        raise WeightsMismatch(f"the weights are a {type(weights).__name__}, not a dictionary")
    received, expected = _shapes(weights), _shapes(target)
    problems = []
    if missing := [key for key in expected if key not in received]:
        problems.append(f"not in the weights: {_name_some(missing)}")
    if unknown := [key for key in received if key not in expected]:
        problems.append(f"not in the model: {_name_some(unknown)}")
    different = [
        f"{key} is {received[key]} in the weights and {expected[key]} in the model"
        for key in expected
        if key in received and received[key] != expected[key]
    ]
    if different:
        problems.append(_name_some(different))
    if problems:
        raise WeightsMismatch("the received weights do not fit the model: " + "; ".join(problems))


def _shapes(tree: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """Return, by path, the shape of each tensor and array and the type of every other value."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _shapes(value, f"{path}{key}.")
        else:
            shape = getattr(value, "shape", None)
            found[f"{path}{key}"] = type(value).__name__ if shape is None else str(tuple(shape))
    return found


def _name_some(names: list[str]) -> str:
    rest = len(names) - _KEYS_NAMED
    return ", ".join(names[:_KEYS_NAMED]) + (f" and {rest} more" if rest > 0 else "")
