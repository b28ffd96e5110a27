"""What rlbroker did not write under a run's keys is said to be that, and does not look like a mistake of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rlbroker.errors import InvalidArgument, RlbrokerError, WireError

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


def _illegible(what: str, error: Exception) -> WireError:
    kind = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return WireError(
        f"{what} holds what rlbroker does not write ({kind[:_SHOWN]}): another program uses this key"
    )
