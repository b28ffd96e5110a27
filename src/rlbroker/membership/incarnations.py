"""Who ever took part in a run, and in which life: what learners, commands and people read of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, NamedTuple

from rlbroker.backend.connection import Argument
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import whole_number
from rlbroker.config import MAX_WORKER_ID
from rlbroker.errors import AccessDenied, ConnectionFailed, PeerError

#: Characters of the longest name that a worker can have in the set `workers`.
_LONGEST_NAME: Final = len(str(MAX_WORKER_ID))


class Incarnation(NamedTuple):
    """The newest life of a worker id, as its `life:` hash has it. Workers write it, so it is read with care."""

    incarnation: int
    member: bool  #: whether it takes part; False once it has left, or was given up
    seen_milliseconds: int  #: when it was heard of last, by the server's clock
    known_version: int = 0  #: the newest version that it saw on a server which has lost it; 0 for none

    @classmethod
    def from_reply(cls, reply: Sequence[bytes | None]) -> Incarnation | None:
        """Read what `incarnation_command` asks for; None where it is of no life."""
        incarnation, member, seen, known = (str(one or b"", "ascii", "replace") for one in reply)
        number = whole_number(incarnation)
        # Scripts compare it as text, so that 07 is no 7.
        if not number or str(number) != incarnation:
            return None
        return cls(number, member == "1", whole_number(seen) or 0, whole_number(known) or 0)

    def silent_seconds(self, now: float) -> float:
        """Give how long it has not been heard of, by the server's clock in seconds."""
        return max(0.0, now - self.seen_milliseconds / 1000)


@dataclass(frozen=True)
class Incarnations:
    """Every worker id that the run ever had, in order, with its newest life.

    Attributes:
        of: by worker.
        unusable: members of the set that are no worker with a life: a worker wrote nonsense.
    """

    of: Mapping[int, Incarnation] = field(default_factory=dict)
    unusable: Sequence[bytes] = ()

    @property
    def named(self) -> int:
        """How many members the set has."""
        return len(self.of) + len(self.unusable)

    @property
    def members(self) -> dict[int, Incarnation]:
        """Those who take part now."""
        return {worker: life for worker, life in self.of.items() if life.member}


def incarnation_command(keys: Keys, worker: int) -> tuple[str, ...]:
    """Give the command that reads a life: no more than its fields, whatever else a worker put there."""
    return ("HMGET", keys.life(worker), "incarnation", "member", "seen", "known_version")


def worker_numbers(names: Iterable[bytes]) -> list[int]:
    """Give the worker ids among the members of the set `workers`, in order."""
    return sorted(worker for name in names if (worker := worker_number_of(name)) is not None)


def worker_number_of(name: bytes) -> int | None:
    """Give the worker that a member of the set `workers` is; None for what is no worker id."""
    # What is remembered stays in memory, and workers write these names.
    return _number_of(name) if len(name) <= _LONGEST_NAME else None


@lru_cache(maxsize=1 << 16)  # asked of the same names with each batch
def _number_of(name: bytes) -> int | None:
    text = str(name, "ascii", "replace")
    number = whole_number(text)
    return number if number is not None and number <= MAX_WORKER_ID and str(number) == text else None


def read_incarnations(ask: Callable[[Sequence[Sequence[Argument]]], list[Any]], keys: Keys) -> Incarnations:
    """Read who ever took part, in two round trips.

    Args:
        ask: runs commands, and gives as a `PeerError` what the server refused.
        keys: names of the run's keys.

    Raises:
        AccessDenied: a right is missing.
        PeerError: the server refused, or could not be reached.
    """
    (names,) = ask([("SMEMBERS", keys.workers)])
    if isinstance(names, PeerError):
        raise names
    ids = worker_numbers(names)
    lives = incarnations_from(ids, ask([incarnation_command(keys, worker) for worker in ids]) if ids else [])
    return Incarnations(lives, [name for name in names if worker_number_of(name) not in lives])


def incarnations_from(ids: Iterable[int], replies: Iterable[Any]) -> dict[int, Incarnation]:
    """Give the lives that were read; a worker whose hash is none, or nonsense, is left out.

    Raises:
        PeerError: the server refused for another reason than what a worker may have written.
    """
    found = {}
    for worker, reply in zip(ids, replies, strict=True):
        if isinstance(reply, AccessDenied | ConnectionFailed):
            raise reply
        life = None if isinstance(reply, PeerError) else Incarnation.from_reply(reply)
        if life is not None:
            found[worker] = life
    return found
