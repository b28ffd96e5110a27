"""Every error that rlbroker raises: what the caller did wrong, or what the server, the network or a peer did.

::

    RlbrokerError
    ├── UsageError                  the caller's mistake: the same call will fail again
    │   ├── InvalidArgument         an argument or setting has a value that cannot work (ValueError)
    │   ├── UnsupportedType         a value cannot travel; names its path (TypeError)
    │   ├── WeightsMismatch         the weights do not fit the model; names keys and shapes (ValueError)
    │   ├── BatchTooLarge           one batch exceeds a bound of its queue or of the server (ValueError)
    │   ├── UnknownWorker           none of the worker ids belongs to the run (LookupError)
    │   ├── ForkedProcess           a client was used in a child process after a fork (RuntimeError)
    │   └── Closed                  a client was used after it was closed (RuntimeError)
    └── PeerError                   the server, the network or another process failed: a retry may succeed
        ├── ConnectionFailed        the server cannot be reached, or refuses its service (ConnectionError)
        │   └── ServerOutOfMemory   the server reached its memory limit (MemoryError)
        ├── AccessDenied            wrong password, or a missing right (PermissionError)
        ├── TlsFailed               no secure connection: a certificate is refused, or one side has no TLS
        │                           (ConnectionError)
        ├── ServerUnsuitable        the server is too old, would evict keys, or cannot provide a level (RuntimeError)
        ├── ServerFault             the server answered with an error that rlbroker does not expect (RuntimeError)
        │   └── WrongKeyType        a key of the run has a type that rlbroker does not write
        ├── WireError               received bytes cannot be decoded (ValueError)
        │   └── IncompatibleFormat  the bytes have another version of the wire format
        ├── Fenced                  a newer process took this one's place (RuntimeError)
        ├── RunLost                 the server lost the run's keys, and the learner has not restored them
        │                           (ConnectionError)
        └── DeadlineExceeded        a wait timed out (TimeoutError)
            ├── QueueFull           no room for a batch within the timeout (queue.Full)
            ├── RoundIncomplete     a worker has not sent its batches of a round; says why
            └── Unconfirmed         a batch was accepted, and not confirmed within the timeout

In parentheses: the builtin that an error also is, so that callers who know nothing of rlbroker catch it too.
`docs/errors.md` says which answer of a server becomes which error, and which errors are waited out.
"""

from __future__ import annotations

import copy
import queue
import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn, TypeVar

#: The login in a URL, and a password among its parameters. A path made of a URL has one slash.
_SECRETS: Final = re.compile(r"(?<=:/)(/?)[^\s'\"]*@|(?<=password=)[^&\s'\"]+")
_Error = TypeVar("_Error", bound=BaseException)


class RlbrokerError(Exception):
    """Base of every error that rlbroker raises. An `except` for it catches all of them."""

    def __init__(self, *args: Any) -> None:
        """Remove passwords of URLs from the message: a URL may be given where something else belongs."""
        super().__init__(*(without_passwords(one) if isinstance(one, str) else one for one in args))


def without_passwords(text: str) -> str:
    """Return the text without the user and password of each URL in it.

    >>> without_passwords("cannot use 'redis://me:secret@host/0'")
    "cannot use 'redis://host/0'"
    """
    return _SECRETS.sub(lambda found: found[1] if found[1] is not None else "…", text)


class UsageError(RlbrokerError):
    """The caller made a mistake. The same call will fail again: change it, as the message says."""


class InvalidArgument(UsageError, ValueError):
    """An argument or setting has a value that cannot work. Raised before anything is sent; says which values work."""


class UnsupportedType(UsageError, TypeError):
    """A value cannot travel.

    Raised before anything is sent. The message names the path of the value within the tree, and the call that makes it
    travel if there is one, such as `_asdict()`.
    """


class WeightsMismatch(UsageError, ValueError):
    """The received weights do not fit the model.

    The model is unchanged. The message names keys and shapes: build the same model on both sides.
    """


class BatchTooLarge(UsageError, ValueError):
    """One batch alone is larger than the byte bound of its queue, than 1 GiB, or than what the server takes.

    Raised by `send_experiences`; the batch was not accepted. Send smaller batches, or raise `max_queue_bytes` on the
    learner, or `proto-max-bulk-len` on the server, as the message says.
    """


class UnknownWorker(UsageError, LookupError):
    """None of these workers belongs to the run. The message names those that do."""


class ForkedProcess(UsageError, RuntimeError):
    """A client that was made before a fork was used in the child process. Make a new one there."""


class Closed(UsageError, RuntimeError):
    """A client was used after it was closed, or was closed before the result arrived. Make a new one."""


class PeerError(RlbrokerError):
    """The server, the network or another process failed.

    rlbroker has retried whatever is safe to repeat. The caller may try again later, or stop.
    """


class ConnectionFailed(PeerError, ConnectionError):
    """The server cannot be reached, the connection to it broke, or it refuses its service for now.

    rlbroker has tried again until the timeout. The same client may be used again later.
    """


class ServerOutOfMemory(ConnectionFailed, MemoryError):
    """The server refuses writes because it reached its `maxmemory`. Raise it, or lower the bounds of the queues.

    Reading and acknowledging batches makes room. The command had no effect.
    """


class AccessDenied(PeerError, PermissionError):
    """The server refused user or password, or the user lacks a right. Correct the login, or the user's ACL rules.

    Attributes:
        rule: what an ACL rule of this user must grant, such as `+xinfo`; empty if no right is missing.
        user: the user that lacks it.
    """

    rule: str = ""
    user: str = ""


class TlsFailed(PeerError, ConnectionError):
    """No secure connection is possible: one side refuses the other's certificate, or has no TLS.

    Correct the certificate files, or the scheme of the URL (`redis://` or `rediss://`).
    """


class ServerUnsuitable(PeerError, RuntimeError):
    """The server is too old, would evict keys, is not what the URL says, or cannot provide the requested level.

    Change its settings, or give the URL of another one. `rlbroker doctor` lists what is wrong.
    """


class ServerFault(PeerError, RuntimeError):
    """The server answered with an error that rlbroker does not expect. The message has its text."""


class WrongKeyType(ServerFault):
    """A key of the run has a type that rlbroker does not write: another program uses it, or a worker spoiled it.

    Choose another name for the run, or delete the key.
    """


class WireError(PeerError, ValueError):
    """Received bytes cannot be decoded: they are damaged, hostile, or beyond the limits.

    rlbroker fetches damaged weights again, and stores a damaged batch as a dead letter.
    """


class IncompatibleFormat(WireError):
    """The other side writes another version of the wire format. Run the same release on both sides."""


class Fenced(PeerError, RuntimeError):
    """A newer process took this one's place: a learner of the same run, or a worker with the same id.

    Nothing that this client sends is accepted any more. Stop; or make a new client, which fences the other process.
    """


class RunLost(PeerError, ConnectionError):
    """The server lost the run's keys, and the learner has not restored them in time.

    The learner restores them by itself while it is alive. Try again later, or check that it runs.
    """


class DeadlineExceeded(PeerError, TimeoutError):
    """A wait timed out. What was waited for may still happen."""


class Unconfirmed(DeadlineExceeded):
    """A batch was accepted, and not confirmed within the timeout. It is kept and resent: do not send it again.

    Attributes:
        receipt: what is known of the batch; a `SendReceipt`.
    """

    def __init__(self, message: str, receipt: Any) -> None:
        """Attach the receipt of the batch."""
        super().__init__(message)
        self.receipt = receipt

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy it with its receipt."""
        return type(self), (str(self), self.receipt), vars(self)


class QueueFull(DeadlineExceeded, queue.Full):
    """There was no room for a batch within the timeout. It was not accepted: send it again, or drop it."""


class RoundIncomplete(DeadlineExceeded):
    """Workers have not sent their batches of a round within the timeout, or cannot send them any more.

    What was gathered is not lost: it comes with the next `collect_round` of the same version, or the next
    `collect_experiences`.

    Attributes:
        missing: by worker id, why its batches are missing. Empty if no worker is alive, or another thread was
            collecting all the time.
    """

    def __init__(self, message: str, missing: Mapping[int, str] | None = None) -> None:
        """Attach the reasons."""
        super().__init__(message)
        self.missing = dict(missing or {})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy it with the reasons."""
        return type(self), (str(self), self.missing), vars(self)


# Errors that are stored, to be raised later. A traceback refers to the frames that an error passed, and so to the
# client whose method was called. A stored error with a traceback would keep that client alive; an error that one of its
# own frames refers to waits for the garbage collector, and all of these frames with it.


def without_frames(error: _Error) -> _Error:
    """Return an error after removing the tracebacks of it and of its causes."""
    error.__traceback__ = None
    for other in (error.__cause__, error.__context__):
        if other is not None and other.__traceback__ is not None:
            without_frames(other)
    return error


def raise_again(error: BaseException) -> NoReturn:
    """Raise a copy of a stored error, so that the stored one gets no traceback."""
    raise _copy(error) from error.__cause__  # no variable: this frame must not refer to what it raises


def _copy(error: BaseException) -> BaseException:
    try:
        return copy.copy(error)
    except Exception:  # noqa: BLE001 # its class takes other arguments than it keeps
        return error.with_traceback(None)
