"""The learner's view of who takes part: it opens the run, lists the workers, and forgets the silent ones."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence

from rlbroker.backend.connection import ALSO_WHEN_FULL, Channel, Connection, Script, flat
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import number_in, server_seconds, text_fields
from rlbroker.backend.text import counted
from rlbroker.backend.unreadable import legible, unless_spoiled
from rlbroker.config import RunSettings
from rlbroker.errors import Fenced, IncompatibleFormat, RunLost, ServerFault
from rlbroker.membership.incarnation_scripts import ANNOUNCE, HEARD_OF, NEXT_LIFE
from rlbroker.membership.incarnations import Lives, read_lives, worker_number_of, worker_numbers
from rlbroker.membership.worker_info import member_infos
from rlbroker.types import WorkerInfo

logger = logging.getLogger("rlbroker")

#: After a loss a worker is expected back within its lease, or this if it is longer: until it notices, and is heard.
BACK_SECONDS = 10.0

#: A number that a worker claims to have seen is not believed above it, nor so far above the latest, where there is
#: one: numbers of versions shall never run out, and those that others saw are to stay credible.
CREDIBLE_VERSION = 1 << 40
CREDIBLE_STEP = 10_000_000

OPEN = Script(
    "open",
    f"""
    {NEXT_LIFE}
    -- KEYS: meta
    -- ARGV: wire format, the learner's name, '1' if it publishes, then field and value pairs
    -- Gives the learner's epoch, and 1 if the run was there before.
    {ALSO_WHEN_FULL}
    local written = redis.call('HGET', KEYS[1], 'wire_format')
    if written and written ~= ARGV[1] then
      return redis.error_reply('FORMAT ' .. written)
    end
    local epoch = next_life(redis.call('HGET', KEYS[1], 'epochs'))
    local time = redis.call('TIME')
    redis.call('HSET', KEYS[1], 'epochs', epoch, 'learner:' .. ARGV[2], epoch,
      'back_at', string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)))
    if ARGV[3] == '1' then redis.call('HSET', KEYS[1], 'epoch', epoch) end
    -- Where batches may wait already, they are looked for.
    local shards = redis.call('HGET', KEYS[1], 'shards')
    if ARGV[3] == '1' or not written then
      redis.call('HSET', KEYS[1], 'wire_format', ARGV[1], unpack(ARGV, 4))
      if written then redis.call('HSET', KEYS[1], 'shards', shards or '') end
    end
    return {{epoch, written and 1 or 0, redis.call('HGET', KEYS[1], 'shards') or ''}}
    """,
)

RESTORE_RUN = Script(
    "restore_run",
    f"""
    -- KEYS: meta, workers, then the life of each worker that took part
    -- ARGV: the learner's epoch, its name, the epoch of the learner that leads, as far as it knows,
    --       these workers in order, each with its incarnation and 1 for a member, as one text,
    --       then field and value pairs for the learner that leads
    -- Gives when it was, and the members that the server had lost.
    {ALSO_WHEN_FULL}
    local mine = tonumber(ARGV[1])
    local named = 'learner:' .. ARGV[2]
    if (tonumber(redis.call('HGET', KEYS[1], named) or '0') or 0) > mine then
      return redis.error_reply('FENCED a newer learner with this name has taken over the run')
    end
    local time = redis.call('TIME')
    local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
    local reply, place = {{now}}, 3
    -- Word by word: to look for all three parts in the whole text takes time that grows with its square, and workers
    -- can call this too.
    for word in string.gmatch(ARGV[4], '[^,]+') do
      local worker, incarnation, member = string.match(word, '^(%d+):(%d+):(%d)$')
      local life = KEYS[place]
      place = place + 1
      local there = redis.pcall('HMGET', life, 'incarnation', 'member')  -- a worker may have put something else there
      if not there['err'] and (tonumber(there[1] or '0') or 0) < tonumber(incarnation) then
        redis.call('SADD', KEYS[2], worker)
        redis.call('HSET', life, 'incarnation', incarnation)
        -- It comes back by itself, or is given up soon.
        if member == '1' and there[2] ~= '1' then
          redis.call('HSET', life, 'member', '1', 'seen', now)
          table.insert(reply, worker)
        end
      end
    end
    local leading = tonumber(ARGV[3])
    redis.call('HSET', KEYS[1], named, ARGV[1], 'back_at', now)
    if (tonumber(redis.call('HGET', KEYS[1], 'epochs') or '0') or 0) < math.max(mine, leading) then
      redis.call('HSET', KEYS[1], 'epochs', string.format('%.0f', math.max(mine, leading)))
    end
    local there = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0') or 0
    if there < leading then redis.call('HSET', KEYS[1], 'epoch', ARGV[3]) end
    -- Another learner may have written the epoch of this one back, but not what only this one knows.
    if leading == mine and (there < mine or redis.call('HEXISTS', KEYS[1], 'wire_format') == 0) then
      redis.call('HSET', KEYS[1], unpack(ARGV, 5))
    end
    return reply
    """,
)

CLOSE = Script(
    "close",
    """
    -- KEYS: meta
    -- ARGV: epoch of the learner that ends
    if redis.call('HGET', KEYS[1], 'epoch') == ARGV[1] then
      redis.call('HSET', KEYS[1], 'learner_state', 'ended')
    end
    return 1
    """,
)

FORGET = Script(
    "forget",
    ANNOUNCE
    + NEXT_LIFE
    + HEARD_OF
    + """
    -- KEYS: the worker's life, its acknowledgements, weights, meta
    -- ARGV: milliseconds of silence after which it is gone, when it was seen last if that is to be still so; 0 for any
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    local silent_since = heard_of(KEYS[1], KEYS[4])
    if not silent_since or now - silent_since < tonumber(ARGV[1]) then
      return 0
    end
    if ARGV[2] ~= '0' and redis.call('HGET', KEYS[1], 'seen') ~= ARGV[2] then
      return 0
    end
    -- Should it come back, it has to register again: its incarnation is over.
    local incarnation = next_life(redis.call('HGET', KEYS[1], 'incarnation'))
    redis.call('HSET', KEYS[1], 'incarnation', incarnation, 'member', '0')
    local latest = redis.call('HGET', KEYS[3], 'version') or '0'
    announce(KEYS[2], incarnation, 'gone', latest)
    return 1
    """,
)


ALIVE = Script(
    "alive",
    f"""
    -- KEYS: meta
    -- ARGV: field and value pairs that say when its learner was last alive
    {ALSO_WHEN_FULL}
    return redis.call('HSET', KEYS[1], unpack(ARGV))
    """,
)


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
        self._lives = Lives()
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
        self._raise_floor(read_lives(self._connection.ask, self._keys))
        return self.epoch

    def close(self) -> None:
        """Note that the learner ended, so that nobody takes its silence for a fault."""
        self._connection.run(CLOSE, (self._keys.meta,), (self.epoch,))

    def say_alive(self, channel: Channel) -> None:
        """Note in the run's `meta` when its learner was last alive, by the server's clock; see who takes part.

        Raises:
            Fenced: a newer learner of this name has taken over.
            RunLost: the server has lost the run, or a part of it.
        """
        clock, epochs = channel.execute_all(
            [("TIME",), ("HMGET", self._keys.meta, f"learner:{self._name}", "epoch")], strict=True
        )
        lives = read_lives(channel.execute_all, self._keys)
        self._ids = None
        with legible(self._keys.meta):
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
        """See on how many hosts those are who take part, for `say_alive` to tell.

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
        """Members that `say_alive` last saw within their lease."""
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

        The set hardly ever loses one, so it is only counted where `say_alive` has not looked since the last time.
        """
        known = self._ids
        if known is None or self._connection.execute("SCARD", self._keys.workers) != known[0]:
            names = self._connection.execute("SMEMBERS", self._keys.workers)
            known = self._ids = len(names), worker_numbers(names)
        return list(known[1])

    def workers(self) -> list[WorkerInfo]:
        """Give the members of the run, by id."""
        clock, latest = self._connection.execute_all([("TIME",), ("HGET", self._keys.weights, "version")])
        members = read_lives(self._connection.ask, self._keys).members
        beats = self._connection.ask([("HGETALL", self._keys.heartbeat(worker)) for worker in members])
        return member_infos(
            now=server_seconds(clock),
            latest_version=int(latest or 0),
            members=members,
            beats=[text_fields(unless_spoiled(beat, {})) for beat in beats],
            lease_seconds=self._settings.lease_seconds,
        )

    def forget_silent(self) -> Sequence[int]:
        """Strike workers that were silent for longer than `forget_seconds`; give their ids.

        Those that were written back after a loss have less time: some of them had left before.
        """
        now_milliseconds = int(self._connection.clock(self._keys.meta) * 1000)
        limit_milliseconds = int(self._settings.forget_seconds * 1000)
        before = now_milliseconds - limit_milliseconds
        members = read_lives(self._connection.ask, self._keys).members
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

    def _raise_floor(self, lives: Lives) -> None:
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

    def _forget_unusable(self, lives: Lives, channel: Channel) -> None:
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
