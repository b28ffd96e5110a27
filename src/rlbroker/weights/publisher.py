"""The learner's half: a version is encoded and stored once, then one atomic step makes it the latest.

The learner keeps one image of its latest version: the next one may be stored as a difference to it, and a server
that comes back without its data gets it again, under a new version: a number is never used twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Self

import xxhash

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection, flat
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import text_fields, whole_number
from rlbroker.backend.scripts import Script
from rlbroker.codec.image import ImagePlan
from rlbroker.codec.signing import SigningKey, chunk_hash
from rlbroker.errors import Fenced, PeerError, RunLost, ServerFault, ServerOutOfMemory, WireError
from rlbroker.metrics.counters import Metrics
from rlbroker.types import Published, PublishReceipt
from rlbroker.weights.gpu_copy import GpuCopy, Staged
from rlbroker.weights.image_store import Bytes, Draft, Image, ImageStore
from rlbroker.weights.manifest import CHUNK_BYTES, Manifest, StoredForm, kept, needs_whole
from rlbroker.weights.retention import Retention
from rlbroker.weights.upload import Base, Pieces, Stored, Uploader

logger = logging.getLogger("rlbroker")

#: Raw bytes of one segment: the piece that is compressed, sent and decoded as one.
SEGMENT_BYTES: Final = 2 << 20

#: Smaller weights are always stored whole: a difference would save less than the look at it costs.
MIN_DELTA_BYTES: Final = 64 << 10

#: A version is stored this often before we give up, if the server loses parts of it meanwhile.
_TRIES: Final = 3

#: No number above it is a version: scripts count in floating numbers, which then do not grow by 1 any more.
_LAST_VERSION: Final = 1 << 52

#: A commit is tried this often while others write to the pointer.
_COMMITS: Final = 20

#: A higher number is believed only if it is signed.
_LIKELY_VERSION: Final = 10**9

#: How many versions' times of publication are remembered.
TIMES_KEPT: Final = 10_000

COMMIT = Script.load("weights/lua/commit.lua")


@dataclass(frozen=True)
class _Held:
    """The image of a version, and what it takes to store it again, or a difference to it."""

    plan: ImagePlan
    image: Image
    compression: bool
    base: Base

    def numbered(self, version: int) -> Self:
        """Give what is held under the number that it got."""
        return replace(self, base=replace(self.base, version=version))


class _Incomplete(Exception):
    """The server has lost chunks that the version needs."""


class Publisher:
    """Publishes the versions of one learner. Safe to use from several threads."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        epoch: int,
        images: ImageStore | None = None,
        metrics: Metrics | None = None,
        key: SigningKey | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Take over from the version that the run has now.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            epoch: the learner's epoch; a newer one fences this.
            images: where images are kept; in our own memory by default.
            metrics: is told what was published, and how long that took.
            key: signs what is published, and what was published before must be signed with it; None for no signatures.
            segment_bytes: raw bytes that are compressed as one.
            chunk_bytes: a chunk is closed once it holds this much.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        self._connection, self._keys, self._epoch = connection, keys, epoch
        self._segment_bytes, self._chunk_bytes = segment_bytes, chunk_bytes
        self._images = images or ImageStore(keys.run, None)
        self._metrics = metrics or Metrics()
        self._key = key
        #: Upload and version of the pointer that was refused last: another one than ours is there.
        self._refused = (b"-", b"-")
        #: What a run that nobody signed had stored when it was opened: it is to expire.
        self._unsigned: tuple[StoredForm, ...] = ()
        self._staging = GpuCopy()
        self._lock = threading.Lock()
        #: What was sent last without waiting.
        self._under_way: Future[Published] = Future()
        self._under_way.cancel()
        self._attempt = 0
        #: A commit of which nobody said what became of it: its upload, and what it would make the latest.
        self._unsure: tuple[str, _Held] | None = None
        #: Versions up to this one were used, or may have been, though nobody has them any more.
        self._floor = 0
        self._held: _Held | None = None
        self._channel = Channel(connection, keys.meta)
        self._retention = Retention(connection, keys)
        self._uploader = Uploader(
            connection,
            keys,
            chunk_bytes=chunk_bytes,
            make_room=self._retention.make_room,
            metrics=self._metrics,
            hashes=key is not None,
        )
        self._latest: Manifest | None = None
        self._published: dict[int, float] = {}
        #: What each chunk consists of that is stored and must stay, by upload.
        self._chunks: dict[str, Sequence[Pieces]] = {}
        self._catch_up(opening=True)
        self._retention.tidy()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="rlbroker-publish")

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

    def publish(
        self, weights: Any, *, compression: bool, dtype: str | None = None, wait: bool = True
    ) -> PublishReceipt:
        """Make these weights the run's next version, for every worker.

        Args:
            weights: a state dict, or any tree of tensors, arrays and plain values.
            compression: whether to compress with blosc2, and to store differences; off is faster where the link is.
            dtype: what floating tensors are cast to; None to leave them as they are.
            wait: whether to return only when the version is out. If not, the weights have been copied on return,
                and one publication at a time is under way: the next call waits for it.

        Raises:
            InvalidArgument: `dtype` is not one that tensors can be cast to.
            UnsupportedType: something in the weights cannot travel; its path is named.
            Fenced: a newer learner has taken over the run.
            PeerError: the server refused, or could not be reached in time; the version was not published, or,
                after a lost connection, it was and nobody said so.
        """
        began = time.monotonic()
        while True:
            _wait_for(self._under_way)
            with self._lock:
                if not self._under_way.done():  # another thread was quicker
                    continue
                staged = self._staging.take(weights)
                plan = ImagePlan(staged.tree, dtype=dtype, segment_bytes=self._segment_bytes)
                draft = self._images.reserve(plan.image_bytes, plan.raw_bytes)
                if wait or not staged.pending:
                    staged.fill(plan, draft.array)
                if wait:
                    return PublishReceipt(self._publish(staged, plan, draft, compression, began))
                work = partial(self._publish_later, staged, plan, draft, compression, began)
                self._under_way = self._background.submit(work)
            self._under_way.add_done_callback(_log_failure)
            return PublishReceipt(self._under_way)

    def tidy(self) -> None:
        """Do again what a fault kept from being done: keep the latest chunks, let older ones expire.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        if self._lock.acquire(blocking=False):
            try:
                self._retention.tidy()
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
        return self._held is not None and self._seen() > self.latest_version

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
            pointer, held = self._latest, self._held
            if pointer is None or held is None:
                return True
            there = self._read_pointer()
            lost = there is None or there.upload != pointer.upload or there.version != pointer.version
            if (
                lost
                or seen > pointer.version
                or self._is_damaged(pointer, compare=unreadable_version == pointer.version)
            ):
                again = Draft(held.image.array, placed=held.image)
                self._make_latest(held.plan, again, held.compression, None, Deadline(0))
                logger.warning(
                    "the server had lost version %d, or a part of it; it is published again as version %d",
                    pointer.version,
                    self.latest_version,
                )
                self._retention.tidy()
            return True
        finally:
            self._lock.release()

    def finish(self, timeout_seconds: float) -> bool:
        """Wait until what was sent without waiting is out; give whether it is."""
        deadline = Deadline(timeout_seconds)
        _wait_for(self._under_way, deadline.remaining)
        if not self._under_way.done() or not self._lock.acquire(timeout=deadline.remaining):
            return False
        self._lock.release()
        return True

    def close(self) -> None:
        """End the threads; give up the image."""
        self._background.shutdown(wait=False, cancel_futures=True)
        self._channel.close()
        self._uploader.close()
        self._held = self._unsure = None
        self._images.close()

    def _publish_later(self, *arguments: Any) -> Published:
        with self._lock:
            return self._publish(*arguments)

    def _publish(
        self, staged: Staged, plan: ImagePlan, draft: Draft, compression: bool, began: float
    ) -> Published:
        """Make what is in the draft the latest version."""
        try:
            if staged.pending:
                staged.fill(plan, draft.array)
            if self._unsure:
                self._catch_up()
            base = self._base_for(plan) if compression else None
            pointer = self._make_latest(plan, draft, compression, base)
        except BaseException:
            draft.abandon()
            raise
        self._metrics.add("publish_seconds", time.monotonic() - began)
        try:
            self._retention.tidy()
        except PeerError as error:  # the version is out; what is left to do is done later
            logger.warning("version %d is published; its chunks wait for care: %s", pointer.version, error)
        return Published(
            version=pointer.version,
            kind=pointer.kind,
            base=pointer.latest.base,
            raw_bytes=pointer.raw_bytes,
            stored_bytes=_stored_bytes(pointer),
            chunks=pointer.latest.chunks,
            seconds=time.monotonic() - began,
        )

    def _base_for(self, plan: ImagePlan) -> Base | None:
        """Give what is held, if a difference to it makes sense."""
        held = self._held
        if held is None or held.plan.layout != plan.layout or plan.raw_bytes < MIN_DELTA_BYTES:
            return None
        return held.base if held.base.version == self.latest_version else None

    def _make_latest(
        self,
        plan: ImagePlan,
        draft: Draft,
        compression: bool,
        base: Base | None,
        deadline: Deadline | None = None,
    ) -> Manifest:
        """Store an image and commit it as the latest version; hold it from then on."""
        for _ in range(_TRIES):
            pointer, stored, full_ratio = self._store(plan, draft.array, compression, base, deadline)
            name = pointer.latest.name_of_image(self._key, self._keys.run)
            image = draft.publish(name, stored.header)
            draft = Draft(image.array, placed=image)
            held = _Held(plan, image, compression, Base(0, image.array, stored.digests, full_ratio))
            try:
                return self._commit(pointer, held, deadline)
            except _Incomplete:
                base = None  # it may have been lost too
                self._discard(pointer)
            except (Fenced, RunLost, ServerOutOfMemory):
                self._discard(pointer)
                raise
        raise ServerFault(
            f"{self._connection.address} loses chunks of weights before a version is complete; does it evict keys?"
        )

    def _store(
        self, plan: ImagePlan, array: Bytes, compression: bool, base: Base | None, deadline: Deadline | None
    ) -> tuple[Manifest, Stored, float]:
        """Store an image, as a difference if that pays; and as a whole too, once many differences have come."""
        before = self._latest.forms if self._latest else ()
        store = partial(self._uploader.store, plan, array, compression=compression, deadline=deadline)
        version = self.last_used + 1
        tried = self._uploader.try_difference(plan, array, base) if base else None
        whole: Stored | None = None
        if base and tried:
            stored = store(version=version, upload=self._new_upload(), base=base, encoded=tried)
            if needs_whole(stored.form, before):
                whole = store(version=version, upload=self._new_upload())
        else:
            stored = whole = store(version=version, upload=self._new_upload())
        full_ratio = base.full_ratio if base else 1.0
        if whole:
            self._chunks[whole.form.upload] = whole.chunks
            full_ratio = whole.form.stored_bytes / max(1, plan.raw_bytes)
        self._chunks[stored.form.upload] = stored.chunks
        others = kept(stored.form, whole.form if whole and whole is not stored else None, before)
        pointer = Manifest(
            latest=stored.form,
            others=others,
            raw_bytes=plan.raw_bytes,
            chunk_bytes=self._chunk_bytes,
            codec="blosc2" if compression else "raw",
            published=time.time(),
            dropped=(*(form for form in before if form not in others), *self._unsigned),
        )
        return self._signed(pointer), stored, full_ratio

    def _signed(self, pointer: Manifest) -> Manifest:
        return pointer.signed(self._key, self._keys.run) if self._key else pointer

    def _commit(self, pointer: Manifest, held: _Held, deadline: Deadline | None) -> Manifest:
        """Make what is stored the next version; give the pointer with its number."""
        for _ in range(_COMMITS):
            done = self._connection.retry(partial(self._try_commit, pointer, held), deadline)
            if done != b"taken":
                break
            before = self._latest
            self._catch_up()
            if self._latest is not before:  # what came through meanwhile is to be superseded
                raise _Incomplete
            pointer = self._signed(pointer.numbered(self.last_used + 1))
        else:
            raise ServerFault(
                f"somebody else keeps writing {self._keys.weights}; version {pointer.version} is not out"
            )
        self._adopt(pointer)
        self._unsure = None
        self._held = held.numbered(pointer.version)
        self._metrics.add_all(
            published=1,
            published_raw_bytes=pointer.raw_bytes,
            published_stored_bytes=_stored_bytes(pointer),
        )
        return pointer

    def _discard(self, pointer: Manifest) -> None:
        """Delete what was stored for a version that did not come to be; a full server needs the room."""
        if self._unsure is not None and self._unsure[0] == pointer.upload:
            return  # an earlier try may have been done after all
        for form in pointer.new_forms:
            self._uploader.discard(form.upload, form.chunks)

    def _try_commit(self, pointer: Manifest, held: _Held) -> Any:
        """Commit over the connection on which every chunk was seen: a server may have lost some meanwhile.

        On a Cluster others have the chunks. If one loses some after this look, workers say that they are gone.
        """
        self._channel.connect()
        chunks = [key for form in pointer.forms for key in self._retention.chunk_keys(form)]
        there = (
            self._connection.on_each("EXISTS", chunks)
            if self._keys.shards
            else self._channel.execute("EXISTS", *chunks)
        )
        if there < len(chunks):
            raise _Incomplete
        keys = (self._keys.meta, self._keys.weights, self._keys.control, self._keys.notify)
        arguments = (self._epoch, pointer.version, pointer.upload, *self._refused, *flat(pointer.to_fields()))
        try:
            return self._channel.run(COMMIT, keys, arguments)
        except (Fenced, RunLost, ServerOutOfMemory):  # it was not done
            raise
        except BaseException:  # it may have been done, and a worker may run it: the number is gone
            self._unsure = pointer.upload, held
            self._floor = max(self._floor, pointer.version)
            raise

    def _catch_up(self, *, opening: bool = False) -> int:
        """Learn which numbers were used: by a commit whose reply never came, or by what the server lost.

        Args:
            opening: whether this is the first look at the run, which may have gone on without signatures so far.

        Returns:
            The newest version that workers saw on a server that lost it; 0 without one.
        """
        found = self._read_pointer(opening=opening)
        if found is not None and found.version > self.latest_version:
            self._adopt(found)
            came_through = self._unsure is not None and self._unsure[0] == found.upload
            self._held = self._unsure[1].numbered(found.version) if self._unsure and came_through else None
        self._unsure = None
        seen = self._seen()
        self._floor = max(self._floor, seen)
        return seen

    def _seen(self) -> int:
        """Give the newest version that workers saw on a server that lost it; 0 without one."""
        text = self._connection.execute("HGET", self._keys.meta, "version_floor") or b"0"
        seen = whole_number(str(text, "ascii", "replace"))
        if seen is None or seen > _LAST_VERSION:
            raise ServerFault(
                f"version_floor of {self._keys.meta} is {text!r:.100}, which no worker saw; delete this field"
            )
        return seen

    def _adopt(self, pointer: Manifest) -> None:
        """Take a pointer for the latest; what it no longer names is to expire."""
        self._retention.adopt(pointer, self._latest.forms if self._latest else ())
        names = {form.upload for form in pointer.forms}
        self._chunks = {upload: chunks for upload, chunks in self._chunks.items() if upload in names}
        self._unsigned = ()
        self._latest = pointer
        self._published[pointer.version] = pointer.published
        if len(self._published) > TIMES_KEPT:
            del self._published[next(iter(self._published))]

    def _is_damaged(self, pointer: Manifest, *, compare: bool) -> bool:
        """Whether a chunk is missing or, as far as its size or its digest tells, is not what was stored."""
        expected = [
            pair
            for form in pointer.forms
            for pair in zip(self._retention.chunk_keys(form), self._chunks.get(form.upload, ()), strict=False)
        ]
        hashes = {
            key: form.hash_of(number)
            for form in pointer.forms
            for number, key in enumerate(self._retention.chunk_keys(form))
        }
        there = self._connection.on_each("EXISTS", [key for key, _ in expected])
        sizes = self._connection.execute_all([("STRLEN", key) for key, _ in expected])
        if there < len(expected) or sizes != [sum(size for size, _ in pieces) for _, pieces in expected]:
            return True
        return compare and not all(
            _consists_of(self._connection.execute("GET", key) or b"", pieces, hashes[key])
            for key, pieces in expected
        )

    def _new_upload(self) -> str:
        self._attempt += 1
        return f"{self.last_used + 1}-{self._epoch}-{self._attempt}"

    def _read_pointer(self, *, opening: bool = False) -> Manifest | None:
        """Give what the server names as the latest version; with a key, only what was signed with it.

        What others wrote there counts for nothing, and the next version replaces it, whatever its number. Only if
        this learner just opens the run may that be an honest version without a signature: then its number is used.
        """
        fields = text_fields(self._connection.execute("HGETALL", self._keys.weights))
        if self._key is None:
            return Manifest.from_fields(fields)
        pointer: Manifest | None = None
        try:
            pointer = Manifest.from_fields(fields)
            if pointer is not None:
                pointer.check(self._key, self._keys.run)
            return pointer
        except WireError as error:
            upload, number = self._connection.execute("HMGET", self._keys.weights, "upload", "version")
            if (upload, number) != self._refused:
                logger.warning("the weights that the run %r names are refused: %s", self._keys.run, error)
            self._refused = upload or b"", number or b""
        if opening and pointer is not None and pointer.version <= _LIKELY_VERSION:
            self._floor = max(self._floor, pointer.version)
            self._unsigned = tuple(replace(form, signature="") for form in (*pointer.forms, *pointer.dropped))
        return None


def _stored_bytes(pointer: Manifest) -> int:
    """Give what a version took to store: as a difference, as a whole, or both."""
    return sum(form.stored_bytes for form in pointer.new_forms)


def _wait_for(work: Future[Any], timeout_seconds: float | None = None) -> None:
    """Wait until work is done, whatever becomes of it."""
    with suppress(CancelledError, TimeoutError):
        work.exception(timeout_seconds)


def _consists_of(data: bytes, pieces: Pieces, signed: str) -> bool:
    """Whether a chunk is what was stored: by its hash where that is signed, or by the digests of its pieces."""
    if signed:
        return chunk_hash([data]) == signed
    rest = memoryview(data)
    for size, digest in pieces:
        if xxhash.xxh3_64_intdigest(rest[:size]) != digest:
            return False
        rest = rest[size:]
    return True


def _log_failure(future: Future[Published]) -> None:
    """Say that a version was not published, as perhaps nobody looks at its receipt."""
    if not future.cancelled() and (error := future.exception()) is not None:
        logger.warning("weights that were sent without waiting were not published: %s", error)
