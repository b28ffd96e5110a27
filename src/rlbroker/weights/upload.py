"""Encodes versions and stores their chunks. By that nothing becomes a version yet: the publisher commits it."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlbroker.backend.bulk import ChunkWriter, ProgressTimeout
from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.codec.format import StoredSegment
from rlbroker.codec.image import EncodedSegment, ImagePlan
from rlbroker.codec.signing import chunk_hash
from rlbroker.errors import ConnectionFailed, PeerError, ServerOutOfMemory
from rlbroker.metrics.counters import Metrics
from rlbroker.weights.manifest import StoredForm, digest_of

#: Segments that may be encoded ahead of sending; bounds the memory that publishing takes.
SEGMENTS_AHEAD: Final = 8

#: Chunks of a version that was never committed expire after this.
UNCOMMITTED_SECONDS: Final = 3600

#: So many segments are tried before a whole version is stored as a difference.
_TRIED_SEGMENTS: Final = 3

#: A difference must be smaller than this part of the whole; else applying it is not worth the trouble.
_WORTHWHILE: Final = 0.8

Chunk = tuple[str, Sequence[bytes | memoryview]]

#: What a chunk consists of: size and xxh3_64 of each segment in it, or of the header.
Pieces = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Base:
    """What a version may be stored as a difference to.

    Attributes:
        version: its number.
        image: its bytes.
        digests: xxh3_64 of each of its segments, raw.
        full_ratio: stored bytes for each raw byte when a version was last stored as a whole.
    """

    version: int
    image: NDArray[np.uint8]
    digests: Sequence[int]
    full_ratio: float


@dataclass(frozen=True)
class Stored:
    """A version whose chunks are on the server.

    Attributes:
        form: what to fetch.
        header: its chunk 0.
        digests: xxh3_64 of each segment, raw.
        chunks: what each chunk consists of, the header's first.
    """

    form: StoredForm
    header: bytes
    digests: Sequence[int]
    chunks: Sequence[Pieces]


class _Made:
    """The chunks of one upload, as they are made."""

    def __init__(
        self, keys: Keys, upload: str, plan: ImagePlan, chunk_bytes: int, hashing: ThreadPoolExecutor | None
    ) -> None:
        self._keys, self._upload, self._plan, self._chunk_bytes = keys, upload, plan, chunk_bytes
        self._hashing = hashing
        self._hashes: list[Future[str]] = []  #: of each chunk, the header's last
        self._segments: list[StoredSegment] = []
        self.digests: list[int] = []
        self.sent: list[Pieces] = []  #: what each chunk consists of, the header's last
        self.header = b""

    def chunks(self, encoded: Iterator[EncodedSegment]) -> Iterator[Chunk]:
        """Group segments as `pointer.group` does; the header comes last, as it holds the facts of all of them."""
        waiting: list[EncodedSegment] = []
        size = 0
        for one in encoded:
            self._segments.append(one.segment)
            self.digests.append(one.raw_digest)
            waiting.append(one)
            size += one.segment.stored_bytes
            if size >= self._chunk_bytes:
                yield self._chunk(waiting)
                waiting, size = [], 0
        if waiting:
            yield self._chunk(waiting)
        self.header = self._plan.header(self._segments)
        self.sent.append([(len(self.header), xxhash.xxh3_64_intdigest(self.header))])
        self._hash([self.header])
        yield self._keys.chunk(self._upload, 0), [self.header]

    def hashes(self) -> str:
        """Give the hash of each chunk, the header's first; nothing where none are wanted."""
        *chunks, header = [one.result() for one in self._hashes] or [""]
        return "".join([header, *chunks])

    def _chunk(self, segments: Sequence[EncodedSegment]) -> Chunk:
        self.sent.append([(one.segment.stored_bytes, one.segment.digest) for one in segments])
        parts = [one.stored for one in segments]
        self._hash(parts)
        return self._keys.chunk(self._upload, len(self.sent)), parts

    def _hash(self, parts: Sequence[bytes | memoryview]) -> None:
        """Have a chunk hashed beside all that goes on."""
        if self._hashing:
            self._hashes.append(self._hashing.submit(chunk_hash, parts))


class Uploader:
    """Stores images in chunks. Not safe to use from several threads at once."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        chunk_bytes: int,
        make_room: Callable[[], bool],
        metrics: Metrics,
        hashes: bool = False,
    ) -> None:
        """Prepare an uploader.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            chunk_bytes: a chunk is closed once it holds this much.
            make_room: called when the server is full; gives whether it has deleted something.
            metrics: is told how long encoding and sending took.
            hashes: whether forms are to have the hashes of their chunks, to be signed.
        """
        self._connection, self._keys, self._metrics = connection, keys, metrics
        self._chunk_bytes, self._make_room = chunk_bytes, make_room
        self._writer = ChunkWriter(connection)
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="rlbroker-encode")
        self._hashing = self._pool if hashes else None

    def close(self) -> None:
        """End the threads and the connection."""
        self._writer.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def try_difference(
        self, plan: ImagePlan, image: NDArray[np.uint8], base: Base
    ) -> dict[int, EncodedSegment] | None:
        """Encode a few segments as a difference; give them if the whole of it is worthwhile, else None."""
        count = plan.segment_count
        step = max(1, count // _TRIED_SEGMENTS)
        tried = {
            index: self._pool.submit(self._encode, plan, image, base, True, index)
            for index in range(step // 2, count, step)
        }
        found = {index: future.result() for index, future in tried.items()}
        raw_bytes = sum(one.segment.raw_bytes for one in found.values())
        stored_bytes = sum(one.segment.stored_bytes for one in found.values())
        return found if stored_bytes < raw_bytes * base.full_ratio * _WORTHWHILE else None

    def store(
        self,
        plan: ImagePlan,
        image: NDArray[np.uint8],
        *,
        version: int,
        upload: str,
        compression: bool,
        base: Base | None = None,
        encoded: Mapping[int, EncodedSegment] | None = None,
        deadline: Deadline | None = None,
    ) -> Stored:
        """Send every chunk of an image, encoding ahead.

        Args:
            plan: how the image is cut.
            image: its bytes; they do not change meanwhile.
            version: number that it is to get.
            upload: names its chunks.
            compression: whether to compress.
            base: what to store the difference to; None to store it as a whole.
            encoded: segments that are encoded already.
            deadline: how long to wait for a server that is away; by default the connection's timeout, from when
                something was stored last.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        made = _Made(self._keys, upload, plan, self._chunk_bytes, self._hashing)
        ahead = self._encoded(plan, partial(self._encode, plan, image, base, compression), encoded or {})
        try:
            with closing(ahead):
                self._send(made.chunks(ahead), deadline)
        except BaseException as error:  # Ctrl-C too: half a version must not fill the server
            if not isinstance(error, ConnectionFailed):  # it would not get through either, and chunks expire
                self.discard(upload, len(made.sent))
            raise
        *chunks, header = made.sent
        form = StoredForm(
            version=version,
            base=base.version if base else 0,
            upload=upload,
            chunks=len(chunks),
            stored_bytes=sum(size for pieces in made.sent for size, _ in pieces),
            digest=digest_of(made.header),
            hashes=made.hashes(),
        )
        return Stored(form, made.header, made.digests, [header, *chunks])

    def discard(self, upload: str, chunks: int) -> None:
        """Delete what is stored of an upload, if the server can be reached."""
        with suppress(PeerError):  # it expires by itself
            self._connection.on_each("UNLINK", self._keys.upload(upload, chunks), deadline=Deadline(0))

    def _encoded(
        self, plan: ImagePlan, encode: Callable[[int], EncodedSegment], done: Mapping[int, EncodedSegment]
    ) -> Generator[EncodedSegment]:
        ahead: deque[Future[EncodedSegment] | EncodedSegment] = deque()
        try:
            for index in range(plan.segment_count):
                ahead.append(done.get(index) or self._pool.submit(encode, index))
                if len(ahead) >= SEGMENTS_AHEAD:
                    yield _result(ahead.popleft())
            while ahead:
                yield _result(ahead.popleft())
        finally:
            for future in ahead:
                if isinstance(future, Future):
                    future.cancel()

    def _encode(
        self, plan: ImagePlan, image: NDArray[np.uint8], base: Base | None, compression: bool, index: int
    ) -> EncodedSegment:
        with self._metrics.timed("encode_seconds"):
            if base is None:
                return plan.encode_segment(index, image, compression=compression)
            return plan.encode_segment(
                index, image, compression=compression, base=base.image, base_digest=base.digests[index]
            )

    def _send(self, chunks: Iterator[Chunk], deadline: Deadline | None) -> None:
        """Store chunks; once a server that went away answers again, go on with the first that may be missing."""
        unconfirmed: deque[Chunk] = deque()
        confirmed = 0
        began, encoding_seconds = time.perf_counter(), 0.0

        def forget_confirmed() -> None:
            nonlocal confirmed
            while confirmed < self._writer.confirmed:
                unconfirmed.popleft()
                confirmed += 1

        def noted() -> Iterator[Chunk]:
            nonlocal encoding_seconds
            while True:
                asked = time.perf_counter()
                chunk = next(chunks, None)
                encoding_seconds += time.perf_counter() - asked
                if chunk is None:
                    return
                forget_confirmed()
                unconfirmed.append(chunk)
                yield chunk

        fresh, patience = noted(), ProgressTimeout(self._connection, deadline)
        try:
            while True:
                try:
                    self._writer.write(chain(list(unconfirmed), fresh), expire_seconds=UNCOMMITTED_SECONDS)
                    return
                except ServerOutOfMemory:
                    forget_confirmed()
                    if not self._make_room():
                        raise
                except ConnectionFailed as fault:
                    forget_confirmed()
                    patience.outlast(fault, moved=confirmed > 0)
                confirmed = 0
        finally:
            self._metrics.add("send_seconds", time.perf_counter() - began - encoding_seconds)


def _result(one: Future[EncodedSegment] | EncodedSegment) -> EncodedSegment:
    return one.result() if isinstance(one, Future) else one
