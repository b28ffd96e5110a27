"""How long chunks stay: those of the latest version for good, those of superseded ones for a while."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from rlbroker.backend.connection import Argument, Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.errors import ConnectionFailed
from rlbroker.weights.manifest import Manifest, StoredForm

logger = logging.getLogger("rlbroker")

#: Chunks of a superseded version stay this long for those who are still reading.
SUPERSEDED_SECONDS: Final = 60

#: But no more than this of them, besides the last: frequent versions must not fill the server.
SUPERSEDED_BYTES: Final = 1 << 30


class Retention:
    """What one learner has yet to keep, to let expire, and may delete. Not safe to use from several threads at once."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        """Begin with nothing to do."""
        self._connection, self._keys = connection, keys
        self._latest = ""
        self._to_keep: dict[str, StoredForm] = {}
        self._to_expire: dict[str, StoredForm] = {}
        #: What is superseded, and since when.
        self._superseded: deque[tuple[StoredForm, float]] = deque()

    def adopt(self, pointer: Manifest, before: Sequence[StoredForm]) -> None:
        """Take note that a pointer is the latest: what it names is to stay, and what was there before to expire."""
        names = {form.upload for form in pointer.forms}
        gone = {form.upload: form for form in (*before, *pointer.dropped) if form.upload not in names}
        known = {form.upload for form in before}
        self._to_expire |= gone
        self._to_keep = {
            form.upload: form
            for form in pointer.forms
            if form.upload not in known or form.upload in self._to_keep
        }
        self._latest = pointer.upload
        now = time.monotonic()
        self._superseded += [(form, now) for form in gone.values()]

    def tidy(self) -> None:
        """Do what is to be done; what a fault kept from being done is done the next time.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        keep = [key for form in self._to_keep.values() for key in self.chunk_keys(form)]
        commands: list[tuple[Argument, ...]] = [("PERSIST", key) for key in keep]
        for form in self._to_expire.values():
            commands += [("EXPIRE", key, SUPERSEDED_SECONDS) for key in self.chunk_keys(form)]
        if commands:
            *_, latest = self._connection.execute_all([*commands, ("HGET", self._keys.weights, "upload")])
            if latest is not None and latest.decode(errors="replace") != self._latest:
                # A newer learner has superseded them; if these came late, nobody else would ever delete them.
                self._connection.execute_all([("EXPIRE", key, SUPERSEDED_SECONDS) for key in keep])
        self._to_keep, self._to_expire = {}, {}
        self._look_again()
        last = self._superseded[-1][1] if self._superseded else 0.0
        last_bytes = sum(form.stored_bytes for form, since in self._superseded if since == last)
        self._unlink(keep_bytes=max(SUPERSEDED_BYTES, last_bytes))

    def make_room(self) -> bool:
        """Delete superseded weights before their time; give whether there were any."""
        if not self._superseded:
            return False
        logger.warning("the server is full; superseded weights are deleted before their time")
        self._unlink(keep_bytes=0)
        return True

    def chunk_keys(self, form: StoredForm) -> list[str]:
        """Give the keys of a form's header and chunks."""
        return self._keys.upload(form.upload, form.chunks)

    def _look_again(self) -> None:
        """Delete what should have expired by now: a server that failed over may have forgotten that it should."""
        over = time.monotonic() - SUPERSEDED_SECONDS
        gone = [form for form, since in self._superseded if since < over]
        if not gone:
            return
        try:
            latest = self._connection.execute("HGET", self._keys.weights, "upload", deadline=Deadline(0))
            if latest is not None and latest.decode(errors="replace") == self._latest:
                keys = [key for form in gone for key in self.chunk_keys(form)]
                self._connection.on_each("UNLINK", keys, deadline=Deadline(0))
        except ConnectionFailed as error:
            logger.info("%s; whether superseded weights have expired is looked at later", error)
            return
        for _ in gone:
            self._superseded.popleft()

    def _unlink(self, *, keep_bytes: int) -> None:
        """Delete superseded versions, oldest first; who is still reading one goes on to the latest."""
        while self._superseded and sum(form.stored_bytes for form, _ in self._superseded) > keep_bytes:
            form, _ = self._superseded.popleft()
            self._connection.on_each("UNLINK", self.chunk_keys(form))
