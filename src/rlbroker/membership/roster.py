"""The learner's view of who takes part: it opens the run, lists the workers, and forgets the silent ones."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection, flat
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import default_if_wrong_type, number_in, parsing, server_seconds, text_fields
from rlbroker.backend.scripts import Script
from rlbroker.backend.text import counted
from rlbroker.config import RunSettings
from rlbroker.errors import Fenced, IncompatibleFormat, RunLost, ServerFault
from rlbroker.membership.incarnations import Incarnations, read_incarnations, worker_number_of, worker_numbers
from rlbroker.membership.worker_info import member_infos
from rlbroker.types import WorkerInfo

logger = logging.getLogger("rlbroker")

#: After a loss a worker is expected back within its lease, or this if it is longer: until it notices, and is heard.
BACK_SECONDS = 10.0

#: A number that a worker claims to have seen is not believed above it, nor so far above the latest, where there is
#: one: numbers of versions shall never run out, and those that others saw are to stay credible.
CREDIBLE_VERSION = 1 << 40
CREDIBLE_STEP = 10_000_000

OPEN = Script.load("membership/lua/open.lua")

RESTORE_RUN = Script.load("membership/lua/restore_run.lua")

CLOSE = Script.load("membership/lua/close.lua")

FORGET = Script.load("membership/lua/forget.lua")


ALIVE = Script.load("membership/lua/alive.lua")


class Roster:
    """Opens one run for a learner and knows its workers."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        settings: RunSettings,
        *,
        learner_name: str = "",
        publishes: bool = False,
    ) -> None:
        """Prepare a roster; nothing is sent yet.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            settings: of the run.
            learner_name: of the learner that opens the run.
            publishes: whether that learner publishes weights and commands.
        """
        self._connection, self._keys, self._settings = connection, keys, settings
        self._name, self._publishes = learner_name, publishes
        self._facts: dict[str, str | int] = {}
        self._hosts = 0
        self._lives = Incarnations()
        self._alive: frozenset[int] = frozenset()
        self._ids: tuple[int, Sequence[int]] | None = None  #: members of the set `workers`, and who they are
        #: Members that were written back and not heard of since: when that was, in the server's milliseconds.
        self._awaited: dict[int, int] = {}
        self._leading = 0  #: the newest epoch that was seen to lead
        self.epoch = 0
        #: Whether the run was there before it was opened.
        self.goes_on = False
        #: Whether this learner is the newest of those that publish.
        self.leads = publishes

    def open(self, *, wire_format: int, num_workers: int, shards: str) -> int:
        """Open the run and give the learner's epoch, which fences every earlier learner of the same name.

        Args:
            wire_format: what it writes.
            num_workers: how many workers are expected.
            shards: over which a new run is spread; one that is there keeps its own.

        Raises:
            IncompatibleFormat: the run was written by a release with another wire format.
        """
        self._facts = {
            "wire_format": wire_format,
            "learner_state": "open",
            "learner_host": socket.gethostname(),
            "learner_pid": os.getpid(),
            "opened": f"{time.time():.3f}",
            "num_workers": num_workers,
            "shards": shards,
            **self._settings.to_fields(),
        }
        arguments = (wire_format, self._name, int(self._publishes), *flat(self._facts))
        try:
            epoch, there, known = self._connection.run(OPEN, (self._keys.meta,), arguments)
        except ServerFault as error:
            written = str(error).partition("FORMAT ")[2]
            if not written:
                raise
            raise IncompatibleFormat(
                f"the run {self._keys.run!r} was written with wire format {written.split()[0]}, this release writes "
                f"{wire_format}; choose another run name, or the release that wrote it"
            ) from error
        self.epoch, self.goes_on = int(epoch), bool(there)
        spread = known.decode("ascii", "replace")
        self._facts["shards"] = spread
        self._keys.spread(spread)
        self._leading = self.epoch if self._publishes else 0
        self._raise_floor(read_incarnations(self._connection.ask, self._keys))
        return self.epoch

    def close(self) -> None:
        """Note that the learner ended, so that nobody takes its silence for a fault."""
        self._connection.run(CLOSE, (self._keys.meta,), (self.epoch,))

    def heartbeat(self, channel: Channel) -> None:
        """Note in the run's `meta` when its learner was last alive, by the server's clock; see who takes part.

        Raises:
            Fenced: a newer learner of this name has taken over.
            RunLost: the server has lost the run, or a part of it.
        """
        clock, epochs = channel.execute_all(
            [("TIME",), ("HMGET", self._keys.meta, f"learner:{self._name}", "epoch")], strict=True
        )
        lives = read_incarnations(channel.execute_all, self._keys)
        self._ids = None
        with parsing(self._keys.meta):
            named, leading = (int(epoch or 0) for epoch in epochs)
        if named > self.epoch:
            raise Fenced(f"a newer learner has taken over the run {self._keys.run!r}")
        if named < self.epoch or leading < self._leading:
            raise RunLost(
                f"{self._connection.address} has lost the run {self._keys.run!r}; it is being restored"
            )
        if self.leads and leading > self.epoch:
            logger.warning(
                "a newer learner publishes in the run %r; this one only collects now", self._keys.run
            )
        if self._publishes:
            self._leading = leading
        self.leads = leading == self.epoch
        self._lives = lives
        limit = (server_seconds(clock) - self._settings.lease_seconds) * 1000
        self._alive = frozenset(
            worker for worker, life in lives.members.items() if life.seen_milliseconds > limit
        )
        if self.leads:
            self._raise_floor(lives)
            self._forget_unusable(lives, channel)
        said = {f"seen:{self._name}": f"{server_seconds(clock):.3f}"}
        if self.leads:
            said["learner_seen"] = f"{server_seconds(clock):.3f}"
            if not self._hosts:
                self.count_hosts()
            said |= {"members": str(len(self._alive)), "hosts": str(self._hosts)}
        channel.run(ALIVE, (self._keys.meta,), flat(said))

    def count_hosts(self) -> None:
        """See on how many hosts those are who take part, for `heartbeat` to tell.

        Raises:
            ConnectionFailed: the server could not be reached in time.
        """
        asked = [("HGET", self._keys.heartbeat(worker), "host") for worker in self._alive]
        self._hosts = len({host for host in self._connection.ask(asked) if isinstance(host, bytes)})

    def restore(self) -> None:
        """Write back what a server lost: who takes part, and last of all, that this learner has the run.

        One that does not lead any more writes back that a newer one does, and never leads again.

        Raises:
            Fenced: a newer learner of this name has taken over.
            PeerError: the server refused, or could not be reached in time.
        """
        lives = self._lives.of
        workers = ",".join(
            f"{worker}:{life.incarnation}:{int(life.member)}" for worker, life in lives.items()
        )
        arguments = (self.epoch, self._name, self._leading, workers)
        keys = (self._keys.meta, self._keys.workers, *map(self._keys.life, lives))
        now, *lost = self._connection.run(RESTORE_RUN, keys, (*arguments, *flat(self._facts)))
        self._awaited |= dict.fromkeys(map(int, lost), int(now))

    @property
    def alive(self) -> frozenset[int]:
        """Members that `heartbeat` last saw within their lease."""
        return self._alive

    @property
    def away(self) -> frozenset[int]:
        """Members that it did not."""
        return frozenset(self._lives.members) - self._alive

    @property
    def everyone(self) -> frozenset[int]:
        """Whoever ever took part, as it last saw."""
        return frozenset(self._lives.of)

    def ids(self) -> list[int]:
        """Give every worker id that the run ever had, in order.

        The set hardly ever loses one, so it is only counted where `heartbeat` has not looked since the last time.
        """
        known = self._ids
        if known is None or self._connection.execute("SCARD", self._keys.workers) != known[0]:
            names = self._connection.execute("SMEMBERS", self._keys.workers)
            known = self._ids = len(names), worker_numbers(names)
        return list(known[1])

    def workers(self) -> list[WorkerInfo]:
        """Give the members of the run, by id."""
        clock, latest = self._connection.execute_all([("TIME",), ("HGET", self._keys.weights, "version")])
        members = read_incarnations(self._connection.ask, self._keys).members
        beats = self._connection.ask([("HGETALL", self._keys.heartbeat(worker)) for worker in members])
        return member_infos(
            now=server_seconds(clock),
            latest_version=int(latest or 0),
            members=members,
            beats=[text_fields(default_if_wrong_type(beat, {})) for beat in beats],
            lease_seconds=self._settings.lease_seconds,
        )

    def forget_silent(self) -> Sequence[int]:
        """Strike workers that were silent for longer than `forget_seconds`; give their ids.

        Those that were written back after a loss have less time: some of them had left before.
        """
        now_milliseconds = int(self._connection.clock(self._keys.meta) * 1000)
        limit_milliseconds = int(self._settings.forget_seconds * 1000)
        before = now_milliseconds - limit_milliseconds
        members = read_incarnations(self._connection.ask, self._keys).members
        to_strike = {
            worker: (limit_milliseconds, 0)
            for worker, life in members.items()
            if life.seen_milliseconds <= before
        }
        back_seconds = min(max(self._settings.lease_seconds, BACK_SECONDS), self._settings.forget_seconds)
        for worker, written in list(self._awaited.items()):
            if now_milliseconds - written >= back_seconds * 1000:
                to_strike[worker] = (int(back_seconds * 1000), self._awaited.pop(worker))
        gone = self._connection.run_all(
            [
                (
                    FORGET,
                    (
                        self._keys.life(worker),
                        self._keys.acknowledgements(worker),
                        self._keys.weights,
                        self._keys.meta,
                    ),
                    limits,
                )
                for worker, limits in to_strike.items()
            ]
        )
        return [worker for worker, struck in zip(to_strike, gone, strict=True) if struck]

    def _raise_floor(self, lives: Incarnations) -> None:
        """Note the newest version that workers saw on a server which lost it: its number is not used again."""
        if not any(life.known_version for life in lives.of.values()):
            return
        replies = self._connection.execute_all(
            [("HGET", self._keys.meta, "version_floor"), ("HGET", self._keys.weights, "version")]
        )
        floor, latest = (number_in(said) or 0 for said in replies)
        credible = min(CREDIBLE_VERSION, latest + CREDIBLE_STEP) if latest else CREDIBLE_VERSION
        known = [life.known_version for life in lives.of.values() if life.known_version <= credible]
        if max(known, default=0) > max(floor, latest):
            self._connection.execute("HSET", self._keys.meta, "version_floor", max(known))

    def _forget_unusable(self, lives: Incarnations, channel: Channel) -> None:
        """Remove what workers wrote that is no life, so that it costs nobody anything and ids can be used again."""
        ids = [worker for name in lives.unusable if (worker := worker_number_of(name)) is not None]
        kinds = channel.execute_all([("TYPE", self._keys.life(worker)) for worker in ids]) if ids else []
        wrong = [worker for worker, kind in zip(ids, kinds, strict=True) if kind not in (b"hash", b"none")]
        if lives.unusable:
            logger.warning(
                "removed from %s what is no worker: %s",
                self._keys.workers,
                counted(len(lives.unusable), "name"),
            )
            channel.execute_all(
                [
                    ("SREM", self._keys.workers, *lives.unusable),
                    *(("UNLINK", self._keys.life(worker)) for worker in wrong),
                ],
                strict=True,
            )
