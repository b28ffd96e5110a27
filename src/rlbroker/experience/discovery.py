"""Finding the streams of batches that exist, and the pending entries that no read returned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from rlbroker.backend.connection import BLOCK_SECONDS, Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import GROUP
from rlbroker.backend.replies import consumer_pending
from rlbroker.backend.unreadable import answered, unless_spoiled
from rlbroker.errors import PeerError, ServerFault, ServerOutOfMemory, WrongKeyType
from rlbroker.experience.pending import PendingEntries, Takeover
from rlbroker.experience.read_position import ReadPosition, Stream
from rlbroker.experience.watched_streams import WatchedStreams

logger = logging.getLogger("rlbroker")

#: How often the server is asked for pending entries that are unknown here, for abandoned ones, and for retried batches.
RECHECK_SECONDS = 5.0

#: For how many workers at once; the others follow in turn.
RECHECK_WORKERS = 250


class StreamDiscovery:
    """Looks, now and then, for new streams, lost entries and abandoned entries. Not for several threads at once."""

    def __init__(
        self,
        connection: Connection,
        streams: WatchedStreams,
        pending: PendingEntries,
        takeover: Takeover,
        *,
        workers: Callable[[], Iterable[int]],
    ) -> None:
        """Prepare; the first search is due at once.

        Args:
            connection: connection to the server.
            streams: the streams to extend.
            pending: the learner's pending entries.
            takeover: takes over what other learners abandoned.
            workers: returns every worker id that may have batches.
        """
        self._connection, self._streams, self._pending = connection, streams, pending
        self._takeover, self._workers = takeover, workers
        self._next_search = self._next_recheck = Deadline(0)
        self._rechecked = 0  #: workers up to the one whose turn comes next

    def make_due(self) -> None:
        """Search for everything at the next opportunity."""
        self._next_search = self._next_recheck = Deadline(0)

    @property
    def is_due(self) -> bool:
        """Whether it is time to search for streams."""
        return self._next_search.over

    def find(self) -> None:
        """Watch streams that were created, and now and then recheck those that are watched.

        Raises:
            ConnectionFailed: no server could be reached.
        """
        self._next_search = Deadline(BLOCK_SECONDS)
        recheck = self._next_recheck.over
        workers = list(self._workers())
        names = [str(worker) for worker in workers]
        rechecked = set(self._next_workers(workers) if recheck else ())
        names += [
            f"again:{worker}" for worker in rechecked
        ]  # searched for less often: dead letters are seldom retried
        positions = [self._streams.position(name) for name in names]
        for reader, some in self._streams.by_reader(positions):
            if reader.is_away:
                continue
            with self._streams.skip_if_away(reader):
                workers_here = {one.stream.worker_id for one in some}
                self._pending.fence_older(workers_here, deadline=self._streams.deadline)
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
        """Watch those of these streams that exist on the server. Only workers create them: see `Sender`."""
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
        """Take over abandoned entries, and rescan streams in which more is pending on the server than is known here."""
        positions = [one for one in positions if one.stream.name in self._streams.watched]
        try:
            taken = self._takeover.take_abandoned([one.stream for one in positions])
            self._streams.rescan(one for one, some in zip(positions, taken, strict=True) if some)
            replies = self._connection.ask(
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
            )
            for position, summary, has_epoch, counts in zip(
                positions, answered(replies[::3]), answered(replies[1::3]), replies[2::3], strict=True
            ):
                stream = position.stream
                if has_epoch:
                    self._pending.remember_counts(stream.worker_id, unless_spoiled(counts, {}))
                else:  # the server has lost its counts, perhaps without breaking a connection
                    self._pending.restore([stream.worker_id], deadline=self._streams.deadline)
                if consumer_pending(summary, self._pending.consumers) > len(self._pending.ids(stream)):
                    self._streams.rescan([position])
        except ServerFault as error:
            if not is_stream_lost(error):
                raise
            return  # the next read fails too, and searches again

    def _create_group(self, stream: Stream) -> None:
        try:
            self._connection.execute("XGROUP CREATE", stream.key, GROUP, "0")
        except ServerOutOfMemory:
            pass  # the worker creates it with its stream; if it did not, the next read fails and searches again
        except PeerError as error:
            if "BUSYGROUP" not in str(error):
                raise


def is_stream_lost(error: ServerFault) -> bool:
    """Return whether an error means that a stream or its group does not exist, or that its key has another type."""
    texts = ("NOGROUP", "UNBLOCKED", "requires the key to exist", "no such key")
    return isinstance(error, WrongKeyType) or any(text in str(error) for text in texts)
