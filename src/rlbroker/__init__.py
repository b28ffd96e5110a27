"""The Redis-backed broker between reinforcement-learning learners and rollout workers.

The learner creates a `WorkerCommunicator`, each worker a `WorkerClient`. They share nothing but a Redis URL and
the name of the run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlbroker.codec.registration import register_batch
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
    RoundIncomplete,
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
from rlbroker.receipts import PublishReceipt
from rlbroker.types import (
    Batch,
    CleanupReport,
    DeadLetter,
    Missed,
    MissedUpdates,
    Outcome,
    QueueCounts,
    QueueInfo,
    SendReceipt,
    WorkerInfo,
)

if TYPE_CHECKING:
    from rlbroker.control.commands import Command
    from rlbroker.learner.communicator import WorkerCommunicator
    from rlbroker.worker.client import WorkerClient

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
    "QueueInfo",
    "RlbrokerError",
    "RoundIncomplete",
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

register_batch()

#: Imported at first use: they need numpy and blosc2, which would slow down commands that only inspect a run.
_LAZY = {
    "Command": "control.commands",
    "WorkerClient": "worker.client",
    "WorkerCommunicator": "learner.communicator",
}


def __getattr__(name: str) -> Any:
    """Import a name at its first use, and keep it."""
    if name in _LAZY:
        found = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    elif name == "__version__":
        found = import_module("importlib.metadata").version(__name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found
