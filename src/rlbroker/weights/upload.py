"""Encodes versions and stores their chunks. An upload becomes a version when it is committed."""

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

import xxhash

from rlbroker.backend.bulk import ChunkWriter, ProgressTimeout
from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import ONE_TRY, Deadline
from rlbroker.backend.keys import Keys
from rlbroker.codec.format import StoredSegment
from rlbroker.codec.image import EncodedSegment, ImagePlan
from rlbroker.codec.leaves import Bytes
from rlbroker.codec.signing import chunk_hash
from rlbroker.errors import ConnectionFailed, PeerError, ServerOutOfMemory
from rlbroker.metrics.counters import Metrics
from rlbroker.weights.manifest import Manifest, StoredForm, digest_of
from rlbroker.weights.retention import Retention

#: Segments that may be encoded ahead of sending; bounds the memory that publishing takes.
SEGMENTS_AHEAD: Final = 8

#: Chunks of a version that was never committed expire after this.
UNCOMMITTED_SECONDS: Final = 3600

#: How many segments are encoded as a trial before a version is stored as a delta.
_TRIAL_SEGMENTS: Final = 3

#: A delta must be smaller than this fraction of the full version; otherwise it is not worth applying.
_WORTHWHILE_RATIO: Final = 0.8

#: The key of a chunk, and the parts of its value.
Chunk = tuple[str, Sequence[bytes | memoryview]]

#: Size and xxh3_64 of each part of a chunk: of its segments, or of the header.
PartDigests = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class DeltaBase:
    """A version that the next one may be stored as a delta to.

    Attributes:
        version: its number.
        image: its bytes.
        digests: xxh3_64 of each of its segments, raw.
        full_ratio: stored bytes for each raw byte when a version was last stored in full.
    """

    version: int
    image: Bytes
    digests: Sequence[int]
    full_ratio: float


@dataclass(frozen=True)
class Upload:
    """A stored form whose chunks are on the server.

    Attributes:
        form: its entry in a manifest.
        header: its chunk 0.
        digests: xxh3_64 of each segment, raw.
    """

    form: StoredForm
    header: bytes
    digests: Sequence[int]


class Uploader:
    """Stores images in chunks, and checks that the server still has them.

    Not safe to use from several threads at once.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        chunk_bytes: int,
        retention: Retention,
        metrics: Metrics,
        hashes: bool = False,
    ) -> None:
        """Create an uploader.

        Args:
            chunk_bytes: a chunk is closed once it holds this much.
            retention: makes room when the server is full.
            metrics: records the time for encoding and sending.
            hashes: whether forms get the hashes of their chunks, to be signed.
        """
        self._connection, self._keys, self._metrics = connection, keys, metrics
        self._chunk_bytes, self._retention = chunk_bytes, retention
        self._writer = ChunkWriter(connection)
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="rlbroker-encode")
        self._hashing = self._pool if hashes else None
        #: What was stored in each chunk, the header first, by upload.
        self._stored: dict[str, Sequence[PartDigests]] = {}

    def close(self) -> None:
        """End the threads and close the connection."""
        self._writer.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def try_delta(self, plan: ImagePlan, image: Bytes, base: DeltaBase) -> dict[int, EncodedSegment] | None:
        """Encode a few segments as a delta; return them if a delta is worthwhile, and None otherwise."""
        count = plan.segment_count
        step = max(1, count // _TRIAL_SEGMENTS)
        trials = {
            index: self._pool.submit(self._encode, plan, image, base, True, index)
            for index in range(step // 2, count, step)
        }
        encoded = {index: future.result() for index, future in trials.items()}
        raw_bytes = sum(one.segment.raw_bytes for one in encoded.values())
        stored_bytes = sum(one.segment.stored_bytes for one in encoded.values())
        return encoded if stored_bytes < raw_bytes * base.full_ratio * _WORTHWHILE_RATIO else None

    def store(
        self,
        plan: ImagePlan,
        image: Bytes,
        *,
        version: int,
        upload: str,
        compression: bool,
        base: DeltaBase | None = None,
        encoded: Mapping[int, EncodedSegment] | None = None,
        deadline: Deadline | None = None,
    ) -> Upload:
        """Store every chunk of an image, while the next ones are being encoded.

        Args:
            image: its bytes, which must not change until this returns.
            version: the number that the version will get.
            upload: the name in the keys of its chunks.
            compression: whether to compress.
            base: the version to store a delta to; None to store the full version.
            encoded: segments that are already encoded, by index.
            deadline: how long to wait for a server that is away; by default the connection's timeout after the last
                stored chunk.
        """
        builder = _ChunkBuilder(self._keys, upload, plan, self._chunk_bytes, self._hashing)
        ahead = self._encode_ahead(plan, partial(self._encode, plan, image, base, compression), encoded or {})
        try:
            with closing(ahead):
                self._send(builder.chunks(ahead), deadline)
        except BaseException as error:  # Ctrl-C too: half a version must not fill the server
            # Over a broken connection nothing can be deleted either; the chunks expire.
            if not isinstance(error, ConnectionFailed) or isinstance(error, ServerOutOfMemory):
                self.discard(upload, len(builder.built))
            raise
        *chunks, header = builder.built
        self._stored[upload] = [header, *chunks]
        form = StoredForm(
            version=version,
            base=base.version if base else 0,
            upload=upload,
            chunks=len(chunks),
            stored_bytes=sum(size for parts in builder.built for size, _ in parts),
            digest=digest_of(builder.header),
            hashes=builder.hashes(),
        )
        return Upload(form, builder.header, builder.digests)

    def discard(self, upload: str, chunks: int) -> None:
        """Delete the chunks of an upload, if the server can be reached."""
        with suppress(PeerError):  # they expire anyway
            self._connection.execute_on_keys("UNLINK", self._keys.upload(upload, chunks), deadline=ONE_TRY)

    def forget_superseded(self, manifest: Manifest) -> None:
        """Forget the stored chunks of uploads that the latest manifest does not name."""
        names = {form.upload for form in manifest.forms}
        self._stored = {upload: chunks for upload, chunks in self._stored.items() if upload in names}

    def is_damaged(self, manifest: Manifest, *, compare: bool) -> bool:
        """Return whether a chunk that this learner stored is missing or has another size.

        With `compare`, return True for a chunk with other content, too.
        """
        stored = [
            (key, parts, form.hash_of(number))
            for form in manifest.forms
            for number, (key, parts) in enumerate(
                zip(form.chunk_keys(self._keys), self._stored.get(form.upload, ()), strict=False)
            )
        ]
        found = self._connection.execute_on_keys("EXISTS", [key for key, _, _ in stored])
        sizes = self._connection.execute_all([("STRLEN", key) for key, _, _ in stored])
        if found < len(stored) or sizes != [sum(size for size, _ in parts) for _, parts, _ in stored]:
            return True
        return compare and not all(
            _has_content(self._connection.execute("GET", key) or b"", parts, signed_hash)
            for key, parts, signed_hash in stored
        )

    def _encode_ahead(
        self, plan: ImagePlan, encode: Callable[[int], EncodedSegment], encoded: Mapping[int, EncodedSegment]
    ) -> Generator[EncodedSegment]:
        """Yield all segments in order; the next ones are encoded in the background."""
        ahead: deque[Future[EncodedSegment] | EncodedSegment] = deque()
        try:
            for index in range(plan.segment_count):
                ahead.append(encoded.get(index) or self._pool.submit(encode, index))
                if len(ahead) >= SEGMENTS_AHEAD:
                    yield _result(ahead.popleft())
            while ahead:
                yield _result(ahead.popleft())
        finally:
            for future in ahead:
                if isinstance(future, Future):
                    future.cancel()

    def _encode(
        self, plan: ImagePlan, image: Bytes, base: DeltaBase | None, compression: bool, index: int
    ) -> EncodedSegment:
        with self._metrics.timed("encode_seconds"):
            if base is None:
                return plan.encode_segment(index, image, compression=compression)
            return plan.encode_segment(
                index, image, compression=compression, base=base.image, base_digest=base.digests[index]
            )

    def _send(self, chunks: Iterator[Chunk], deadline: Deadline | None) -> None:
        """Store chunks; after an outage, continue with the first one that is not confirmed."""
        unconfirmed: deque[Chunk] = deque()
        confirmed = 0
        began, encoding_seconds = time.perf_counter(), 0.0

        def forget_confirmed() -> None:
            nonlocal confirmed
            while confirmed < self._writer.confirmed:
                unconfirmed.popleft()
                confirmed += 1

        def keep_unconfirmed() -> Iterator[Chunk]:
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

        fresh, progress = keep_unconfirmed(), ProgressTimeout(self._connection, deadline)
        try:
            while True:
                try:
                    self._writer.write(chain(list(unconfirmed), fresh), expire_seconds=UNCOMMITTED_SECONDS)
                    return
                except ServerOutOfMemory as full:
                    forget_confirmed()
                    if not self._retention.make_room():
                        progress.outlast(full, progressed=confirmed > 0)
                except ConnectionFailed as fault:
                    forget_confirmed()
                    progress.outlast(fault, progressed=confirmed > 0)
                confirmed = 0
        finally:
            self._metrics.add("send_seconds", time.perf_counter() - began - encoding_seconds)


class _ChunkBuilder:
    """Groups the segments of one upload into chunks, and collects what its manifest needs."""

    def __init__(
        self, keys: Keys, upload: str, plan: ImagePlan, chunk_bytes: int, hashing: ThreadPoolExecutor | None
    ) -> None:
        self._keys, self._upload, self._plan, self._chunk_bytes = keys, upload, plan, chunk_bytes
        self._hashing = hashing
        self._hashes: list[Future[str]] = []  #: of each chunk, the header last
        self._segments: list[StoredSegment] = []
        self.digests: list[int] = []  #: xxh3_64 of each segment, raw
        self.built: list[PartDigests] = []  #: the content of each chunk, the header last
        self.header = b""

    def chunks(self, encoded: Iterator[EncodedSegment]) -> Iterator[Chunk]:
        """Group segments as `manifest.group` does; the header is last, as it describes all of them."""
        waiting: list[EncodedSegment] = []
        size = 0
        for one in encoded:
            self._segments.append(one.segment)
            self.digests.append(one.raw_digest)
            waiting.append(one)
            size += one.segment.stored_bytes
            if size >= self._chunk_bytes:
                yield self._build(waiting)
                waiting, size = [], 0
        if waiting:
            yield self._build(waiting)
        self.header = self._plan.header(self._segments)
        self.built.append([(len(self.header), xxhash.xxh3_64_intdigest(self.header))])
        self._hash([self.header])
        yield self._keys.chunk(self._upload, 0), [self.header]

    def hashes(self) -> str:
        """Return the hashes of all chunks, the header first; empty where none are wanted."""
        *chunks, header = [one.result() for one in self._hashes] or [""]
        return "".join([header, *chunks])

    def _build(self, segments: Sequence[EncodedSegment]) -> Chunk:
        self.built.append([(one.segment.stored_bytes, one.segment.digest) for one in segments])
        parts = [one.stored for one in segments]
        self._hash(parts)
        return self._keys.chunk(self._upload, len(self.built)), parts

    def _hash(self, parts: Sequence[bytes | memoryview]) -> None:
        """Hash a chunk in the background."""
        if self._hashing:
            self._hashes.append(self._hashing.submit(chunk_hash, parts))


def _has_content(data: bytes, parts: PartDigests, signed_hash: str) -> bool:
    """Return whether a chunk is unchanged, by its signed hash if there is one, else by the digests of its parts."""
    if signed_hash:
        return chunk_hash([data]) == signed_hash
    rest = memoryview(data)
    for size, digest in parts:
        if xxhash.xxh3_64_intdigest(rest[:size]) != digest:
            return False
        rest = rest[size:]
    return True


def _result(one: Future[EncodedSegment] | EncodedSegment) -> EncodedSegment:
    return one.result() if isinstance(one, Future) else one
