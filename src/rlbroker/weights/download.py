"""Downloads and decodes a version along the cheapest path, once for all processes of this host."""

from __future__ import annotations

import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Final

import numpy as np

from rlbroker.backend.bulk import ChunkReader, ProgressTimeout
from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Backoff, Deadline
from rlbroker.backend.keys import Keys
from rlbroker.codec.foreign import is_empty
from rlbroker.codec.image import ImageFormat
from rlbroker.codec.leaves import Bytes
from rlbroker.codec.limits import Limits
from rlbroker.codec.signing import NotSigned, SigningKey, chunk_hash
from rlbroker.errors import ConnectionFailed, WireError
from rlbroker.weights.host_cache import Image, ImageStore
from rlbroker.weights.manifest import Manifest, StoredForm, digest_of, group

#: The limits for decoding weights.
WEIGHTS_LIMITS: Final = Limits(max_raw_bytes=64 << 30, max_header_bytes=256 << 20)

#: A smaller form is read in one round trip, together with its header. A smaller image is decoded in the thread that
#: reads it, as another thread would take longer to start.
SMALL_BYTES: Final = 1 << 20

#: Bytes that are read before the first of them must be decoded; bounds the memory of chunks that are not read in place.
READ_AHEAD_BYTES: Final = 64 << 20

#: The most segments that wait to be decoded.
SEGMENTS_AHEAD: Final = 32

#: How long to wait for another process of this host that makes the image; it may hang.
CLAIM_TIMEOUT_SECONDS: Final = 60.0

_FIRST_PAUSE_SECONDS: Final = 0.001
_LONGEST_PAUSE_SECONDS: Final = 0.02


class DecodedVersion:
    """A decoded version, which must not be written to.

    Attributes:
        number: the version.
        weights: its tree, in the dtypes in which it was sent; large tensors and arrays are views of the image.
        metadata: `_metadata` of the state dict; None if it had none.
    """

    def __init__(self, number: int, image: Image, form: ImageFormat) -> None:
        """Wrap a decoded image; raise WireError if its tree cannot be built here."""
        self.number, self.image, self.form = number, image, form
        # Map its pages now, in the background, and not in `poll`.
        np.add.reduce(image.array[:: mmap.PAGESIZE])
        self.weights: Any = form.tree(image.array, keep_dtype=True)
        self.metadata = form.metadata

    def weights_for(self, target: Any, *, keep_dtype: bool) -> Any:
        """Return the tree to load into a target; an empty dictionary gets the learner's dtypes unless `keep_dtype`."""
        if isinstance(target, MutableMapping) and is_empty(target) and not keep_dtype:
            return self.form.tree(self.image.array)
        return self.weights


class Downloader:
    """Downloads and decodes versions for one worker. For one thread, except for `cancel`."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        images: ImageStore,
        *,
        key: SigningKey | None = None,
        from_replicas: bool = False,
        received: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Create a downloader.

        Args:
            images: where to find decoded images and to keep new ones.
            key: the key that weights must be signed with; None to accept them unsigned.
            from_replicas: whether chunks are read from replicas, where there are any.
            received: called with the size of each chunk in bytes, in the thread that downloads.
        """
        self._connection, self._keys, self._images = connection, keys, images
        self._received, self._key, self._from_replicas = received, key, from_replicas
        self._cancelled = False
        self._reader = ChunkReader(connection)
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="rlbroker-decode")

    def cancel(self) -> None:
        """Make a running download fail soon, and every later one. May be called from any thread."""
        self._cancelled = True

    def close(self) -> None:
        """End the threads and close the connection."""
        self._reader.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def fetch(self, manifest: Manifest, previous: DecodedVersion | None) -> DecodedVersion:
        """Return the latest version, from this host's cache or from the server.

        `previous` is a decoded version that may be the base of a delta.

        Raises:
            NotSigned: a signature is missing or wrong; nothing was decoded.
            WireError: a chunk is missing or invalid.
        """
        if self._key:
            manifest.check(self._key, self._keys.run)
        if previous and previous.number == manifest.version:
            return previous
        self._reader.from_replicas = self._from_replicas and self._reader.may_read_replicas
        try:
            try:
                return self._find_or_download(manifest, previous)
            except WireError:
                if not self._reader.from_replicas:
                    raise
            # The replica may be behind, or may follow another master by now.
            self._reader.from_replicas = False
            return self._find_or_download(manifest, previous)
        except MemoryError as error:
            raise WireError(f"version {manifest.version} needs more memory than there is") from error

    def fetch_arrays(self, path: Sequence[StoredForm], chunk_bytes: int) -> tuple[ImageFormat, Bytes]:
        """Return the image of a version, checked as for a worker, without building tensors, which would need torch.

        Args:
            path: the stored forms of the version: a full one, and the deltas that follow it.
            chunk_bytes: `chunk_bytes` of the manifest.

        Raises:
            NotSigned: a signature is missing or wrong; nothing was decoded.
            WireError: a chunk is missing or invalid.
        """
        if self._key:
            for form in path:
                form.check(self._key, self._keys.run)
        small = self._read_small(path)
        headers = [self._header(form, small) for form in path]
        formats = [ImageFormat(header, WEIGHTS_LIMITS, arrays_only=True) for header in headers]
        if len({form.layout for form in formats}) > 1:
            raise WireError(f"version {path[-1].version} is a delta to weights of another layout")
        try:
            array = np.empty(formats[-1].image_bytes, np.uint8)
        except MemoryError as error:
            raise WireError(f"version {path[-1].version} needs more memory than there is") from error
        self._fill(path, formats, chunk_bytes, array, None, small)
        return formats[-1], array

    def _find_or_download(self, manifest: Manifest, previous: DecodedVersion | None) -> DecodedVersion:
        name = manifest.latest.name_of_image(self._key, self._keys.run)
        version = self._find(manifest, name)
        timeout = Deadline(CLAIM_TIMEOUT_SECONDS)
        backoff = Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        while version is None:
            claim = self._images.claim(name, manifest.raw_bytes)
            if claim is not None:
                with claim:
                    version = self._find(manifest, name) or self._download(manifest, previous, name)
            elif timeout.over:
                version = self._download(manifest, previous, name)
            else:  # another process of this host is making the image
                self._check_cancelled()
                time.sleep(backoff.next())
                version = self._find(manifest, name)
        return version

    def _find(self, manifest: Manifest, name: str) -> DecodedVersion | None:
        image = self._images.find(name, manifest.raw_bytes)
        if image is None:
            return None
        return DecodedVersion(manifest.version, image, ImageFormat(image.header, WEIGHTS_LIMITS))

    def _download(self, manifest: Manifest, previous: DecodedVersion | None, name: str) -> DecodedVersion:
        path = manifest.path(previous.number if previous else 0)
        small = self._read_small(path)
        headers = [self._header(form, small) for form in path]
        formats = [ImageFormat(header, WEIGHTS_LIMITS) for header in headers]
        base = previous if path[0].base else None
        layouts = {form.layout for form in formats} | ({base.form.layout} if base else set())
        if len(layouts) > 1:
            raise WireError(f"version {manifest.version} is a delta to weights of another layout")
        draft = self._images.reserve(formats[-1].image_bytes, manifest.raw_bytes)
        try:
            base_array = base.image.array if base else None
            self._fill(path, formats, manifest.chunk_bytes, draft.array, base_array, small)
            image = draft.publish(name, headers[-1])
        except BaseException:
            draft.abandon()
            raise
        return DecodedVersion(manifest.version, image, formats[-1])

    def _fill(
        self,
        path: Sequence[StoredForm],
        formats: Sequence[ImageFormat],
        chunk_bytes: int,
        array: Bytes,
        base: Bytes | None,
        small: dict[str, bytes],
    ) -> None:
        """Fill an image with the first form, which may be a delta to `base`; then apply the next ones in place."""
        for form, image_format in zip(path, formats, strict=True):
            self._decode(form, image_format, chunk_bytes, array, base, small)
            base = array

    def _read_small(self, path: Sequence[StoredForm]) -> dict[str, bytes]:
        """Read all chunks of small forms and the headers of the others in one round trip; return them by key."""
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
            raise WireError("the digest of the header does not match the manifest")
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
            raise WireError(f"the header describes {len(layout)} chunks, the manifest {form.chunks}")
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
            for future in decoding:  # no thread may write to the image once its memory is released
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
        """Read chunks in order; a chunk that is one raw segment is read directly into its place in the image."""
        waiting: list[tuple[str, memoryview]] = []
        ranges: list[range] = []
        waiting_bytes = 0
        for number, indices in enumerate(layout, start=1):
            self._check_cancelled()
            key = self._keys.chunk(form.upload, number)
            size = sum(image_format.segments[index].stored_bytes for index in indices)
            if form.stored_bytes <= SMALL_BYTES:
                data = small.get(key)
                if data is None:
                    raise WireError(f"chunk {number} of {form.chunks} is gone")
                if len(data) != size:
                    raise WireError(f"chunk {number} has {len(data)} bytes instead of {size}")
                yield indices, memoryview(data)
                continue
            in_place = len(indices) == 1 and image_format.segments[indices[0]].is_raw
            memory = image_format.segment_view(indices[0], array) if in_place else np.empty(size, np.uint8)
            waiting.append((key, memory.data))
            ranges.append(indices)
            waiting_bytes += size
            if waiting_bytes >= READ_AHEAD_BYTES:
                yield from self._read(waiting, ranges)
                waiting, ranges, waiting_bytes = [], [], 0
        yield from self._read(waiting, ranges)

    def _read(
        self, chunks: list[tuple[str, memoryview]], ranges: list[range]
    ) -> Iterator[tuple[range, memoryview]]:
        """Read chunks into memory; after an outage, continue with the first one that is missing."""
        done, progress = 0, ProgressTimeout(self._connection)
        while done < len(chunks):
            begin = done
            try:
                for index in self._reader.read(chunks[begin:]):
                    self._check_cancelled()
                    done = begin + index + 1
                    yield ranges[done - 1], chunks[done - 1][1]
            except ConnectionFailed as fault:
                self._reader.avoid_replicas()
                progress.outlast(fault, progressed=done > begin)

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise WireError("the download was cancelled")


def _decode_checked(
    form: StoredForm,
    number: int,
    image_format: ImageFormat,
    indices: range,
    data: memoryview,
    array: Bytes,
    base: Bytes | None,
) -> None:
    """Check that a chunk is the one that was signed, and decode its segments."""
    check_hash(form, number, data)
    for index in indices:
        size = image_format.segments[index].stored_bytes
        image_format.decode_segment(index, data[:size], array, base)
        data = data[size:]


def check_hash(form: StoredForm, number: int, data: bytes | memoryview) -> None:
    """Raise `NotSigned` unless a chunk is the one that was signed."""
    if chunk_hash([data]) != form.hash_of(number):
        raise NotSigned(f"chunk {number} of version {form.version} does not match its signature")
