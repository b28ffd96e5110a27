"""What the learner holds: batches it has read and not acknowledged, and how it gives them up."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlbroker.connection import ALSO_WHEN_FULL, Connection, Script
from rlbroker.deadline import Deadline
from rlbroker.keys import GROUP, Keys

TAKE_OVER = Script(
    "take_over",
    f"""
    -- KEYS: a worker's counts
    -- ARGV: the learner's epoch
    {ALSO_WHEN_FULL}
    if (tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0') or 0) < tonumber(ARGV[1]) then
      redis.call('HSET', KEYS[1], 'epoch', ARGV[1])
    end
    return 1
    """,
)

ACKNOWLEDGE = Script(
    "acknowledge",
    """
    -- KEYS: a worker's experiences, its counts
    -- ARGV: group, the learner's epoch, then for each entry: id, stored bytes, what became of it
    if (tonumber(redis.call('HGET', KEYS[2], 'epoch') or '0') or 0) > tonumber(ARGV[2]) then
      return redis.error_reply('FENCED a newer learner has taken over the run')
    end
    local function count(field, by)
      local done = redis.pcall('HINCRBY', KEYS[2], field, by)
      -- The worker can write here too: what is no number begins anew.
      if type(done) == 'table' and done['err'] then redis.call('HSET', KEYS[2], field, by) end
    end
    local removed = 0
    for i = 3, #ARGV, 3 do
      if redis.call('XACK', KEYS[1], ARGV[1], ARGV[i]) == 1 then
        redis.call('XDEL', KEYS[1], ARGV[i])
        count(ARGV[i + 2], 1)
        count('removed_bytes', ARGV[i + 1])
        removed = removed + 1
      end
    end
    return removed
    """,
)


@dataclass
class _Held:
    """The entries of one worker, by id, with their stored bytes."""

    stream_key: str
    counts_key: str
    entries: dict[str, int] = field(default_factory=dict)


class Holdings:
    """The batches in one learner's hands. Safe to use from several threads; no lock is held while waiting."""

    def __init__(self, connection: Connection, keys: Keys, *, epoch: int) -> None:
        """Begin with empty hands.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            epoch: the learner's epoch; acknowledgements of older ones are refused.
        """
        self._connection, self._keys, self._epoch = connection, keys, epoch
        self._lock = threading.Lock()
        self._held: dict[int, _Held] = {}

    def take_over(self, workers: Sequence[int]) -> None:
        """Become the only learner whose acknowledgements for these workers are accepted.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        with self._lock:
            new = [one for one in workers if one not in self._held]
        self._connection.run_all([(TAKE_OVER, (self._keys.counts(one),), (self._epoch,)) for one in new])
        with self._lock:
            for one in new:
                self._held.setdefault(one, _Held(self._keys.experiences(one), self._keys.counts(one)))

    def add(self, worker: int, entry_id: str, stored_bytes: int) -> bool:
        """Note an entry that was read; give False if it is held already."""
        with self._lock:
            entries = self._held[worker].entries
            if entry_id in entries:
                return False
            entries[entry_id] = stored_bytes
            return True

    def counts(self) -> dict[int, int]:
        """Give how many batches of each worker are held."""
        with self._lock:
            return {worker: len(held.entries) for worker, held in self._held.items()}

    def count(self, worker: int) -> int:
        """Give how many batches of one worker are held."""
        with self._lock:
            return len(self._held[worker].entries)

    def settle(self, entries: Sequence[tuple[int, str, str]], *, deadline: Deadline | None = None) -> int:
        """Acknowledge, count and delete entries, in one step for each worker; give how many were there.

        Args:
            entries: worker id, entry id, and what became of it. What is not held is passed over.
            deadline: the connection's timeout by default.

        Raises:
            Fenced: a newer learner has taken over the run.
            PeerError: the server refused, or could not be reached in time.
        """
        by_worker: dict[int, list[Any]] = {}
        with self._lock:
            for worker, entry_id, reason in entries:
                held = self._held.get(worker)
                if held is not None and entry_id in held.entries:
                    by_worker.setdefault(worker, []).extend((entry_id, held.entries[entry_id], reason))
            calls = [
                (
                    ACKNOWLEDGE,
                    (self._held[worker].stream_key, self._held[worker].counts_key),
                    (GROUP, self._epoch, *arguments),
                )
                for worker, arguments in by_worker.items()
            ]
        removed = sum(int(number) for number in self._connection.run_all(calls, deadline=deadline))
        with self._lock:
            for worker, arguments in by_worker.items():
                for entry_id in arguments[::3]:
                    self._held[worker].entries.pop(entry_id, None)
        return removed
