"""Follows the latest weights for a worker: waits for announcements, reads the manifest, decodes in the background."""

from __future__ import annotations

import logging
import socket
import uuid
from collections.abc import Callable
from typing import Final

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import number_in, raise_first_error, text_fields
from rlbroker.backend.threads import BackgroundThread
from rlbroker.codec.signing import NotSigned, SigningKey
from rlbroker.errors import WireError
from rlbroker.membership.run_size import RunSize
from rlbroker.weights.download import DecodedVersion, Downloader
from rlbroker.weights.host_cache import ImageStore
from rlbroker.weights.manifest import Manifest
from rlbroker.weights.update_queue import UpdateQueue, WeightsUpdate
from rlbroker.weights.version_channel import VersionChannel

logger = logging.getLogger("rlbroker")

#: How often the manifest is polled without an announcement. Announcements come over the channel and the control stream;
#: a worker that has lost the connection of either polls as soon as it is back.
POLL_SECONDS: Final = 3.0

#: At most one refused version is reported in this time: any client with write access can name a new one at each poll.
REFUSED_SECONDS: Final = 1.0

#: How often a download is tried before the version counts as failed.
TRIES: Final = 3


class Subscriber:
    """Keeps the newest version ready for one worker."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        images: ImageStore | None = None,
        *,
        key: SigningKey | None = None,
        from_replicas: bool = False,
        run_size: Callable[[], RunSize] = RunSize,
    ) -> None:
        """Create a subscriber; nothing is read yet.

        Args:
            images: where decoded versions are kept; by default in this process's memory.
            key: the key that weights must be signed with; None to accept them unsigned.
            from_replicas: whether chunks are read from replicas, where there are any.
            run_size: returns the number of workers and hosts that download each version.
        """
        self._connection, self._keys = connection, keys
        self._images = images or ImageStore(keys.run, None)
        self._jitter = _DownloadJitter(self._images, run_size)
        self._signatures = _SignatureCheck(key, keys.run)
        self._channel = VersionChannel(connection, keys)
        self._updates = UpdateQueue()
        self._downloader = Downloader(connection, keys, self._images, key=key, from_replicas=from_replicas)
        self._thread = BackgroundThread(f"weights of {keys.run!r}", self._run_once)
        self._announced = 0
        self._next_poll = Deadline(0)
        self._not_before: Deadline | None = None  #: when to download, if that was delayed
        self._last_manifest: Manifest | None = None  #: of the version that was downloaded last
        #: The version that was decoded last: the next one may be a delta to it.
        self._previous: DecodedVersion | None = None
        self._failures = ("", 0)  #: the upload that failed last, and how often
        self._problem = ""

    def start(self) -> None:
        """Begin to follow the run's weights in the background."""
        self._thread.start()

    def request_stop(self) -> None:
        """Make the background thread end soon, without waiting for it."""
        self._thread.request_stop()
        self._downloader.cancel()

    def stop(self, timeout_seconds: float) -> None:
        """End the background thread and release all images."""
        self.request_stop()
        self._thread.stop(timeout_seconds)
        self._downloader.close()
        self._channel.close()
        self._previous = None
        self._updates.clear()
        self._images.close()

    @property
    def thread(self) -> BackgroundThread:
        """The background thread."""
        return self._thread

    @property
    def problem(self) -> str:
        """The reason why the newest version cannot be read; empty if it can."""
        return self._problem

    @property
    def reason(self) -> str:
        """Why no newer version arrives, as far as the worker knows."""
        return self._problem or "is its learner running, and has it published?"

    @property
    def ready(self) -> bool:
        """Whether there is an update to load."""
        return self._updates.ready

    @property
    def newest(self) -> int:
        """The newest version that was decoded or given up; 0 before the first, and after `offer_again`."""
        return self._updates.newest

    @property
    def newest_seen(self) -> tuple[int, str]:
        """The newest version that was ever decoded or given up, and its upload; 0 and "" before the first."""
        return self._updates.newest_seen

    @property
    def updates(self) -> list[WeightsUpdate]:
        """What is ready, failed versions first. The caller marks as taken what it has loaded."""
        return self._updates.updates

    def wait(self, timeout_seconds: float) -> None:
        """Wait until a version is decoded or given up; may return earlier."""
        self._updates.wait(timeout_seconds)

    def read_latest(self) -> int:
        """Return the server's latest version; with a signing key, the latest signed one. 0 before the first."""
        version = self._read_version() or 0
        self.announce(version)
        if not self._signatures.required:
            return version
        try:
            manifest = self._read_manifest()
            if manifest is not None:
                self._signatures.verify(manifest)
            return max(manifest.version if manifest else 0, self._signatures.newest)
        except WireError:  # the background thread reports it
            return self._signatures.newest

    def announce(self, version: int) -> None:
        """Note that a version was published, as another part of the worker found out."""
        if version > self._announced:
            self._announced = version
            self._thread.wake()

    def offer_again(self, newer_than: int) -> None:
        """Fetch the latest version again if calls have taken all that was newer than this: for another model."""
        if self.newest_seen[0] > newer_than and not self._updates.contains_newer(newer_than):
            self._updates.forget_newest()
            self._next_poll = Deadline(0)
            self._thread.wake()

    def _run_once(self) -> bool:
        """Wait for an announcement, and poll when it is time; return whether it polled."""
        if not self._channel.subscribed:
            self._channel.subscribe()
            self._next_poll = Deadline(0)  # announcements that came before are not repeated
        until = self._next_poll if self._not_before is None else self._not_before
        announced = self._channel.wait(until, self._thread)
        self._announced = max(self._announced, announced)
        due = self._announced > self.newest or self._next_poll.over
        if self._not_before is not None:
            due = self._not_before.over
        if due:
            self._next_poll = Deadline(POLL_SECONDS)
            self._poll()
        return due

    def _poll(self) -> None:
        """Fetch the latest version, if there is a new one and it is this worker's turn to download."""
        delayed, self._not_before = self._not_before is not None, None
        if not self._is_newer_announced():
            return
        # A delayed worker then downloads whatever is the latest. Until then it does not even read the manifest: a
        # thousand workers that read it at once are a load too, and a version is likely as large as the one before.
        if not delayed and self._last_manifest and self._delay(self._announced, self._last_manifest):
            return
        manifest, signed = self._read_manifest(), self._signatures.newest
        if manifest is not None and manifest.version < signed:
            self._problem = (
                f"version {manifest.version}: it is older than {signed}, which this worker has seen"
            )
        if manifest is None or manifest.version <= self.newest or manifest.version < signed:
            # The announcement was wrong, or the server has lost the version.
            self._announced = min(self._announced, manifest.version if manifest else 0)
            return
        try:
            self._signatures.accept(manifest)
        except NotSigned as error:
            self._refuse(manifest, str(error))
            return
        first, self._last_manifest = self._last_manifest is None, manifest
        if first and not delayed and self._delay(manifest.version, manifest):
            return
        self._fetch(manifest)

    def _is_newer_announced(self) -> bool:
        """Return whether a newer version is announced; ask the server for the latest if none is."""
        if self._announced > self.newest:
            return True
        latest = self._read_version()
        if latest is not None and latest <= self.newest:
            seen = self.newest_seen[0]
            if 0 < latest < seen:
                self._problem = (
                    f"the run's latest version is {latest}, but this worker has seen {seen}, which the learner does "
                    "not know of"
                )
            return False
        self._announced = max(self._announced, latest or 0)
        return True

    def _delay(self, version: int, similar: Manifest) -> bool:
        """Delay the download if many workers want this version; return whether it is delayed."""
        seconds = self._jitter.seconds(version, similar)
        self._not_before = Deadline(seconds) if seconds else None
        return self._not_before is not None

    def _fetch(self, manifest: Manifest) -> None:
        """Fetch a version and queue it; after a failure try again later, or give it up."""
        try:
            version = self._downloader.fetch(manifest, self._previous)
        except WireError as error:
            self._previous = None  # it may be the wrong base
            self._fail(manifest, str(error), refused=isinstance(error, NotSigned))
            return
        self._problem = ""
        self._previous = version if manifest.codec != "raw" else None  # raw versions are never deltas
        self._updates.put(WeightsUpdate(manifest.version, version), manifest.upload)

    def _read_version(self) -> int | None:
        """Return the latest version, 0 before the first; None if the field is not a number."""
        return number_in(self._connection.execute("HGET", self._keys.weights, "version"))

    def _read_manifest(self) -> Manifest | None:
        """Return the server's manifest, and use the shards over which its chunks are spread."""
        commands = [("HGETALL", self._keys.weights), ("HGET", self._keys.meta, "shards")]
        fields, shards = raise_first_error(self._connection.execute_all(commands, strict=False))
        if shards is not None:
            self._keys.use_shards(shards.decode("ascii", "replace"))
        return Manifest.from_fields(text_fields(fields))

    def _refuse(self, manifest: Manifest, problem: str) -> None:
        """Report a version with a wrong signature. The learner's next version may have a lower number."""
        self._problem = f"version {manifest.version}: {problem}"
        self._announced = self.newest
        if self._signatures.is_new_refusal(manifest, problem):
            logger.warning("%s", self._problem)
            self._updates.put_refused(WeightsUpdate(manifest.version, None, problem, refused=True))

    def _fail(self, manifest: Manifest, problem: str, *, refused: bool) -> None:
        if self._thread.stopping:
            return
        self._problem = f"version {manifest.version}: {problem}"
        upload, tries = self._failures
        tries = tries + 1 if upload == manifest.upload else 1
        self._failures = manifest.upload, tries
        logger.warning("%s (try %d of %d)", self._problem, tries, TRIES)
        if tries < TRIES:
            self._not_before = Deadline(self._connection.block_seconds)
        else:
            self._updates.put(WeightsUpdate(manifest.version, None, problem, refused), manifest.upload)


class _DownloadJitter:
    """Spreads the downloads of a version over time, so that many workers do not start at once."""

    def __init__(self, images: ImageStore, run_size: Callable[[], RunSize]) -> None:
        self._images, self._run_size = images, run_size
        self._host, self._worker = socket.gethostname(), uuid.uuid4().hex

    def seconds(self, version: int, similar: Manifest) -> float:
        """Return how long to wait before downloading a version about as large as another one."""
        shared = self._images.shares(similar.raw_bytes)
        name = self._host if shared else self._worker
        return self._run_size().wait_seconds(version, similar.stored_bytes, name=name, shared=shared)


class _SignatureCheck:
    """Checks the signatures of manifests.

    Attributes:
        newest: the newest version with a valid signature. An older one is not accepted after it, so that another
            client cannot bring back old weights.
    """

    def __init__(self, key: SigningKey | None, run: str) -> None:
        self._key, self._run = key, run
        self.newest = 0
        self._last_refusal: tuple[int, str, str] | None = None
        self._next_refusal = Deadline(0)
        self._warned = False

    @property
    def required(self) -> bool:
        """Whether weights must be signed."""
        return self._key is not None

    def verify(self, manifest: Manifest) -> None:
        """Raise NotSigned if a signature is required and is missing or wrong."""
        if self._key:
            manifest.check(self._key, self._run)

    def accept(self, manifest: Manifest) -> None:
        """Verify the manifest of a version to fetch, and remember its version; without a key, warn once."""
        if self._key:
            self.verify(manifest)
            self.newest = manifest.version
        elif manifest.latest.signature and not self._warned:
            self._warned = True
            logger.warning(
                "the learner of %r signs its weights, but this worker does not check the signatures, as it has no key: "
                "set signing_key or RLBROKER_SIGNING_KEY_FILE",
                self._run,
            )

    def is_new_refusal(self, manifest: Manifest, problem: str) -> bool:
        """Return whether to report a refusal: not one that repeats the last, nor one shortly after it."""
        refusal = manifest.version, manifest.upload, problem
        if refusal == self._last_refusal or not self._next_refusal.over:
            return False
        self._last_refusal, self._next_refusal = refusal, Deadline(REFUSED_SECONDS)
        return True
