"""A worker's membership: it registers, sends heartbeats, rejoins after a loss, and leaves."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import SupportsIndex

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection, flat
from rlbroker.backend.deadline import ONE_TRY, Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import parsing, stored_seconds, text_fields
from rlbroker.backend.scripts import Script
from rlbroker.backend.text import readable
from rlbroker.backend.threads import BackgroundThread
from rlbroker.codec.signing import SigningKey
from rlbroker.config import RunSettings
from rlbroker.errors import DeadlineExceeded, RunLost
from rlbroker.membership.joined_run import JoinedRun
from rlbroker.membership.lease import (
    OPEN_POLL_SECONDS,
    heartbeat_lifetime_milliseconds,
    heartbeat_seconds,
)
from rlbroker.membership.run_size import RunSize
from rlbroker.membership.worker_ids import Registrar
from rlbroker.types import Registration

REJOIN = Script.load("membership/lua/rejoin.lua")

BEAT = Script.load("membership/lua/beat.lua")

LEAVE = Script.load("membership/lua/leave.lua")


class Heartbeat:
    """Keeps one worker a member of its run, from `register` to `leave`."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        wire_format: int,
        key: SigningKey | None = None,
        describe: Callable[[], Mapping[str, str | int]],
        newest_seen: Callable[[], tuple[int, str]],
        maintain: Callable[[bool], None],
    ) -> None:
        """Prepare a heartbeat; nothing is sent yet.

        Args:
            wire_format: the only wire format that this process reads and writes.
            key: the key that the end of the run must be signed with; None to accept an unsigned one.
            describe: returns the fields that each heartbeat reports, besides host and pid.
            newest_seen: returns the newest version that this worker saw, and the name of its upload.
            maintain: called after each heartbeat, with whether the server may have lost data since the last one.
        """
        self._connection, self._keys, self._describe = connection, keys, describe
        self._newest_seen, self._maintain = newest_seen, maintain
        self._run = JoinedRun(keys, wire_format=wire_format, key=key)
        self._registrar = Registrar(connection, keys, self._run)
        #: This worker's id and incarnation; zeros until it is registered.
        self.registration = Registration(0, 0, 0, "0-0")
        self._channel = Channel(connection, keys.meta)
        #: Whether the channel was connected before, so that a new connection is a reconnect.
        self._connected = False
        self._rejoined = False  #: whether the server may have lost data since the last call of `maintain`
        self._next_beat = Deadline(0)
        self._thread = BackgroundThread(f"heartbeat in {keys.run!r}", self._step)
        self._beats = False  #: whether the thread sends heartbeats yet
        self._host, self._pid = readable(socket.gethostname()), os.getpid()

    def register(self, worker_id: SupportsIndex | None) -> Registration:
        """Register, as `Registrar.register` does, and send the first heartbeat."""
        self.registration = self._registrar.register(worker_id)
        self._connection.retry(self._beat)
        return self.registration

    @property
    def thread(self) -> BackgroundThread:
        """The background thread."""
        return self._thread

    def start(self) -> None:
        """Start the background thread; it sends heartbeats after `begin`."""
        self._thread.start()

    def begin(self) -> None:
        """Let the background thread send heartbeats, once the worker is registered."""
        self._beats = True

    def rejoin(self, channel: Channel) -> None:
        """Write this membership back if the server lost it. The incarnation stays.

        Args:
            channel: the channel that the caller writes over afterwards.

        Raises:
            Fenced: a newer process has this worker id, or the run has forgotten this worker.
        """
        worker = self.registration.worker_id
        keys = (
            self._keys.life(worker),
            self._keys.workers,
            self._keys.weights,
            self._keys.heartbeat(worker),
        )
        version, upload = self._newest_seen()
        lifetime = heartbeat_lifetime_milliseconds(self._run.settings)
        channel.run(
            REJOIN,
            keys,
            (worker, self.registration.incarnation, version, self._registrar.token, lifetime, upload),
        )

    @property
    def knows_run(self) -> bool:
        """Whether a learner has opened the run, so that its settings and shards are known."""
        return self._run.opened

    @property
    def run_ended(self) -> bool:
        """Whether this worker stops because the run has ended."""
        return self._run.ended

    @property
    def run_size(self) -> RunSize:
        """The number of workers and hosts of the run, from the learner's latest count."""
        return self._run.size

    def settings(self, deadline: Deadline) -> RunSettings:
        """Return the run's settings, waiting for a learner to open the run.

        Raises:
            DeadlineExceeded: no learner opened the run in time.
            Fenced: a newer process has this worker id, or the run has forgotten this worker.
        """
        settings = self._run.wait_for_settings(deadline, self._thread.check)
        if settings is None:
            self._thread.check()
            raise DeadlineExceeded(
                f"no learner has opened the run {self._keys.run!r} on {self._connection.address} within "
                f"{deadline.seconds:g} s; start the learner, or check the run's name and the URL"
            )
        return settings

    def learner_silent_seconds(self) -> float:
        """Return how long no learner of the run has sent a heartbeat, if that is longer than a lease; otherwise 0.

        Raises:
            PeerError: the server refused, or did not answer in time.
        """
        fields = self._connection.execute("HGETALL", self._keys.meta)
        with parsing(self._keys.meta):
            found = text_fields(fields).items()
            seen = [stored_seconds(value) for name, value in found if name.startswith("seen:")]
        silent_seconds = self._connection.clock(self._keys.meta) - max(seen, default=float("inf"))
        return silent_seconds if silent_seconds > self._run.settings.lease_seconds else 0.0

    def leave(self, timeout_seconds: float) -> None:
        """Stop the heartbeats and end the membership, so that the learner does not wait for this worker."""
        if self._thread.stop(timeout_seconds):
            self._channel.close()
        deadline, registration = Deadline(timeout_seconds), self.registration
        if not registration.incarnation:
            attempt = self._registrar.find_attempt(deadline)
            if attempt is None:  # never registered
                return
            registration = attempt
        worker = registration.worker_id
        keys = (
            self._keys.life(worker),
            self._keys.heartbeat(worker),
            self._keys.acknowledgements(worker),
            self._keys.weights,
        )
        arguments = (registration.incarnation, self._process)
        self._connection.run(LEAVE, keys, arguments, deadline=deadline)

    def release(self) -> None:
        """Forget the other parts of the worker, which refer to this one; no heartbeat follows."""
        self._describe, self._newest_seen, self._maintain = dict, _nothing_seen, _maintain_nothing

    @property
    def _process(self) -> str:
        return f"{self._host}:{self._pid}"

    def _step(self) -> bool | None:
        if not self._beats:
            self._thread.pause(OPEN_POLL_SECONDS)
            return False
        if not self._run.opened and not self._next_beat.over:
            # Poll often until a learner opens the run, so that the worker does not wait a whole heartbeat for it.
            self._thread.pause(min(OPEN_POLL_SECONDS, self._next_beat.remaining))
            opened = not self._thread.stopping and self._is_opened()
            if not opened and not self._next_beat.over:
                return None
        self._thread.pause(self._next_beat.remaining if self._run.opened else 0)
        if not self._thread.stopping:
            self._beat()
            rejoined, self._rejoined = self._rejoined, False
            self._maintain(rejoined)
        return None

    def _is_opened(self) -> bool:
        return self._connection.execute("HGET", self._keys.meta, "wire_format", deadline=ONE_TRY) is not None

    def _beat(self) -> None:
        self._schedule_next()
        if self._channel.connect() and self._connected:
            self._rejoin()
        self._connected = True
        worker = self.registration.worker_id
        fields = {"host": self._host, "pid": self._pid, **self._describe()}
        fields = {name: readable(str(value)) for name, value in fields.items()}
        keys = (self._keys.life(worker), self._keys.workers, self._keys.heartbeat(worker), self._keys.meta)
        arguments = (
            worker,
            self.registration.incarnation,
            self._registrar.token,
            heartbeat_lifetime_milliseconds(self._run.settings),
            self._process,
            *flat(fields),
        )
        try:
            reply = self._channel.run(BEAT, keys, arguments)
        except RunLost:
            self._rejoin()
            reply = self._channel.run(BEAT, keys, arguments)
        if self._run.apply(reply):
            self._schedule_next()  # the lease may have changed

    def _schedule_next(self) -> None:
        self._next_beat = Deadline(heartbeat_seconds(self._run.settings))

    def _rejoin(self) -> None:
        self.rejoin(self._channel)
        self._rejoined = True


def _nothing_seen() -> tuple[int, str]:
    return 0, ""


def _maintain_nothing(returned: bool) -> None:
    pass


class LastPoll:
    """The time since a worker last polled: one that does not poll is alive, but obeys no command.

    Each polling thread enters it as a context manager. It has no lock, which an interrupted poll could leave behind: a
    thread that was interrupted counts as polling until its next poll ends.
    """

    def __init__(self) -> None:
        """Start as if a poll had just ended."""
        self._polling = set[int]()  #: the threads that poll
        self._ended = time.monotonic()

    @property
    def unpolled_seconds(self) -> float:
        """Seconds since the last poll ended; 0 while a thread polls."""
        return 0.0 if self._polling else time.monotonic() - self._ended

    def __enter__(self) -> None:
        """Begin a poll."""
        self._polling.add(threading.get_ident())

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """End a poll; also one of this thread that was interrupted before this line."""
        self._ended = time.monotonic()
        self._polling.discard(threading.get_ident())
