"""Every error is also the builtin kind that fits, and can be pickled and copied with its message."""

from __future__ import annotations

import copy
import pickle
import queue
from pathlib import Path

import pytest

from rlbroker import errors
from rlbroker.types import SendReceipt

pytestmark = pytest.mark.unit

DOCS = Path(__file__).parents[2] / "docs" / "errors.md"

#: The builtin kinds of each error, apart from `Exception`. The bases of the tree have none.
BUILTINS: dict[str, tuple[type[BaseException], ...]] = {
    "RlbrokerError": (),
    "UsageError": (),
    "InvalidArgument": (ValueError,),
    "UnsupportedType": (TypeError,),
    "WeightsMismatch": (ValueError,),
    "BatchTooLarge": (ValueError,),
    "UnknownWorker": (LookupError,),
    "ForkedProcess": (RuntimeError,),
    "Closed": (RuntimeError,),
    "PeerError": (),
    "ConnectionFailed": (ConnectionError,),
    "ServerOutOfMemory": (ConnectionError, MemoryError),
    "AccessDenied": (PermissionError,),
    "TlsFailed": (ConnectionError,),
    "ServerUnsuitable": (RuntimeError,),
    "ServerFault": (RuntimeError,),
    "WrongKeyType": (RuntimeError,),
    "WireError": (ValueError,),
    "IncompatibleFormat": (ValueError,),
    "Fenced": (RuntimeError,),
    "RunLost": (ConnectionError,),
    "DeadlineExceeded": (TimeoutError,),
    "QueueFull": (TimeoutError, queue.Full),
    "RoundIncomplete": (TimeoutError,),
    "Unconfirmed": (TimeoutError,),
}

ERRORS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.RlbrokerError)
}

RECEIPT = SendReceipt(3, 17, 5, 2, 1, 10, 12, accepted=True)


def make(name: str) -> errors.RlbrokerError:
    kind: type[errors.RlbrokerError] = ERRORS[name]
    if issubclass(kind, errors.Unconfirmed):
        return kind("what happened; what to do", RECEIPT)
    return kind("what happened; what to do")


def test_the_table_has_every_error() -> None:
    assert set(ERRORS) == set(BUILTINS)


@pytest.mark.parametrize("name", BUILTINS)
def test_each_error_is_also_the_builtin_that_fits(name: str) -> None:
    error = make(name)
    assert isinstance(error, (errors.RlbrokerError, *BUILTINS[name]))
    for builtin in BUILTINS[name]:
        with pytest.raises(builtin) as caught:
            raise error
        assert caught.value is error
    if name not in ("RlbrokerError", "UsageError", "PeerError"):
        assert BUILTINS[name]


@pytest.mark.parametrize("name", BUILTINS)
@pytest.mark.parametrize("way", ["pickle", "copy", "deepcopy"])
def test_an_error_can_be_pickled_and_copied(name: str, way: str) -> None:
    error = make(name)
    if isinstance(error, errors.AccessDenied):
        error.rule, error.user = "+hset", "me"
    ways = {
        "pickle": lambda one: pickle.loads(pickle.dumps(one)),
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
    }
    again = ways[way](error)
    assert type(again) is type(error)
    assert str(again) == str(error) == "what happened; what to do"
    assert vars(again) == vars(error)


@pytest.mark.parametrize("name", BUILTINS)
def test_the_docs_name_each_error_with_its_builtin(name: str) -> None:
    (row,) = [line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{name}` |")]
    shown = row.split("|")[2]
    for builtin in BUILTINS[name]:
        label = "queue.Full" if builtin is queue.Full else builtin.__name__
        assert f"`{label}`" in shown
    assert shown.count("`") == 2 * len(BUILTINS[name])
