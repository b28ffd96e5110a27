"""The workers of a run and their newest incarnations, read from what the workers wrote about themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, NamedTuple

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import number_in, whole_number
from rlbroker.config import MAX_WORKER_ID
from rlbroker.errors import AccessDenied, ConnectionFailed, PeerError, raise_again

#: Bounds on the versions that workers claim to have seen on a server that lost them: an absolute one, and one above the
#: latest version where that is known. A larger claim is ignored, so that no worker can use up the version numbers.
MAX_CLAIMED_VERSION: Final = 1 << 40
MAX_CLAIMED_STEP: Final = 10_000_000

#: Length of the longest valid member of the set `workers`.
_LONGEST_NAME: Final = len(str(MAX_WORKER_ID))


class Incarnation(NamedTuple):
    """The newest incarnation of a worker id, from its `life:` hash. Workers write that, so nothing in it is trusted."""

    number: int
    member: bool  #: whether it is a member of the run; False after it left or was forgotten
    seen_milliseconds: int  #: the time of its last heartbeat, by the server's clock
    #: The newest version that the worker claims to have seen before the server lost it (field `known_version`); 0 for
    #: none. The learner must not use version numbers up to this one again.
    claimed_version: int = 0

    @classmethod
    def from_reply(cls, reply: Sequence[bytes | None]) -> Incarnation | None:
        """Parse the reply of `incarnation_command`; None if it holds no valid incarnation."""
        incarnation, member, seen, claimed = (str(one or b"", "ascii", "replace") for one in reply)
        number = whole_number(incarnation)
        # Scripts compare it as text, so `07` must not count as 7.
        if not number or str(number) != incarnation:
            return None
        return cls(number, member == "1", whole_number(seen) or 0, whole_number(claimed) or 0)

    def silent_seconds(self, now: float, back_milliseconds: int = 0) -> float:
        """Return the seconds since its last heartbeat.

        Args:
            now: the server's clock in seconds.
            back_milliseconds: when the learner last opened or restored the run. Silence before that does not count,
                as in `silent_since.lua`: the server may have been unreachable.
        """
        return max(0.0, now - max(self.seen_milliseconds, back_milliseconds) / 1000)


@dataclass(frozen=True)
class Incarnations:
    """Every worker id that the run ever had, in order, with its newest incarnation.

    Attributes:
        by_worker: incarnations by worker id.
        invalid_names: members of the set `workers` without a valid id or incarnation; a worker wrote them.
        back_milliseconds: when the learner last opened or restored the run, by the server's clock.
    """

    by_worker: Mapping[int, Incarnation] = field(default_factory=dict)
    invalid_names: Sequence[bytes] = ()
    back_milliseconds: int = 0

    @property
    def names_count(self) -> int:
        """The number of members of the set `workers`."""
        return len(self.by_worker) + len(self.invalid_names)

    @property
    def members(self) -> dict[int, Incarnation]:
        """The current members of the run, with their incarnations."""
        return {worker: incarnation for worker, incarnation in self.by_worker.items() if incarnation.member}

    def alive(self, now: float, lease_seconds: float) -> frozenset[int]:
        """Return the members within their lease; `now` is the server's clock in seconds."""
        back = self.back_milliseconds
        return frozenset(
            [
                worker
                for worker, incarnation in self.members.items()
                if incarnation.silent_seconds(now, back) < lease_seconds
            ]
        )


def incarnation_command(keys: Keys, worker: int) -> tuple[str, ...]:
    """Return the command that reads an incarnation, without other fields that the worker may have added."""
    return ("HMGET", keys.life(worker), "incarnation", "member", "seen", "known_version")


def parse_worker_ids(names: Iterable[bytes]) -> list[int]:
    """Return the valid worker ids among the members of the set `workers`, in order."""
    return sorted(worker for name in names if (worker := parse_worker_id(name)) is not None)


def parse_worker_id(name: bytes) -> int | None:
    """Return the worker id that a member of the set `workers` stands for; None if it is invalid."""
    # Workers choose these names: long ones must not fill the cache.
    return _parse_short_id(name) if len(name) <= _LONGEST_NAME else None


@lru_cache(maxsize=1 << 16)  # the same names are parsed for each batch
def _parse_short_id(name: bytes) -> int | None:
    text = str(name, "ascii", "replace")
    number = whole_number(text)
    return number if number is not None and number <= MAX_WORKER_ID and str(number) == text else None


def read_incarnations(connection: Connection | Channel, keys: Keys) -> Incarnations:
    """Read the incarnations of all workers that the run ever had, in two round trips.

    Raises:
        AccessDenied: a right is missing.
    """
    names, back = connection.execute_all(
        [("SMEMBERS", keys.workers), ("HGET", keys.meta, "back_at")], strict=True
    )
    ids = parse_worker_ids(names)
    commands = [incarnation_command(keys, worker) for worker in ids]
    found = parse_incarnations(ids, connection.execute_all(commands, strict=False))
    invalid_names = [name for name in names if parse_worker_id(name) not in found]
    return Incarnations(found, invalid_names, number_in(back) or 0)


def believed_claim(claimed_version: int, latest: int) -> int:
    """Return a worker's claim to have seen a version, or 0 if it is beyond the bounds."""
    limit = min(MAX_CLAIMED_VERSION, latest + MAX_CLAIMED_STEP) if latest else MAX_CLAIMED_VERSION
    return claimed_version if claimed_version <= limit else 0


def parse_incarnations(ids: Iterable[int], replies: Iterable[Any]) -> dict[int, Incarnation]:
    """Parse replies of `incarnation_command`, and leave out workers whose reply is invalid.

    Raises:
        AccessDenied: a right is missing.
        ConnectionFailed: the server could not be reached.
    """
    found = {}
    for worker, reply in zip(ids, replies, strict=True):
        if isinstance(reply, AccessDenied | ConnectionFailed):
            raise_again(reply)
        incarnation = None if isinstance(reply, PeerError) else Incarnation.from_reply(reply)
        if incarnation is not None:
            found[worker] = incarnation
    return found
