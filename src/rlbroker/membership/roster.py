"""The learner's view of the workers: it opens the run, lists its workers, and forgets silent ones."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final, Literal

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection, flat
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import (
    default_if_wrong_type,
    number_in,
    parsing,
    server_seconds,
    stored_integer,
    text_fields,
)
from rlbroker.backend.scripts import Script
from rlbroker.backend.text import counted, readable
from rlbroker.codec.signing import END, SigningKey
from rlbroker.config import RunSettings
from rlbroker.errors import Fenced, IncompatibleFormat, RunLost, ServerFault, WrongKeyType
from rlbroker.membership.incarnations import (
    Incarnations,
    believed_claim,
    parse_worker_id,
    parse_worker_ids,
    read_incarnations,
)
from rlbroker.membership.joined_run import end_epoch
from rlbroker.membership.lease import return_seconds
from rlbroker.membership.worker_info import parse_worker_infos
from rlbroker.types import WorkerInfo

logger = logging.getLogger("rlbroker")

OPEN = Script.load("membership/lua/open.lua")

RESTORE_RUN = Script.load("membership/lua/restore_run.lua")

END_RUN = Script.load("membership/lua/end_run.lua")

FORGET = Script.load("membership/lua/forget.lua")

ALIVE = Script.load("membership/lua/alive.lua")

#: A heartbeat of the learner that is later than this, and than a lease, counts as the end of an outage.
LATE_SECONDS: Final = 2.0

#: What ended a run.
EndedBy = Literal["learner", "command"]


def end_run(
    connection: Connection, keys: Keys, epoch: int, key: SigningKey | None, *, by: EndedBy = "learner"
) -> None:
    """Record that the run has ended, for the learner with this epoch; raise `Fenced` if a newer one leads the run.

    Args:
        by: who ends it: the learner itself, or a `command` of another process.
    """
    connection.run(END_RUN, (keys.meta,), (epoch, key.sign(END, keys.run, epoch) if key else "", by))


class Roster:
    """One learner's run and its workers."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        settings: RunSettings,
        *,
        learner_name: str = "",
        publishes: bool = False,
        key: SigningKey | None = None,
    ) -> None:
        """Prepare a roster; nothing is sent yet.

        Args:
            publishes: whether the learner publishes weights and sends commands.
            key: signs the end of the run; None to leave it unsigned.
        """
        self._connection, self._keys, self._settings = connection, keys, settings
        self._name, self._publishes, self._key = learner_name, publishes, key
        self._meta: dict[str, str | int] = {}  #: the fields of `meta` that this learner writes
        self._hosts = 0
        self._incarnations = Incarnations()
        self._alive: frozenset[int] = frozenset()
        #: The size of the set `workers`, and the worker ids in it; None if it must be read again.
        self._ids: tuple[int, Sequence[int]] | None = None
        #: By worker: when `restore` wrote it back, in milliseconds of the server's clock.
        self._written_back: dict[int, int] = {}
        #: The newest epoch that was seen to lead the run; 0 if this learner does not publish.
        self._leading_epoch = 0
        self.epoch = 0
        #: Whether the run existed before this learner opened it.
        self.existed = False
        #: Whether this learner is the newest of those that publish.
        self.leads = publishes
        self._ended = False  #: whether this learner has ended the run
        self._seen = 0.0  #: the server's clock at the last heartbeat
        #: Whether a command of another process has ended the run that this learner leads, as of the last heartbeat.
        self.ended_by_command = False

    def open(self, *, wire_format: int, num_workers: int, shards: str) -> int:
        """Open the run and return the learner's epoch, which fences every earlier learner of the same name.

        Args:
            wire_format: the wire format that this learner writes.
            shards: the shards of a new run; an existing run keeps its own.

        Raises:
            IncompatibleFormat: the run was written by a release with another wire format.
        """
        self._meta = {
            "wire_format": wire_format,
            "learner_host": readable(socket.gethostname()),
            "learner_pid": os.getpid(),
            "opened": f"{time.time():.3f}",
            "num_workers": num_workers,
            "shards": shards,
            **self._settings.to_fields(),
        }
        if self._key:
            self._meta["signed_with"] = self._key.id
        arguments = (wire_format, self._name, int(self._publishes), *flat(self._meta))
        try:
            epoch, existed, stored_shards = self._connection.run(OPEN, (self._keys.meta,), arguments)
        except ServerFault as error:
            written = str(error).partition("FORMAT ")[2]
            if not written:
                raise
            raise IncompatibleFormat(
                f"the run {self._keys.run!r} was written with wire format {written.strip():.40}, this release writes "
                f"{wire_format}; choose another run name, or the release that wrote it"
            ) from error
        self.epoch, self.existed = int(epoch), bool(existed)
        known_shards = stored_shards.decode("ascii", "replace")
        self._meta["shards"] = known_shards
        self._keys.use_shards(known_shards)
        self._leading_epoch = self.epoch if self._publishes else 0
        self._raise_version_floor(read_incarnations(self._connection, self._keys))
        return self.epoch

    def end_run(self) -> None:
        """Record that the run has ended, so that its workers stop, also those that join later.

        Raises:
            Fenced: a newer learner leads the run.
        """
        end_run(self._connection, self._keys, self.epoch, self._key)
        self._ended = True

    def heartbeat(self, channel: Channel) -> None:
        """Record in `meta` that the learner is alive, and read which workers are.

        Raises:
            Fenced: a newer learner of this name has taken over.
            RunLost: the server has lost the run, or a part of it.
        """
        clock, (*epochs, ended, ended_by) = channel.execute_all(
            [("TIME",), ("HMGET", self._keys.meta, f"learner:{self._name}", "epoch", "ended", "ended_by")],
            strict=True,
        )
        incarnations = read_incarnations(channel, self._keys)
        self._ids = None
        with parsing(self._keys.meta):
            named, leading = (stored_integer(epoch, 0) for epoch in epochs)
        if named > self.epoch:
            raise Fenced(f"a newer learner has taken over the run {self._keys.run!r}")
        if named < self.epoch or leading < self._leading_epoch:
            raise RunLost(
                f"{self._connection.address} has lost the run {self._keys.run!r}; it is being restored"
            )
        if self.leads and leading > self.epoch:
            logger.warning(
                "a newer learner publishes in the run %r; this one only collects now", self._keys.run
            )
        if self._publishes:
            self._leading_epoch = leading
        self.leads = leading == self.epoch
        self._note_end(ended, ended_by)
        now = server_seconds(clock)
        fields = {f"seen:{self._name}": f"{now:.3f}"}
        if now - self._seen > max(
            self._settings.lease_seconds, LATE_SECONDS
        ):  # perhaps the server did not answer
            incarnations = replace(incarnations, back_milliseconds=int(now * 1000))
            fields["back_at"] = str(incarnations.back_milliseconds)
        self._incarnations, self._seen = incarnations, now
        self._alive = incarnations.alive(now, self._settings.lease_seconds)
        if self.leads:
            self._raise_version_floor(incarnations)
            self._remove_invalid(incarnations, channel)
        if self.leads:
            fields["learner_seen"] = f"{now:.3f}"
            if not self._hosts:
                self.count_hosts()
            fields |= {"members": str(len(self._alive)), "hosts": str(self._hosts)}
        channel.run(ALIVE, (self._keys.meta,), flat(fields))

    def _note_end(self, ended: bytes | None, ended_by: bytes | None) -> None:
        is_ended = end_epoch((ended or b"").decode("ascii", "replace")) == self.epoch
        by_command = self.leads and is_ended and ended_by == b"command"
        if by_command and not self.ended_by_command:
            logger.warning(
                "the run %r was ended by a command, so its workers stop, also those that join later; start the "
                "learner again to open it",
                self._keys.run,
            )
        self.ended_by_command = by_command

    def count_hosts(self) -> None:
        """Count the hosts of the workers that are alive; the next `heartbeat` reports the number to the workers.

        Raises:
            ConnectionFailed: the server could not be reached in time.
        """
        commands = [("HGET", self._keys.heartbeat(worker), "host") for worker in self._alive]
        self._hosts = len(
            {host for host in self._connection.execute_all(commands, strict=False) if isinstance(host, bytes)}
        )

    def restore(self) -> None:
        """Write back the workers and the fields of `meta` that the server may have lost.

        A learner that no longer leads writes back the epoch of the newer learner, neither leads again nor ends the run.

        Raises:
            Fenced: a newer learner of this name has taken over.
        """
        incarnations = self._incarnations.by_worker
        workers = ",".join(
            f"{worker}:{incarnation.number}:{int(incarnation.member)}"
            for worker, incarnation in incarnations.items()
        )
        arguments = (self.epoch, self._name, self._leading_epoch, workers)
        keys = (self._keys.meta, self._keys.workers, *map(self._keys.life, incarnations))
        now, *lost = self._connection.run(RESTORE_RUN, keys, (*arguments, *flat(self._meta)))
        self._written_back |= dict.fromkeys(map(int, lost), int(now))
        if self._ended and self.leads:
            self.end_run()

    @property
    def alive(self) -> frozenset[int]:
        """Members whose lease had not expired at the learner's last `heartbeat`."""
        return self._alive

    @property
    def away(self) -> frozenset[int]:
        """Members whose lease had expired at the learner's last `heartbeat`."""
        return frozenset(self._incarnations.members) - self._alive

    @property
    def everyone(self) -> frozenset[int]:
        """All workers that the run ever had, as of the learner's last `heartbeat`."""
        return frozenset(self._incarnations.by_worker)

    def read_alive(self) -> frozenset[int]:
        """Read which members are alive now. `alive` is cheaper, may be a second old, and outlasts a server's loss."""
        clock = self._connection.clock(self._keys.meta)
        incarnations = read_incarnations(self._connection, self._keys)
        return incarnations.alive(clock, self._settings.lease_seconds)

    def ids(self) -> list[int]:
        """Return every worker id that the run ever had, in order.

        The set `workers` is read again only if its size has changed, because it hardly ever loses a member.
        """
        known = self._ids
        if known is None or self._connection.execute("SCARD", self._keys.workers) != known[0]:
            names = self._connection.execute("SMEMBERS", self._keys.workers)
            known = self._ids = len(names), parse_worker_ids(names)
        return list(known[1])

    def workers(self) -> list[WorkerInfo]:
        """Return the members of the run, by worker id."""
        clock, latest = self._connection.execute_all([("TIME",), ("HGET", self._keys.weights, "version")])
        incarnations = read_incarnations(self._connection, self._keys)
        members = incarnations.members
        heartbeats = self._connection.execute_all(
            [("HGETALL", self._keys.heartbeat(worker)) for worker in members], strict=False
        )
        with parsing(self._keys.weights):
            latest_version = stored_integer(latest, 0)
        return parse_worker_infos(
            now=server_seconds(clock),
            latest_version=latest_version,
            members=members,
            back_milliseconds=incarnations.back_milliseconds,
            heartbeats=[text_fields(default_if_wrong_type(heartbeat, {})) for heartbeat in heartbeats],
            lease_seconds=self._settings.lease_seconds,
        )

    def forget_silent(self) -> Sequence[int]:
        """Forget workers that were silent for longer than `forget_seconds`, and return their ids.

        Members that were written back after a loss have less time to return, because some may have left before it.
        """
        now_milliseconds = int(self._connection.clock(self._keys.meta) * 1000)
        limit_milliseconds = int(self._settings.forget_seconds * 1000)
        before = now_milliseconds - limit_milliseconds
        members = read_incarnations(self._connection, self._keys).members
        # By worker: the arguments of the script, which checks them once more.
        to_forget = {
            worker: (limit_milliseconds, 0)
            for worker, incarnation in members.items()
            if incarnation.seen_milliseconds <= before
        }
        return_milliseconds = return_seconds(self._settings) * 1000
        for worker, written in list(self._written_back.items()):
            if now_milliseconds - written >= return_milliseconds:
                to_forget[worker] = (int(return_milliseconds), self._written_back.pop(worker))
        forgotten = []
        for worker, limits in to_forget.items():
            own = self._keys.life(worker), self._keys.acknowledgements(worker)
            with suppress(WrongKeyType):  # a worker has just changed its type; the next heartbeat deletes it
                if self._connection.run(FORGET, (*own, self._keys.weights, self._keys.meta), limits):
                    forgotten.append(worker)
        return forgotten

    def _raise_version_floor(self, incarnations: Incarnations) -> None:
        """Record the newest version that workers saw before the server lost it, so that it is not reused."""
        claims = [incarnation.claimed_version for incarnation in incarnations.by_worker.values()]
        if not any(claims):
            return
        replies = self._connection.execute_all(
            [("HGET", self._keys.meta, "version_floor"), ("HGET", self._keys.weights, "version")]
        )
        floor, latest = (number_in(reply) or 0 for reply in replies)
        claimed = max(believed_claim(claim, latest) for claim in claims)
        if claimed > max(floor, latest):
            self._connection.execute("HSET", self._keys.meta, "version_floor", claimed)

    def _remove_invalid(self, incarnations: Incarnations, channel: Channel) -> None:
        """Remove invalid names and `life:` keys that workers wrote: they slow each read and block worker ids."""
        names = incarnations.invalid_names
        ids = [worker for name in names if (worker := parse_worker_id(name)) is not None]
        kinds = channel.execute_all([("TYPE", self._keys.life(worker)) for worker in ids]) if ids else []
        wrong = [worker for worker, kind in zip(ids, kinds, strict=True) if kind not in (b"hash", b"none")]
        if names:
            logger.warning(
                "removed %s from %s: no worker with a valid incarnation",
                counted(len(names), "name"),
                self._keys.workers,
            )
            channel.execute_all(
                [
                    ("SREM", self._keys.workers, *names),
                    *(("UNLINK", self._keys.life(worker)) for worker in wrong),
                ],
                strict=True,
            )
