"""The registration of a process as a worker: it claims a worker id and receives a new incarnation."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import SupportsIndex

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Backoff, Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import parsing, seconds_number, stored_integer
from rlbroker.backend.scripts import Script
from rlbroker.config import MAX_WORKER_ID, RunSettings, check_worker_id
from rlbroker.errors import AccessDenied, DeadlineExceeded
from rlbroker.membership.incarnations import Incarnation, read_incarnations
from rlbroker.membership.joined_run import JoinedRun
from rlbroker.types import Registration

REGISTER = Script.load("membership/lua/register.lua")


class Registrar:
    """Registers one process as a worker of a run."""

    def __init__(self, connection: Connection, keys: Keys, run: JoinedRun) -> None:
        """Prepare a registrar; nothing is sent yet.

        Args:
            run: checks the run's wire format against that of this process.
        """
        self._connection, self._keys, self._run = connection, keys, run
        #: The token of the last attempt. As long as the server has it, the server has not lost this registration.
        self.token = ""
        self._worker = 0  #: the worker id of the last attempt

    def register(self, worker_id: SupportsIndex | None) -> Registration:
        """Register under this worker id, or under the lowest free one.

        A process that already has the given id is fenced.

        Raises:
            InvalidArgument: the worker id is invalid.
            IncompatibleFormat: the run's learner writes another wire format.
            DeadlineExceeded: no free id was found in time.
        """
        if worker_id is None:
            return self._claim_lowest_free()
        found = self._claim(check_worker_id(worker_id), only_if_free=False)
        assert found is not None
        return found

    def find_attempt(self, deadline: Deadline) -> Registration | None:
        """Return the registration of the last attempt, if an interrupt came before its reply; None if there is none."""
        if not self.token:
            return None
        fields = "token", "incarnation", "joined_version", "joined_position"
        found = self._connection.execute(
            "HMGET", self._keys.heartbeat(self._worker), *fields, deadline=deadline
        )
        token, incarnation, latest, position = (str(one or b"", "ascii", "replace") for one in found)
        if token != self.token:
            return None
        return Registration(self._worker, int(incarnation), int(latest), position)

    def _claim(self, worker: int, *, only_if_free: bool) -> Registration | None:
        """Claim one id; return None if it must be free and is not."""
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
        self.token = ""
        self._worker = worker
        self.token = uuid.uuid4().hex
        reply = self._connection.run(
            REGISTER,
            keys,
            (worker, RunSettings.lease_seconds, int(only_if_free), self.token, self._run.wire_format),
        )
        if reply[0] == b"taken":
            return None
        if reply[0] == b"incompatible":
            self._run.check_wire_format(reply[1].decode(errors="replace"))
        _, incarnation, latest, position = reply
        with parsing(self._keys.weights):
            return Registration(worker, int(incarnation), stored_integer(latest), position.decode())

    def _claim_lowest_free(self) -> Registration:
        deadline, backoff = Deadline(self._connection.timeout_seconds), Backoff()
        while not deadline.over:
            try:
                members = read_incarnations(self._connection, self._keys).members
            except AccessDenied as error:
                raise AccessDenied(
                    f"{error}; if this user belongs to one worker, pass its worker_id: only the user that all workers "
                    "share (`rlbroker acl --shared`) can be given a free one"
                ) from error
            free = 0
            while free in members and free < MAX_WORKER_ID:
                free += 1
            # All lower ids belong to members, but an id whose lease has expired may be free too.
            expired = [worker for worker in self._find_silent(members) if worker < free]
            for worker in (*expired, free):
                claimed = self._claim(worker, only_if_free=True)
                if claimed is not None:
                    return claimed
            time.sleep(backoff.next(deadline))
        raise DeadlineExceeded(f"no free worker id was found in the run {self._keys.run!r}")

    def _find_silent(self, members: Mapping[int, Incarnation]) -> list[int]:
        """Return the members that were silent for a lease; the server decides whether their ids are free."""
        stored = self._connection.execute("HGET", self._keys.meta, "lease_seconds")
        lease_seconds = seconds_number(str(stored or b"", "ascii", "replace")) or RunSettings.lease_seconds
        now = self._connection.clock(self._keys.meta)
        return [
            worker
            for worker, incarnation in members.items()
            if incarnation.silent_seconds(now) >= lease_seconds
        ]
