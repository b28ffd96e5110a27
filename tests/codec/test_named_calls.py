"""A refusal names a call, and what this call returns does travel."""

from __future__ import annotations

import argparse
import array
import collections
import dataclasses
import datetime
import enum
import fractions
import io
import pathlib
import types
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch

from rlbroker.codec.message import decode, encode
from rlbroker.errors import UnsupportedType

pytestmark = pytest.mark.unit


class _Samples(NamedTuple):
    """As those of the buffers of stable-baselines3."""

    observations: torch.Tensor
    returns: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    obs: np.ndarray[Any, Any]
    reward: float


class _Mode(enum.Enum):
    TRAIN = "train"


class _Level(enum.IntEnum):
    EASY = 1


class _Stack:
    """As a stack of texts in a TensorDict, which looks like one, and of which `to_dict` gives a list."""

    batch_size = (2,)

    def to_dict(self) -> list[str]:
        return ["a", "b"]


_RECORDS = np.array([(1, 2.0), (3, 4.0)], "i4,f8")

CALLS: list[tuple[Any, str, Callable[[Any], Any]]] = [
    (_Samples(torch.ones(3), torch.zeros(3)), "_asdict()", lambda value: value._asdict()),
    (_Samples(torch.ones(3), torch.zeros(3)), "tuple()", tuple),
    (torch.Size([3]), "tuple()", tuple),
    (_Step(np.ones(3), 1.0), "dataclasses.asdict()", dataclasses.asdict),
    (_Mode.TRAIN, "the value", lambda value: value.value),
    (_Level.EASY, "int()", int),
    (datetime.datetime(2026, 1, 1), "isoformat()", lambda value: value.isoformat()),
    (datetime.timedelta(seconds=3), "total_seconds()", lambda value: value.total_seconds()),
    (pathlib.PurePosixPath("/x"), "str()", str),
    (uuid.UUID(int=3), "str()", str),
    (fractions.Fraction(1, 2), "float()", float),
    (1j, "numpy.complex128()", np.complex128),
    ({1, 2}, "list()", list),
    (collections.deque([{"r": 1.0, "l": 9}]), "list()", list),
    (bytearray(b"x"), "bytes()", bytes),
    (memoryview(b"x"), "bytes()", bytes),
    (memoryview(array.array("d", [1.0, 2.0])), "numpy.asarray()", np.asarray),
    (array.array("f", [1.0, 2.0]), "numpy.asarray()", np.asarray),
    (io.BytesIO(b"x"), "getvalue()", lambda value: value.getvalue()),
    (types.SimpleNamespace(lr=1e-3), "vars()", vars),
    (argparse.Namespace(lr=1e-3), "vars()", vars),
    (_Stack(), "to_dict()", lambda value: value.to_dict()),
    (torch.nn.Linear(2, 2), "state_dict()", lambda value: value.state_dict()),
    (np.str_("a"), "str()", str),
    (np.bytes_(b"a"), "bytes()", bytes),
    (np.array(["a", "b"]), "tolist()", lambda value: value.tolist()),
    (np.array([{"x": np.ones(2)}, None]), "tolist()", lambda value: value.tolist()),
    (np.datetime64("2026-01-01"), 'astype("int64")', lambda value: value.astype("int64")),
    (_RECORDS, "its fields", lambda value: {name: value[name] for name in value.dtype.names}),
    (np.zeros(2, "V3"), 'view("uint8")', lambda value: value.view("uint8")),
    (np.void(b"abc"), "bytes()", bytes),
    (np.ma.masked_array([1.0, 2.0], [False, True]), "filled()", lambda value: value.filled()),
    (np.ones((1, 1)).view(np.matrix), "numpy.asarray()", np.asarray),
]


@pytest.mark.parametrize(("value", "call", "convert"), CALLS, ids=lambda one: type(one).__name__)
def test_the_call_that_a_refusal_names_makes_the_value_travel(
    value: Any, call: str, convert: Callable[[Any], Any]
) -> None:
    with pytest.raises(UnsupportedType, match=r"^\['x'\]: ") as refused:
        encode({"x": value})
    assert call in str(refused.value)
    decode(encode({"x": convert(value)}))


@pytest.mark.parametrize(
    ("key", "call", "name"),
    [
        (np.int64(3), "send int() of it", 3),
        (np.str_("a"), "send str() of it", "a"),
        (1.5, "send str() of it", "1.5"),
        (True, "send str() of it", "True"),
        (_Mode.TRAIN, "send the value of it", "train"),
        (_Level.EASY, "send the value of it", 1),
    ],
)
def test_the_call_that_is_named_for_a_key_keeps_its_meaning(key: Any, call: str, name: str | int) -> None:
    with pytest.raises(UnsupportedType, match=r"keys must be str or int") as refused:
        encode({key: 1})
    assert str(refused.value).endswith(call)
    assert decode(encode({name: 1})) == {name: 1}


def test_the_infos_of_vector_environments_travel_after_the_call_for_their_object_arrays() -> None:
    """Gymnasium puts the last observations of ended episodes into an array of objects."""
    same_step = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    environments = gymnasium.make_vec(
        "CartPole-v1", num_envs=2, vectorization_mode="sync", vector_kwargs=same_step
    )
    environments.reset(seed=0)
    infos: dict[str, Any] = {}
    while "final_obs" not in infos:
        infos = environments.step(np.zeros(2, np.int64))[-1]
    with pytest.raises(UnsupportedType, match=r"^\['infos'\]\['final_obs'\]: .*object .*send tolist\(\)"):
        encode({"infos": infos})
    got = decode(encode({"infos": infos | {"final_obs": infos["final_obs"].tolist()}}))["infos"]
    for index, ended in enumerate(got["_final_obs"]):
        last = got["final_obs"][index]
        np.testing.assert_array_equal(last, infos["final_obs"][index])
        assert ended == (last is not None)
    environments.close()


def test_a_space_of_gymnasium_is_refused_and_its_samples_travel() -> None:
    space = gymnasium.spaces.Dict(
        a=gymnasium.spaces.Discrete(3), b=gymnasium.spaces.Box(0, 1, (2,)), c=gymnasium.spaces.Text(4)
    )
    with pytest.raises(UnsupportedType, match=r"^\['a'\]: a value of type .*Discrete cannot travel"):
        encode(space)
    sample = space.sample()
    assert decode(encode(sample)).keys() == sample.keys()
