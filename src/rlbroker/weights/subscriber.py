"""The worker's half: notices come as hints, the pointer is the truth, and decoding happens in the background."""

from __future__ import annotations

import logging
import socket
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import redis
from redis import exceptions as redis_errors

from rlbroker.backend.client import STALL_SECONDS
from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import number_in, raise_first_error, text_fields, whole_number
from rlbroker.backend.threads import BackgroundThread
from rlbroker.codec.signing import NotSigned, SigningKey
from rlbroker.errors import ConnectionFailed, WireError
from rlbroker.membership.run_size import RunSize
from rlbroker.weights.download import Downloader, Version
from rlbroker.weights.image_store import ImageStore
from rlbroker.weights.manifest import Manifest

logger = logging.getLogger("rlbroker")

#: Without any hint the pointer is read this often. Hints come by two ways, and who has lost one of them looks at once.
LOOK_SECONDS: Final = 3.0

#: How often the subscription is asked whether it lives: a connection that broke on its way stays silent for ever.
#: It has to answer before it is asked again.
PING_SECONDS: Final = STALL_SECONDS / 2

#: Refused versions are told of this often, at most: whoever writes to the server could name a new one at each look.
REFUSED_SECONDS: Final = 1.0

#: Updates that wait to be told of, at most, where they were refused.
REFUSED_KEPT: Final = 100

#: A version that cannot be read is tried this often before it counts as failed.
TRIES: Final = 3


@dataclass(frozen=True)
class Update:
    """A version that is decoded and waits to be loaded, or that could not be read and says why."""

    version: int
    decoded: Version | None
    problem: str = ""
    refused: bool = False  #: whether the problem is its signature


def only_newest(updates: Sequence[Update]) -> list[Update]:
    """Give those that failed, and the newest that did not: it is the only one worth loading."""
    good = [one for one in updates if not one.problem]
    return [one for one in updates if one.problem] + good[-1:]


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
        crowd: Callable[[], RunSize] = RunSize,
    ) -> None:
        """Prepare a subscriber; nothing is read yet.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            images: where decoded versions are kept; in our own memory by default.
            key: which signs weights; None to take them unsigned.
            from_replicas: whether chunks are read from replicas, where there are any.
            crowd: gives who else asks for each version.
        """
        self._connection, self._keys, self._key = connection, keys, key
        self._crowd, self._host, self._name = crowd, socket.gethostname(), uuid.uuid4().hex
        self._turn: Deadline | None = None  #: when to fetch, where that was put off
        self._last: Manifest | None = None  #: to what was fetched last
        self._images = images or ImageStore(keys.run, None)
        self._pubsub: redis.client.PubSub | None = None
        self._next_ping, self._answered = Deadline(0), True
        self._hinted = 0
        self._handled = 0
        self._seen = (0, "")
        self._tried, self._tries = "", 0
        self._next_look = Deadline(0)
        self._problem = ""
        self._updates: list[Update] = []
        self._arrived = threading.Condition()
        self._thread = BackgroundThread(f"weights of {keys.run!r}", self._step)
        self._fetcher = Downloader(
            connection,
            keys,
            self._images,
            key=key,
            from_replicas=from_replicas,
            stopping=lambda: self._thread.stopping,
        )
        #: The newest version with a right signature: a key keeps who has it from going back.
        self._signed = 0
        self._refused: tuple[int, str, str] | None = None  #: what was refused last
        self._next_refusal = Deadline(0)
        self._said_unchecked = False
        #: The version that was read last: the next one may be a difference to it.
        self._held: Version | None = None

    def start(self) -> None:
        """Begin to follow the run's weights in the background."""
        self._thread.start()

    def request_stop(self) -> None:
        """Have the background thread end soon; does not wait."""
        self._thread.request_stop()

    def stop(self, timeout_seconds: float) -> None:
        """Stop following."""
        self._thread.stop(timeout_seconds)
        self._fetcher.close()
        self._unsubscribe()
        self._held, self._updates = None, []
        self._images.close()

    def check(self) -> None:
        """Raise what ended the following, if anything did."""
        self._thread.check()

    @property
    def problem(self) -> str:
        """What keeps the newest version from being read; empty if nothing does."""
        return self._problem

    @property
    def ready(self) -> bool:
        """Whether there is an update to take."""
        return bool(self._updates)

    @property
    def newest(self) -> int:
        """The newest version that was read, or given up."""
        return self._handled

    @property
    def newest_seen(self) -> tuple[int, str]:
        """The newest version that was ever read, or given up, and the name of its upload; 0 and "" before the first."""
        return self._seen

    def has_handled(self, version: int) -> bool:
        """Whether this version, or a newer one, was handed out by `take` or is past mending."""
        with self._arrived:
            return self._handled >= version and not self._updates

    def read_latest(self) -> int:
        """Ask the server for the latest version; 0 before the first. With a key, for the latest that is signed.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        version = self._read_version() or 0
        self.hint(version)
        if self._key is None:
            return version
        try:
            pointer = self._read_pointer()
            if pointer is not None:
                pointer.check(self._key, self._keys.run)
            return max(pointer.version if pointer else 0, self._signed)
        except WireError:  # the background says so
            return self._signed

    def hint(self, version: int) -> None:
        """Be told from elsewhere that a version was published."""
        if version > self._hinted:
            self._hinted = version
            self._thread.wake()

    def fetch_again(self) -> None:
        """Have the latest version read once more, for another model."""
        self._handled = 0
        self._next_look = Deadline(0)
        self._thread.wake()

    def take(self, timeout_seconds: float = 0) -> list[Update]:
        """Give what is ready, versions that failed first; wait for it if there is a timeout."""
        with self._arrived:
            if not self._updates and timeout_seconds > 0:
                self._arrived.wait(timeout_seconds)
            found, self._updates = self._updates, []
            return found

    def _step(self) -> bool:
        """Look for a newer version when it is time; give whether it was."""
        if self._pubsub is None:
            self._subscribe()
            self._next_look = Deadline(0)  # nothing published while unsubscribed is replayed
        self._hear()
        due = self._hinted > self._handled or self._next_look.over
        if self._turn is not None:
            due = self._turn.over
        if due:
            self._next_look = Deadline(LOOK_SECONDS)
            self._look()
        return due

    def _subscribe(self) -> None:
        pubsub = self._connection.pubsub(self._keys.notify)
        try:
            pubsub.subscribe(self._keys.notify)
        except redis_errors.RedisError as error:
            pubsub.close()
            raise self._connection.to_rlbroker_error(error) from error
        self._pubsub = pubsub
        self._next_ping, self._answered = Deadline(PING_SECONDS), True

    def _unsubscribe(self) -> None:
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            pubsub.close()

    def _hear(self) -> None:
        """Wait for a hint, or until there is something else to do."""
        pubsub = self._pubsub
        assert pubsub is not None
        try:
            message = pubsub.get_message(timeout=0) or self._wait(pubsub)
        except (redis_errors.RedisError, OSError) as error:
            self._unsubscribe()
            if isinstance(error, redis_errors.RedisError):
                raise self._connection.to_rlbroker_error(error) from error
            raise
        if message is not None:
            self._answered = True
            if message["type"] == "message":
                version = whole_number(str(message["data"], "ascii", "replace")) or 0
                self._hinted = max(self._hinted, version)

    def _wait(self, pubsub: redis.client.PubSub) -> Any:
        """Wait for a message, but not for longer than there is nothing else to do."""
        if self._next_ping.over:
            if not self._answered:
                raise ConnectionFailed(f"the subscription to {self._connection.address} gives no answer")
            pubsub.ping()
            self._next_ping, self._answered = Deadline(PING_SECONDS), False
        until = self._next_look if self._turn is None else self._turn
        seconds = min(until.remaining, self._next_ping.remaining)
        sock = getattr(pubsub.connection, "_sock", None)
        if not isinstance(sock, socket.socket):
            return pubsub.get_message(timeout=min(seconds, self._connection.block_seconds))
        return pubsub.get_message(timeout=0) if self._thread.wait_for(sock, seconds) else None

    def _look(self) -> None:
        waited, self._turn = self._turn is not None, None
        if self._hinted <= self._handled:
            latest = self._read_version()
            if latest is not None and latest <= self._handled:
                if 0 < latest < self._seen[0]:
                    self._problem = (
                        f"the run's latest version is {latest}, and {self._seen[0]} was here before: its learner does "
                        "not know of that"
                    )
                return
            self._hinted = max(self._hinted, latest or 0)
        # Who has waited once fetches what is the newest then.
        if not waited and self._last and self._put_off(self._hinted, self._last):
            return
        pointer = self._read_pointer()
        if pointer is not None and pointer.version < self._signed:
            self._problem = (
                f"version {pointer.version}: it is older than {self._signed}, which was here before"
            )
        if pointer is None or pointer.version <= self._handled or pointer.version < self._signed:
            # A hint of a version that the pointer does not have is wrong, or its server lost its data.
            self._hinted = min(self._hinted, pointer.version if pointer else 0)
            return
        try:
            self._check(pointer)
        except NotSigned as error:
            self._refuse(pointer, str(error))
            return
        first, self._last = self._last is None, pointer
        if first and not waited and self._put_off(pointer.version, pointer):
            return
        try:
            version = self._fetcher.fetch(pointer, self._held)
        except WireError as error:
            self._held = None  # what we hold may be what does not fit
            self._failed(pointer, str(error), refused=isinstance(error, NotSigned))
            return
        self._problem = ""
        self._held = version if pointer.codec != "raw" else None  # raw versions are never differences
        self._hand_over(Update(pointer.version, version), pointer.upload)

    def _put_off(self, version: int, like: Manifest) -> bool:
        """Have a version fetched later, if so many want it that they must take turns; give whether that is so.

        Until then the server is asked for nothing, not for its pointer either: one that is known will be like it.
        """
        shared = self._images.shares(like.raw_bytes)
        name = self._host if shared else self._name
        seconds = self._crowd().wait_seconds(version, like.stored_bytes, name=name, shared=shared)
        self._turn = Deadline(seconds) if seconds else None
        return self._turn is not None

    def _read_version(self) -> int | None:
        """Give the number of the latest version, 0 before the first; None if what is there is no number."""
        return number_in(self._connection.execute("HGET", self._keys.weights, "version"))

    def _read_pointer(self) -> Manifest | None:
        """Give what the server names as the latest version; see over which shards its chunks are spread."""
        asked = [("HGETALL", self._keys.weights), ("HGET", self._keys.meta, "shards")]
        fields, shards = raise_first_error(self._connection.ask(asked))
        if shards is not None:
            self._keys.spread(shards.decode("ascii", "replace"))
        return Manifest.from_fields(text_fields(fields))

    def _check(self, pointer: Manifest) -> None:
        """Check that a learner with our key has published this; note that it did."""
        if self._key:
            pointer.check(self._key, self._keys.run)
            self._signed = pointer.version
        elif pointer.latest.signature and not self._said_unchecked:
            self._said_unchecked = True
            logger.warning(
                "the learner of %r signs its weights, and this worker does not check that, as it has no key: set "
                "signing_key, or RLBROKER_SIGNING_KEY_FILE",
                self._keys.run,
            )

    def _refuse(self, pointer: Manifest, problem: str) -> None:
        """Say that somebody else has published this; what the learner publishes may have a lower number."""
        self._problem = f"version {pointer.version}: {problem}"
        self._hinted = self._handled
        refused = pointer.version, pointer.upload, problem
        if refused == self._refused or not self._next_refusal.over:
            return
        self._refused, self._next_refusal = refused, Deadline(REFUSED_SECONDS)
        logger.warning("%s", self._problem)
        with self._arrived:
            if len(self._updates) < REFUSED_KEPT:
                self._updates = only_newest(
                    [*self._updates, Update(pointer.version, None, problem, refused=True)]
                )
            self._arrived.notify_all()

    def _failed(self, pointer: Manifest, problem: str, *, refused: bool) -> None:
        if self._thread.stopping:
            return
        self._problem = f"version {pointer.version}: {problem}"
        self._tries = self._tries + 1 if self._tried == pointer.upload else 1
        self._tried = pointer.upload
        logger.warning("%s (try %d of %d)", self._problem, self._tries, TRIES)
        if self._tries < TRIES:
            self._turn = Deadline(self._connection.block_seconds)
        else:
            self._hand_over(Update(pointer.version, None, problem, refused), pointer.upload)

    def _hand_over(self, update: Update, upload: str) -> None:
        with self._arrived:
            self._handled = update.version
            self._seen = max(self._seen, (update.version, upload), key=lambda one: one[0])
            self._updates = only_newest([*self._updates, update])
            self._arrived.notify_all()
