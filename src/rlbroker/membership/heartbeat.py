"""A worker's membership: it registers, says regularly that it lives, and leaves."""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Final

from rlbroker.backend.connection import ALSO_WHEN_FULL, Channel, Connection, Script, flat
from rlbroker.backend.deadline import Backoff, Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import seconds_number, text_fields, whole_number
from rlbroker.backend.threads import Background
from rlbroker.backend.unreadable import legible
from rlbroker.config import MAX_WORKER_ID, RunSettings, worker_number
from rlbroker.errors import AccessDenied, DeadlineExceeded, IncompatibleFormat, RunLost
from rlbroker.membership.incarnation_scripts import ANNOUNCE, HEARD_OF, NEXT_LIFE, NOTE_FENCED
from rlbroker.membership.incarnations import Life, read_lives
from rlbroker.membership.run_size import Crowd
from rlbroker.types import Registration

#: Heartbeats in one lease: this many must fail in a row before a worker is called away.
BEATS_PER_LEASE = 5

#: How often a worker looks whether its run was opened: a look costs the server far less than a heartbeat.
OPENED_SECONDS = 0.1

REGISTER = Script(
    "register",
    ANNOUNCE
    + NEXT_LIFE
    + HEARD_OF
    + """
    -- KEYS: the worker's life, workers, its acknowledgements, weights, control, meta, its heartbeat, its ledger
    -- ARGV: worker id, lease in seconds where no learner has set one, '1' to take the id only if it is free,
    --       a token of this attempt, wire format
    local wire_format = redis.call('HGET', KEYS[6], 'wire_format') or ''
    if wire_format ~= '' and wire_format ~= ARGV[5] then
      return {'incompatible', wire_format}  -- and the process that has this id goes on
    end
    local before = redis.call('HMGET', KEYS[7], 'token', 'incarnation', 'joined_version', 'joined_position')
    if before[1] == ARGV[4] then  -- registered before; the reply was lost
      return {'registered', before[2], before[3], before[4]}
    end
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    local lease = tonumber(redis.call('HGET', KEYS[6], 'lease_seconds') or ARGV[2])
    local silent_since = heard_of(KEYS[1], KEYS[6])
    if ARGV[3] == '1' and silent_since then
      -- If the learner could not reach the server when the lease was over, the worker may not have reached it either.
      local over = silent_since + lease * 1000
      if now < over or tonumber(redis.call('HGET', KEYS[6], 'learner_seen') or '0') * 1000 < over then
        return {'taken'}
      end
    end
    -- What was settled may be of a later life than the hash says, if a process wrote nonsense into it.
    local settled = string.match(redis.call('HGET', KEYS[8], 'event') or '', '^%d+') or '0'
    local last_life = redis.call('HGET', KEYS[1], 'incarnation') or '0'
    local incarnation = next_life(math.max(tonumber(last_life) or 0, tonumber(settled)))
    redis.call('SADD', KEYS[2], ARGV[1])
    redis.call('HSET', KEYS[1], 'incarnation', incarnation, 'member', '1', 'seen', string.format('%.0f', now))
    local latest = redis.call('HGET', KEYS[4], 'version') or '0'
    announce(KEYS[3], incarnation, 'joined', latest)
    local last = redis.call('XREVRANGE', KEYS[5], '+', '-', 'COUNT', 1)
    local position = last[1] and last[1][1] or '0-0'
    redis.call('DEL', KEYS[7])
    redis.call('HSET', KEYS[7], 'token', ARGV[4], 'incarnation', incarnation,
      'joined_version', latest, 'joined_position', position)
    redis.call('PEXPIRE', KEYS[7], string.format('%.0f', lease * 10000))
    return {'registered', incarnation, latest, position}
    """,
)

#: Put into scripts that only the newest life of a worker may run; KEYS[1] is its `life:`, ARGV[1] the worker's
#: id, ARGV[2] its incarnation. Whoever is replaced, struck or leaves has an incarnation that is over.
_ONLY_NEWEST = """
    local newest = tonumber(redis.call('HGET', KEYS[1], 'incarnation') or '0') or 0
    if newest > tonumber(ARGV[2]) then
      return redis.error_reply('FENCED worker ' .. ARGV[1] .. ' was replaced by a newer process, or it was silent ' ..
        'for longer than forget_seconds, or it has left; if nothing took its place, start it again')
    end
"""

REJOIN = Script(
    "rejoin",
    ANNOUNCE
    + f"""
    -- KEYS: the worker's life, workers, its acknowledgements, weights, its heartbeat
    -- ARGV: worker id, incarnation, newest version that the worker knows, token of its registration,
    --       lifetime of the heartbeat in milliseconds, name of the upload of that version
    -- For a worker that lives on after the server may have lost it. Its incarnation stays.
    {ALSO_WHEN_FULL}
    {_ONLY_NEWEST}
    local time = redis.call('TIME')
    local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
    redis.call('SADD', KEYS[2], ARGV[1])
    redis.call('HSET', KEYS[1], 'incarnation', ARGV[2], 'member', '1', 'seen', now)
    redis.call('HSET', KEYS[5], 'token', ARGV[4], 'incarnation', ARGV[2])
    redis.call('PEXPIRE', KEYS[5], ARGV[5])
    local pointer = redis.call('HMGET', KEYS[4], 'version', 'upload')
    local latest = tonumber(pointer[1] or '0') or 0
    local known = tonumber(ARGV[3])
    -- For the learner: these numbers were used. One that was given to something else must not be the latest any more.
    if known > 0 and known == latest and pointer[2] ~= ARGV[6] then known = known + 1 end
    if known > latest then
      redis.call('HSET', KEYS[1], 'known_version', string.format('%.0f', known))
    end
    if redis.call('EXISTS', KEYS[3]) == 0 then
      announce(KEYS[3], ARGV[2], 'joined', math.max(latest, known))
    end
    return 1
    """,
)

#: What a worker has to know of the run's `meta`, of which most stays as it is.
_KNOWN: Final = ("wire_format", "shards", *Crowd._fields, *(field.name for field in fields(RunSettings)))

BEAT = Script(
    "beat",
    NOTE_FENCED
    + f"""
    -- KEYS: the worker's life, workers, its heartbeat, meta
    -- ARGV: worker id, incarnation, token of its registration, lifetime in milliseconds, the process as host:pid,
    --       then field and value pairs
    -- Gives what the learner says of the run.
    local there = redis.call('HGET', KEYS[1], 'incarnation')
    if (tonumber(there or '0') or 0) > tonumber(ARGV[2]) then
      note_fenced(KEYS[1], KEYS[3], there, ARGV[5])
    end
    {ALSO_WHEN_FULL}
    {_ONLY_NEWEST}
    -- The learner writes back who took part, but no token: only the worker itself knows what else is missing.
    local known = redis.call('HGET', KEYS[3], 'token') == ARGV[3]
    local member = redis.call('HGET', KEYS[1], 'member') == '1' and redis.call('SISMEMBER', KEYS[2], ARGV[1]) == 1
    if newest < tonumber(ARGV[2]) or not known or not member then
      return redis.error_reply('LOST the server has lost worker ' .. ARGV[1])
    end
    local time = redis.call('TIME')
    redis.call('HSET', KEYS[1], 'seen', string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)))
    redis.call('HSET', KEYS[3], 'incarnation', ARGV[2], unpack(ARGV, 6))
    redis.call('PEXPIRE', KEYS[3], ARGV[4])
    return redis.call('HMGET', KEYS[4], {", ".join(map(repr, _KNOWN))})
    """,
)

LEAVE = Script(
    "leave",
    NEXT_LIFE
    + NOTE_FENCED
    + """
    -- KEYS: the worker's life, its heartbeat, its acknowledgements, weights
    -- ARGV: incarnation, the process as host:pid
    local newest = redis.call('HGET', KEYS[1], 'incarnation')
    if (tonumber(newest or '0') or 0) > tonumber(ARGV[1]) then
      note_fenced(KEYS[1], KEYS[2], newest, ARGV[2])
    end
    if newest ~= ARGV[1] or redis.call('HGET', KEYS[1], 'member') ~= '1' then
      return 0
    end
    redis.call('DEL', KEYS[2])
    redis.call('HSET', KEYS[1], 'incarnation', next_life(ARGV[1]), 'member', '0')  -- this life is over
    -- The largest number that any answer of this incarnation can have: it is the last one.
    local latest = redis.call('HGET', KEYS[4], 'version') or '0'
    redis.call('XADD', KEYS[3], ARGV[1] .. '-18446744073709551615', 'event', 'left', 'version', latest)
    return 1
    """,
)


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
        tend: Callable[[bool], None],
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
        self._wire_format, self._newest_seen, self._tend = wire_format, newest_seen, tend
        self._channel = Channel(connection, keys.meta)
        self._began = self._returned = False
        self._settings: RunSettings | None = None
        self._settings_known = threading.Event()
        self._next_beat = Deadline(0)
        self._thread = Background(f"heartbeat in {keys.run!r}", self._step)
        self.registration = Registration(0, 0, 0, "0-0")
        #: Who takes part besides, as the learner said last.
        self.crowd = Crowd()
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
                members = read_lives(self._connection.ask, self._keys).members
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

    def _silent(self, members: Mapping[int, Life]) -> list[int]:
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
            self._tend(returned)

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
            with legible(self._keys.meta):
                self._check_format(meta["wire_format"])
                self._settings = RunSettings.from_fields(meta)
            self._next_beat = Deadline(self._lease_seconds / BEATS_PER_LEASE)  # the first beat knew no lease
            self._keys.spread(meta.get("shards", " ".join(self._keys.shards)))
            self._settings_known.set()
        self.crowd = Crowd(*(whole_number(meta.get(name, "")) or 0 for name in Crowd._fields))

    def _come_back(self) -> None:
        self.rejoin(self._channel)
        self._returned = True

    def _check_format(self, found: str) -> None:
        if found and int(found) != self._wire_format:
            raise IncompatibleFormat(
                f"the run {self._keys.run!r} uses wire format {found}, this process {self._wire_format}; "
                "install the same release of rlbroker for learner and workers"
            )
