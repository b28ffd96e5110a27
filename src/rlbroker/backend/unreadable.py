"""What rlbroker did not write under a run's keys is said to be that, and does not look like a mistake of ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rlbroker.errors import InvalidArgument, PeerError, RlbrokerError, WireError, WrongKeyType

#: Longest part of an error's text that is repeated.
_SHOWN = 120


@contextmanager
def legible(what: str) -> Iterator[None]:
    """Have what is read in this block be what a learner or worker writes.

    Args:
        what: what is read, for the message: a key.

    Raises:
        WireError: it cannot be understood; a number that is none, or a field that is missing.
    """
    try:
        yield
    except InvalidArgument as error:  # settings that no learner would take
        raise _illegible(what, error) from error
    except RlbrokerError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise _illegible(what, error) from error


def unless_spoiled(reply: Any, otherwise: Any) -> Any:
    """Give the answer about a key that a worker writes, or `otherwise` where the key is of a wrong type.

    Raises:
        PeerError: the server refused for another reason.
    """
    if isinstance(reply, WrongKeyType):
        return otherwise
    if isinstance(reply, PeerError):
        raise reply
    return reply


def answered(replies: Iterable[Any]) -> list[Any]:
    """Give answers where none may be a refusal.

    Raises:
        PeerError: the first refusal.
    """
    found = list(replies)
    for reply in found:
        if isinstance(reply, PeerError):
            raise reply
    return found


def _illegible(what: str, error: Exception) -> WireError:
    kind = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return WireError(
        f"{what} holds what rlbroker does not write ({kind[:_SHOWN]}): another program uses this key"
    )
