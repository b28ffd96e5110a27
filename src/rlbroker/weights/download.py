"""Downloads a version and decodes it, by the cheapest path, and once for all processes of this host."""

from __future__ import annotations

import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Final

import numpy as np

from rlbroker.backend.bulk import ChunkReader, ProgressTimeout
from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Backoff, Deadline
from rlbroker.backend.keys import Keys
from rlbroker.codec.image import ImageFormat
from rlbroker.codec.limits import Limits
from rlbroker.codec.signing import NotSigned, SigningKey, chunk_hash
from rlbroker.errors import ConnectionFailed, WireError
from rlbroker.weights.image_store import Bytes, Image, ImageStore
from rlbroker.weights.manifest import Manifest, StoredForm, digest_of, group

#: What weights may ask for when they are decoded.
WEIGHTS_LIMITS: Final = Limits(max_raw_bytes=64 << 30, max_header_bytes=256 << 20)

#: What is smaller is fetched in one round trip, by guessing that all of it will be wanted; and such an image is decoded
#: by the thread that fetches it, as handing it over takes longer.
SMALL_BYTES: Final = 1 << 20

#: Bytes that are fetched before the first of them must be decoded; bounds the memory for what is not in place yet.
AHEAD_BYTES: Final = 64 << 20

#: Segments that wait to be decoded, at most.
SEGMENTS_AHEAD: Final = 32

#: A process that makes an image for all is waited for this long; it may hang.
PATIENCE_SECONDS: Final = 60.0

_FIRST_PAUSE_SECONDS: Final = 0.001
_LONGEST_PAUSE_SECONDS: Final = 0.02


class Version:
    """A version in our hands: decoded, and not to be written to.

    Attributes:
        number: which version it is.
        weights: its tree; large tensors and arrays are views of the image, in the dtypes in which they travelled.
    """

    def __init__(self, number: int, image: Image, form: ImageFormat) -> None:
        """Take a decoded image; raise WireError if its tree cannot be made here."""
        self.number, self.image, self.form = number, image, form
        np.add.reduce(image.array[:: mmap.PAGESIZE])  # here, and not in `poll`, its pages are mapped
        self.weights: Any = form.tree(image.array, keep_dtype=True)

    def weights_for(self, target: Any, *, keep_dtype: bool) -> Any:
        """Give what to load into a target: an empty dictionary gets the learner's dtypes unless told otherwise."""
        if target == {} and not keep_dtype:
            return self.form.tree(self.image.array)
        return self.weights


class Downloader:
    """Fetches versions for one worker; from one thread."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        images: ImageStore,
        *,
        key: SigningKey | None = None,
        from_replicas: bool = False,
        stopping: Callable[[], bool] = lambda: False,
        received: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Prepare a fetcher.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            images: where to find what others decoded, and to put what we decode.
            key: which signs weights; None to take them unsigned.
            from_replicas: whether chunks are read from replicas, where there are any.
            stopping: whether to give up.
            received: is told of bytes as they come, from this thread.
        """
        self._connection, self._keys, self._images, self._stopping = connection, keys, images, stopping
        self._received, self._key, self._from_replicas = received, key, from_replicas
        self._reader = ChunkReader(connection)
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="rlbroker-decode")

    def close(self) -> None:
        """End the threads and the connection."""
        self._reader.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def fetch(self, pointer: Manifest, held: Version | None) -> Version:
        """Give the latest version.

        Args:
            pointer: what the server says of it.
            held: the version that we have already, which may save a part of the way.

        Raises:
            NotSigned: somebody else than a learner with our key has published it; nothing of it was read.
            WireError: what is stored cannot be read, or is gone.
            PeerError: the server refused, or could not be reached in time.
        """
        if self._key:
            pointer.check(self._key, self._keys.run)
        if held and held.number == pointer.version:
            return held
        self._reader.from_replicas = self._from_replicas and self._reader.replicas_answer
        try:
            try:
                return self._find_or_download(pointer, held)
            except WireError:
                if not self._reader.from_replicas:
                    raise
            # What replicas have may be old, or belong to another master by now.
            self._reader.from_replicas = False
            return self._find_or_download(pointer, held)
        except MemoryError as error:
            raise WireError(f"version {pointer.version} needs more memory than there is") from error

    def fetch_arrays(self, path: Sequence[StoredForm], chunk_bytes: int) -> tuple[ImageFormat, Bytes]:
        """Give the image of a version, checked as for a worker, for who makes no tree of it: no torch is needed.

        Args:
            path: how the version is stored: as a whole, and the differences that lead on from there.
            chunk_bytes: as the pointer says.

        Raises:
            NotSigned: somebody else than a learner with our key has published it; nothing of it was read.
            WireError: what is stored cannot be read, or is gone.
            PeerError: the server refused, or could not be reached in time.
        """
        if self._key:
            for form in path:
                form.check(self._key, self._keys.run)
        small = self._small(path)
        headers = [self._header(form, small) for form in path]
        formats = [ImageFormat(header, WEIGHTS_LIMITS, arrays_only=True) for header in headers]
        if len({form.layout for form in formats}) > 1:
            raise WireError(f"version {path[-1].version} is a difference to weights of another layout")
        try:
            array = np.empty(formats[-1].image_bytes, np.uint8)
        except MemoryError as error:
            raise WireError(f"version {path[-1].version} needs more memory than there is") from error
        self._fill(path, formats, chunk_bytes, array, None, small)
        return formats[-1], array

    def _find_or_download(self, pointer: Manifest, held: Version | None) -> Version:
        name = pointer.latest.name_of_image(self._key, self._keys.run)
        version = self._find(pointer, name)
        patience, backoff = Deadline(PATIENCE_SECONDS), Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        while version is None:
            claim = self._images.claim(name, pointer.raw_bytes)
            if claim is not None:
                with claim:
                    version = self._find(pointer, name) or self._download(pointer, held, name)
            elif patience.over:
                version = self._download(pointer, held, name)
            else:  # another process of this host is at it
                self._check_stopping()
                time.sleep(backoff.next())
                version = self._find(pointer, name)
        return version

    def _find(self, pointer: Manifest, name: str) -> Version | None:
        image = self._images.find(name, pointer.raw_bytes)
        if image is None:
            return None
        return Version(pointer.version, image, ImageFormat(image.header, WEIGHTS_LIMITS))

    def _download(self, pointer: Manifest, held: Version | None, name: str) -> Version:
        path = pointer.path(held.number if held else 0)
        small = self._small(path)
        headers = [self._header(form, small) for form in path]
        formats = [ImageFormat(header, WEIGHTS_LIMITS) for header in headers]
        base = held if path[0].base else None
        layouts = {form.layout for form in formats} | ({base.form.layout} if base else set())
        if len(layouts) > 1:
            raise WireError(f"version {pointer.version} is a difference to weights of another layout")
        draft = self._images.reserve(formats[-1].image_bytes, pointer.raw_bytes)
        try:
            before = base.image.array if base else None
            self._fill(path, formats, pointer.chunk_bytes, draft.array, before, small)
            image = draft.publish(name, headers[-1])
        except BaseException:
            draft.abandon()
            raise
        return Version(pointer.version, image, formats[-1])

    def _fill(
        self,
        path: Sequence[StoredForm],
        formats: Sequence[ImageFormat],
        chunk_bytes: int,
        array: Bytes,
        before: Bytes | None,
        small: dict[str, bytes],
    ) -> None:
        """Fill an image: with the first form, which may be a difference to `before`, and the next in place."""
        for form, image_format in zip(path, formats, strict=True):
            self._decode(form, image_format, chunk_bytes, array, before, small)
            before = array

    def _small(self, path: Sequence[StoredForm]) -> dict[str, bytes]:
        """Fetch what is small in one round trip, and of the rest the headers; by key."""
        wanted = [
            key
            for form in path
            for key in self._keys.upload(form.upload, form.chunks if form.stored_bytes <= SMALL_BYTES else 0)
        ]
        return self._reader.values(wanted)

    def _header(self, form: StoredForm, small: dict[str, bytes]) -> bytes:
        header = small.get(self._keys.chunk(form.upload, 0))
        if header is None:
            raise WireError(f"chunk 0 of {form.chunks} is gone")
        if digest_of(header) != form.digest:
            raise WireError("the digest of the header does not match the pointer")
        if self._key:
            check_hash(form, 0, header)
        return header

    def _decode(
        self,
        form: StoredForm,
        image_format: ImageFormat,
        chunk_bytes: int,
        array: Bytes,
        base: Bytes | None,
        small: dict[str, bytes],
    ) -> None:
        """Fill an image with one stored form of it."""
        segments = image_format.segments
        layout = list(group((segment.stored_bytes for segment in segments), chunk_bytes))
        if len(layout) != form.chunks:
            raise WireError(f"the header describes {len(layout)} chunks, the pointer {form.chunks}")
        decoding: deque[Future[None]] = deque()
        try:
            chunks = self._chunks(form, image_format, layout, array, small)
            for number, (indices, data) in enumerate(chunks, start=1):
                self._received(len(data))
                tasks = []
                if self._key:
                    tasks.append(
                        partial(_decode_checked, form, number, image_format, indices, data, array, base)
                    )
                else:
                    for index in indices:
                        size = segments[index].stored_bytes
                        tasks.append(partial(image_format.decode_segment, index, data[:size], array, base))
                        data = data[size:]
                for task in tasks:
                    if len(array) > SMALL_BYTES:
                        decoding.append(self._pool.submit(task))
                    else:
                        task()
                while len(decoding) > SEGMENTS_AHEAD:
                    decoding.popleft().result()
            while decoding:
                decoding.popleft().result()
        finally:
            for future in decoding:
                future.cancel()
            for future in decoding:  # nothing may write to the image once it is given up
                with suppress(BaseException):
                    future.result()

    def _chunks(
        self,
        form: StoredForm,
        image_format: ImageFormat,
        layout: Sequence[range],
        array: Bytes,
        small: dict[str, bytes],
    ) -> Iterator[tuple[range, memoryview]]:
        """Receive chunks in order; those that are one raw segment come straight into their place in the image."""
        waiting: list[tuple[str, memoryview]] = []
        ranges: list[range] = []
        waiting_bytes = 0
        for number, indices in enumerate(layout, start=1):
            self._check_stopping()
            key = self._keys.chunk(form.upload, number)
            size = sum(image_format.segments[index].stored_bytes for index in indices)
            if form.stored_bytes <= SMALL_BYTES:
                data = small.get(key)
                if data is None:
                    raise WireError(f"chunk {number} of {form.chunks} is gone")
                if len(data) != size:
                    raise WireError(f"chunk {number} has {len(data)} bytes, expected were {size}")
                yield indices, memoryview(data)
                continue
            in_place = len(indices) == 1 and image_format.segments[indices[0]].is_raw
            memory = image_format.segment_view(indices[0], array) if in_place else np.empty(size, np.uint8)
            waiting.append((key, memory.data))
            ranges.append(indices)
            waiting_bytes += size
            if waiting_bytes >= AHEAD_BYTES:
                yield from self._receive(waiting, ranges)
                waiting, ranges, waiting_bytes = [], [], 0
        yield from self._receive(waiting, ranges)

    def _receive(
        self, chunks: list[tuple[str, memoryview]], ranges: list[range]
    ) -> Iterator[tuple[range, memoryview]]:
        """Receive chunks; once a server that went away answers again, go on with the first that is missing."""
        done, patience = 0, ProgressTimeout(self._connection)
        while done < len(chunks):
            begin = done
            try:
                for index in self._reader.read(chunks[begin:]):
                    self._check_stopping()
                    done = begin + index + 1
                    yield ranges[done - 1], chunks[done - 1][1]
            except ConnectionFailed as fault:
                self._reader.leave_replicas()
                patience.outlast(fault, moved=done > begin)

    def _check_stopping(self) -> None:
        if self._stopping():
            raise WireError("the worker stops")


def _decode_checked(
    form: StoredForm,
    number: int,
    image_format: ImageFormat,
    indices: range,
    data: memoryview,
    array: Bytes,
    base: Bytes | None,
) -> None:
    """Decode the segments of a chunk, once it is known to be what was signed."""
    check_hash(form, number, data)
    for index in indices:
        size = image_format.segments[index].stored_bytes
        image_format.decode_segment(index, data[:size], array, base)
        data = data[size:]


def check_hash(form: StoredForm, number: int, data: bytes | memoryview) -> None:
    """Check that a chunk is the one that is signed; NotSigned if it is another."""
    if chunk_hash([data]) != form.hash_of(number):
        raise NotSigned(f"chunk {number} of version {form.version} is not what its signature speaks of")
