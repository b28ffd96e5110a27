"""Loading changes all of a target or nothing: what can fail is checked before the first write, the rest is undone."""

from __future__ import annotations

import copy
import itertools
import signal
import types
import warnings
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from interrupts import Alarm, interrupt_at
from torch import nn

from rlbroker.errors import WeightsMismatch
from rlbroker.weights.loading import Load, load

pytestmark = pytest.mark.unit


def weights_of(module: nn.Module) -> tuple[dict[str, Any], Any]:
    """Return the weights of a module as a worker receives them, and their metadata."""
    state = module.state_dict()
    return {key: copy.deepcopy(value) for key, value in state.items()}, state._metadata  # type: ignore[attr-defined]


def read_only(values: Any) -> Any:
    array = np.array(values)
    array.flags.writeable = False
    return array


def view_of_read_only() -> Any:
    base = np.zeros(3)
    view = base[:]
    base.flags.writeable = False
    return view


def freed() -> torch.Tensor:
    tensor = torch.zeros(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(3)


ONES = np.ones(3)

REFUSED: dict[str, tuple[Any, Any, str]] = {
    "a read-only array": (ONES, read_only([0.0, 0, 0]), "z is a read-only array"),
    "a view of a read-only array": (ONES, view_of_read_only(), "z is a read-only array"),
    "memory of bytes": (ONES, np.frombuffer(bytes(24)), "z is a read-only array"),
    "a broadcast array": (ONES, np.broadcast_to(np.zeros(1), 3), "z is a read-only array"),
    "a writable array that overlaps itself": (
        ONES,
        np.lib.stride_tricks.as_strided(np.zeros(3), (3,), (4,)),
        "z overlaps itself",
    ),
    "floats into integers": (ONES, np.zeros(3, int), "z is float64 in the weights and int64 in the model"),
    "floats into an integer tensor": (torch.ones(3), torch.zeros(3, dtype=torch.int32), "z is torch.float32"),
    "complex into floats": (torch.ones(3, dtype=torch.complex64), torch.zeros(3), "which would lose values"),
    "integers into bools": (np.arange(3), np.zeros(3, bool), "which would lose values"),
    "integers that do not fit": (np.array([1, 2, 300]), np.zeros(3, np.uint8), "do not fit into uint8"),
    "negative integers": (torch.tensor([1, -2, 3]), torch.zeros(3, dtype=torch.uint8), "do not fit into"),
    "integers that no float32 has": (
        np.array([1, 2, 2**24 + 1]),
        np.zeros(3, "f4"),
        "do not fit into float32",
    ),
    "the largest integer into floats": (np.array([0, 0, 2**63 - 1]), np.zeros(3), "do not fit into float64"),
    "the largest unsigned integer": (
        np.array([0, 0, 2**64 - 1], "u8"),
        np.zeros(3),
        "do not fit into float64",
    ),
    "integers beyond float16": (np.array([0, 0, 70000]), np.zeros(3, "f2"), "do not fit into float16"),
    "integers into complex numbers": (np.array([0, 0, 2**24 + 1]), np.zeros(3, "c8"), "do not fit into"),
    "integers that no bfloat16 has": (
        torch.tensor([1, 2, 257]),
        torch.zeros(3, dtype=torch.bfloat16),
        "do not fit into torch.bfloat16",
    ),
    "integers into a float tensor": (torch.tensor([0, 0, 2**24 + 1]), torch.zeros(3), "do not fit into"),
    "numbers into bytes": (np.arange(3), np.zeros(3, "S5"), "z is int64 in the weights"),
    "numbers into texts": (np.arange(3), np.zeros(3, "U5"), "z is int64 in the weights"),
    "numbers into objects": (np.arange(3), np.zeros(3, object), "z is int64 in the weights"),
    "texts into numbers": (np.array(["1", "2", "3"]), np.zeros(3), "in the weights"),
    "texts that are too long": (np.array(["a", "b", "longer"]), np.zeros(3, "U3"), "z is <U6"),
    "times into coarser times": (
        np.array([0, 0, 1], "m8[ms]"),
        np.zeros(3, "m8[s]"),
        "z is timedelta64",
    ),
    "a masked array": (
        ONES,
        np.ma.masked_array(np.zeros(3), mask=[True, False, False]),
        "z is a masked array",
    ),
    "an expanded tensor": (torch.ones(3), torch.zeros(1).expand(3), "z overlaps itself"),
    "a tensor that overlaps itself": (
        torch.ones(2, 2),
        torch.zeros(3).as_strided((2, 2), (1, 1)),
        "z overlaps itself",
    ),
    "a meta tensor": (torch.ones(3), torch.zeros(3, device="meta"), "z is on the meta device"),
    "an inference tensor": (torch.ones(3), inference(), "z was made in torch.inference_mode"),
    "a freed tensor": (torch.ones(3), freed(), "z has lost its memory"),
    "a sparse tensor": (torch.ones(3), torch.zeros(3).to_sparse(), "z is not a dense tensor"),
    "a list in place of a tensor": ([1, 2, 3], torch.zeros(3), r"z is list in the weights and \(3,\)"),
    "a tensor in place of a number": (torch.tensor(1), 1, r"z is \(\) in the weights and int in the model"),
    "an array in place of a numpy scalar": (np.array(1.0), np.float64(1), "z is"),
    "a number in place of a tensor": (1.0, torch.tensor(1.0), r"z is float in the weights and \(\)"),
    "an array that no tensor can hold": (np.ones(3, np.longdouble), torch.zeros(3), "z cannot become"),
    "an object that only looks like an array": (ONES, types.SimpleNamespace(shape=(3,)), "z is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_dictionary_that_cannot_take_all_is_unchanged(case: str) -> None:
    new, old, named = REFUSED[case]
    first, second = torch.zeros(2), np.zeros(2)
    target: dict[str, Any]
    target = {"a": first, "b": {"c": second, "step": 0}, "z": old}
    with pytest.raises(WeightsMismatch, match=named):
        load({"a": torch.ones(2), "b": {"c": np.ones(2), "step": 1}, "z": new}, target)
    assert [first.tolist(), second.tolist(), target["b"]["step"]] == [[0, 0], [0, 0], 0]
    assert [target["a"], target["b"]["c"], target["z"]] == [first, second, old] or target["z"] is old


TAKEN: dict[str, tuple[Any, Any]] = {
    "a numpy scalar, again": (np.float64(0.5), np.float64(0.25)),
    "a numpy scalar for a number": (np.float32(0.5), 1),
    "a numpy scalar for an array without dimensions": (np.float64(0.5), np.zeros(())),
    "a numpy scalar for a tensor without dimensions": (np.float64(0.5), torch.zeros(())),
    "a number for None": (3, None),
    "a list for a text": ([1, "a"], "text"),
    "float64 into float32": (np.array([0.1, 0.2]), np.zeros(2, np.float32)),
    "float32 into bfloat16": (torch.tensor([1.0, 2]), torch.zeros(2, dtype=torch.bfloat16)),
    "an array into a bfloat16 tensor": (np.array([1.0, 2]), torch.zeros(2, dtype=torch.bfloat16)),
    "a bfloat16 tensor into an array": (torch.tensor([1.0, 2], dtype=torch.bfloat16), np.zeros(2)),
    "a big-endian array into a tensor": (np.array([1.0, 2], ">f4"), torch.zeros(2)),
    "a read-only array into a tensor": (read_only([1.0, 2]), torch.zeros(2)),
    "integers that fit": (np.array([1, 255]), np.zeros(2, np.uint8)),
    "integers into floats": (torch.tensor([1, 2]), torch.zeros(2)),
    "large integers that floats have": (np.array([-(2**63), 2**62]), np.zeros(2, np.float32)),
    "texts into longer texts": (np.array(["a", "bcd"]), np.zeros(2, "U5")),
    "short texts of a long dtype": (np.array(["a", "b"], "U9"), np.zeros(2, "U5")),
    "bools into floats": (np.array([True, False]), np.zeros(2, np.float32)),
    "bools into integers": (np.array([True, False]), np.zeros(2, int)),
    "a leaf that requires a gradient": (torch.ones(2), nn.Parameter(torch.zeros(2))),
    "a view that steps": (torch.ones(2), torch.zeros(4)[::2]),
    "an array that goes backwards": (np.arange(3.0), np.zeros(3)[::-1]),
    "a transposed tensor": (torch.ones(2, 3), torch.zeros(3, 2).T),
    "without elements": (torch.ones(0, 3), torch.zeros(0, 3)),
    "a conjugate view": (torch.tensor([1 + 2j]), torch.zeros(1, dtype=torch.complex64).conj()),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_dictionary_takes_what_fits(case: str) -> None:
    new, old = TAKEN[case]
    target, kept = {"a": {"b": old}}, hasattr(old, "shape") and not isinstance(old, np.generic)
    load({"a": {"b": new}}, target)
    found = target["a"]["b"]
    assert not kept or found is old
    if isinstance(old, torch.Tensor):
        expected = torch.as_tensor(np.array(new, np.float64)) if not isinstance(new, torch.Tensor) else new
        assert torch.equal(found.detach(), expected.to(old.dtype))
    elif kept:
        numbers = new.float().numpy() if isinstance(new, torch.Tensor) else new
        assert np.array_equal(found, np.asarray(numbers).astype(old.dtype))
    else:
        assert (type(found), found) == (type(new), new)


def test_dots_in_keys_are_not_levels() -> None:
    target = {"a": {"b": np.zeros(1)}, "c": np.zeros(1)}
    with pytest.raises(WeightsMismatch, match=r"not in the weights: a\.b; not in the model: a\.b"):
        load({"c": np.ones(1), "a.b": np.ones(1)}, target)
    assert target["c"] == [0]


def test_a_dictionary_that_contains_itself_is_refused() -> None:
    target: dict[str, Any] = {"w": np.zeros(1)}
    target["self"] = target
    with pytest.raises(WeightsMismatch, match="nested deeper than 64"):
        load({"w": np.ones(1)}, target)


def test_a_dictionary_filled_in_inference_mode_can_be_loaded_again() -> None:
    target: dict[str, Any] = {}
    with torch.inference_mode():
        load({"w": torch.ones(3)}, target)
    load({"w": torch.zeros(3)}, target)
    assert target["w"].sum() == 0


def test_inference_tensors_can_be_loaded_in_inference_mode() -> None:
    target = {"w": inference()}
    with torch.inference_mode():
        load({"w": torch.ones(3)}, target)
    assert target["w"].sum() == 3


# Memory that several keys share


def test_tied_keys_take_tied_weights() -> None:
    shared, new = torch.zeros(3), torch.ones(3)
    load({"a": new, "b": new}, {"a": shared, "b": shared})
    assert shared.sum() == 3


def test_tied_keys_take_equal_weights() -> None:
    shared = torch.zeros(3)
    load({"a": torch.ones(3), "b": torch.ones(3)}, {"a": shared, "b": shared})
    assert shared.sum() == 3


@pytest.mark.parametrize("kind", ["tensor", "array", "both"])
def test_keys_that_share_memory_do_not_lose_their_values(kind: str) -> None:
    array = np.zeros(4)
    tensor = torch.from_numpy(array)
    first = array[:3] if kind == "array" else tensor[:3]
    second = array[1:] if kind != "tensor" else tensor[1:]
    target = {"a": first, "b": second, "c": np.zeros(1)}
    with pytest.raises(WeightsMismatch, match="a, b share memory in the model"):
        load({"a": np.arange(3.0), "b": np.arange(3.0), "c": np.ones(1)}, target)
    assert array.tolist() == [0, 0, 0, 0]
    assert target["c"] == [0]
    load({"a": np.arange(3.0), "b": np.arange(1.0, 4), "c": np.ones(1)}, target)
    assert array.tolist() == [0, 1, 2, 3]


def test_columns_of_one_array_do_not_share_memory() -> None:
    columns = np.zeros((3, 2))
    load({"a": np.ones(3), "b": np.full(3, 2.0)}, {"a": columns[:, 0], "b": columns[:, 1]})
    assert columns.tolist() == [[1, 2]] * 3


def test_a_module_whose_tied_parameters_got_other_weights_is_unchanged() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    weights, metadata = weights_of(module)
    module["a"].weight = module["b"].weight
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(WeightsMismatch, match=r"a\.weight, b\.weight share memory"):
        load(weights, module, metadata)
    assert same(module.state_dict(), before)


# Modules


def same(one: Any, other: Any) -> bool:
    pairs = zip(one.items(), other.items(), strict=True)
    return all(
        left == right and (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)
        for (left, a), (right, b) in pairs
    )


class Migrating(nn.Linear):
    """Version 2 stores twice the weight of version 1."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *others: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] *= 2
        super()._load_from_state_dict(state, prefix, metadata, *others)


def test_version_migration_gets_the_metadata() -> None:
    sent: Any = nn.Sequential(Migrating(2, 2))
    target: Any = nn.Sequential(Migrating(2, 2))
    weights, metadata = weights_of(sent)
    load(weights, target, metadata)
    assert same(target.state_dict(), sent.state_dict())
    load(weights, target, {"0": {"version": 1}})
    assert torch.equal(target[0].weight, sent[0].weight * 2)
    assert torch.equal(weights["0.weight"], sent[0].weight)  # the received weights belong to all workers


def test_metadata_cannot_make_a_module_keep_the_received_memory() -> None:
    module = nn.BatchNorm1d(2)
    weights, metadata = weights_of(module)
    before = module.running_mean
    del weights["num_batches_tracked"]  # what an old release sent
    load(weights, module, {"": {**metadata[""], "version": 1, "assign_to_params_buffers": True}})
    assert module.running_mean is before


class WithExtra(nn.Module):
    def __init__(self, extra: Any = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        if state == "refused":
            raise ValueError("no such state")
        self.extra = state


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (None, {"a": 1}),
        ({"a": 1}, None),
        ([], [torch.ones(2)] * 3),
        (1, "text"),
        (torch.ones(2), torch.ones(5)),
    ],
)
def test_extra_state_may_change(old: Any, new: Any) -> None:
    module = WithExtra(old)
    load({"w": torch.ones(2), "_extra_state": new}, module)
    assert module.extra is not new or new is None or isinstance(new, str)
    assert repr(module.extra) == repr(new)
    assert module.w.sum() == 2


def test_extra_state_that_is_refused_changes_nothing() -> None:
    module: Any = nn.ModuleList([WithExtra({"a": 1}), WithExtra({"b": [1]})])
    extra, w = module[0].extra, module[0].w
    weights = {key: torch.ones(2) if key.endswith("w") else "refused" for key in module.state_dict()}
    weights["0._extra_state"] = "taken"
    with pytest.raises(WeightsMismatch, match="ValueError: no such state"):
        load(weights, module)
    assert (module[0].extra, module[1].extra) == ({"a": 1}, {"b": [1]})
    assert module[0].extra is extra
    assert module[0].w is w
    assert w.sum() == 0


def test_an_old_state_dict_is_taken_as_torch_takes_it() -> None:
    module = nn.BatchNorm1d(2)
    weights, _ = weights_of(nn.BatchNorm1d(2))
    del weights["num_batches_tracked"]
    weights["weight"] += 1
    load(weights, module)
    assert module.weight.sum() == 4
    scalar = nn.ParameterDict({"w": nn.Parameter(torch.zeros(()))})
    load({"w": torch.ones(1)}, scalar)
    assert scalar["w"] == 1


def test_keys_that_a_hook_renames_are_taken() -> None:
    module = nn.Linear(2, 2)

    def rename(state: Any, prefix: str, *_: Any) -> None:
        state[prefix + "weight"] = state.pop(prefix + "old")

    module._register_load_state_dict_pre_hook(rename)
    load({"old": torch.ones(2, 2), "bias": torch.ones(2)}, module)
    assert module.weight.sum() == 4


def fail(*_: Any) -> None:
    raise LookupError("the hook")


def change_all_and_fail(module: Any, *_: Any) -> None:
    module.bias = nn.Parameter(torch.full((5,), 7.0))
    module.weight.data = torch.zeros(1)
    module.seen = 1
    module.history.append(1)
    module.counts += 1
    fail()


FAILING: dict[str, Callable[[Any], object]] = {
    "a pre-hook": lambda module: module._register_load_state_dict_pre_hook(fail),
    "a post-hook": lambda module: module.register_load_state_dict_post_hook(fail),
    "a post-hook that changes all": lambda module: module.register_load_state_dict_post_hook(
        change_all_and_fail
    ),
    "a hook of state_dict": lambda module: module.register_state_dict_post_hook(fail),
}


@pytest.mark.parametrize("hook", FAILING)
def test_a_hook_that_fails_changes_nothing(hook: str) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    last: Any = module[1]
    last.history, last.counts = [0], np.zeros(2)
    last.register_buffer("scratch", torch.zeros(2), persistent=False)
    weights, metadata = weights_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    before, tensors = copy.deepcopy(module.state_dict()), dict(module.named_parameters())
    FAILING[hook](last)
    with pytest.raises(WeightsMismatch, match="LookupError: the hook"):
        load(weights, module, metadata)
    last._state_dict_hooks.clear()
    assert same(module.state_dict(), before)
    assert all(value is tensors[key] for key, value in module.named_parameters())
    assert (last.history, last.counts.tolist(), hasattr(last, "seen")) == ([0], [0, 0], False)


def test_a_module_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    with warnings.catch_warnings(), pytest.raises(WeightsMismatch, match="weight is on the meta device"):
        load({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, module)


def test_a_module_that_replaces_its_meta_parameters_is_loaded() -> None:
    class Assigning(nn.Linear):
        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = True) -> Any:
            return super().load_state_dict(state_dict, strict, assign)

    module = Assigning(2, 2, device="meta")
    received = torch.ones(2, 2)
    load({"weight": received, "bias": torch.ones(2)}, module)
    received.zero_()  # its memory gets another version
    assert module.weight.sum() == 4


def test_a_module_with_inference_parameters_is_unchanged() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.inference_mode():
        module[1] = nn.Linear(2, 2)
    before = copy.deepcopy({key: value.clone() for key, value in module.state_dict().items()})
    with pytest.raises(WeightsMismatch, match=r"1\.weight was made in torch\.inference_mode"):
        load({key: torch.ones_like(value) for key, value in before.items()}, module)
    assert same(module.state_dict(), before)


def test_a_lazy_module_gets_its_shapes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    sent = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    weights, metadata = weights_of(sent)
    with pytest.raises(WeightsMismatch, match=r"1\.bias"):
        load({**weights, "1.bias": torch.zeros(7)}, module, metadata)
    assert isinstance(module[0].weight, nn.UninitializedParameter)
    load(weights, module, metadata)
    assert same(module.state_dict(), sent.state_dict())
    assert module(torch.ones(1, 2)).shape == (1, 1)


def scripted(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "torch.compile": lambda module: torch.compile(module, backend="eager"),
    "torch.jit.script": scripted,
    "DataParallel": nn.DataParallel,
    "spectral_norm": lambda module: nn.utils.parametrizations.spectral_norm(module, "weight"),
    "weight_norm": lambda module: nn.utils.parametrizations.weight_norm(module, "weight"),
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_modules_take_what_they_send(name: str) -> None:
    wrap = WRAPPED[name]
    sent, target = wrap(nn.Linear(3, 2)), wrap(nn.Linear(3, 2))
    weights, metadata = weights_of(sent)
    load(weights, target, metadata)
    assert same(target.state_dict(), sent.state_dict())
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(WeightsMismatch, match="bias"):
        load(
            {key: value + 1 if "bias" not in key else torch.ones(9) for key, value in weights.items()}, target
        )
    assert same(target.state_dict(), before)


def test_a_subclass_of_a_dictionary_that_fails_is_put_back() -> None:
    class Failing(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            if value == "new":
                raise ZeroDivisionError
            super().__setitem__(key, value)

        def update(self, *arguments: Any, **fields: Any) -> None:
            super().update(*arguments, **fields)
            if "w" in self:
                raise ZeroDivisionError

    target = Failing(OrderedDict(w=np.zeros(2), a=1, b="old"))
    with pytest.raises(WeightsMismatch, match="ZeroDivisionError"):
        load({"w": np.ones(2), "a": 2, "b": "new"}, target)
    assert (target["w"].tolist(), target["a"], target["b"]) == ([0, 0], 1, "old")
    empty = Failing()
    with pytest.raises(WeightsMismatch, match="ZeroDivisionError"):
        load({"w": np.ones(2)}, empty)
    assert not empty


def test_weights_for_an_integer_buffer_are_cast_as_torch_does() -> None:
    module = nn.BatchNorm1d(1)
    weights, metadata = weights_of(module)
    weights["num_batches_tracked"] = torch.tensor(3.0)  # state dicts that were averaged
    load(weights, module, metadata)
    assert module.num_batches_tracked == 3


# Code of the target that fails


class ErringArray(np.ndarray[Any, Any]):
    def __setitem__(self, *_: Any) -> None:
        raise ZeroDivisionError


class WritingErringArray(np.ndarray[Any, Any]):
    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        raise ZeroDivisionError


class ErringTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            raise ZeroDivisionError
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


ERRING: dict[str, Callable[[], Any]] = {
    "an array that refuses": lambda: np.zeros(2).view(ErringArray),
    "an array that writes and fails": lambda: np.zeros(2).view(WritingErringArray),
    "a tensor that refuses": lambda: torch.zeros(2).as_subclass(ErringTensor),
    "a zero tensor": lambda: torch._efficientzerotensor(2),
}


@pytest.mark.parametrize("case", ERRING)
def test_a_place_that_refuses_changes_nothing(case: str) -> None:
    first, refusing, last = np.zeros(2), ERRING[case](), torch.zeros(2)
    with pytest.raises(WeightsMismatch):
        load(
            {"a": np.ones(2), "b": torch.ones(2), "c": torch.ones(2)}, {"a": first, "b": refusing, "c": last}
        )
    assert [first.tolist(), (refusing + 0).tolist(), last.tolist()] == [[0, 0]] * 3


@pytest.mark.parametrize("tensor", [False, True])
def test_numpy_that_raises_does_not_stop_a_load(tensor: bool) -> None:
    half: Any = torch.zeros(2, dtype=torch.float16) if tensor else np.zeros(2, "f2")
    target = {"a": np.zeros(2, "f4"), "b": half, "c": np.zeros(2, "f2")}
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        load({key: np.full(2, 1e10 if key != "a" else 1, "f4") for key in target}, target)
    assert target["a"].tolist() == [1, 1]
    assert np.isinf(np.asarray(target["b"])).all()


class Strict(dict[str, Any]):
    """Refuses every value of a key."""

    def __setitem__(self, key: str, value: Any) -> None:
        self.update(other=0)
        if key == "b":
            raise ValueError("not b")
        super().__setitem__(key, value)


class StrictWrapper(UserDict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        if key == "b" and key in self.data:
            raise ValueError("not b")
        super().__setitem__(key, value)


@pytest.mark.parametrize("with_array", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", [Strict, StrictWrapper])
def test_a_mapping_that_refuses_a_value_is_put_back(kind: Any, nested: bool, with_array: bool) -> None:
    array, mapping = np.zeros(1), kind({"a": 1, "b": 2, "c": 3})
    target = {"m": mapping, "n": 0} if nested else mapping
    new: dict[str, Any] = {"a": 10, "b": 20, "c": 30}
    if nested:
        new = {"m": new, "n": 1}
    if with_array:
        mapping["d"] = array
        (new["m"] if nested else new)["d"] = np.ones(1)
    mapping.pop("other", None)
    with pytest.raises(WeightsMismatch, match="ValueError: not b"):
        load(new, target)
    assert dict(mapping) == {"a": 1, "b": 2, "c": 3, **({"d": array} if with_array else {})}
    assert array == [0]
    assert not nested or target["n"] == 0


class LoadedTwice(nn.Linear):
    """Does what its class says in its first and in every later load."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        loads = itertools.count(1)

        def load_state_dict(state: Any, *arguments: Any) -> Any:
            return self.load_as(next(loads), lambda: nn.Linear.load_state_dict(self, state, *arguments))

        object.__setattr__(self, "load_state_dict", load_state_dict)

    def load_as(self, number: int, take: Callable[[], Any]) -> Any:
        take()
        raise KeyError("loaded twice") if number > 1 else ValueError("the first")


class Deleting(LoadedTwice):
    def load_as(self, number: int, take: Callable[[], Any]) -> Any:
        take()
        del self.bias
        raise KeyError("deleted")


class RaisesMismatch(LoadedTwice):
    def load_as(self, number: int, take: Callable[[], Any]) -> Any:
        take()
        raise WeightsMismatch(f"load {number}")


class Unsteady(LoadedTwice):
    """Fails once."""

    def load_as(self, number: int, take: Callable[[], Any]) -> Any:
        take()
        if number == 1:
            self.extra = 1
            del self.bias
            raise OSError("busy")


@pytest.mark.parametrize("kind", [LoadedTwice, Deleting, RaisesMismatch])
def test_a_module_whose_loads_fail_differently_is_unchanged(kind: Any) -> None:
    module = kind()
    bias, before = module.bias, copy.deepcopy(module.state_dict())
    with pytest.raises(WeightsMismatch, match="do not fit the model"):
        load({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, module)
    assert same(module.state_dict(), before)
    assert module.bias is bias


def test_a_module_that_fails_once_is_loaded_from_its_old_state() -> None:
    module: Any = Unsteady()
    load({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, module)
    assert (module.weight.sum(), module.bias.sum(), hasattr(module, "extra")) == (4, 2, False)


@pytest.mark.parametrize("handler", ["names", "no names"])
def test_a_signal_during_a_load_is_raised_after_it(handler: str) -> None:
    def named(number: int, frame: Any) -> None:
        raise Alarm

    def unnamed(*_: Any) -> None:
        raise Alarm

    class Signalled(LoadedTwice):
        def load_as(self, number: int, take: Callable[[], Any]) -> Any:
            take()
            if number == 1:
                signal.raise_signal(signal.SIGALRM)

    module = Signalled()
    before = signal.signal(signal.SIGALRM, named if handler == "names" else unnamed)
    try:
        with pytest.raises(Alarm):
            load({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, module)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert module.weight.sum() == 4


class Statistics:
    def __init__(self) -> None:
        self.mean, self.count, self.parts = np.zeros(2), 0, {"a": [torch.zeros(2)]}

    def __call__(self, value: Any) -> Any:
        return value - self.mean


class Normaliser(nn.Linear):
    """Has state of many kinds, all of which a failing load changes."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.many = list(range(200_000))  # more than is looked at
        self.rms = Statistics()
        self.rms.owner = self  # type: ignore[attr-defined]
        self.nested: Any = {"a": {"b": [1, [2, (3, [4])]]}, "d": defaultdict(list, x=[1])}
        self.recent, self.counts, self.seen = deque([1, 2], 5), Counter("aab"), {1}
        self.ordered, self.raw = OrderedDict(a=1, b=2), bytearray(b"abc")
        self.weight.grad = torch.ones(2, 2)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        super().load_state_dict(*arguments, **options)
        self.rms.mean += 1
        self.rms.count += 1
        self.rms.parts["a"][0].add_(1)
        self.rms.extra = 1  # type: ignore[attr-defined]
        self.nested["a"]["b"][1][1][1].append(5)
        self.nested["d"]["y"].append(1)
        self.recent.append(3)
        self.counts.update("abc")
        self.seen.add(2)
        self.ordered.move_to_end("a")
        self.raw += b"d"
        assert self.weight.grad is not None
        self.weight.grad.zero_()
        self.weight.grad = None
        self.weight.requires_grad_(False)
        self.bias.grad = torch.ones(2)
        raise OSError("after all that")

    def all_state(self) -> str:
        parameters = [(one.tolist(), one.grad, one.requires_grad) for one in (self.weight, self.bias)]
        rms = {name: value for name, value in vars(self.rms).items() if name != "owner"}
        others = self.nested, self.recent, self.counts, self.seen, self.ordered, self.raw
        return repr((parameters, rms, others))


def test_state_of_any_kind_is_put_back() -> None:
    module = Normaliser()
    mean, inner, before = module.rms.mean, module.nested["a"]["b"], module.all_state()
    with pytest.raises(WeightsMismatch, match="OSError: after all that"):
        load({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, module)
    assert module.all_state() == before
    assert module.rms.mean is mean
    assert module.nested["a"]["b"] is inner


# Interrupts


def plain_module() -> Any:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def module_with_hooks() -> Any:
    module = nn.Sequential(nn.Linear(2, 3), WithExtra([1]))
    module.register_load_state_dict_post_hook(lambda *_: None)
    return module


def filled_dictionary() -> Any:
    shared = np.zeros(4)
    return {"a": torch.zeros(3), "b": {"c": np.zeros(3), "n": 0}, "d": shared[:3], "e": shared[1:]}


INTERRUPTED: dict[str, tuple[Callable[[], Any], bool]] = {
    "a module": (plain_module, False),
    "a module with hooks": (module_with_hooks, False),
    "a dictionary": (filled_dictionary, False),
    "an empty dictionary": (dict, True),
}


def flat(tree: Any) -> list[Any]:
    values = tree.state_dict() if isinstance(tree, nn.Module) else tree
    leaves = [flat(value) if isinstance(value, dict) else copy.deepcopy(value) for value in values.values()]
    return [value.tolist() if hasattr(value, "tolist") else value for value in leaves]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Alarm])
@pytest.mark.parametrize("points", ["function", "line"])
@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupted_load_is_whole(name: str, points: Any, error: type[BaseException]) -> None:
    make, fills = INTERRUPTED[name]
    sent = filled_dictionary() if fills else make()
    weights = weights_of(sent)[0] if isinstance(sent, nn.Module) else sent
    for value in weights.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value += 1
    new = flat(weights)
    for point in itertools.count(1):
        target = make()
        old = flat(target)
        loading = Load(weights, target)
        with interrupt_at(point, points, error) as interrupt:
            loading.run()
        assert torch.is_grad_enabled(), interrupt.place
        assert flat(target) == (new if loading.done else old), interrupt.place
        loading.run()
        assert flat(target) == new, interrupt.place
        if not interrupt.place:
            break
