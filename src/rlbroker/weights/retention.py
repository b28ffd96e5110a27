"""Lifetimes of chunks: those of the latest version stay, those of superseded versions expire."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from rlbroker.backend.connection import Argument, Connection
from rlbroker.backend.deadline import ONE_TRY
from rlbroker.backend.keys import Keys
from rlbroker.errors import ConnectionFailed
from rlbroker.weights.manifest import Manifest, StoredForm

logger = logging.getLogger("rlbroker")

#: Chunks of a superseded version stay this long, for workers that are still reading them.
SUPERSEDED_SECONDS: Final = 60

#: At most this many superseded bytes stay, but always the version superseded last. Otherwise frequent versions could
#: fill the server.
SUPERSEDED_BYTES: Final = 1 << 30


class Retention:
    """The chunks that one learner keeps, lets expire, or deletes. Not safe to use from several threads at once."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        """Begin without chunks."""
        self._connection, self._keys = connection, keys
        self._latest_upload = ""
        self._to_keep: dict[str, StoredForm] = {}
        self._to_expire: dict[str, StoredForm] = {}
        #: Superseded forms, and when they were superseded.
        self._superseded: deque[tuple[StoredForm, float]] = deque()

    def adopt(self, manifest: Manifest, before: Sequence[StoredForm]) -> None:
        """Adopt the latest manifest: its forms stay, and forms of the manifest `before` that it drops expire."""
        names = {form.upload for form in manifest.forms}
        gone = {form.upload: form for form in (*before, *manifest.dropped) if form.upload not in names}
        known = {form.upload for form in before}
        self._to_expire |= gone
        self._to_keep = {
            form.upload: form
            for form in manifest.forms
            if form.upload not in known or form.upload in self._to_keep
        }
        self._latest_upload = manifest.upload
        now = time.monotonic()
        self._superseded += [(form, now) for form in gone.values()]

    def enforce(self) -> None:
        """Set the lifetimes that are due. What fails stays due for the next call."""
        keep = [key for form in self._to_keep.values() for key in form.chunk_keys(self._keys)]
        commands: list[tuple[Argument, ...]] = [("PERSIST", key) for key in keep]
        for form in self._to_expire.values():
            commands += [("EXPIRE", key, SUPERSEDED_SECONDS) for key in form.chunk_keys(self._keys)]
        if commands:
            *_, latest = self._connection.execute_all([*commands, ("HGET", self._keys.weights, "upload")])
            if latest is not None and latest.decode(errors="replace") != self._latest_upload:
                # A newer learner has superseded these chunks, perhaps before this PERSIST: without an expiry they
                # would stay for ever.
                self._connection.execute_all([("EXPIRE", key, SUPERSEDED_SECONDS) for key in keep])
        self._to_keep, self._to_expire = {}, {}
        self._delete_overdue()
        last = self._superseded[-1][1] if self._superseded else 0.0
        last_bytes = sum(form.stored_bytes for form, since in self._superseded if since == last)
        self._delete_oldest(keep_bytes=max(SUPERSEDED_BYTES, last_bytes))

    def make_room(self) -> bool:
        """Delete superseded weights before they expire; return whether there were any."""
        if not self._superseded:
            return False
        logger.warning("the server is full; superseded weights are deleted before they expire")
        self._delete_oldest(keep_bytes=0)
        return True

    def _delete_overdue(self) -> None:
        """Delete what should have expired by now: a failover may have lost the EXPIRE."""
        over = time.monotonic() - SUPERSEDED_SECONDS
        gone = [form for form, since in self._superseded if since < over]
        if not gone:
            return
        try:
            latest = self._connection.execute("HGET", self._keys.weights, "upload", deadline=ONE_TRY)
            if latest is not None and latest.decode(errors="replace") == self._latest_upload:
                keys = [key for form in gone for key in form.chunk_keys(self._keys)]
                self._connection.execute_on_keys("UNLINK", keys, deadline=ONE_TRY)
        except ConnectionFailed as error:
            logger.info("%s; a later check deletes superseded weights that did not expire", str(error))
            return
        for _ in gone:
            self._superseded.popleft()

    def _delete_oldest(self, *, keep_bytes: int) -> None:
        """Delete superseded forms, oldest first; a worker that is reading one continues with the latest version."""
        while self._superseded and sum(form.stored_bytes for form, _ in self._superseded) > keep_bytes:
            form, _ = self._superseded.popleft()
            self._connection.execute_on_keys("UNLINK", form.chunk_keys(self._keys))
