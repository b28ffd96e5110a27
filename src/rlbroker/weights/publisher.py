"""The learner's half: a version is encoded once and stored in chunks; then one atomic step makes it the latest."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final

from rlbroker.connection import Argument, Connection, Script
from rlbroker.keys import Keys
from rlbroker.records import PublishReceipt
from rlbroker.replies import text_fields
from rlbroker.weights.pointer import CHUNK_BYTES, Pointer, digest_of
from rlbroker.wire import Plan, StoredSegment, plan

#: Raw bytes of one segment: the piece that is compressed, sent and decoded as one.
SEGMENT_BYTES: Final = 4 << 20

#: Segments that may be encoded ahead of sending; bounds the memory that publishing takes.
SEGMENTS_AHEAD: Final = 8

#: Chunks of a version that was never committed expire after this.
UNCOMMITTED_SECONDS: Final = 3600

#: Chunks of a superseded version stay this long for those who are still reading.
SUPERSEDED_SECONDS: Final = 60

#: How many versions' times of publication are remembered.
TIMES_KEPT: Final = 10_000

COMMIT = Script(
    "commit",
    """
    -- KEYS: meta, weights, control, notify channel
    -- ARGV: epoch, version, upload, then field and value pairs of the pointer
    if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
      return redis.error_reply('FENCED a newer learner has taken over the run, or the server has lost it')
    end
    local latest = redis.call('HMGET', KEYS[2], 'upload', 'version')
    if latest[1] == ARGV[3] then
      return 'committed'  -- before; the reply was lost
    end
    if tonumber(latest[2] or '0') >= tonumber(ARGV[2]) then
      return 'taken'  -- an earlier try came through after all
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
        self._unsure = False
        self._latest = self._read_pointer()
        self._published: dict[int, float] = {}
        if self._latest is not None:
            self._published[self._latest.version] = self._latest.published
            # A learner that died right after its commit left chunks that would expire.
            self._connection.execute_all([("PERSIST", key) for key in self._chunk_keys(self._latest)])
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="rlbroker-encode")

    @property
    def latest_version(self) -> int:
        """Number of the latest version; 0 before the first."""
        return self._latest.version if self._latest else 0

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
            whole = plan(weights, compression=compression, segment_bytes=self._segment_bytes)
            self._attempt += 1
            upload = f"{self.latest_version + 1}-{self._epoch}-{self._attempt}"
            header, chunks, stored_bytes = self._store(whole, upload)
            pointer = Pointer(
                version=0,
                upload=upload,
                kind="full",
                raw_bytes=whole.raw_bytes,
                stored_bytes=stored_bytes,
                chunks=chunks,
                chunk_bytes=self._chunk_bytes,
                digest=digest_of(header),
                codec="blosc2" if compression else "raw",
                published=time.time(),
            )
            pointer = self._commit(pointer)
        return PublishReceipt(
            version=pointer.version,
            kind="full",
            raw_bytes=pointer.raw_bytes,
            stored_bytes=stored_bytes,
            chunks=chunks,
            seconds=time.monotonic() - began,
        )

    def close(self) -> None:
        """End the encoding threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _store(self, whole: Plan, upload: str) -> tuple[bytes, int, int]:
        """Send every chunk, encoding ahead; give the header, how many chunks there are, and their bytes."""
        facts: list[StoredSegment] = []
        held: list[bytes | memoryview] = []
        chunks, stored_bytes, held_bytes = 0, 0, 0
        for fact, stored in self._encoded(whole):
            facts.append(fact)
            held.append(stored)
            held_bytes += len(stored)
            if held_bytes >= self._chunk_bytes or len(facts) == whole.segment_count:
                chunks += 1
                self._set(upload, chunks, held[0] if len(held) == 1 else b"".join(held))
                stored_bytes += held_bytes
                held, held_bytes = [], 0
        header = whole.header(facts)
        self._set(upload, 0, header)
        return header, chunks, stored_bytes + len(header)

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

    def _set(self, upload: str, number: int, data: bytes | memoryview) -> None:
        self._connection.execute("SET", self._keys.chunk(upload, number), data, "EX", UNCOMMITTED_SECONDS)

    def _commit(self, pointer: Pointer) -> Pointer:
        """Make these chunks the next version; give the pointer with its number."""
        keys = (self._keys.meta, self._keys.weights, self._keys.control, self._keys.notify)
        if self._unsure:
            self._catch_up()
        self._unsure = True  # until the server has said what became of it
        while True:
            pointer = replace(pointer, version=self.latest_version + 1)
            fields = [part for pair in pointer.to_fields().items() for part in pair]
            done = self._connection.run(COMMIT, keys, (self._epoch, pointer.version, pointer.upload, *fields))
            if done != b"taken":
                break
            self._catch_up()
        self._unsure = False
        before, self._latest = self._latest, pointer
        self._published[pointer.version] = pointer.published
        if len(self._published) > TIMES_KEPT:
            del self._published[next(iter(self._published))]
        commands: list[tuple[Argument, ...]] = [("PERSIST", key) for key in self._chunk_keys(pointer)]
        if before is not None:
            commands += [("EXPIRE", key, SUPERSEDED_SECONDS) for key in self._chunk_keys(before)]
        self._connection.execute_all(commands)
        return pointer

    def _catch_up(self) -> None:
        """Learn whether a commit whose reply never came was done: its number must not be used again."""
        found = self._read_pointer()
        if found is not None and found.version > self.latest_version:
            self._latest = found

    def _chunk_keys(self, pointer: Pointer) -> list[str]:
        return [self._keys.chunk(pointer.upload, number) for number in range(pointer.chunks + 1)]

    def _read_pointer(self) -> Pointer | None:
        return Pointer.from_fields(text_fields(self._connection.execute("HGETALL", self._keys.weights)))
