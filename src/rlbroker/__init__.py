"""The Redis-backed broker between reinforcement-learning learners and rollout workers.

The learner makes a `WorkerCommunicator`, each worker a `WorkerClient`; all they share is a Redis URL and the
name of the run.
"""

from importlib.metadata import version as _version

from rlbroker.config import SamplesPerInsert
from rlbroker.control.commander import Command
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
    Unconfirmed,
    UnknownWorker,
    UnsupportedType,
    UsageError,
    WeightsMismatch,
    WireError,
)
from rlbroker.learner import WorkerCommunicator
from rlbroker.records import (
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
from rlbroker.worker import WorkerClient

__version__ = _version("rlbroker")

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
    "Unconfirmed",
    "UnknownWorker",
    "UnsupportedType",
    "UsageError",
    "WeightsMismatch",
    "WireError",
    "WorkerClient",
    "WorkerCommunicator",
    "WorkerInfo",
    "__version__",
]
