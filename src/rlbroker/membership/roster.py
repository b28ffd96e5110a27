"""The learner's view of who takes part: it opens the run, lists the workers, and forgets the silent ones."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence

from rlbroker.config import RunSettings
from rlbroker.connection import ALSO_WHEN_FULL, Connection, Script, flat
from rlbroker.errors import Fenced, IncompatibleFormat, RunLost, ServerFault
from rlbroker.keys import Keys
from rlbroker.membership.announcement import ANNOUNCE
from rlbroker.records import WorkerInfo
from rlbroker.replies import scored_members, server_seconds, text_fields, whole_number

OPEN = Script(
    "open",
    f"""
    -- KEYS: meta
    -- ARGV: wire format, then field and value pairs
    {ALSO_WHEN_FULL}
    local written = redis.call('HGET', KEYS[1], 'wire_format')
    if written and written ~= ARGV[1] then
      return redis.error_reply('FORMAT ' .. written)
    end
    redis.call('HSET', KEYS[1], 'wire_format', ARGV[1], unpack(ARGV, 2))
    return redis.call('HINCRBY', KEYS[1], 'epoch', 1)
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
    + """
    -- KEYS: incarnations, members, the worker's acknowledgements, weights
    -- ARGV: worker id, milliseconds of silence after which it is gone
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    local seen = redis.call('ZSCORE', KEYS[2], ARGV[1])
    if not seen or now - seen < tonumber(ARGV[2]) then
      return 0
    end
    redis.call('ZREM', KEYS[2], ARGV[1])
    -- Should it come back, it has to register again: its incarnation is over.
    local incarnation = redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
    local latest = redis.call('HGET', KEYS[4], 'version') or '0'
    announce(KEYS[3], incarnation, 'gone', latest)
    return 1
    """,
)


class Roster:
    """Opens one run for a learner and knows its workers."""

    def __init__(self, connection: Connection, keys: Keys, settings: RunSettings) -> None:
        """Prepare a roster; nothing is sent yet."""
        self._connection, self._keys, self._settings = connection, keys, settings

    def open(self, *, wire_format: int, num_workers: int) -> int:
        """Take over the run as its newest learner and give the epoch, which fences every earlier learner.

        Raises:
            IncompatibleFormat: the run was written by a release with another wire format.
        """
        facts: dict[str, str | int] = {
            "learner_state": "open",
            "learner_host": socket.gethostname(),
            "learner_pid": os.getpid(),
            "opened": f"{time.time():.3f}",
            "num_workers": num_workers,
            **self._settings.to_fields(),
        }
        try:
            return int(self._connection.run(OPEN, (self._keys.meta,), (wire_format, *flat(facts))))
        except ServerFault as error:
            written = str(error).partition("FORMAT ")[2]
            if not written:
                raise
            raise IncompatibleFormat(
                f"the run {self._keys.run!r} was written with wire format {written.split()[0]}, this release writes "
                f"{wire_format}; choose another run name, or the release that wrote it"
            ) from error

    def close(self, epoch: int) -> None:
        """Note that the learner ended, so that nobody takes its silence for a fault."""
        self._connection.run(CLOSE, (self._keys.meta,), (epoch,))

    def say_alive(self, epoch: int) -> None:
        """Note in the run's `meta` when its learner was last alive, by the server's clock.

        Raises:
            Fenced: a newer learner has taken over the run.
            RunLost: the server has lost the run.
        """
        clock, newest = self._connection.execute_all([("TIME",), ("HGET", self._keys.meta, "epoch")])
        if newest is None:
            raise RunLost(
                f"{self._connection.address} has lost the run {self._keys.run!r}: it was flushed, or came back without "
                "its data; start the learner again"
            )
        if int(newest) != epoch:
            raise Fenced(f"a newer learner has taken over the run {self._keys.run!r}")
        seen = f"{server_seconds(clock):.3f}"
        self._connection.execute("HSET", self._keys.meta, "learner_seen", seen)

    def ids(self) -> list[int]:
        """Give every worker id that the run ever had, in order."""
        return sorted(int(worker) for worker in self._connection.execute("HKEYS", self._keys.incarnations))

    def workers(self) -> list[WorkerInfo]:
        """Give the members of the run, by id."""
        clock, latest, incarnations, members = self._connection.execute_all(
            [
                ("TIME",),
                ("HGET", self._keys.weights, "version"),
                ("HGETALL", self._keys.incarnations),
                ("ZRANGE", self._keys.members, 0, -1, "WITHSCORES"),
            ]
        )
        now = server_seconds(clock)
        newest = text_fields(incarnations)
        seen = {int(worker): score / 1000 for worker, score in scored_members(members).items()}
        beats = self._connection.execute_all([("HGETALL", self._keys.heartbeat(worker)) for worker in seen])
        found = []
        for (worker, last_seen), beat in zip(seen.items(), beats, strict=True):
            said = text_fields(beat)
            version, silent_seconds = _number(said, "version"), max(0.0, now - last_seen)
            found.append(
                WorkerInfo(
                    worker_id=worker,
                    incarnation=_number(newest, str(worker)),
                    state="alive" if silent_seconds < self._settings.lease_seconds else "away",
                    host=said.get("host", ""),
                    pid=_number(said, "pid"),
                    version=version,
                    staleness=max(0, int(latest or 0) - version),
                    last_seen_seconds=silent_seconds,
                    sent=_number(said, "sent"),
                    problem=said.get("problem", ""),
                )
            )
        return sorted(found, key=lambda info: info.worker_id)

    def forget_silent(self) -> Sequence[int]:
        """Strike workers that were silent for longer than `forget_seconds`; give their ids."""
        now = server_seconds(self._connection.execute("TIME"))
        limit_milliseconds = int(self._settings.forget_seconds * 1000)
        before = int(now * 1000) - limit_milliseconds
        silent = [
            int(worker)
            for worker in self._connection.execute("ZRANGEBYSCORE", self._keys.members, "-inf", before)
        ]
        gone = self._connection.run_all(
            [
                (
                    FORGET,
                    (
                        self._keys.incarnations,
                        self._keys.members,
                        self._keys.acknowledgements(worker),
                        self._keys.weights,
                    ),
                    (worker, limit_milliseconds),
                )
                for worker in silent
            ]
        )
        return [worker for worker, struck in zip(silent, gone, strict=True) if struck]


def _number(said: Mapping[str, str], name: str) -> int:
    """Give a number that a worker wrote of itself; 0 for anything else."""
    return whole_number(said.get(name, "")) or 0
