"""Reads new entries from the streams of one shard, over a dedicated connection. A single server is one shard."""

from __future__ import annotations

import selectors
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Argument, Connection
from rlbroker.backend.deadline import SHORTEST_TRY_SECONDS, Deadline, within
from rlbroker.backend.keys import GROUP
from rlbroker.backend.replies import StreamEntries, stream_entries
from rlbroker.backend.threads import OutageLog
from rlbroker.errors import PeerError, raise_again
from rlbroker.experience.read_position import ReadPosition

#: Up to this many quiet streams cost almost nothing, so all streams are polled each time.
FEW: Final = 32

#: A stream is quiet when it has had nothing new for this long.
QUIET_SECONDS: Final = 2.0

#: How long quiet streams are skipped, for each quiet stream: polling one costs about a hundredth of that.
SKIP_SECONDS: Final = 0.0001

#: The longest that quiet streams are skipped.
MAX_SKIP_SECONDS: Final = 0.2

T = TypeVar("T")


class PollSchedule:
    """The choice of streams that a read polls: busy ones each time, quiet ones now and then.

    So the cost of a read depends on what arrives, not on the number of workers.
    """

    def __init__(self) -> None:
        """Begin by polling all streams."""
        self._busy: dict[str, float] = {}  #: when each stream last had something new, by key
        self._poll_all_at = 0.0

    def poll_all(self) -> None:
        """Poll all streams at the next read."""
        self._poll_all_at = 0.0

    def choose(self, streams: Mapping[str, T], now: float) -> tuple[list[T], float | None]:
        """Return the streams to poll, and the seconds until all are polled; None for the latter if all are now.

        Args:
            streams: all streams that can be polled, by key.
            now: seconds by a monotonic clock.
        """
        quiet = len(streams) - len(self._busy)
        if quiet > FEW and now < self._poll_all_at:
            busy = [streams[key] for key in self._busy if key in streams]
            if busy:
                return busy, self._poll_all_at - now
        return list(streams.values()), None

    def note(self, found: Iterable[str], streams: int, now: float, *, polled_all: bool) -> None:
        """Record which streams had something new.

        Args:
            found: their keys.
            streams: how many streams can be polled.
            now: seconds by the clock of `choose`, after the read.
            polled_all: whether all streams were polled.
        """
        self._busy |= dict.fromkeys(found, now)
        if polled_all:
            self._busy = {key: at for key, at in self._busy.items() if now - at < QUIET_SECONDS}
            quiet = streams - len(self._busy)
            self._poll_all_at = now + min(MAX_SKIP_SECONDS, quiet * SKIP_SECONDS)


@dataclass(frozen=True)
class _Read:
    """A read in progress.

    Attributes:
        count: the most entries of each stream that it returns.
        polls_all: whether all streams are polled.
        skips_some: whether quiet streams were skipped.
        reply_due: when the server must have replied.
    """

    count: int
    polls_all: bool
    skips_some: bool
    reply_due: Deadline


class ShardReader:
    """Reads new entries of one shard's streams: one read at a time, which may block. Not thread-safe."""

    def __init__(self, connection: Connection, consumer: str, shard: str) -> None:
        """Create a reader; nothing is connected yet. The shard is the prefix of the streams' keys."""
        self.channel = Channel(connection, f"{shard}:x")
        #: The streams that are read, by key.
        self.streams: dict[str, ReadPosition] = {}
        self._consumer, self._schedule = consumer, PollSchedule()
        self._reply_seconds = connection.socket_seconds
        self._read: _Read | None = None
        self._was_connected = False
        self._away = Deadline(0)
        #: Failures since the last successful read, and the log of the times when the shard is skipped for them.
        self.failures, self.outage = 0, OutageLog(f"collecting from {shard}")
        #: Whether the last read returned everything in the streams it polled; and whether it skipped some streams.
        self.drained = self.skipped_some = False

    @property
    def is_reading(self) -> bool:
        """Whether a read is in progress."""
        return self._read is not None

    def has_any(self, workers: Collection[int] | None) -> bool:
        """Return whether there are streams of these workers; None for any worker."""
        return any(workers is None or one.stream.worker_id in workers for one in self.streams.values())

    @property
    def is_overdue(self) -> bool:
        """Whether the reply to the read in progress is overdue."""
        return self._read is not None and self._read.reply_due.over

    @property
    def is_away(self) -> bool:
        """Whether the shard is skipped for now, because its server did not answer."""
        return not self._away.over

    def skip_for(self, seconds: float) -> None:
        """Cancel the read in progress, and skip the shard for a while."""
        self.close()
        self._away = Deadline(seconds)

    def reconnect(self) -> bool:
        """Connect if there is no connection; return whether a new one has replaced an earlier one.

        Its server may then have lost something: entries that it delivered, or counts.
        """
        if self.is_reading or not self.channel.connect():
            return False
        was_connected, self._was_connected = self._was_connected, True
        return was_connected

    def poll_all(self) -> None:
        """Poll all streams at the next read."""
        self._schedule.poll_all()

    def start_read(
        self,
        count: int,
        wait_seconds: float | None,
        *,
        workers: Collection[int] | None = None,
        after: Sequence[Sequence[Argument]] = (),
    ) -> None:
        """Start a read.

        Args:
            count: the most entries of each stream.
            wait_seconds: how long to block until a first entry arrives; None to not block.
            workers: the workers whose streams are read, at least one of which has a stream; None for all.
            after: commands to send before the read. Their replies come first; the caller must receive them.
        """
        skip_seconds = None
        if workers is None:
            positions, skip_seconds = self._schedule.choose(self.streams, time.monotonic())
        else:
            positions = [one for one in self.streams.values() if one.stream.worker_id in workers]
        command: list[Argument] = ["XREADGROUP", "GROUP", GROUP, self._consumer, "COUNT", count]
        if wait_seconds is not None:
            wait_seconds = wait_seconds if skip_seconds is None else min(wait_seconds, skip_seconds)
            command += ["BLOCK", max(1, int(wait_seconds * 1000))]
        command += ["STREAMS", *(position.stream.key for position in positions), *(">" for _ in positions)]
        self.channel.send([*after, command])
        reply_due = Deadline((wait_seconds or 0.0) + self._reply_seconds)
        skips_some = skip_seconds is not None
        self._read = _Read(count, workers is None and not skips_some, skips_some, reply_due)

    def finish_read(self) -> list[StreamEntries]:
        """Wait for the reply to the read in progress, and return its entries.

        Raise `SlotMigrating` while a Cluster is moving the streams.
        """
        read, self._read = self._read, None
        assert read is not None
        with within(Deadline(SHORTEST_TRY_SECONDS)) if read.reply_due.over else nullcontext():
            (reply,) = self.channel.receive(1)
        if isinstance(reply, PeerError):
            raise_again(reply)
        self.failures = 0
        self.outage.end()
        found = stream_entries(reply)
        keys = [key for key, _ in found]
        self._schedule.note(keys, len(self.streams), time.monotonic(), polled_all=read.polls_all)
        self.drained = all(len(entries) < read.count for _, entries in found)
        self.skipped_some = read.skips_some
        return found

    def close(self) -> None:
        """Cancel the read in progress; entries in its reply stay pending on the server."""
        self._read = None
        self.channel.close()


def wait_for_replies(readers: Sequence[ShardReader], wait_seconds: float) -> list[ShardReader]:
    """Wait for a reply to any of these reads in progress; return the readers with a reply, or with an overdue one."""
    if not readers:
        return []
    with selectors.DefaultSelector() as selector:
        for reader in readers:
            sock: Any = reader.channel.raw_socket
            selector.register(sock, selectors.EVENT_READ, reader)
        ended = [key.data for key, _ in selector.select(wait_seconds)]
    return [*ended, *(one for one in readers if one.is_overdue and one not in ended)]
