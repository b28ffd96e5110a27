"""Publishes weights for a learner: encodes and stores each version once, and commits it in one atomic step.

The learner keeps one image of its latest version. The next version may be stored as a delta to it, and a server that
comes back without its data gets it again under a new version.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import ONE_TRY, Backoff, Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.locks import CallLock
from rlbroker.backend.tasks import Task, TaskThread
from rlbroker.codec.image import ImagePlan
from rlbroker.codec.leaves import Bytes
from rlbroker.codec.signing import SigningKey
from rlbroker.errors import Closed, Fenced, PeerError, RunLost, ServerOutOfMemory
from rlbroker.metrics.counters import Metrics
from rlbroker.receipts import AppliedVersions, Published, PublishReceipt
from rlbroker.weights.commit import ChunksLost, Committer, LocalCopy
from rlbroker.weights.gpu_copy import Copies, GpuCopy
from rlbroker.weights.host_cache import Draft, ImageStore
from rlbroker.weights.manifest import CHUNK_BYTES, Manifest, choose_others, needs_full
from rlbroker.weights.retention import Retention
from rlbroker.weights.upload import DeltaBase, Upload, Uploader

logger = logging.getLogger("rlbroker")

#: Raw bytes of one segment, which is compressed, sent and decoded as a whole.
SEGMENT_BYTES: Final = 2 << 20

#: Smaller weights are always stored in full: a delta would save less than finding it costs.
MIN_DELTA_BYTES: Final = 64 << 10


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
        """Continue with the version that the run has now.

        Args:
            epoch: the learner's epoch; a newer one fences this learner.
            images: where images are kept; in this process's memory by default.
            metrics: records publications and their durations.
            key: signs versions, and must have signed the present one; None for no signatures.
            segment_bytes: raw bytes of one segment.
            chunk_bytes: a chunk is closed once it holds this much.
        """
        self._connection, self._keys, self._key = connection, keys, key
        self._segment_bytes, self._chunk_bytes = segment_bytes, chunk_bytes
        self._images = images or ImageStore(keys.run, None)
        self._metrics = metrics or Metrics()
        self._gpu_copy = GpuCopy()
        #: Held by a call while it copies its weights.
        self._preparing = CallLock()
        #: Held by the threads in the background that publish.
        self._publishing = CallLock()
        #: The last publication. It is submitted again if the call was interrupted before it could submit it.
        self._last: Task[Published] | None = None
        self._retention = Retention(connection, keys)
        self._committer = Committer(connection, keys, self._retention, epoch=epoch, key=key)
        self._uploader = Uploader(
            connection,
            keys,
            chunk_bytes=chunk_bytes,
            retention=self._retention,
            metrics=self._metrics,
            hashes=key is not None,
        )
        self._retention.enforce()
        self._thread = TaskThread(f"publish {keys.run!r}")

    @property
    def latest_version(self) -> int:
        """The latest version; 0 before the first."""
        return self._committer.latest_version

    @property
    def last_tried(self) -> int:
        """The highest version that a worker may run."""
        return self._committer.last_tried

    @property
    def publish_times(self) -> Mapping[int, float]:
        """The times at which recent versions were published, seconds since the epoch."""
        return self._committer.publish_times

    def publish(
        self,
        weights: Any,
        *,
        compression: bool,
        dtype: str | None = None,
        wait: bool = True,
        applied: AppliedVersions | None = None,
    ) -> PublishReceipt:
        """Publish weights as the run's next version.

        Args:
            weights: a state dict, or any tree of tensors, arrays and plain values.
            compression: whether to compress with blosc2 and to store deltas; without, publishing is faster on a fast
                link.
            dtype: the dtype that floating tensors are cast to; None to leave them as they are.
            wait: whether to return only when the version is published. Otherwise the weights have been copied on
                return; the next call waits for this one, as one publication runs at a time.
            applied: tells the receipt which workers have applied the version.

        Raises:
            InvalidArgument: tensors cannot be cast to `dtype`.
            UnsupportedType: a value in the weights cannot be sent; the message names its path.
            Fenced: a newer learner has taken over the run.
            PeerError: the server refused or could not be reached in time. The version was not published, or its
                commit may have been applied and the reply was lost.
        """
        began = time.monotonic()
        task = self._prepare(weights, compression, dtype, wait, began)
        self._thread.submit(task)
        if not wait:
            return PublishReceipt(task, applied)
        try:
            return PublishReceipt(task.result(), applied)
        finally:
            if not task.done:  # an interrupt: the thread continues, and no caller sees its error
                task.on_failure = _log_failure

    def _prepare(
        self, weights: Any, compression: bool, dtype: str | None, wait: bool, began: float
    ) -> Task[Published]:
        """Copy weights, once the last publication has ended, and return the task that publishes them."""
        task: Task[Published] | None = None
        while task is None:
            self._wait_for_last()
            task = self._preparing.run(self._copy_if_idle, weights, compression, dtype, wait, began)
        return task

    def _copy_if_idle(
        self, weights: Any, compression: bool, dtype: str | None, wait: bool, began: float
    ) -> Task[Published] | None:
        if self._last is not None and not self._last.done:
            return None  # another thread was faster
        self._last = self._copy(weights, compression, dtype, wait, began)
        return self._last

    def _copy(
        self, weights: Any, compression: bool, dtype: str | None, wait: bool, began: float
    ) -> Task[Published]:
        metadata = inspect.getattr_static(
            weights, "_metadata", None
        )  # runs no `__getattr__`, which may raise
        plan = ImagePlan(weights, dtype=dtype, segment_bytes=self._segment_bytes, metadata=metadata)
        copies = self._gpu_copy.start(plan)
        draft = self._images.reserve(plan.image_bytes, plan.raw_bytes)
        try:
            if wait or not copies.pending:
                copies.fill(plan, draft.array)
        except BaseException:
            draft.abandon()
            raise
        work = partial(self._publishing.run, self._publish, copies, plan, draft, compression, began)
        return Task(work, on_failure=None if wait else _log_failure)

    def enforce_retention(self) -> None:
        """Set the lifetimes of chunks that an earlier fault left unset. Do nothing during a publication."""
        self._publishing.run_within(0, self._retention.enforce)

    def mark_used(self, version: int) -> None:
        """Never use this version number or a lower one: a checkpoint refers to it."""
        self._committer.reserve(version)

    def is_behind_workers(self) -> bool:
        """Return whether workers have seen a newer version than the latest, on a server that lost it."""
        committer = self._committer
        return (
            committer.local_copy is not None and committer.newest_seen_by_workers() > committer.latest_version
        )

    def restore(self, *, unreadable_version: int = 0) -> bool:
        """Publish the latest weights again, under a new version, if the server has lost them. Try once.

        Args:
            unreadable_version: a version that a worker could not read. If it is the latest, the contents of the stored
                chunks are checked; otherwise only their sizes.

        Returns:
            False if another thread is publishing: call again later.
        """
        return self._publishing.run_within(0, self._restore, unreadable_version) or False

    def _restore(self, unreadable_version: int) -> bool:
        seen = self._committer.catch_up()
        manifest, copy = self._committer.latest, self._committer.local_copy
        if manifest is None or copy is None:
            return True
        found = self._committer.read_manifest()
        lost = found is None or found.upload != manifest.upload or found.version != manifest.version
        if (
            lost
            or seen > manifest.version
            or self._uploader.is_damaged(manifest, compare=unreadable_version == manifest.version)
        ):
            again = Draft(copy.image.array, published=copy.image)
            self._make_latest(copy.plan, again, copy.compression, None, ONE_TRY)
            logger.warning(
                "the server has lost version %d, or a part of it; it is published again as version %d",
                manifest.version,
                self.latest_version,
            )
            self._retention.enforce()
        return True

    def finish(self, timeout_seconds: float) -> bool:
        """Wait until no publication is running in the background; return whether there is none."""
        return self._wait_for_last(timeout_seconds)

    def check(self) -> None:
        """Raise the error of the last publication if it failed in the background, where no caller got it."""
        if self._last is not None and self._last.failed and self._last.on_failure is not None:
            self._last.result()

    def close(self) -> None:
        """End the threads and release the image."""
        if self._last is not None:
            self._last.cancel(Closed("the WorkerCommunicator was closed before the weights were published"))
        self._thread.close()
        self._committer.close()
        self._uploader.close()
        self._images.close()

    def _wait_for_last(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the last publication has ended, with or without success; return whether it has."""
        last = self._last
        if last is None or last.done:
            return True
        self._thread.submit(last)  # again, in case that an interrupt came before
        return last.wait(timeout_seconds)

    def _publish(
        self, copies: Copies, plan: ImagePlan, draft: Draft, compression: bool, began: float
    ) -> Published:
        """Make the content of the draft the latest version."""
        try:
            if copies.pending:
                copies.fill(plan, draft.array)
            self._committer.resolve_unconfirmed()
            base = self._base_for(plan) if compression else None
            manifest = self._make_latest(plan, draft, compression, base)
        except BaseException:
            draft.abandon()
            raise
        self._metrics.add("publish_seconds", time.monotonic() - began)
        try:
            self._retention.enforce()
        except PeerError as error:  # the version is published; the learner calls enforce_retention later
            logger.warning(
                "version %d is published; the lifetimes of its chunks are set later: %s",
                manifest.version,
                str(error),
            )
        return Published(
            version=manifest.version,
            kind=manifest.kind,
            base=manifest.base,
            raw_bytes=manifest.raw_bytes,
            stored_bytes=_stored_bytes(manifest),
            chunks=manifest.latest.chunks,
            seconds=time.monotonic() - began,
        )

    def _base_for(self, plan: ImagePlan) -> DeltaBase | None:
        """Return the latest version as a base, if a delta to it is possible and useful."""
        copy = self._committer.local_copy
        if copy is None or copy.plan.layout != plan.layout or plan.raw_bytes < MIN_DELTA_BYTES:
            return None
        return copy.base if copy.base.version == self.latest_version else None

    def _make_latest(
        self,
        plan: ImagePlan,
        draft: Draft,
        compression: bool,
        base: DeltaBase | None,
        deadline: Deadline | None = None,
    ) -> Manifest:
        """Store an image, publish it on this host, and commit it as the latest version."""
        backoff, give_up = Backoff(), deadline or Deadline(self._connection.timeout_seconds)
        while True:
            manifest, upload, full_ratio = self._store(plan, draft.array, compression, base, deadline)
            name = manifest.latest.name_of_image(self._key, self._keys.run)
            image = draft.publish(name, upload.header)
            draft = Draft(image.array, published=image)
            copy = LocalCopy(plan, image, compression, DeltaBase(0, image.array, upload.digests, full_ratio))
            try:
                manifest = self._committer.commit(manifest, copy, deadline)
            except ChunksLost as error:
                base = None  # the server may have lost it too
                self._discard(manifest)
                if give_up.over:
                    raise RunLost(
                        f"{self._connection.address} loses chunks of weights before a version is complete; does it "
                        "evict keys, or is it flushed again and again?"
                    ) from error
                time.sleep(backoff.next(give_up))
            except (Fenced, RunLost, ServerOutOfMemory):
                self._discard(manifest)
                raise
            else:
                self._uploader.forget_superseded(manifest)
                self._metrics.add_all(
                    published=1,
                    published_raw_bytes=manifest.raw_bytes,
                    published_stored_bytes=_stored_bytes(manifest),
                )
                return manifest

    def _store(
        self,
        plan: ImagePlan,
        array: Bytes,
        compression: bool,
        base: DeltaBase | None,
        deadline: Deadline | None,
    ) -> tuple[Manifest, Upload, float]:
        """Store an image as a delta if that is worthwhile, and in full as well when `needs_full`."""
        committer = self._committer
        before = committer.latest.forms if committer.latest else ()
        store = partial(
            self._uploader.store,
            plan,
            array,
            version=committer.last_used + 1,
            compression=compression,
            deadline=deadline,
        )
        trial = self._uploader.try_delta(plan, array, base) if base else None
        full: Upload | None = None
        if base and trial:
            upload = store(upload=committer.new_upload(), base=base, encoded=trial)
            if needs_full(upload.form, before):
                full = store(upload=committer.new_upload())
        else:
            upload = full = store(upload=committer.new_upload())
        full_ratio = base.full_ratio if base else 1.0
        if full:
            full_ratio = full.form.stored_bytes / max(1, plan.raw_bytes)
        others = choose_others(upload.form, full.form if full and full is not upload else None, before)
        manifest = Manifest(
            latest=upload.form,
            others=others,
            raw_bytes=plan.raw_bytes,
            chunk_bytes=self._chunk_bytes,
            codec="blosc2" if compression else "raw",
            published=time.time(),
            dropped=(*(form for form in before if form not in others), *committer.unsigned_forms),
        )
        return committer.sign(manifest), upload, full_ratio

    def _discard(self, manifest: Manifest) -> None:
        """Delete the stored chunks of a version that was not committed: a full server needs the room."""
        if self._committer.is_unconfirmed(manifest.upload):
            return
        for form in manifest.new_forms:
            self._uploader.discard(form.upload, form.chunks)


def _stored_bytes(manifest: Manifest) -> int:
    """Return the bytes that a version was stored in: as a delta, in full, or both."""
    return sum(form.stored_bytes for form in manifest.new_forms)


def _log_failure(error: BaseException) -> None:
    """Log that a version was not published: the caller may never read its receipt."""
    logger.warning("weights that were sent without waiting were not published: %s", str(error))
