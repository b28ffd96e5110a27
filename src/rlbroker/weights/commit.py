"""Commits stored versions in one atomic step, and keeps track of which version numbers were used."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Self

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection, flat
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import text_fields, whole_number
from rlbroker.backend.scripts import Script
from rlbroker.codec.image import ImagePlan
from rlbroker.codec.signing import SigningKey
from rlbroker.errors import Fenced, RunLost, ServerFault, ServerOutOfMemory, WireError
from rlbroker.weights.host_cache import Image
from rlbroker.weights.manifest import Manifest, StoredForm
from rlbroker.weights.retention import Retention
from rlbroker.weights.upload import DeltaBase

logger = logging.getLogger("rlbroker")

#: The highest version number: Lua scripts count in floating point, which is exact up to here.
_LAST_VERSION: Final = 1 << 52

#: How often a commit is tried while another client writes to the manifest.
_TRIES: Final = 20

#: An unsigned manifest with a higher version number is not believed.
_LIKELY_VERSION: Final = 10**9

#: How many publication times are remembered.
TIMES_KEPT: Final = 10_000

COMMIT = Script.load("weights/lua/commit.lua")


@dataclass(frozen=True)
class LocalCopy:
    """A version that this learner published: its image, and what is needed to store it again, or a delta to it."""

    plan: ImagePlan
    image: Image
    compression: bool
    base: DeltaBase

    def with_version(self, version: int) -> Self:
        """Return the copy with the number that the version got."""
        return replace(self, base=replace(self.base, version=version))


class ChunksLost(Exception):
    """The server has lost chunks that the version needs."""


class Committer:
    """Commits versions of a run, and knows the latest one.

    A commit whose reply is lost may or may not have been applied. Its number counts as used, and the next `catch_up`
    finds out which it was.

    Not safe to use from several threads at once.

    Attributes:
        latest: the manifest of the latest version; None before the first.
        local_copy: the copy of the latest version; None if this learner did not publish it.
        unsigned_forms: the forms of a run that was unsigned until this learner, which signs, opened it; the next commit
            drops them.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        retention: Retention,
        *,
        epoch: int,
        key: SigningKey | None = None,
    ) -> None:
        """Read the latest version of the run.

        Args:
            retention: keeps and expires the chunks of committed versions.
            epoch: the learner's epoch; a newer one fences this learner.
            key: signs manifests, and must have signed the run's present one; None for no signatures.
        """
        self._connection, self._keys, self._retention, self._epoch = connection, keys, retention, epoch
        self._key = key
        self._channel = Channel(connection, keys.meta)
        self.latest: Manifest | None = None
        self.local_copy: LocalCopy | None = None
        self._publish_times: dict[int, float] = {}
        self._uploads = 0
        #: All versions up to this one may have been used, even if the server has lost them.
        self._floor = 0
        #: The versions of `reserve`, which other threads call.
        self._reserved = [0]
        #: The version that a commit was last tried for: a worker may run it before the reply arrives here.
        self._tried = 0
        #: The upload and the copy of a commit whose reply was lost.
        self._unconfirmed: tuple[str, LocalCopy] | None = None
        #: Upload and version of the manifest that was refused last. The next commit may replace exactly this one.
        self._refused = (b"-", b"-")
        self.unsigned_forms: tuple[StoredForm, ...] = ()
        self.catch_up(opening=True)

    @property
    def latest_version(self) -> int:
        """The latest version; 0 before the first."""
        return self.latest.version if self.latest else 0

    @property
    def last_used(self) -> int:
        """The highest version number known to have been used."""
        return max(self.latest_version, self._floor, *self._reserved)

    @property
    def last_tried(self) -> int:
        """The highest version that a worker may run."""
        return max(self.last_used, self._tried)

    @property
    def publish_times(self) -> Mapping[int, float]:
        """The times at which recent versions were published, seconds since the epoch."""
        return self._publish_times

    def close(self) -> None:
        """Close the connection and release the copies."""
        self._channel.close()
        self.local_copy = self._unconfirmed = None

    def new_upload(self) -> str:
        """Return a unique name for an upload of the next version."""
        self._uploads += 1
        return f"{self.last_used + 1}-{self._epoch}-{self._uploads}"

    def mark_used(self, version: int) -> None:
        """Never use this version number or a lower one."""
        self._floor = max(self._floor, version)

    def reserve(self, version: int) -> None:
        """Never use this version number or a lower one; for any thread."""
        self._reserved.append(version)

    def sign(self, manifest: Manifest) -> Manifest:
        """Return the manifest signed, if this learner has a signing key."""
        return manifest.signed(self._key, self._keys.run) if self._key else manifest

    def commit(self, manifest: Manifest, copy: LocalCopy, deadline: Deadline | None) -> Manifest:
        """Make a stored version the latest; return its manifest, with another number if this one was taken.

        Raises:
            ChunksLost: the server has lost chunks of this version, or another version was committed before it.
        """
        for _ in range(_TRIES):
            reply = self._connection.retry(partial(self._try_commit, manifest, copy), deadline)
            if reply != b"taken":
                break
            before = self.latest
            self.catch_up()
            if self.latest is not before:  # the forms of that other version must be superseded too
                raise ChunksLost
            manifest = self.sign(manifest.with_version(self.last_used + 1))
        else:
            raise ServerFault(
                f"another client keeps writing {self._keys.weights}; version {manifest.version} was not published"
            )
        self._adopt(manifest)
        self._unconfirmed = None
        self.local_copy = copy.with_version(manifest.version)
        return manifest

    def is_unconfirmed(self, upload: str) -> bool:
        """Return whether a commit of this upload may have been applied although its reply was lost."""
        return self._unconfirmed is not None and self._unconfirmed[0] == upload

    def resolve_unconfirmed(self) -> None:
        """Find out whether the commit whose reply was lost was applied, if there is one."""
        if self._unconfirmed:
            self.catch_up()

    def catch_up(self, *, opening: bool = False) -> int:
        """Learn which version numbers were used by a commit whose reply was lost, or before the server lost its data.

        Args:
            opening: whether this learner is opening the run, which may have had no signatures until now.

        Returns:
            The newest version that workers have seen on a server that lost it; 0 without one.
        """
        found = self.read_manifest(opening=opening)
        if found is not None and found.version > self.latest_version:
            copy = self._unconfirmed[1] if self._unconfirmed and self.is_unconfirmed(found.upload) else None
            self._adopt(found)
            self.local_copy = copy.with_version(found.version) if copy else None
        self._unconfirmed = None
        seen = self.newest_seen_by_workers()
        self.mark_used(seen)
        return seen

    def newest_seen_by_workers(self) -> int:
        """Return the newest version that workers have seen on a server that lost it; 0 without one."""
        text = self._connection.execute("HGET", self._keys.meta, "version_floor") or b"0"
        seen = whole_number(str(text, "ascii", "replace"))
        if seen is None or seen > _LAST_VERSION:
            raise ServerFault(
                f"version_floor of {self._keys.meta} is {text!r:.100}, which is not a valid version; delete this field"
            )
        return seen

    def read_manifest(self, *, opening: bool = False) -> Manifest | None:
        """Return the manifest that the server has; with a signing key, only one that was signed with it.

        A manifest from another writer is ignored, and the next version replaces it, whatever its number. Only when
        this learner opens the run may it be an honest manifest without a signature, whose number counts as used.
        """
        fields = text_fields(self._connection.execute("HGETALL", self._keys.weights))
        if self._key is None:
            return Manifest.from_fields(fields)
        manifest: Manifest | None = None
        try:
            manifest = Manifest.from_fields(fields)
            if manifest is not None:
                manifest.check(self._key, self._keys.run)
            return manifest
        except WireError as error:
            upload, number = self._connection.execute("HMGET", self._keys.weights, "upload", "version")
            if (upload, number) != self._refused:
                logger.warning("the manifest in the run %r is refused: %s", self._keys.run, str(error))
            self._refused = upload or b"", number or b""
        if opening and manifest is not None and manifest.version <= _LIKELY_VERSION:
            self.mark_used(manifest.version)
            self.unsigned_forms = tuple(
                replace(form, signature="") for form in (*manifest.forms, *manifest.dropped)
            )
        return None

    def _try_commit(self, manifest: Manifest, copy: LocalCopy) -> Any:
        """Commit over the connection that has just checked the chunks: after a reconnect the server may have lost some.

        On a Cluster the chunks are on other nodes. If a node loses chunks after this check, workers report it.
        """
        self._channel.connect()
        chunks = [key for form in manifest.forms for key in form.chunk_keys(self._keys)]
        found = (
            self._connection.execute_on_keys("EXISTS", chunks)
            if self._keys.shards
            else self._channel.execute("EXISTS", *chunks)
        )
        if found < len(chunks):
            raise ChunksLost
        keys = (self._keys.meta, self._keys.weights, self._keys.control, self._keys.notify)
        fields = flat(manifest.to_fields())
        arguments = (self._epoch, manifest.version, manifest.upload, *self._refused, *fields)
        self._tried = manifest.version
        try:
            return self._channel.run(COMMIT, keys, arguments)
        except (Fenced, RunLost, ServerOutOfMemory):  # it was not applied
            raise
        except BaseException:
            # It may have been applied, and a worker may run the version: its number is used.
            self._unconfirmed = manifest.upload, copy
            self.mark_used(manifest.version)
            raise

    def _adopt(self, manifest: Manifest) -> None:
        """Adopt this manifest as the latest; forms that it no longer names will expire."""
        self._retention.adopt(manifest, self.latest.forms if self.latest else ())
        self.unsigned_forms = ()
        self.latest = manifest
        self._publish_times[manifest.version] = manifest.published
        if len(self._publish_times) > TIMES_KEPT:
            del self._publish_times[next(iter(self._publish_times))]
