"""Several learners of one run: each keeps what it works on, and takes what another one gave up."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from rlbroker.backend.connection import Connection, Script
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import GROUP
from rlbroker.backend.replies import pending_rows
from rlbroker.backend.text import counted
from rlbroker.experience.pending import OWN, Holdings, Source

logger = logging.getLogger("rlbroker")

#: Entries of one stream that are taken over in one go.
TAKE_COUNT = 100

TAKE_ABANDONED = Script(
    "take_abandoned",
    OWN
    + """
    -- further ARGV: milliseconds for which an entry must have been idle, then ids
    local taken = {}
    for i = 5, #ARGV do
      local row = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1)[1]
      if row and not mine(ARGV[i]) and row[3] >= tonumber(ARGV[4]) then
        -- Its number of deliveries stays: it counts one more when it is handed out.
        redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2] .. '+', 0, ARGV[i], 'RETRYCOUNT', row[4], 'JUSTID')
        if mine(ARGV[i]) == nil then
          count('trimmed', 1)  -- somebody deleted it, and the server noticed just now
        else
          table.insert(taken, ARGV[i])
        end
      end
    end
    return taken
    """,
)

HAND_OUT = Script(
    "hand_out",
    OWN
    + """
    -- further ARGV: id, the consumer of this learner that has it, how often it is handed out with this time
    -- Has the server remember it, before a learner can die over it. Gives 0 where another learner has it now.
    if not mine(ARGV[4]) then return 0 end
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[5], 0, ARGV[4], 'RETRYCOUNT', ARGV[6], 'JUSTID')
    return 1
    """,
)

RENEW = Script(
    "renew",
    """
    -- KEYS: a stream
    -- ARGV: group, a consumer
    -- Only what the learner still has: another one may have taken some of it.
    if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
    local position, renewed = '-', 0
    while true do
      local rows = redis.call('XPENDING', KEYS[1], ARGV[1], position, '+', 100, ARGV[2])
      if #rows == 0 then return renewed end
      for _, row in ipairs(rows) do
        redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, row[1], 'RETRYCOUNT', row[4], 'JUSTID')
        position = '(' .. row[1]  -- by name: a number may be larger than Lua can count
        renewed = renewed + 1
      end
    end
    """,
)


class Ownership:
    """Which pending entries are this learner's."""

    def __init__(self, connection: Connection, holdings: Holdings, *, take_over_seconds: float) -> None:
        """Prepare.

        Args:
            connection: way to the server.
            holdings: what this learner holds.
            take_over_seconds: what another learner held for longer without renewing it, it gave up.
        """
        self._connection, self._holdings = connection, holdings
        self._idle_milliseconds = int(take_over_seconds * 1000)
        self._seconds = take_over_seconds
        self._next_renewal = Deadline(take_over_seconds / 3)

    def take_abandoned(self, sources: Sequence[Source]) -> list[bool]:
        """Take what other learners gave up; give for each stream whether something of it may be ours now.

        If the reply is lost, some is ours and nobody said so: therefore where something was asked for is given.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        ours, idle = self._holdings.consumers, self._idle_milliseconds
        rows = self._connection.execute_all(
            [("XPENDING", one.key, GROUP, "IDLE", idle, "-", "+", TAKE_COUNT) for one in sources]
        )
        wanted = [[row[0] for row in pending_rows(reply) if row[1] not in ours] for reply in rows]
        calls: list[tuple[Script, tuple[str, ...], tuple[Any, ...]]] = [
            (TAKE_ABANDONED, source.keys, (*self._holdings.signature, idle, *ids))
            for source, ids in zip(sources, wanted, strict=True)
            if ids
        ]
        taken = sum(bool(one) for ids in self._connection.run_all(calls) for one in ids)
        if taken:
            what = counted(taken, "batch was", "batches were")
            logger.warning("%s taken over from a learner that gave no sign of life", what)
        return [bool(ids) for ids in wanted]

    def hand_out(self, source: Source, entry_id: str, consumer: str, deliveries: int) -> bool:
        """Count one more delivery of an entry; give False if another learner has taken it over.

        Raises:
            Fenced: a newer learner of this name has taken over.
            PeerError: the server refused, or could not be reached in time.
        """
        arguments = (*self._holdings.signature, entry_id, consumer, deliveries)
        return bool(self._connection.run(HAND_OUT, source.keys, arguments) == 1)

    def renew(self, sources: Sequence[Source]) -> None:
        """Say of what is in this learner's hands that it still works on it, when it is time.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        if self._next_renewal.over:
            calls = [
                (RENEW, (one.key,), (GROUP, name)) for one in sources for name in self._holdings.consumers
            ]
            self._connection.run_where_there(calls)
            self._next_renewal = Deadline(self._seconds / 3)
