"""Several learners of one run: each keeps what it works on, and takes what another one gave up."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import GROUP
from rlbroker.backend.replies import pending_rows
from rlbroker.backend.scripts import Script
from rlbroker.backend.text import counted
from rlbroker.experience.pending import PendingEntries, Source

logger = logging.getLogger("rlbroker")

#: Entries of one stream that are taken over in one go.
TAKE_COUNT = 100

TAKE_ABANDONED = Script.load("experience/lua/take_abandoned.lua")

HAND_OUT = Script.load("experience/lua/hand_out.lua")

RENEW = Script.load("experience/lua/renew.lua")


class Takeover:
    """Which pending entries are this learner's."""

    def __init__(self, connection: Connection, holdings: PendingEntries, *, take_over_seconds: float) -> None:
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
