"""The ledger: for every version and every worker that was a member when it was published, one final outcome.

A worker's acknowledgement stream tells its whole story in order: it joined, it went from one version to
another, it did a command, it left or was given up. `settle` folds one such event into the worker's state, in
plain Python; a script then writes the new state and removes the event in one step, so that each event counts
once, whichever learner does it and however often it tries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from rlbroker.connection import Argument, Connection, Script, stream_entries, text_fields
from rlbroker.keys import Keys
from rlbroker.records import Missed, MissedUpdates, Outcome, State

#: Entries that the `missed` stream keeps at least; older ones live on as sums in each worker's ledger.
MISSED_KEPT = 10_000

#: What a worker may answer to a command.
_ANSWERS = ("done", "failed", "unknown", "expired")

#: Why a command has no answer, by the event that ended the worker's membership.
_ENDED = {"joined": "away", "gone": "away", "left": "left"}

SETTLE = Script(
    "settle",
    """
    -- KEYS: meta, a worker's acknowledgements, its ledger, missed, pending, then outcomes of commands
    -- ARGV: the learner's epoch, id of the event, number of writes,
    --       then for each write: place of its key in KEYS, number of arguments, command, arguments
    if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
      return redis.error_reply('FENCED a newer learner has taken over the run')
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


@dataclass(frozen=True)
class Account:
    """What the ledger knows of one worker; the fields of its `ledger:` hash.

    Attributes:
        incarnation: the life of the worker that the other fields speak of.
        member: whether versions published now concern it.
        settled: every version up to this one has its final outcome.
        applied: the version that it runs.
        missed: versions missed, by why.
        commands_missed: commands that were not done.
        skips_in_a_row: latest updates in a row that jumped over a version.
        skipping_since: when that row began, seconds since the epoch.
    """

    incarnation: int = 0
    member: bool = False
    settled: int = 0
    applied: int = 0
    applied_total: int = 0
    missed: Mapping[str, int] = field(default_factory=dict)
    commands_done: int = 0
    commands_missed: int = 0
    skips_in_a_row: int = 0
    skipping_since: float = 0.0

    def to_fields(self) -> dict[str, str]:
        """Give the fields of the hash."""
        plain = {
            "incarnation": self.incarnation,
            "member": int(self.member),
            "settled": self.settled,
            "applied": self.applied,
            "applied_total": self.applied_total,
            "commands_done": self.commands_done,
            "commands_missed": self.commands_missed,
            "skips_in_a_row": self.skips_in_a_row,
            "skipping_since": f"{self.skipping_since:.3f}",
        }
        return {name: str(value) for name, value in plain.items()} | {
            f"missed:{why}": str(count) for why, count in self.missed.items()
        }

    @classmethod
    def from_fields(cls, found: Mapping[str, str]) -> Self:
        """Read the fields of the hash; an empty one is a worker that was never seen."""
        return cls(
            incarnation=int(found.get("incarnation", 0)),
            member=found.get("member") == "1",
            settled=int(found.get("settled", 0)),
            applied=int(found.get("applied", 0)),
            applied_total=int(found.get("applied_total", 0)),
            missed={
                name.removeprefix("missed:"): int(count)
                for name, count in found.items()
                if name.startswith("missed:")
            },
            commands_done=int(found.get("commands_done", 0)),
            commands_missed=int(found.get("commands_missed", 0)),
            skips_in_a_row=int(found.get("skips_in_a_row", 0)),
            skipping_since=float(found.get("skipping_since", 0)),
        )


@dataclass(frozen=True)
class Event:
    """One entry of a worker's acknowledgement stream."""

    entry_id: str
    worker_id: int
    kind: str
    fields: Mapping[str, str]
    at: float

    @property
    def incarnation(self) -> int:
        """The life of the worker that it tells of."""
        return int(self.entry_id.partition("-")[0])

    @property
    def version(self) -> int:
        """Latest version when the worker joined or left; the version that it went to."""
        text = self.fields.get("version", "")
        return int(text) if text.isdecimal() and len(text) < 20 else 0


@dataclass(frozen=True)
class Settled:
    """What one event changes: the account, the missed updates, and the outcomes of commands."""

    account: Account
    missed: tuple[Missed, ...] = ()
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)


def settle(account: Account, event: Event, pending: Mapping[str, int], latest: int) -> Settled:
    """Fold one event into a worker's account. What makes no sense changes nothing: workers are not trusted.

    Args:
        account: the account before.
        event: what happened next.
        pending: commands that wait for this worker, with the incarnation that they were sent to.
        latest: the latest version.
    """
    if event.kind == "version" and 1 <= event.version <= latest:
        return _settle_version(account, event)
    if event.kind == "command" and event.fields.get("outcome") in _ANSWERS:
        return _settle_command(account, event, pending)
    if event.kind in _ENDED:
        return _settle_membership(account, event, pending)
    return Settled(account)


def _settle_version(account: Account, event: Event) -> Settled:
    applied = event.fields.get("outcome") == "applied"
    account, missed = _miss(account, event, event.version - 1, "superseded")
    if not applied:
        account, failed = _miss(account, event, event.version, "failed", event.fields.get("detail", ""))
        return Settled(account, missed + failed)
    skipped = bool(missed)
    fresh = event.version > account.settled
    return Settled(
        replace(
            account,
            settled=max(account.settled, event.version),
            applied=event.version,
            applied_total=account.applied_total + fresh,
            skips_in_a_row=account.skips_in_a_row + 1 if skipped else 0,
            skipping_since=(account.skipping_since or event.at) if skipped else 0.0,
        ),
        missed,
    )


def _settle_command(account: Account, event: Event, pending: Mapping[str, int]) -> Settled:
    command, name = event.fields.get("command", ""), event.fields.get("name", "")
    if command not in pending:  # it has its final state already
        return Settled(account)
    state: State = event.fields["outcome"]  # type: ignore[assignment]
    outcome = Outcome(state, event.fields.get("detail", ""))
    if outcome:
        return Settled(replace(account, commands_done=account.commands_done + 1), (), {command: outcome})
    record = _missed_command(event, f"{command} {name}".strip(), outcome.state, outcome.detail)
    account = replace(account, commands_missed=account.commands_missed + 1)
    return Settled(account, (record,), {command: outcome})


def _settle_membership(account: Account, event: Event, pending: Mapping[str, int]) -> Settled:
    why = _ENDED[event.kind]
    missed: tuple[Missed, ...] = ()
    if account.member:
        account, missed = _miss(account, event, event.version, why)
    # Commands that were sent to an earlier life of this worker; one that just left has ended this life too.
    ended = event.incarnation + (event.kind == "left")
    lost = [command for command, incarnation in pending.items() if incarnation < ended]
    missed += tuple(_missed_command(event, command, why, "") for command in lost)
    joined = event.kind == "joined"
    account = replace(
        account,
        incarnation=event.incarnation,
        member=joined,
        settled=max(account.settled, event.version) if account.member or joined else account.settled,
        applied=0 if joined else account.applied,
        commands_missed=account.commands_missed + len(lost),
        skips_in_a_row=0,
        skipping_since=0.0,
    )
    return Settled(account, missed, {command: Outcome("missed", why) for command in lost})


def _miss(
    account: Account, event: Event, last: int, why: str, detail: str = ""
) -> tuple[Account, tuple[Missed, ...]]:
    """Settle every open version up to `last` as missed."""
    first = account.settled + 1
    if last < first:
        return account, ()
    record = Missed(event.worker_id, account.incarnation, "weights", first, last, "", why, detail, event.at)
    sums = {**account.missed, why: account.missed.get(why, 0) + record.count}
    return replace(account, settled=last, missed=sums), (record,)


def _missed_command(event: Event, command: str, why: str, detail: str) -> Missed:
    return Missed(event.worker_id, event.incarnation, "command", 0, 0, command, why, detail, event.at)


class Ledger:
    """Settles what the workers acknowledged, and answers who missed what."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        """Prepare a ledger; nothing is read yet."""
        self._connection, self._keys = connection, keys

    def settle_waiting(self, workers: Sequence[int], epoch: int, *, block_seconds: float) -> int:
        """Settle the acknowledgements that are there, waiting for the first one; give how many there were.

        Raises:
            Fenced: a newer learner has taken over the run.
            PeerError: the server refused, or could not be reached.
        """
        if not workers:
            return 0
        keys = {self._keys.acknowledgements(worker): worker for worker in workers}
        command = ("XREAD", "COUNT", 256, "BLOCK", max(1, int(block_seconds * 1000)), "STREAMS")
        reply = self._connection.execute_once(*command, *keys, *("0-0" for _ in keys))
        streams = [(keys[key], entries) for key, entries in stream_entries(reply)]
        if not streams:
            return 0
        clock, latest, pending, *accounts = self._connection.execute_all(
            [
                ("TIME",),
                ("HGET", self._keys.weights, "version"),
                ("HGETALL", self._keys.pending),
                *(("HGETALL", self._keys.ledger(worker)) for worker, _ in streams),
            ]
        )
        now = int(clock[0]) + int(clock[1]) / 1e6
        waiting = _pending_by_worker(text_fields(pending))
        calls = []
        for (worker, entries), found in zip(streams, accounts, strict=True):
            account = Account.from_fields(text_fields(found))
            commands = waiting.get(worker, {})
            for entry_id, fields in entries:
                said = text_fields(fields)
                event = Event(entry_id, worker, said.get("event", ""), said, now)
                settled = settle(account, event, commands, int(latest or 0))
                calls.append(self._write(event, settled, epoch))
                account = settled.account
                commands = {name: life for name, life in commands.items() if name not in settled.outcomes}
        self._connection.run_all(calls)
        return len(calls)

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
        writes: list[list[Argument]] = [[3, "HSET", *_flat(settled.account.to_fields())]]
        writes += [
            [4, "XADD", "MAXLEN", "~", MISSED_KEPT, "*", *_flat(_missed_fields(missed))]
            for missed in settled.missed
        ]
        for place, (command, outcome) in enumerate(settled.outcomes.items(), start=6):
            writes.append([5, "HDEL", f"{command}:{event.worker_id}"])
            writes.append([place, "HSET", event.worker_id, str(outcome)])
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


def _flat(fields: Mapping[str, Any]) -> list[Any]:
    return [part for pair in fields.items() for part in pair]
