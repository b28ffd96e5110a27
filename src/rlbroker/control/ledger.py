"""The ledger: what the workers acknowledged is settled, and who missed what is answered.

Each worker's acknowledgement stream is folded into its account (see account.py). A script then writes the new
account and removes the event in one step, so that each event counts once, whichever learner does it and
however often it tries.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from rlbroker.connection import Argument, Connection, Script, flat
from rlbroker.control.account import Account, Event, Settled, settle
from rlbroker.deadline import Deadline
from rlbroker.keys import Keys
from rlbroker.records import Missed, MissedUpdates
from rlbroker.replies import server_seconds, stream_entries, text_fields

#: Entries of one stream: id and fields.
Entries = list[tuple[str, dict[bytes, bytes] | None]]

#: How long the outcomes of a command stay readable.
OUTCOMES_KEPT_SECONDS: Final = 24 * 3600

#: Entries that the `missed` stream keeps at least; older ones live on as sums in each worker's ledger.
MISSED_KEPT = 10_000

SETTLE = Script(
    "settle",
    """
    -- KEYS: meta, a worker's acknowledgements, its ledger, missed, pending, then outcomes of commands
    -- ARGV: the learner's epoch, id of the event, number of writes,
    --       then for each write: place of its key in KEYS, number of arguments, command, arguments
    if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
      return redis.error_reply('FENCED a newer learner has taken over the run, or the server has lost it')
    end
    if redis.call('XDEL', KEYS[2], ARGV[2]) == 0 then
      return 0  -- settled before
    end
    local at = 4
    for _ = 1, tonumber(ARGV[3]) do
      local count = tonumber(ARGV[at + 1])
      redis.call(ARGV[at + 2], KEYS[tonumber(ARGV[at])], unpack(ARGV, at + 3, at + 2 + count))
      at = at + 3 + count
    end
    return 1
    """,
)


class Ledger:
    """Settles what the workers acknowledged, and answers who missed what."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        """Prepare a ledger; nothing is read yet."""
        self._connection, self._keys = connection, keys
        self._lock = threading.Lock()

    def wait(self, workers: Sequence[int], seconds: float) -> bool:
        """Wait until there is something to settle; give whether there is.

        Raises:
            PeerError: the server refused, or could not be reached.
        """
        return bool(self._read(workers, "BLOCK", max(1, int(seconds * 1000))))

    def settle(self, workers: Sequence[int], epoch: int, deadline: Deadline) -> None:
        """Settle the acknowledgements that are there, as far as the time allows.

        Raises:
            Fenced: a newer learner has taken over the run.
            PeerError: the server refused, or could not be reached in time.
        """
        # Two threads must not fold the same event into one account.
        if not self._lock.acquire(timeout=deadline.remaining):
            return
        try:
            while streams := self._read(workers):
                self._settle(streams, epoch)
                if deadline.over:
                    return
        finally:
            self._lock.release()

    def _read(self, workers: Sequence[int], *options: Argument) -> list[tuple[int, Entries]]:
        keys = {self._keys.acknowledgements(worker): worker for worker in workers}
        if not keys:
            return []
        # From the beginning each time: what was settled is gone.
        command = ("XREAD", "COUNT", 256, *options, "STREAMS", *keys, *("0-0" for _ in keys))
        read = self._connection.execute_once if options else self._connection.execute
        reply = read(*command)
        return [(keys[key], entries) for key, entries in stream_entries(reply) if entries]

    def _settle(self, streams: Sequence[tuple[int, Entries]], epoch: int) -> None:
        clock, latest, pending, lives, *accounts = self._connection.execute_all(
            [
                ("TIME",),
                ("HGET", self._keys.weights, "version"),
                ("HGETALL", self._keys.pending),
                ("HGETALL", self._keys.incarnations),
                *(("HGETALL", self._keys.ledger(worker)) for worker, _ in streams),
            ]
        )
        now = server_seconds(clock)
        waiting, newest = _pending_by_worker(text_fields(pending)), text_fields(lives)
        calls = []
        for (worker, entries), found in zip(streams, accounts, strict=True):
            account = Account.from_fields(text_fields(found))
            commands = waiting.get(worker, {})
            for entry_id, fields in entries:
                said = text_fields(fields)
                event = Event(entry_id, worker, said.get("event", ""), said, now)
                if event.incarnation > int(newest.get(str(worker), 0)):
                    event = replace(event, kind="forged")  # settles nothing, and is removed
                settled = settle(account, event, commands, int(latest or 0))
                calls.append(self._write(event, settled, epoch))
                account = settled.account
                commands = {name: life for name, life in commands.items() if name not in settled.outcomes}
        self._connection.run_all(calls)

    def missed_updates(
        self, workers: Iterable[int], *, latest_version: int, published: Mapping[int, float]
    ) -> dict[int, MissedUpdates]:
        """Give what each worker missed.

        Args:
            workers: which workers.
            latest_version: the version that those who are up to date run.
            published: when recent versions were published, seconds since the epoch.
        """
        wanted = list(workers)
        entries, *accounts = self._connection.execute_all(
            [
                ("XREVRANGE", self._keys.missed, "+", "-", "COUNT", MISSED_KEPT),
                *(("HGETALL", self._keys.ledger(worker)) for worker in wanted),
            ]
        )
        records: dict[int, list[Missed]] = {}
        for _, fields in reversed(entries):
            record = _missed_record(text_fields(fields))
            records.setdefault(record.worker_id, []).append(record)
        found = {}
        for worker, fields in zip(wanted, accounts, strict=True):
            account = Account.from_fields(text_fields(fields))
            behind = max(0, latest_version - account.settled) if account.member else 0
            found[worker] = MissedUpdates(
                worker_id=worker,
                total=sum(account.missed.values()),
                by_reason=dict(account.missed),
                commands=account.commands_missed,
                behind=behind,
                behind_since=published.get(account.settled + 1) if behind else None,
                skips_in_a_row=account.skips_in_a_row,
                skipping_since=account.skipping_since or None,
                records=tuple(records.get(worker, ())),
            )
        return found

    def accounts(self, workers: Iterable[int]) -> dict[int, Account]:
        """Give the account of each worker."""
        wanted = list(workers)
        found = self._connection.execute_all([("HGETALL", self._keys.ledger(worker)) for worker in wanted])
        return {
            worker: Account.from_fields(text_fields(fields))
            for worker, fields in zip(wanted, found, strict=True)
        }

    def _write(self, event: Event, settled: Settled, epoch: int) -> tuple[Script, list[str], list[Argument]]:
        keys = [
            self._keys.meta,
            self._keys.acknowledgements(event.worker_id),
            self._keys.ledger(event.worker_id),
            self._keys.missed,
            self._keys.pending,
            *(self._keys.outcomes(command) for command in settled.outcomes),
        ]
        writes: list[list[Argument]] = [[3, "HSET", *flat(settled.account.to_fields())]]
        writes += [
            [4, "XADD", "MAXLEN", "~", MISSED_KEPT, "*", *flat(_missed_fields(missed))]
            for missed in settled.missed
        ]
        for place, (command, outcome) in enumerate(settled.outcomes.items(), start=6):
            writes.append([5, "HDEL", f"{command}:{event.worker_id}"])
            writes.append([place, "HSET", event.worker_id, str(outcome)])
            writes.append([place, "EXPIRE", OUTCOMES_KEPT_SECONDS])
        arguments: list[Argument] = [epoch, event.entry_id, len(writes)]
        for place_of_key, command_name, *rest in writes:
            arguments += [place_of_key, len(rest), command_name, *rest]
        return SETTLE, keys, arguments


def _pending_by_worker(found: Mapping[str, str]) -> dict[int, dict[str, int]]:
    waiting: dict[int, dict[str, int]] = {}
    for name, value in found.items():
        command, _, worker = name.rpartition(":")
        waiting.setdefault(int(worker), {})[command] = int(value.split()[0])
    return waiting


def _missed_fields(missed: Missed) -> dict[str, Any]:
    return {
        "worker": missed.worker_id,
        "incarnation": missed.incarnation,
        "what": missed.what,
        "from": missed.first,
        "to": missed.last,
        "command": missed.command,
        "why": missed.why,
        "detail": missed.detail,
        "at": f"{missed.at:.3f}",
    }


def _missed_record(found: Mapping[str, str]) -> Missed:
    return Missed(
        worker_id=int(found["worker"]),
        incarnation=int(found["incarnation"]),
        what="command" if found["what"] == "command" else "weights",
        first=int(found["from"]),
        last=int(found["to"]),
        command=found["command"],
        why=found["why"],
        detail=found["detail"],
        at=float(found["at"]),
    )
