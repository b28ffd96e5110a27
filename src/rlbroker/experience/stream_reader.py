"""Reading what is new in the streams of one shard, over a connection of its own; on a single server there is one."""

from __future__ import annotations

import selectors
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Argument, Connection
from rlbroker.backend.deadline import SHORTEST_TRY_SECONDS, Deadline, within
from rlbroker.backend.keys import GROUP
from rlbroker.backend.replies import StreamEntries, stream_entries
from rlbroker.backend.threads import OutageLog
from rlbroker.errors import PeerError
from rlbroker.experience.poll_schedule import Turns
from rlbroker.experience.read_position import Stream


@dataclass(frozen=True)
class _Asked:
    """A read that is under way.

    Attributes:
        streams: how many streams it is about.
        count: how many entries of each it gives at most.
        left_out: whether streams were left out that had nothing for a while.
        answer_due: when the server has answered, or hangs.
    """

    streams: int
    count: int
    left_out: bool
    answer_due: Deadline


class ShardReader:
    """Has at most one read under way, which may wait for something new. Not for several threads at once."""

    def __init__(self, connection: Connection, consumer: str, shard: str) -> None:
        """Prepare a reader; nothing is connected yet.

        Args:
            connection: way to the server.
            consumer: for whom it reads.
            shard: what the names of the streams begin with.
        """
        self.channel = Channel(connection, f"{shard}:x")
        #: What is read, by key.
        self.streams: dict[str, Stream] = {}
        self._consumer, self._turns = consumer, Turns()
        self._patience_seconds = connection.socket_seconds
        self._asked: _Asked | None = None
        self._had_one = False
        self._away = Deadline(0)
        #: How often it failed since it has read something, and what is told when it is left out.
        self.failures, self.outage = 0, OutageLog(f"collecting from {shard}")
        #: Whether the last read took all that was there, as far as it asked; and whether it asked for all.
        self.drained = self.left_out = False

    @property
    def waits(self) -> bool:
        """Whether a read is under way."""
        return self._asked is not None

    @property
    def hangs(self) -> bool:
        """Whether a read has been under way for too long."""
        return self._asked is not None and self._asked.answer_due.over

    @property
    def is_away(self) -> bool:
        """Whether it is left out for now."""
        return not self._away.over

    def leave_out(self, seconds: float) -> None:
        """Give up what is under way, and do not read for a while."""
        self.close()
        self._away = Deadline(seconds)

    def begins_anew(self) -> bool:
        """Give whether there was a connection, and it is another one now: its server may know less than we do.

        Raises:
            ConnectionFailed: there is no connection.
        """
        if self.waits or not self.channel.connect():
            return False
        had_one, self._had_one = self._had_one, True
        return had_one

    def ask_all(self) -> None:
        """Have the next read leave no stream out."""
        self._turns.ask_all()

    def ask(
        self, count: int, wait_seconds: float | None, *, after: Sequence[Sequence[Argument]] = ()
    ) -> None:
        """Begin a read.

        Args:
            count: entries of each stream, at most.
            wait_seconds: how long it waits for a first entry; None for not at all.
            after: commands that go before it. Their answers come first and are the caller's to receive.

        Raises:
            ConnectionFailed: the connection broke.
        """
        streams, turn_seconds = self._turns.choose(self.streams, time.monotonic())
        command: list[Argument] = ["XREADGROUP", "GROUP", GROUP, self._consumer, "COUNT", count]
        if wait_seconds is not None:
            wait_seconds = wait_seconds if turn_seconds is None else min(wait_seconds, turn_seconds)
            command += ["BLOCK", max(1, int(wait_seconds * 1000))]
        command += ["STREAMS", *(stream.source.key for stream in streams), *(">" for _ in streams)]
        self.channel.send([*after, command])
        answer_due = Deadline((wait_seconds or 0.0) + self._patience_seconds)
        self._asked = _Asked(len(streams), count, turn_seconds is not None, answer_due)

    def take(self) -> list[StreamEntries]:
        """Give what the read that is under way has found, once it has; nothing if it found nothing.

        Raises:
            KeysMove: a Cluster moves the streams.
            PeerError: the server refused, or the connection broke.
        """
        asked, self._asked = self._asked, None
        assert asked is not None
        with within(Deadline(SHORTEST_TRY_SECONDS)) if asked.answer_due.over else nullcontext():
            (reply,) = self.channel.receive(1)
        if isinstance(reply, PeerError):
            raise reply
        self.failures = 0
        self.outage.end()
        found = stream_entries(reply)
        having = [key for key, _ in found]
        self._turns.note(having, len(self.streams), time.monotonic(), all_asked=not asked.left_out)
        self.drained = all(len(entries) < asked.count for _, entries in found)
        self.left_out = asked.left_out
        return found

    def close(self) -> None:
        """Give up what is under way: what it found is pending."""
        self._asked = None
        self.channel.close()


def ready(readers: Sequence[ShardReader], wait_seconds: float) -> list[ShardReader]:
    """Give the readers whose reads have ended, or hang; wait for the first of them.

    Args:
        readers: with a read under way each.
        wait_seconds: how long to wait at most.
    """
    if not readers:
        return []
    with selectors.DefaultSelector() as selector:
        for reader in readers:
            sock: Any = reader.channel.raw_socket
            selector.register(sock, selectors.EVENT_READ, reader)
        ended = [key.data for key, _ in selector.select(wait_seconds)]
    return [*ended, *(one for one in readers if one.hangs and one not in ended)]
