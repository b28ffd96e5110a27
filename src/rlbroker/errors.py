"""Every error that rlbroker raises.

::

    RlbrokerError
    ├── UsageError                  the caller did something wrong; retrying will not help
    │   ├── InvalidArgument         an argument's value (ValueError)
    │   ├── UnsupportedType         an object that cannot travel; names its path (TypeError)
    │   ├── WeightsMismatch         the weights do not fit the model; names keys and shapes (ValueError)
    │   ├── BatchTooLarge           one batch exceeds the byte bound of its queue (ValueError)
    │   ├── UnknownWorker           no such worker id in this run (LookupError)
    │   ├── ForkedProcess           used in a child after fork (RuntimeError)
    │   └── Closed                  used after cleanup (RuntimeError)
    └── PeerError                   the server, the network or another process did
        ├── ConnectionFailed        the server cannot be reached (ConnectionError)
        ├── AccessDenied            wrong password, or a right is missing (PermissionError)
        ├── TlsFailed               there can be no secure connection: a certificate, or a side without TLS
        ├── ServerUnsuitable        the server is too old, would evict our keys, or cannot give a level
        ├── ServerOutOfMemory       the server's memory limit is reached
        ├── ServerFault             the server answered with any other error
        │   └── WrongKeyType        a key of the run is not of the type that rlbroker writes
        ├── WireError               bytes that do not decode (ValueError)
        │   └── IncompatibleFormat  written by a release with another wire format
        ├── Fenced                  a newer process took this one's place
        ├── RunLost                 the server came back without the run's keys, and its learner did not restore them
        └── DeadlineExceeded        what was waited for did not come in time (TimeoutError)
            ├── QueueFull           no room for a batch (queue.Full)
            └── Unconfirmed         a batch was taken, and its arrival not confirmed in time
"""

from __future__ import annotations

import queue
from typing import Any


class RlbrokerError(Exception):
    """Base of every error that rlbroker raises."""


class UsageError(RlbrokerError):
    """The caller did something wrong; the same call will fail again."""


class InvalidArgument(UsageError, ValueError):
    """An argument has a value that cannot work."""


class UnsupportedType(UsageError, TypeError):
    """An object that cannot travel; the message names its path within the tree."""


class WeightsMismatch(UsageError, ValueError):
    """The received weights do not fit the model; the message names keys and shapes."""


class BatchTooLarge(UsageError, ValueError):
    """One batch alone is larger than the byte bound of its queue."""


class UnknownWorker(UsageError, LookupError):
    """No worker with this id belongs to the run."""


class ForkedProcess(UsageError, RuntimeError):
    """A client made before a fork is used in the child; make a new one there."""


class Closed(UsageError, RuntimeError):
    """The client was cleaned up and cannot be used any more."""


class PeerError(RlbrokerError):
    """The server, the network or another process did something wrong."""


class ConnectionFailed(PeerError, ConnectionError):
    """The server cannot be reached, or the connection to it broke."""


class AccessDenied(PeerError, PermissionError):
    """Wrong user or password, or the user lacks a right.

    Attributes:
        rule: what an access-control list must have for this user, such as `+xinfo`; empty if that is not the reason.
        user: who lacks it.
    """

    rule: str = ""
    user: str = ""


class TlsFailed(PeerError):
    """There can be no secure connection: one side does not accept the other's certificate, or speaks no TLS."""


class ServerUnsuitable(PeerError):
    """The server is too old, or its settings would lose data."""


class ServerOutOfMemory(PeerError):
    """The server refuses writes because its memory limit is reached."""


class ServerFault(PeerError):
    """The server answered with an error that rlbroker does not expect."""


class WrongKeyType(ServerFault):
    """A key of the run is of another type than rlbroker writes: another program uses it, or a worker spoiled it."""


class WireError(PeerError, ValueError):
    """Bytes that cannot be decoded: damaged, hostile, or beyond the limits."""


class IncompatibleFormat(WireError):
    """The other side writes another version of the wire format."""


class Fenced(PeerError):
    """A newer process with the same role has taken this one's place."""


class RunLost(PeerError):
    """The server has lost the run's keys, and the learner has not restored them in time; is it alive?"""


class DeadlineExceeded(PeerError, TimeoutError):
    """What was waited for did not happen in time."""


class Unconfirmed(DeadlineExceeded):
    """A batch was taken and not confirmed in time; it is kept and sent again. Do not send it a second time.

    Attributes:
        receipt: what is known of the batch; a `SendReceipt`.
    """

    def __init__(self, message: str, receipt: Any) -> None:
        """Say what was not confirmed."""
        super().__init__(message)
        self.receipt = receipt


class QueueFull(DeadlineExceeded, queue.Full):
    """There was no room for a batch within the timeout; the caller still has it."""
