"""The streams that a learner reads, and the search for new ones and for entries that no read returned."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rlbroker.backend.connection import BLOCK_SECONDS, Connection
from rlbroker.backend.deadline import ONE_TRY, Deadline
from rlbroker.backend.keys import GROUP, Keys, shard_of
from rlbroker.backend.replies import consumer_pending, default_if_wrong_type, raise_first_error
from rlbroker.errors import ConnectionFailed, PeerError, ServerFault, ServerOutOfMemory, WrongKeyType
from rlbroker.experience.pending import PendingEntries, Takeover
from rlbroker.experience.read_position import ReadPosition, Stream
from rlbroker.experience.stream_reader import ShardReader

logger = logging.getLogger("rlbroker")

#: How often the server is asked for pending entries that this learner does not know, for abandoned ones, and for
#: retried batches.
RECHECK_SECONDS = 5.0

#: How many workers are rechecked at once, in turn.
RECHECK_WORKERS = 250

#: A shard whose server is away is skipped for at least this long, and at least this many times as long as the attempt
#: to reach it took.
AWAY_SECONDS = 0.5
AWAY_ATTEMPTS = 2


class WatchedStreams:
    """The streams that exist, and which of them to scan for pending entries. Not thread-safe."""

    def __init__(self, connection: Connection, keys: Keys, consumer: str) -> None:
        """Begin with no stream. New entries are delivered to this consumer."""
        self._connection, self._keys, self._consumer = connection, keys, consumer
        #: All streams that the learner has searched for or restored from marks, by name.
        self.positions: dict[str, ReadPosition] = {}
        #: Of these, the streams that exist on the server.
        self.watched: dict[str, ReadPosition] = {}
        #: Of these, the streams that may have pending entries on the server that this learner does not know.
        self._to_scan: dict[str, ReadPosition] = {}
        self._readers: dict[str, ShardReader] = {}  #: by shard
        #: Whether a broken connection was closed since the caller reset this. It may have broken long before.
        self.dropped_connection = False

    def position(self, name: str) -> ReadPosition:
        """Return how far the learner has read the stream of this name."""
        position = self.positions.get(name)
        if position is None:
            position = self.positions[name] = ReadPosition(Stream.named(name, self._keys))
        return position

    def stream(self, name: str) -> Stream:
        """Return the stream of this name, even if the learner has not searched for it."""
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
        """Before the next read, scan streams from the beginning for pending entries that this learner does not know."""
        for position in positions:
            position.scan_from = "-"
            if position.stream.name in self.watched:
                self._to_scan[position.stream.name] = position

    def rescan_all(self) -> None:
        """Cancel all reads in progress, and rescan all streams: entries in lost replies are pending now."""
        self.rescan(self.watched.values())
        for reader in self._readers.values():
            reader.close()

    def to_scan(self, workers: Collection[int] | None = None) -> list[ReadPosition]:
        """Return the streams to scan for pending entries, without those of shards that are away.

        Args:
            workers: whose streams; None for all.
        """
        return [
            one
            for one in self._to_scan.values()
            if (workers is None or one.stream.worker_id in workers)
            and not self.reader_of(one.stream.key).is_away
        ]

    def note_scan(self, position: ReadPosition, scan_from: str | None) -> None:
        """Record where the scan of a stream continues; None if it is complete."""
        position.scan_from = scan_from
        if scan_from is None:
            position.first_scan = False
            self._to_scan.pop(position.stream.name, None)

    def reader_of(self, key: str) -> ShardReader:
        """Return the reader of the shard that has a key."""
        shard = shard_of(key)
        if shard not in self._readers:
            self._readers[shard] = ShardReader(self._connection, self._consumer, shard)
        return self._readers[shard]

    def readers(self, workers: Collection[int] | None = None) -> list[ShardReader]:
        """Return the readers that have streams to read, without those of shards that are away.

        Args:
            workers: whose streams; None for all.
        """
        return [one for one in self._readers.values() if one.has_any(workers) and not one.is_away]

    def by_reader(self, positions: Iterable[ReadPosition]) -> list[tuple[ShardReader, list[ReadPosition]]]:
        """Group streams by the reader of their shard."""
        found: dict[str, list[ReadPosition]] = {}
        for position in positions:
            found.setdefault(shard_of(position.stream.key), []).append(position)
        return [(self.reader_of(some[0].stream.key), some) for some in found.values()]

    @property
    def several_shards(self) -> bool:
        """Whether the streams are in several shards, whose servers may differ."""
        return len(self._readers) > 1

    @property
    def deadline(self) -> Deadline | None:
        """The deadline of each command: one attempt if there are several shards, as one must not delay the others."""
        return ONE_TRY if self.several_shards else None

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
            reader.outage.report(error, "the other shards are collected meanwhile")
            reader.skip_for(max(AWAY_SECONDS, AWAY_ATTEMPTS * (time.monotonic() - began)))
            self.rescan(reader.streams.values())


class StreamDiscovery:
    """The periodic search for new streams, lost entries and abandoned entries. Not thread-safe."""

    def __init__(
        self,
        connection: Connection,
        streams: WatchedStreams,
        pending: PendingEntries,
        takeover: Takeover,
        *,
        workers: Callable[[], Iterable[int]],
    ) -> None:
        """Create a search that is due at once. `workers` returns every worker id that may have batches."""
        self._connection, self._streams, self._pending = connection, streams, pending
        self._takeover, self._workers = takeover, workers
        self._next_search = self._next_recheck = Deadline(0)
        self._rechecked = 0  #: index of the worker to recheck next

    def make_due(self) -> None:
        """Make every search due now."""
        self._next_search = self._next_recheck = Deadline(0)

    @property
    def is_due(self) -> bool:
        """Whether it is time to search for streams."""
        return self._next_search.over

    def find(self) -> None:
        """Watch streams that were created; every `RECHECK_SECONDS`, recheck the watched streams."""
        self._next_search = Deadline(BLOCK_SECONDS)
        recheck = self._next_recheck.over
        workers = list(self._workers())
        names = [str(worker) for worker in workers]
        rechecked = set(self._next_workers(workers) if recheck else ())
        # The streams of retried dead letters are searched for less often, because they are seldom used.
        names += [f"again:{worker}" for worker in rechecked]
        positions = [self._streams.position(name) for name in names]
        for reader, some in self._streams.by_reader(positions):
            if reader.is_away:
                continue
            with self._streams.skip_if_away(reader):
                worker_ids = {one.stream.worker_id for one in some}
                self._pending.fence_older(worker_ids, deadline=self._streams.deadline)
                self.watch_existing([one for one in some if one.stream.name not in self._streams.watched])
                if recheck:
                    self.recheck([one for one in some if one.stream.worker_id in rechecked])
        if recheck:
            self._next_recheck = Deadline(RECHECK_SECONDS)

    def _next_workers(self, workers: Sequence[int]) -> Sequence[int]:
        if len(workers) <= RECHECK_WORKERS:
            return workers
        first = self._rechecked % len(workers)
        self._rechecked = first + RECHECK_WORKERS
        return workers[first : first + RECHECK_WORKERS]

    def watch_existing(self, positions: Sequence[ReadPosition]) -> None:
        """Watch those of these streams that exist on the server. Only workers create streams."""
        types = self._connection.execute_all(
            [("TYPE", position.stream.key) for position in positions], deadline=self._streams.deadline
        )
        for position, found in zip(positions, types, strict=True):
            self._streams.unwatch(position)
            if found in (b"stream", "stream"):
                self._create_group(position.stream)
                self._streams.watch(position)
            elif found not in (b"none", "none"):
                logger.warning(
                    "worker %d wrote a %s in place of its stream of batches; it is deleted",
                    position.stream.worker_id,
                    found.decode(),
                )
                self._connection.execute("UNLINK", position.stream.key)

    def recheck(self, positions: Iterable[ReadPosition]) -> None:
        """Take over abandoned entries, and rescan streams with more pending entries than this learner knows."""
        positions = [one for one in positions if one.stream.name in self._streams.watched]
        try:
            taken = self._takeover.take_abandoned([one.stream for one in positions])
            self._streams.rescan(one for one, some in zip(positions, taken, strict=True) if some)
            replies = self._connection.execute_all(
                [
                    command
                    for one in positions
                    for command in (
                        ("XPENDING", one.stream.key, GROUP),
                        ("HEXISTS", one.stream.epochs_key, self._pending.name),
                        ("HGETALL", one.stream.counts_key),
                    )
                ],
                deadline=self._streams.deadline,
                strict=False,
            )
            for position, summary, has_epoch, counts in zip(
                positions,
                raise_first_error(replies[::3]),
                raise_first_error(replies[1::3]),
                replies[2::3],
                strict=True,
            ):
                stream = position.stream
                if has_epoch:
                    found = default_if_wrong_type(counts, {})
                    self._pending.write_counts(self._pending.remember_counts, stream.worker_id, found)
                else:  # the server has lost its counts, perhaps without a broken connection
                    self._pending.restore([stream.worker_id], deadline=self._streams.deadline)
                if consumer_pending(summary, self._pending.consumers) > len(self._pending.of_stream(stream)):
                    self._streams.rescan([position])
        except ServerFault as error:
            if not is_stream_lost(error):  # otherwise the next read fails too, and searches for the stream
                raise

    def _create_group(self, stream: Stream) -> None:
        try:
            self._connection.execute("XGROUP CREATE", stream.key, GROUP, "0")
        except ServerOutOfMemory:
            pass  # the worker creates it with its stream; otherwise the next read fails, and searches for it
        except PeerError as error:
            # A stream that was lost after it was found: the next read fails too, and searches for it.
            lost = isinstance(error, ServerFault) and is_stream_lost(error)
            if not lost and "BUSYGROUP" not in str(error):
                raise


def is_stream_lost(error: ServerFault) -> bool:
    """Return whether an error means that a stream or its group does not exist, or that its key has another type."""
    texts = ("NOGROUP", "UNBLOCKED", "requires the key to exist", "no such key")
    return isinstance(error, WrongKeyType) or any(text in str(error) for text in texts)
