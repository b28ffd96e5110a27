"""The streams of batches that a learner reads: how far it has read each, and the reader of each shard."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys, shard_of
from rlbroker.errors import ConnectionFailed
from rlbroker.experience.read_position import ReadPosition, Stream
from rlbroker.experience.stream_reader import ShardReader

#: A shard whose server is away is skipped for at least this long, and at least this many times as long as the attempt
#: to reach it took.
AWAY_SECONDS = 0.5
AWAY_ATTEMPTS = 2


class WatchedStreams:
    """The streams that exist, and which of them must be scanned for pending entries. Not thread-safe."""

    def __init__(self, connection: Connection, keys: Keys, consumer: str) -> None:
        """Begin with no stream.

        Args:
            connection: connection to the server.
            keys: names of the run's keys.
            consumer: the consumer that new entries are delivered to.
        """
        self._connection, self._keys, self._consumer = connection, keys, consumer
        #: All streams that the learner has looked for or restored from marks, by name.
        self.positions: dict[str, ReadPosition] = {}
        #: Of these, the streams that exist on the server.
        self.watched: dict[str, ReadPosition] = {}
        #: Of these, the streams that may have entries which are pending on the server and unknown here.
        self._to_scan: dict[str, ReadPosition] = {}
        self._readers: dict[str, ShardReader] = {}  #: by shard
        #: Whether a broken connection was closed since the caller reset this: it may have broken long ago.
        self.dropped_connection = False

    def position(self, name: str) -> ReadPosition:
        """Return how far the learner has read the stream of this name."""
        position = self.positions.get(name)
        if position is None:
            position = self.positions[name] = ReadPosition(Stream.named(name, self._keys))
        return position

    def stream(self, name: str) -> Stream:
        """Return the stream of this name, also if the learner never looked for it."""
        position = self.positions.get(name)
        return Stream.named(name, self._keys) if position is None else position.stream

    def watch(self, position: ReadPosition) -> None:
        """Watch a stream, beginning with a scan for its pending entries."""
        key = position.stream.key
        self.watched[position.stream.name] = self.reader_of(key).streams[key] = position
        self.rescan([position])

    def unwatch(self, position: ReadPosition) -> None:
        """Stop watching a stream, if it is watched."""
        self.watched.pop(position.stream.name, None)
        self._to_scan.pop(position.stream.name, None)
        reader = self.reader_of(position.stream.key)
        reader.streams.pop(position.stream.key, None)
        reader.poll_all()

    def rescan(self, positions: Iterable[ReadPosition]) -> None:
        """Scan streams from their beginning, before the next read, for pending entries that are unknown here."""
        for position in positions:
            position.scan_from = "-"
            if position.stream.name in self.watched:
                self._to_scan[position.stream.name] = position

    def rescan_all(self) -> None:
        """Give up all reads in progress: their replies may be lost, with entries that are pending now."""
        self.rescan(self.watched.values())
        for reader in self._readers.values():
            reader.close()

    def to_scan(self) -> list[ReadPosition]:
        """Return the streams to scan for pending entries, without those of shards that are away."""
        return [one for one in self._to_scan.values() if not self.reader_of(one.stream.key).is_away]

    def note_scan(self, position: ReadPosition, scan_from: str | None) -> None:
        """Record where the scan of a stream continues; None if it is complete."""
        position.scan_from = scan_from
        if scan_from is None:
            self._to_scan.pop(position.stream.name, None)
        position.first_scan = position.first_scan and scan_from is not None

    def reader_of(self, key: str) -> ShardReader:
        """Return the reader of the shard that has a key."""
        shard = shard_of(key)
        if shard not in self._readers:
            self._readers[shard] = ShardReader(self._connection, self._consumer, shard)
        return self._readers[shard]

    def readers(self) -> list[ShardReader]:
        """Return the readers that have streams to read, without those of shards that are away."""
        return [reader for reader in self._readers.values() if reader.streams and not reader.is_away]

    def by_reader(self, positions: Iterable[ReadPosition]) -> list[tuple[ShardReader, list[ReadPosition]]]:
        """Group streams by the reader of their shard."""
        found: dict[str, list[ReadPosition]] = {}
        for position in positions:
            found.setdefault(shard_of(position.stream.key), []).append(position)
        return [(self.reader_of(some[0].stream.key), some) for some in found.values()]

    @property
    def deadline(self) -> Deadline | None:
        """The deadline of each command: one attempt if there are several shards, as one must not hold up the others."""
        return Deadline(0) if len(self._readers) > 1 else None

    @contextmanager
    def skip_if_away(self, reader: ShardReader) -> Iterator[None]:
        """Skip a shard for a while if its server is away within this block, as long as another shard answers.

        After a first failure the connection is only closed, because it may have broken long ago.
        """
        began = time.monotonic()
        try:
            yield
        except ConnectionFailed as error:
            reader.failures += 1
            if reader.failures == 1 and self.deadline is not None:
                reader.close()
                self.rescan(reader.streams.values())
                self.dropped_connection = True
                return
            others = [one for one in self._readers.values() if one.streams and one is not reader]
            if all(one.is_away for one in others):
                raise
            reader.outage.tell(error, "the other shards are collected meanwhile")
            reader.skip_for(max(AWAY_SECONDS, AWAY_ATTEMPTS * (time.monotonic() - began)))
            self.rescan(reader.streams.values())
