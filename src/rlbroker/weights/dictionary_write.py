"""Writes weights into a dictionary: tensors and arrays in place, other values by replacing them."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from typing import Any

import numpy as np

from rlbroker.codec.dtypes import ML_DTYPES, TORCH_DTYPES
from rlbroker.codec.limits import DEFAULT_LIMITS
from rlbroker.errors import WeightsMismatch
from rlbroker.weights.target_memory import (
    Path,
    describe_shared,
    dotted,
    duplicate,
    find_shared,
    has_same_bits,
    is_array,
    is_plain,
    is_tensor,
    name_some,
    no_grad,
    normal_tensors,
    overwrite,
    restore,
    why_unwritable,
)

#: Dictionaries that replace the value of a key without calling Python code, so that it cannot fail.
_PLAIN_DICTIONARIES = (dict, OrderedDict, defaultdict)

#: Kinds of elements by numpy's letters, in the order in which each can hold the ones before.
_KINDS = {"b": 0, "u": 1, "i": 1, "f": 2, "c": 3}

#: The floats of ml_dtypes. float8_e8m0fnu has neither signs nor zero, so that nothing is rounded to it.
_ML_FLOATS = ML_DTYPES.keys() - {"float8_e8m0fnu"}


class DictionaryFill:
    """The first load into an empty dictionary, which gets copies of all weights."""

    def __init__(self, weights: Mapping[Any, Any], target: MutableMapping[Any, Any]) -> None:
        """Copy the weights, whose memory other processes share. Nothing is written yet."""
        self._target, self._old = target, _OldDictionary(target)
        with normal_tensors():
            self._values = copy.deepcopy(weights)

    def run(self) -> str:
        """Fill the dictionary; return an empty text, as there is no problem."""
        self._target.update(self._values)
        return ""

    def undo(self) -> None:
        """Empty the dictionary."""
        self._old.put_back()

    def explain(self, error: Exception) -> str:
        """Return what an error of the dictionary means."""
        return f"{type(error).__name__}: {error}"


class DictionaryWrite:
    """A load into a dictionary that has values.

    Floats are rounded to the target's dtype. Integers and texts must fit into it. A cast to another kind of elements
    that would lose values, such as from floats to integers, is refused.
    """

    def __init__(self, weights: Mapping[Any, Any], target: MutableMapping[Any, Any]) -> None:
        """Check everything that can fail; nothing is written yet.

        Raises:
            WeightsMismatch: the weights do not fit; the message names the keys.
        """
        received, expected = _Leaves(weights), _Leaves(target)
        #: The tensors and arrays to overwrite, with their new elements, and the other values to replace.
        self._places: dict[Path, Any] = {}
        self._elements: dict[Path, Any] = {}
        self._values: dict[Path, Any] = {}
        self._parents = expected.parents
        problems = []
        if missing := [dotted(path) for path in expected.values if path not in received.values]:
            problems.append(f"not in the weights: {name_some(missing)}")
        if unknown := [dotted(path) for path in received.values if path not in expected.values]:
            problems.append(f"not in the model: {name_some(unknown)}")
        different = [
            f"{dotted(path)} {problem}"
            for path, old in expected.values.items()
            if path in received.values and (problem := self._add(path, received.values[path], old))
        ]
        if different:
            problems.append(name_some(different))
        if problems:
            raise WeightsMismatch("the received weights do not fit the model: " + "; ".join(problems))
        self._shared = find_shared(self._places, received.values)
        #: Only what was not checked can fail: keys that share memory, and code of other types.
        can_fail = (
            self._shared
            or not all(type(one) in _PLAIN_DICTIONARIES for one in self._parents.values())
            or not all(map(is_plain, self._places.values()))
        )
        parents = {id(one): one for one in self._parents.values() if isinstance(one, MutableMapping)}
        self._old = [_OldDictionary(one) for one in parents.values()] if can_fail else []
        self._old_elements = {path: duplicate(place) for path, place in self._places.items() if can_fail}

    def run(self) -> str:
        """Write everything; return what is wrong with the result, if anything."""
        with no_grad():
            for path, place in self._places.items():
                overwrite(place, self._elements[path])
        for path, value in self._values.items():
            self._parents[path][path[-1]] = value
        lost = not all(has_same_bits(self._places[path], self._elements[path]) for path in self._shared)
        return describe_shared(list(map(dotted, self._shared))) if lost else ""

    def undo(self) -> None:
        """Put the old values back, where they were saved."""
        with no_grad():
            for path, old in self._old_elements.items():
                restore(self._places[path], old)
        for dictionary in self._old:
            dictionary.put_back()

    def explain(self, error: Exception) -> str:
        """Return what an error of the dictionary means."""
        return f"{type(error).__name__}: {error}"

    def _add(self, path: Path, new: Any, old: Any) -> str:
        """Plan the write of one value; return why that is impossible, or an empty text."""
        if not (is_tensor(old) or is_array(old)):
            if hasattr(old, "shape") and not isinstance(old, np.generic):
                advice = "give a numpy array, or an empty dictionary"
                return f"is {type(old).__name__} in the model, which cannot be overwritten; {advice}"
            if is_tensor(new) or is_array(new):
                return _describe_difference(new, old)
            if not isinstance(self._parents[path], MutableMapping):
                return f"is in a {type(self._parents[path]).__name__}, which cannot be changed"
            with normal_tensors():
                self._values[path] = copy.deepcopy(new)  # it may hold tensors whose memory will be reused
            return ""
        if not hasattr(new, "shape") or new.shape != old.shape:
            return _describe_difference(new, old)
        problem = why_unwritable(old)
        if problem:
            return problem
        try:
            elements = _as_tensor(new) if is_tensor(old) else _as_array(new)
            with np.errstate(all="ignore"):  # a caller who makes numpy raise would stop the write half-way
                problem = _why_lossy(elements, old)
                if not problem and elements.dtype != old.dtype:
                    elements = elements.to(old.dtype) if is_tensor(old) else elements.astype(old.dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            problem = f"cannot become {old.dtype}: {error}"
        self._places[path], self._elements[path] = old, None if problem else elements
        return problem


class _OldDictionary:
    """The entries and attributes of a dictionary, whose own methods may fail."""

    def __init__(self, dictionary: MutableMapping[Any, Any]) -> None:
        #: The methods to use: those of a subclass of dict may refuse even the values that it has.
        self._base: Any = type(dictionary)
        if isinstance(dictionary, dict):
            self._base = OrderedDict if isinstance(dictionary, OrderedDict) else dict
        self._dictionary = dictionary
        self._entries = dict(self._base.items(dictionary))
        self._attributes = dict(getattr(dictionary, "__dict__", {}))

    def put_back(self) -> None:
        """Restore every entry and attribute that was changed."""
        base, dictionary = self._base, self._dictionary
        if hasattr(dictionary, "__dict__"):
            dictionary.__dict__.clear()
            dictionary.__dict__.update(self._attributes)
        for key, old in self._entries.items():
            with suppress(Exception):
                if not base.__contains__(dictionary, key) or base.__getitem__(dictionary, key) is not old:
                    base.__setitem__(dictionary, key, old)
        with suppress(Exception):
            for key in list(base.__iter__(dictionary)):
                if key not in self._entries:
                    base.__delitem__(dictionary, key)


class _Leaves:
    """The values of a nested dictionary that are not dictionaries, by path, and the dictionary that each is in."""

    def __init__(self, tree: Mapping[Any, Any]) -> None:
        self.values: dict[Path, Any] = {}
        self.parents: dict[Path, Any] = {}
        self._visit(tree, ())

    def _visit(self, tree: Mapping[Any, Any], path: Path) -> None:
        if len(path) > DEFAULT_LIMITS.max_depth:
            raise WeightsMismatch(f"dictionaries are nested deeper than {DEFAULT_LIMITS.max_depth} levels")
        for key, value in tree.items():
            here = (*path, key)
            if isinstance(value, Mapping):
                self._visit(value, here)
            else:
                self.values[here], self.parents[here] = value, tree


def _describe_difference(new: Any, old: Any) -> str:
    def name(value: Any) -> str:
        shape = None if isinstance(value, np.generic) else getattr(value, "shape", None)
        return type(value).__name__ if shape is None else str(tuple(shape))

    names = name(new), name(old)
    if names[0] == names[1]:
        names = type(new).__name__, type(old).__name__
    return f"is {names[0]} in the weights and {names[1]} in the model"


def _as_tensor(new: Any) -> Any:
    """Return new elements as a tensor."""
    import torch

    if not is_tensor(new):
        array = np.asarray(new)
        if array.dtype.name in ML_DTYPES:
            return _as_torch_floats(torch, array)
        new = torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
    return new


def _as_torch_floats(torch: Any, array: Any) -> Any:
    """Return an array of a dtype of ml_dtypes as a tensor of the same dtype, or of float32 where torch lacks it."""
    name = array.dtype.name
    if name not in TORCH_DTYPES or not hasattr(torch, name):
        return torch.from_numpy(array.astype(np.float32))
    return torch.from_numpy(np.array(array.view(TORCH_DTYPES[name].carrier), order="C")).view(
        getattr(torch, name)
    )


def _as_array(new: Any) -> Any:
    """Return new elements as an array."""
    if not is_tensor(new):
        return np.asarray(new)
    new = new.detach().cpu().resolve_conj().resolve_neg()
    try:
        return new.numpy()
    except TypeError:  # bfloat16 and the like: float32 has all their values
        return new.float().numpy()


def _why_lossy(elements: Any, old: Any) -> str:
    """Return why a cast to the old dtype would lose values, or an empty text."""
    if elements.dtype == old.dtype:
        return ""
    new_kind, old_kind = _kind(elements.dtype), _kind(old.dtype)
    if new_kind is None or old_kind is None:
        if is_array(old) and not _is_same_text(elements, old):
            return f"is {elements.dtype} in the weights and {old.dtype} in the model"
        return ""
    if new_kind > old_kind:
        return f"is {elements.dtype} in the weights and {old.dtype} in the model, which would lose values"
    if new_kind == 1 and not (_fit if old_kind == 1 else _are_exact)(elements, old):
        return f"has values of {elements.dtype} that do not fit into {old.dtype}"
    return ""


def _kind(dtype: Any) -> int | None:
    """Return the kind of the elements of a torch or numpy dtype; None if it is neither."""
    if isinstance(dtype, np.dtype):
        return 2 if dtype.name in _ML_FLOATS else _KINDS.get(dtype.kind)
    if dtype.is_complex:
        return 3
    if dtype.is_floating_point:
        return 2
    name = str(dtype).removeprefix("torch.")
    return 0 if name == "bool" else 1 if name.lstrip("u").startswith("int") else None


def _fit(elements: Any, old: Any) -> bool:
    """Return whether integers fit into the dtype of the old ones."""
    if is_tensor(elements):
        bounds = sys.modules["torch"].iinfo(old.dtype)
        elements = elements.cpu().numpy()
    else:
        bounds = np.iinfo(old.dtype)
    return not elements.size or (int(elements.min()) >= bounds.min and int(elements.max()) <= bounds.max)


def _are_exact(elements: Any, old: Any) -> bool:
    """Return whether the floats of an old dtype have the values of integers."""
    if is_tensor(elements):
        cast = elements.to(old.dtype)
        elements = elements.cpu().numpy()
        floats = (cast.real if cast.is_complex() else cast).double().cpu().numpy()
    else:
        floats = elements.astype(old.dtype).real
    # The largest integers are rounded up to a power of two, which cannot be cast back.
    fit = np.isfinite(floats) & (floats < 2.0 ** np.iinfo(elements.dtype).bits)
    if elements.dtype.kind == "i":
        fit &= floats < 2.0 ** (np.iinfo(elements.dtype).bits - 1)
    return bool(fit.all() and (floats.astype(elements.dtype) == elements).all())


def _is_same_text(elements: Any, old: Any) -> bool:
    """Return whether texts, bytes, times and records keep their values in the dtype of the old ones."""
    if elements.dtype.kind != old.dtype.kind:
        return False
    if np.can_cast(elements.dtype, old.dtype, "safe"):
        return True
    cast = elements.astype(old.dtype)
    return old.dtype.kind in "SUmM" and bool((cast.astype(elements.dtype) == elements).all())
