"""The learner's half: a version is encoded once and stored in chunks; then one atomic step makes it the latest.

The learner keeps the stored bytes of its latest version. A server that comes back without them gets them again,
under a new version: a number is never used twice.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Final

from rlbroker.connection import LEADER_ONLY, Argument, Channel, Connection, Script, flat
from rlbroker.deadline import Deadline
from rlbroker.errors import ConnectionFailed, Fenced, PeerError, RunLost, ServerOutOfMemory
from rlbroker.keys import Keys
from rlbroker.records import PublishReceipt
from rlbroker.replies import text_fields
from rlbroker.weights.pointer import CHUNK_BYTES, Pointer, digest_of
from rlbroker.wire import Plan, StoredSegment, plan

logger = logging.getLogger("rlbroker")

#: Raw bytes of one segment: the piece that is compressed, sent and decoded as one.
SEGMENT_BYTES: Final = 4 << 20

#: Segments that may be encoded ahead of sending; bounds the memory that publishing takes.
SEGMENTS_AHEAD: Final = 8

#: Chunks of a version that was never committed expire after this.
UNCOMMITTED_SECONDS: Final = 3600

#: Chunks of a superseded version stay this long for those who are still reading.
SUPERSEDED_SECONDS: Final = 60

#: But no more than this of them: frequent versions must not fill the server.
SUPERSEDED_BYTES: Final = 1 << 30

#: How many versions' times of publication are remembered.
TIMES_KEPT: Final = 10_000

COMMIT = Script(
    "commit",
    LEADER_ONLY
    + """
    -- KEYS: meta, weights, control, notify channel
    -- ARGV: epoch, version, upload, then field and value pairs of the pointer
    local latest = redis.call('HMGET', KEYS[2], 'upload', 'version')
    if latest[1] == ARGV[3] then
      return 'committed'  -- before; the reply was lost
    end
    -- What workers saw on a server that lost it, and what an earlier try of ours came through with after all.
    local floor = tonumber(redis.call('HGET', KEYS[1], 'version_floor') or '0') or 0
    if math.max(floor, tonumber(latest[2] or '0')) >= tonumber(ARGV[2]) then
      return 'taken'
    end
    redis.call('HSET', KEYS[2], unpack(ARGV, 4))
    redis.call('XADD', KEYS[3], '*', 'event', 'version', 'version', ARGV[2])
    redis.call('PUBLISH', KEYS[4], ARGV[2])
    return 'committed'
    """,
)


class Publisher:
    """Publishes the versions of one learner. Safe to use from several threads."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        epoch: int,
        segment_bytes: int = SEGMENT_BYTES,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Take over from the version that the run has now.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            epoch: the learner's epoch; a newer one fences this.
            segment_bytes: raw bytes that are compressed as one.
            chunk_bytes: a chunk is closed once it holds this much.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        self._connection, self._keys, self._epoch = connection, keys, epoch
        self._segment_bytes, self._chunk_bytes = segment_bytes, chunk_bytes
        self._lock = threading.Lock()
        self._attempt = 0
        #: A commit of which nobody said what became of it: its upload, and what is stored of it.
        self._unsure: tuple[str, Sequence[bytes]] | None = None
        #: Versions up to this one were used, or may have been, though nobody has them any more.
        self._floor = 0
        self._held: Sequence[bytes] = ()  #: what is stored of the latest version: header, then chunks
        self._channel = Channel(connection)
        self._latest: Pointer | None = None
        self._published: dict[int, float] = {}
        self._superseded: deque[Pointer] = deque()
        #: Chunks by upload: of superseded versions that do not expire yet.
        self._to_expire: dict[str, int] = {}
        self._to_keep: Pointer | None = None
        self._catch_up()
        self._tidy()
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="rlbroker-encode")

    @property
    def latest_version(self) -> int:
        """Number of the latest version; 0 before the first."""
        return self._latest.version if self._latest else 0

    @property
    def last_used(self) -> int:
        """The highest number that was ever used, as far as is known."""
        return max(self.latest_version, self._floor)

    @property
    def published(self) -> Mapping[int, float]:
        """When recent versions were published, seconds since the epoch."""
        return self._published

    def publish(self, weights: Any, *, compression: bool) -> PublishReceipt:
        """Make these weights the run's next version, for every worker.

        Args:
            weights: a state dict, or any tree of tensors, arrays and plain values.
            compression: whether to compress with blosc2; off is faster where the link is.

        Raises:
            UnsupportedType: something in the weights cannot travel; its path is named.
            Fenced: a newer learner has taken over the run.
            PeerError: the server refused, or could not be reached in time; the version was not published, or,
                after a lost connection, it was and nobody said so.
        """
        began = time.monotonic()
        with self._lock:
            pointer, held = self._store(weights, compression=compression)
            pointer = self._commit(pointer, held)
            self._held = held
            try:
                self._tidy()
            except PeerError as error:  # the version is out; what is left to do is done later
                logger.warning(
                    "version %d is published; its chunks wait for care: %s", pointer.version, error
                )
        return PublishReceipt(
            version=pointer.version,
            kind="full",
            raw_bytes=pointer.raw_bytes,
            stored_bytes=pointer.stored_bytes,
            chunks=pointer.chunks,
            seconds=time.monotonic() - began,
        )

    def tidy(self) -> None:
        """Do again what a fault kept from being done: keep the latest chunks, let older ones expire.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        if self._lock.acquire(blocking=False):
            try:
                self._tidy()
            finally:
                self._lock.release()

    def raise_floor(self, version: int) -> None:
        """Never use this version's number, nor a lower one: a checkpoint knows of it."""
        with self._lock:
            self._floor = max(self._floor, version)

    def outrun(self) -> bool:
        """Whether workers run a newer version than the latest: the server lost it, and they came back after that.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        seen = int(self._connection.execute("HGET", self._keys.meta, "version_floor") or 0)
        return bool(self._held) and seen > self.latest_version

    def restore(self, *, unreadable_version: int = 0) -> bool:
        """Publish the latest weights again, under a new version, if the server has lost them; one try.

        Args:
            unreadable_version: a version that some worker could not read. If it is the latest, what is stored of
                it is compared, and not only the sizes.

        Returns:
            False if another thread is publishing: then it is to be called again.

        Raises:
            Fenced: a newer learner publishes in this run.
            PeerError: the server refused, or could not be reached in time.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            seen = self._catch_up()
            pointer = self._latest
            if pointer is None or not self._held:
                return True
            there = self._read_pointer()
            lost = there is None or there.upload != pointer.upload
            if (
                lost
                or seen > pointer.version
                or self._is_damaged(pointer, compare=unreadable_version == pointer.version)
            ):
                again = self._commit(replace(pointer, upload=self._new_upload()), self._held, Deadline(0))
                logger.warning(
                    "the server had lost version %d, or a part of it; it is published again as version %d",
                    pointer.version,
                    again.version,
                )
                self._tidy()
            return True
        finally:
            self._lock.release()

    def _is_damaged(self, pointer: Pointer, *, compare: bool) -> bool:
        """Whether a chunk is missing or, as far as its size or its bytes tell, is not what was stored."""
        keys = self._chunk_keys(pointer.upload, pointer.chunks)
        sizes = self._connection.execute_all([("STRLEN", key) for key in keys])
        if sizes != [len(data) for data in self._held]:
            return True
        pairs = zip(keys, self._held, strict=True) if compare else ()
        return any(self._connection.execute("GET", key) != data for key, data in pairs)

    def close(self) -> None:
        """End the encoding threads."""
        self._channel.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _store(self, weights: Any, *, compression: bool) -> tuple[Pointer, list[bytes]]:
        """Send every chunk, encoding ahead; give the pointer that would make them a version, and what was sent."""
        whole = plan(weights, compression=compression, segment_bytes=self._segment_bytes)
        upload = self._new_upload()
        facts: list[StoredSegment] = []
        held: list[bytes | memoryview] = []
        sent: list[bytes] = []
        held_bytes = 0
        try:
            for fact, stored in self._encoded(whole):
                facts.append(fact)
                held.append(stored)
                held_bytes += len(stored)
                if held_bytes >= self._chunk_bytes or len(facts) == whole.segment_count:
                    sent.append(b"".join(held))  # a copy: the tensors change while training goes on
                    self._set(upload, len(sent), sent[-1])
                    held, held_bytes = [], 0
            header = whole.header(facts)
            self._set(upload, 0, header)
        except BaseException as error:  # Ctrl-C too: half a version must not fill the server
            if not isinstance(error, ConnectionFailed):  # it would not get through either, and chunks expire
                self._discard(upload, len(sent))
            raise
        pointer = Pointer(
            version=self.last_used + 1,
            upload=upload,
            kind="full",
            raw_bytes=whole.raw_bytes,
            stored_bytes=sum(map(len, sent)) + len(header),
            chunks=len(sent),
            chunk_bytes=self._chunk_bytes,
            digest=digest_of(header),
            codec="blosc2" if compression else "raw",
            published=time.time(),
        )
        return pointer, [header, *sent]

    def _new_upload(self) -> str:
        self._attempt += 1
        return f"{self.last_used + 1}-{self._epoch}-{self._attempt}"

    def _encoded(self, whole: Plan) -> Iterator[tuple[StoredSegment, bytes | memoryview]]:
        ahead: deque[Future[tuple[StoredSegment, bytes | memoryview]]] = deque()
        try:
            for index in range(whole.segment_count):
                ahead.append(self._pool.submit(whole.encode_segment, index))
                if len(ahead) >= SEGMENTS_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def _set(self, upload: str, number: int, data: bytes) -> None:
        command = ("SET", self._keys.chunk(upload, number), data, "EX", UNCOMMITTED_SECONDS)
        try:
            self._connection.execute(*command)
        except ServerOutOfMemory:
            if not self._superseded:
                raise
            logger.warning("the server is full; superseded weights are deleted before their time")
            self._unlink_superseded(keep_bytes=0)
            self._connection.execute(*command)

    def _unlink_superseded(self, *, keep_bytes: int) -> None:
        """Delete superseded versions, oldest first; who is still reading one goes on to the latest."""
        while self._superseded and sum(one.stored_bytes for one in self._superseded) > keep_bytes:
            oldest = self._superseded.popleft()
            self._connection.execute("UNLINK", *self._chunk_keys(oldest.upload, oldest.chunks))

    def _discard(self, upload: str, chunks: int) -> None:
        try:
            self._connection.execute_once("UNLINK", *self._chunk_keys(upload, chunks))
        except PeerError as error:
            logger.debug("the chunks of %s expire by themselves: %s", upload, error)

    def _commit(self, pointer: Pointer, held: Sequence[bytes], deadline: Deadline | None = None) -> Pointer:
        """Make these chunks the next version; give the pointer with its number."""
        if self._unsure:
            self._catch_up()
        while True:
            before = self._latest
            pointer = replace(
                pointer,
                version=self.last_used + 1,
                previous=before.upload if before else "",
                previous_chunks=before.chunks if before else 0,
            )
            done = self._connection.retry(partial(self._try_commit, pointer, held), deadline)
            if done != b"taken":
                break
            self._catch_up()
        self._adopt(pointer)
        self._unsure = None
        return pointer

    def _try_commit(self, pointer: Pointer, held: Sequence[bytes]) -> Any:
        """Commit over the connection on which every chunk was seen: a server may have lost some meanwhile."""
        self._channel.connect()
        chunks = self._chunk_keys(pointer.upload, pointer.chunks)
        if self._channel.execute("EXISTS", *chunks) < len(chunks):
            for number, data in enumerate(held):
                self._set(pointer.upload, number, data)
        keys = (self._keys.meta, self._keys.weights, self._keys.control, self._keys.notify)
        arguments = (self._epoch, pointer.version, pointer.upload, *flat(pointer.to_fields()))
        try:
            return self._channel.run(COMMIT, keys, arguments)
        except (Fenced, RunLost, ServerOutOfMemory):  # it was not done
            raise
        except BaseException:  # it may have been done, and a worker may run it: the number is gone
            self._unsure = pointer.upload, held
            self._floor = max(self._floor, pointer.version)
            raise

    def _catch_up(self) -> int:
        """Learn which numbers were used: by a commit whose reply never came, or by what the server lost.

        Returns:
            The newest version that workers saw on a server that lost it; 0 without one.
        """
        found = self._read_pointer()
        if found is not None and found.version > self.latest_version:
            self._adopt(found)
            came_through = self._unsure is not None and self._unsure[0] == found.upload
            self._held = self._unsure[1] if self._unsure and came_through else ()
        self._unsure = None
        seen = int(self._connection.execute("HGET", self._keys.meta, "version_floor") or 0)
        self._floor = max(self._floor, seen)
        return seen

    def _adopt(self, pointer: Pointer) -> None:
        if self._latest is not None:
            self._to_expire[self._latest.upload] = self._latest.chunks
            self._superseded.append(self._latest)
        if pointer.previous:
            self._to_expire[pointer.previous] = pointer.previous_chunks
        self._latest = self._to_keep = pointer
        self._published[pointer.version] = pointer.published
        if len(self._published) > TIMES_KEPT:
            del self._published[next(iter(self._published))]

    def _tidy(self) -> None:
        commands: list[tuple[Argument, ...]] = []
        if self._to_keep is not None:
            commands += [
                ("PERSIST", key) for key in self._chunk_keys(self._to_keep.upload, self._to_keep.chunks)
            ]
        for upload, chunks in self._to_expire.items():
            commands += [("EXPIRE", key, SUPERSEDED_SECONDS) for key in self._chunk_keys(upload, chunks)]
        self._connection.execute_all(commands)
        self._to_keep, self._to_expire = None, {}
        expired = time.time() - SUPERSEDED_SECONDS
        while len(self._superseded) > 1 and self._superseded[1].published < expired:
            self._superseded.popleft()  # its successor is older than that: it has expired
        self._unlink_superseded(keep_bytes=SUPERSEDED_BYTES)

    def _chunk_keys(self, upload: str, chunks: int) -> list[str]:
        return [self._keys.chunk(upload, number) for number in range(chunks + 1)]

    def _read_pointer(self) -> Pointer | None:
        return Pointer.from_fields(text_fields(self._connection.execute("HGETALL", self._keys.weights)))
