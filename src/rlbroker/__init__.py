"""The Redis-backed broker between reinforcement-learning learners and rollout workers.

The learner makes a `WorkerCommunicator`, each worker a `WorkerClient`; all they share is a Redis URL and the
name of the run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlbroker.config import SamplesPerInsert
from rlbroker.errors import (
    AccessDenied,
    BatchTooLarge,
    Closed,
    ConnectionFailed,
    DeadlineExceeded,
    Fenced,
    ForkedProcess,
    IncompatibleFormat,
    InvalidArgument,
    PeerError,
    QueueFull,
    RlbrokerError,
    RunLost,
    ServerFault,
    ServerOutOfMemory,
    ServerUnsuitable,
    TlsFailed,
    Unconfirmed,
    UnknownWorker,
    UnsupportedType,
    UsageError,
    WeightsMismatch,
    WireError,
    WrongKeyType,
)
from rlbroker.types import (
    Batch,
    CleanupReport,
    DeadLetter,
    Missed,
    MissedUpdates,
    Outcome,
    PublishReceipt,
    QueueCounts,
    SendReceipt,
    WorkerInfo,
)

if TYPE_CHECKING:
    from rlbroker.control.commands import Command
    from rlbroker.learner import WorkerCommunicator
    from rlbroker.worker import WorkerClient

    __version__: str

__all__ = [
    "AccessDenied",
    "Batch",
    "BatchTooLarge",
    "CleanupReport",
    "Closed",
    "Command",
    "ConnectionFailed",
    "DeadLetter",
    "DeadlineExceeded",
    "Fenced",
    "ForkedProcess",
    "IncompatibleFormat",
    "InvalidArgument",
    "Missed",
    "MissedUpdates",
    "Outcome",
    "PeerError",
    "PublishReceipt",
    "QueueCounts",
    "QueueFull",
    "RlbrokerError",
    "RunLost",
    "SamplesPerInsert",
    "SendReceipt",
    "ServerFault",
    "ServerOutOfMemory",
    "ServerUnsuitable",
    "TlsFailed",
    "Unconfirmed",
    "UnknownWorker",
    "UnsupportedType",
    "UsageError",
    "WeightsMismatch",
    "WireError",
    "WorkerClient",
    "WorkerCommunicator",
    "WorkerInfo",
    "WrongKeyType",
    "__version__",
]

#: Imported when they are first asked for, as they need numpy and blosc2: whoever only looks at a run does not.
_LATER = {"Command": "control.commands", "WorkerClient": "worker", "WorkerCommunicator": "learner"}


def __getattr__(name: str) -> Any:
    """Give what was left for later, and keep it."""
    if name in _LATER:
        found = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    elif name == "__version__":
        found = import_module("importlib.metadata").version(__name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found
