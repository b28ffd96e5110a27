"""A worker's membership: it registers, says regularly that it lives, and leaves."""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Final

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection, flat
from rlbroker.backend.deadline import Backoff, Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import parsing, seconds_number, text_fields, whole_number
from rlbroker.backend.scripts import Script
from rlbroker.backend.threads import BackgroundThread
from rlbroker.config import MAX_WORKER_ID, RunSettings, worker_number
from rlbroker.errors import AccessDenied, DeadlineExceeded, IncompatibleFormat, RunLost
from rlbroker.membership.incarnations import Incarnation, read_incarnations
from rlbroker.membership.run_size import RunSize
from rlbroker.types import Registration

#: Heartbeats in one lease: this many must fail in a row before a worker is called away.
BEATS_PER_LEASE = 5

#: How often a worker looks whether its run was opened: a look costs the server far less than a heartbeat.
OPENED_SECONDS = 0.1

REGISTER = Script.load("membership/lua/register.lua")


REJOIN = Script.load("membership/lua/rejoin.lua")

#: What a worker has to know of the run's `meta`, of which most stays as it is.
_KNOWN: Final = ("wire_format", "shards", *RunSize._fields, *(field.name for field in fields(RunSettings)))

BEAT = Script.load("membership/lua/beat.lua")

LEAVE = Script.load("membership/lua/leave.lua")


class Heartbeat:
    """Keeps one worker registered from `register` to `leave`."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        wire_format: int,
        describe: Callable[[], Mapping[str, str | int]],
        newest_seen: Callable[[], tuple[int, str]],
        maintain: Callable[[bool], None],
    ) -> None:
        """Prepare a membership.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            wire_format: the only format that this process reads and writes.
            describe: gives what each heartbeat says of the worker, besides host and pid.
            newest_seen: gives the newest version that this worker knows of, and the name of its upload.
            tend: is called after each heartbeat, with whether the server may have lost something since the last.
        """
        self._connection, self._keys, self._describe = connection, keys, describe
        self._wire_format, self._newest_seen, self._maintain = wire_format, newest_seen, maintain
        self._channel = Channel(connection, keys.meta)
        self._began = self._returned = False
        self._settings: RunSettings | None = None
        self._settings_known = threading.Event()
        self._next_beat = Deadline(0)
        self._thread = BackgroundThread(f"heartbeat in {keys.run!r}", self._step)
        self.registration = Registration(0, 0, 0, "0-0")
        #: Who takes part besides, as the learner said last.
        self.crowd = RunSize()
        self._token = ""
        self._said: Sequence[bytes | None] = ()  #: the learner of the run, as the last heartbeat heard it
        self._host, self._pid = socket.gethostname(), os.getpid()

    def register(self, worker_id: int | None) -> Registration:
        """Become a member under this id, or under the lowest free one.

        A process that already has this id is fenced: nothing of it is accepted any more.

        Raises:
            InvalidArgument: not a worker id.
            IncompatibleFormat: the run's learner writes another wire format.
            DeadlineExceeded: no free id was found.
        """
        if worker_id is not None:
            found = self._claim(worker_number(worker_id), only_if_free=False)
        else:
            found = self._claim_lowest_free()
        assert found is not None
        self._connection.retry(self._beat)
        return found

    def start(self) -> None:
        """Begin the heartbeats."""
        self._thread.start()

    def rejoin(self, channel: Channel) -> None:
        """Be a member again where the server lost it, in the same life; otherwise nothing changes.

        Args:
            channel: over which the caller goes on.

        Raises:
            Fenced: a newer process has this worker id, or the run declared this one gone.
            PeerError: the server refused or could not be reached.
        """
        worker = self.registration.worker_id
        keys = (
            self._keys.life(worker),
            self._keys.workers,
            self._keys.acknowledgements(worker),
            self._keys.weights,
            self._keys.heartbeat(worker),
        )
        newest, lifetime = self._newest_seen(), self._lifetime_milliseconds
        channel.run(
            REJOIN, keys, (worker, self.registration.incarnation, newest[0], self._token, lifetime, newest[1])
        )

    @property
    def knows_run(self) -> bool:
        """Whether a learner has opened the run, so that it is known where its keys live."""
        return self._settings is not None

    def settings(self, deadline: Deadline) -> RunSettings:
        """Give the run's settings; wait for the learner to open the run where it has not yet.

        Raises:
            DeadlineExceeded: no learner opened the run in time.
        """
        if not self._settings_known.wait(deadline.remaining):
            self.check()
            raise DeadlineExceeded(
                f"no learner has opened the run {self._keys.run!r} on {self._connection.address} within "
                f"{deadline.seconds:g} s; start the learner, or check the run's name and the URL"
            )
        assert self._settings is not None
        return self._settings

    def check(self) -> None:
        """Raise what ended the membership, if anything did.

        Raises:
            Fenced: a newer process has this worker id, or the run declared this one gone.
            IncompatibleFormat: the learner came back with another wire format.
        """
        self._thread.check()

    def request_stop(self) -> None:
        """Have the background thread end soon; does not wait."""
        self._thread.request_stop()

    def leave(self, timeout_seconds: float) -> None:
        """End the heartbeats and the membership, so that nobody waits for this worker."""
        if self._thread.stop(timeout_seconds):
            self._channel.close()
        if not self.registration.incarnation:  # never joined
            return
        worker = self.registration.worker_id
        keys = (
            self._keys.life(worker),
            self._keys.heartbeat(worker),
            self._keys.acknowledgements(worker),
            self._keys.weights,
        )
        arguments = (self.registration.incarnation, self._process)
        self._connection.run(LEAVE, keys, arguments, deadline=Deadline(timeout_seconds))

    def _claim(self, worker: int, *, only_if_free: bool) -> Registration | None:
        keys = (
            self._keys.life(worker),
            self._keys.workers,
            self._keys.acknowledgements(worker),
            self._keys.weights,
            self._keys.control,
            self._keys.meta,
            self._keys.heartbeat(worker),
            self._keys.ledger(worker),
        )
        self._token = uuid.uuid4().hex
        reply = self._connection.run(
            REGISTER,
            keys,
            (worker, RunSettings.lease_seconds, int(only_if_free), self._token, self._wire_format),
        )
        if reply[0] == b"taken":
            return None
        if reply[0] == b"incompatible":
            self._check_format(reply[1].decode())
        _, incarnation, latest, position = reply
        self.registration = Registration(worker, int(incarnation), int(latest), position.decode())
        return self.registration

    def _claim_lowest_free(self) -> Registration:
        deadline, backoff = Deadline(self._connection.timeout_seconds), Backoff()
        while not deadline.over:
            try:
                members = read_incarnations(self._connection.ask, self._keys).members
            except AccessDenied as error:
                raise AccessDenied(
                    f"{error}; if this user is that of one worker, pass its worker_id: only the user that all workers "
                    "share (`rlbroker acl --shared`) can be given a free one"
                ) from error
            free = next((worker for worker in range(MAX_WORKER_ID) if worker not in members), MAX_WORKER_ID)
            # Ids below it belong to members, but those whose lease is over may be free too.
            over = [worker for worker in self._silent(members) if worker < free]
            for worker in (*over, free):
                claimed = self._claim(worker, only_if_free=True)
                if claimed is not None:
                    return claimed
            self._thread.pause(backoff.next(deadline))
        raise DeadlineExceeded(f"no free worker id was found in the run {self._keys.run!r}")

    def _silent(self, members: Mapping[int, Incarnation]) -> list[int]:
        """Give the members that were not heard of for a lease; whether their ids are free, the server decides."""
        said = self._connection.execute("HGET", self._keys.meta, "lease_seconds")
        lease_seconds = seconds_number(str(said or b"", "ascii", "replace")) or RunSettings.lease_seconds
        now = self._connection.clock(self._keys.meta)
        return [worker for worker, life in members.items() if life.silent_seconds(now) >= lease_seconds]

    @property
    def _process(self) -> str:
        return f"{self._host}:{self._pid}"

    @property
    def _lease_seconds(self) -> float:
        return (self._settings or RunSettings()).lease_seconds

    @property
    def _lifetime_milliseconds(self) -> int:
        settings = self._settings or RunSettings()
        # For as long as it belongs to the run: who looks for a dead worker wants to know where it ran.
        return int(max(10 * settings.lease_seconds, settings.forget_seconds) * 1000)

    def _step(self) -> None:
        if not self._settings and not self._next_beat.over:
            # Before the learner has opened the run, look often, so that nobody waits for long.
            self._thread.pause(min(OPENED_SECONDS, self._next_beat.remaining))
            opened = not self._thread.stopping and self._is_opened()
            if not opened and not self._next_beat.over:
                return
        self._thread.pause(self._next_beat.remaining if self._settings else 0)
        if not self._thread.stopping:
            self._beat()
            returned, self._returned = self._returned, False
            self._maintain(returned)

    def _is_opened(self) -> bool:
        return self._connection.execute_once("HGET", self._keys.meta, "wire_format") is not None

    def _beat(self) -> None:
        self._next_beat = Deadline(self._lease_seconds / BEATS_PER_LEASE)
        if self._channel.connect() and self._began:
            self._come_back()
        self._began = True
        worker = self.registration.worker_id
        facts: dict[str, str | int] = {"host": self._host, "pid": self._pid, **self._describe()}
        keys = (self._keys.life(worker), self._keys.workers, self._keys.heartbeat(worker), self._keys.meta)
        life = self.registration.incarnation
        arguments = (worker, life, self._token, self._lifetime_milliseconds, self._process, *flat(facts))
        try:
            said = self._channel.run(BEAT, keys, arguments)
        except RunLost:
            self._come_back()
            said = self._channel.run(BEAT, keys, arguments)
        if said != self._said:
            self._heed(
                text_fields(
                    {name: value for name, value in zip(_KNOWN, said, strict=True) if value is not None}
                )
            )
            self._said = said

    def _heed(self, meta: Mapping[str, str]) -> None:
        """Take what the learner says of the run."""
        if "wire_format" in meta:
            with parsing(self._keys.meta):
                self._check_format(meta["wire_format"])
                self._settings = RunSettings.from_fields(meta)
            self._next_beat = Deadline(self._lease_seconds / BEATS_PER_LEASE)  # the first beat knew no lease
            self._keys.spread(meta.get("shards", " ".join(self._keys.shards)))
            self._settings_known.set()
        self.crowd = RunSize(*(whole_number(meta.get(name, "")) or 0 for name in RunSize._fields))

    def _come_back(self) -> None:
        self.rejoin(self._channel)
        self._returned = True

    def _check_format(self, found: str) -> None:
        if found and int(found) != self._wire_format:
            raise IncompatibleFormat(
                f"the run {self._keys.run!r} uses wire format {found}, this process {self._wire_format}; "
                "install the same release of rlbroker for learner and workers"
            )
