"""Who ever took part in a run, and in which life: what learners, commands and people read of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rlbroker.config import MAX_WORKER_ID
from rlbroker.connection import Argument
from rlbroker.errors import AccessDenied, ConnectionFailed, PeerError
from rlbroker.keys import Keys
from rlbroker.replies import text_fields, whole_number


class Life(NamedTuple):
    """The newest life of a worker id, as its `life:` hash has it. Workers write it, so it is read with care."""

    incarnation: int
    member: bool  #: whether it takes part; False once it has left, or was given up
    seen_milliseconds: int  #: when it was heard of last, by the server's clock
    known_version: int = 0  #: the newest version that it saw on a server which has lost it; 0 for none

    @classmethod
    def from_fields(cls, said: Mapping[str, str]) -> Life | None:
        """Read the fields of the hash; None where they are of no life."""
        names = ("incarnation", "seen", "known_version")
        incarnation, seen, known = (whole_number(said.get(name, "")) or 0 for name in names)
        return cls(incarnation, said.get("member") == "1", seen, known) if incarnation else None


@dataclass(frozen=True)
class Lives:
    """Every worker id that the run ever had, in order, with its newest life.

    Attributes:
        of: by worker.
        unusable: members of the set that are no worker with a life: a worker wrote nonsense.
    """

    of: Mapping[int, Life] = field(default_factory=dict)
    unusable: Sequence[bytes] = ()

    @property
    def named(self) -> int:
        """How many members the set has."""
        return len(self.of) + len(self.unusable)

    @property
    def members(self) -> dict[int, Life]:
        """Those who take part now."""
        return {worker: life for worker, life in self.of.items() if life.member}


def worker_numbers(names: Iterable[bytes]) -> list[int]:
    """Give the worker ids among the members of the set `workers`, in order."""
    return sorted(worker for name in names if (worker := worker_number_of(name)) is not None)


def worker_number_of(name: bytes) -> int | None:
    """Give the worker that a member of the set `workers` is; None for what is no worker id."""
    text = str(name, "ascii", "replace")
    number = whole_number(text)
    return number if number is not None and number <= MAX_WORKER_ID and str(number) == text else None


def read_lives(ask: Callable[[Sequence[Sequence[Argument]]], list[Any]], keys: Keys) -> Lives:
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
    numbered = {worker: name for name in names if (worker := worker_number_of(name)) is not None}
    ids = sorted(numbered)
    lives = lives_from(ids, ask([("HGETALL", keys.life(worker)) for worker in ids]) if ids else [])
    return Lives(lives, [name for name in names if worker_number_of(name) not in lives])


def lives_from(ids: Iterable[int], replies: Iterable[Any]) -> dict[int, Life]:
    """Give the lives that were read; a worker whose hash is none, or nonsense, is left out.

    Raises:
        PeerError: the server refused for another reason than what a worker may have written.
    """
    found = {}
    for worker, reply in zip(ids, replies, strict=True):
        if isinstance(reply, AccessDenied | ConnectionFailed):
            raise reply
        life = None if isinstance(reply, PeerError) else Life.from_fields(text_fields(reply))
        if life is not None:
            found[worker] = life
    return found
