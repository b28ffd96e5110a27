"""The ledger: what the workers acknowledged is settled, and who missed what is answered.

Each worker's acknowledgement stream is folded into its account (see account.py). A script then writes the new
account and removes the event in one step, so that each event counts once, whichever learner does it and
however often it tries.

The learner remembers the accounts and what it recorded as missed. A server may come back without them: then
they are written back, and of two accounts of one worker the later one holds.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from rlbroker.backend.connection import Argument, Connection, flat
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import (
    entry_place,
    number_in,
    parsing,
    server_seconds,
    stream_entries,
    text_fields,
)
from rlbroker.backend.scripts import Script
from rlbroker.control.outcomes import (
    REFUSED,
    TEXT_KEPT,
    Event,
    Settled,
    WorkerOutcomes,
    missed_updates,
    settle,
)
from rlbroker.errors import RunLost, ServerFault
from rlbroker.membership.incarnations import incarnation_command, incarnations_from
from rlbroker.types import Missed, MissedUpdates, Outcome

logger = logging.getLogger("rlbroker")

#: Entries of one stream: id and fields.
Entries = list[tuple[str, dict[bytes, bytes] | None]]

#: How long the outcomes of a command stay readable.
OUTCOMES_KEPT_SECONDS: Final = 24 * 3600

#: Entries of one worker that one look reads, at most.
READ_COUNT: Final = 256

#: Entries that the `missed` stream keeps at least; older ones live on as sums in each worker's ledger.
MISSED_KEPT = 10_000

SETTLE = Script.load("control/lua/settle.lua")


RESTORE_OUTCOMES = Script.load("control/lua/restore_account.lua")


class Ledger:
    """Settles what the workers acknowledged, and answers who missed what."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        epoch: int = 0,
        latest_version: Callable[[], int] = lambda: 0,
        signed: bool = False,
        settled: Callable[[int, Mapping[str, Outcome]], None] = lambda worker, outcomes: None,
    ) -> None:
        """Prepare a ledger; nothing is read yet. Only one with an epoch can settle.

        Args:
            connection: way to the server.
            keys: names of the run's keys.
            epoch: of the learner.
            latest_version: gives the latest version that the learner knows; the server may have lost it.
            signed: whether only a learner with the key makes versions: then what the server names as the latest may
                be made up.
            settled: is told the final outcomes of commands, by worker.
        """
        self._connection, self._keys, self._epoch = connection, keys, epoch
        self._latest_version, self._settled, self._signed = latest_version, settled, signed
        self._lock = threading.Lock()
        self._accounts: dict[int, WorkerOutcomes] = {}
        self._missed: deque[Missed] = deque(maxlen=MISSED_KEPT)
        #: By worker and id of the event: what may have been settled, and nobody said so.
        self._unsure: dict[tuple[int, str], Settled] = {}
        self._lost_version = 0
        #: The newest version that a worker could not read or load.
        self.failed_version = 0

    def remember(self, workers: Sequence[int]) -> None:
        """Learn what earlier learners settled, as the server may lose that too.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        records, accounts = self.records(), self.accounts(workers)
        with self._lock:
            self._accounts.update(accounts)
            self._missed.extend(records)

    @property
    def missed_versions(self) -> int:
        """Versions that were missed, summed over workers, as far as this learner has settled or remembers."""
        return sum(sum(account.missed.values()) for account in list(self._accounts.values()))

    def wait(self, workers: Sequence[int], seconds: float) -> bool:
        """Wait until there is something to settle; give whether there is.

        Raises:
            PeerError: the server refused, or could not be reached.
        """
        return bool(self._unsure or self._read(workers, "BLOCK", max(1, int(seconds * 1000))))

    def settle(self, workers: Sequence[int], deadline: Deadline) -> None:
        """Settle the acknowledgements that are there, as far as the time allows.

        Raises:
            Fenced: a newer learner publishes in this run.
            RunLost: the server has lost the run, and it was not restored in time.
            PeerError: the server refused, or could not be reached in time.
        """
        while self._connection.retry(lambda: self._settle_some(workers, deadline), deadline):
            if deadline.over:
                return

    def restore(self) -> None:
        """Write back what the server may have lost. Where it lost nothing, nothing changes.

        Raises:
            Fenced: a newer learner publishes in this run.
            PeerError: the server refused, or could not be reached in time.
        """
        with self._lock:
            self._look_after_unsure()
            commands = [("XRANGE", self._keys.acknowledgements(at[0]), at[1], at[1]) for at in self._unsure]
            found = self._connection.execute_all(commands)
            # What is neither settled nor waits to be was settled and lost, or will come again and change nothing.
            self._adopt([at for at, entries in zip(self._unsure, found, strict=True) if not entries])
            there, latest = (
                self._connection.execute("HGET", self._keys.weights, "version"),
                self._latest_version(),
            )
            if (number_in(there) or 0) < latest:
                self._lost_version = latest
            calls = [
                (
                    RESTORE_OUTCOMES,
                    (self._keys.meta, self._keys.ledger(worker)),
                    (self._epoch, *account.place, *flat(account.to_fields())),
                )
                for worker, account in self._accounts.items()
            ]
            self._connection.run_all(calls)
            if not self._missed:
                return
            newest = self._connection.execute("XREVRANGE", self._keys.missed, "+", "-", "COUNT", 1)
            if newest and _missed_record(text_fields(newest[0][1])) == self._missed[-1]:
                return  # what came before it is there too
            entries = self._connection.execute("XRANGE", self._keys.missed, "-", "+")
            kept = {_missed_record(text_fields(fields)) for _, fields in entries}
            lost = [self._record(missed) for missed in self._missed if missed not in kept]
            self._connection.execute_all(lost)

    def _read(self, workers: Sequence[int], *options: Argument) -> list[tuple[int, Entries]]:
        keys = {self._keys.acknowledgements(worker): worker for worker in workers}
        if not keys:
            return []
        # From the beginning each time: what was settled is gone.
        command = ("XREAD", "COUNT", READ_COUNT, *options, "STREAMS", *keys, *("0-0" for _ in keys))
        try:
            reply = self._connection.execute_once(*command)
        except ServerFault:
            if not self._delete_what_is_no_stream(list(keys)):
                raise
            return []  # the next look reads the others
        return [(keys[key], entries) for key, entries in stream_entries(reply) if entries]

    def _delete_what_is_no_stream(self, keys: Sequence[str]) -> bool:
        """Have one worker that wrote something else to its key not keep the answers of all from being read."""
        kinds = self._connection.execute_all([("TYPE", key) for key in keys])
        wrong = [key for key, kind in zip(keys, kinds, strict=True) if kind not in (b"stream", b"none")]
        if wrong:
            logger.warning("deleted what is no stream: %s", ", ".join(wrong))
            self._connection.execute("UNLINK", *wrong)
        return bool(wrong)

    def _settle_some(self, workers: Sequence[int], deadline: Deadline) -> bool:
        """Settle what one read finds, in one try; give whether it left anything.

        Two threads must not fold the same event into one account, and who waits for the run to be restored must
        not keep `restore` waiting: so the lock is held for one try only.
        """
        if not self._lock.acquire(timeout=deadline.remaining):
            return False
        try:
            self._look_after_unsure()
            streams = self._read(workers)
            if streams:
                self._settle(streams)
            return any(len(entries) == READ_COUNT for _, entries in streams)
        finally:
            self._lock.release()

    def _settle(self, streams: Sequence[tuple[int, Entries]]) -> None:
        once = Deadline(0)
        clock, latest, pending, *accounts = self._connection.execute_all(
            [
                ("TIME",),
                ("HGET", self._keys.weights, "version"),
                ("HGETALL", self._keys.pending),
                *(("HGETALL", self._keys.ledger(worker)) for worker, _ in streams),
            ],
            deadline=once,
        )
        ids = [worker for worker, _ in streams]
        replies = self._connection.ask(
            [incarnation_command(self._keys, worker) for worker in ids], deadline=once
        )
        lives = incarnations_from(ids, replies)
        now = round(server_seconds(clock), 3)  # as it is written, so that a record can be recognised
        newest_version = self._latest_version()
        if not self._signed:
            newest_version = max(number_in(latest) or 0, newest_version)
        with parsing(self._keys.pending):
            waiting = _pending_by_worker(text_fields(pending))
        self._find_waiting(streams, waiting)
        calls, results = [], dict[tuple[int, str], Settled]()
        for (worker, entries), found in zip(streams, accounts, strict=True):
            with parsing(self._keys.ledger(worker)):
                there = WorkerOutcomes.from_fields(text_fields(found))
            account = max(there, self._accounts.get(worker, there), key=lambda one: one.place)
            commands = waiting.get(worker, {})
            for entry_id, fields in entries:
                said = text_fields(fields)
                event = Event(entry_id, worker, said.get("event", ""), said, now)
                newest = lives[worker].incarnation if worker in lives else 0
                if event.incarnation > min(newest, 2000 * now):  # and not what no clock can have given
                    settled = Settled(account)  # forged: it settles nothing, and is removed
                else:
                    settled = settle(account, event, commands, newest_version, self._lost_version)
                if event.kind == "version" and said.get("outcome") in ("failed", REFUSED):
                    self.failed_version = max(self.failed_version, min(event.version, newest_version))
                calls.append(self._write(event, settled))
                results[worker, entry_id] = settled
                account = settled.account
                commands = {name: life for name, life in commands.items() if name not in settled.outcomes}
        try:
            self._connection.run_all(calls, deadline=once)
        except RunLost:  # nothing was settled
            raise
        except BaseException:
            self._unsure |= results
            raise
        self._unsure |= results
        self._adopt(list(results))

    def _find_waiting(
        self, streams: Sequence[tuple[int, Entries]], waiting: dict[int, dict[str, int]]
    ) -> None:
        """Add answered commands whose outcomes say that they wait, though `pending` was lost."""
        answered = []
        for worker, entries in streams:
            for entry_id, fields in entries:
                said = text_fields(fields)
                command = said.get("command", "")[:TEXT_KEPT]
                if said.get("event") == "command" and command not in waiting.get(worker, {}):
                    answered.append((worker, command, entry_place(entry_id)[0]))
        states = self._connection.execute_all(
            [("HGET", self._keys.outcomes(command), worker) for worker, command, _ in answered],
            deadline=Deadline(0),
        )
        for (worker, command, life), state in zip(answered, states, strict=True):
            if state == b"waiting":
                waiting.setdefault(worker, {})[command] = life

    def _look_after_unsure(self) -> None:
        """Remember what was settled without an answer, before the server may lose it."""
        if self._unsure:
            there = self.accounts({worker for worker, _ in self._unsure}, Deadline(0))
            self._adopt([at for at in self._unsure if entry_place(at[1]) <= there[at[0]].place])

    def _adopt(self, events: Iterable[tuple[int, str]]) -> None:
        """Remember what these events, each a worker and an id, have settled."""
        for worker, entry_id in events:
            settled = self._unsure.pop((worker, entry_id))
            self._accounts[worker] = settled.account
            self._missed.extend(settled.missed)
            self._settled(worker, settled.outcomes)

    def missed_updates(
        self,
        workers: Iterable[int],
        *,
        latest_version: int,
        published: Mapping[int, float],
    ) -> dict[int, MissedUpdates]:
        """Give what each worker missed.

        Args:
            workers: which workers.
            latest_version: the version that those who are up to date run.
            published: when recent versions were published, seconds since the epoch.
        """
        records: dict[int, list[Missed]] = {}
        for record in self.records():
            records.setdefault(record.worker_id, []).append(record)
        return {
            worker: missed_updates(
                worker,
                account,
                latest_version=latest_version,
                published=published,
                records=records.get(worker, ()),
            )
            for worker, account in self.accounts(workers).items()
        }

    def records(self, *, since: float = 0.0) -> list[Missed]:
        """Give the record of missed updates, oldest first.

        Args:
            since: only what was recorded from then on, seconds since the epoch, by the server's clock.
        """
        first = str(max(0, int(since * 1000)))
        entries = self._connection.execute("XRANGE", self._keys.missed, first, "+")
        return [_missed_record(text_fields(fields)) for _, fields in entries]

    def accounts(self, workers: Iterable[int], deadline: Deadline | None = None) -> dict[int, WorkerOutcomes]:
        """Give the account of each worker."""
        wanted = list(workers)
        found = self._connection.execute_all(
            [("HGETALL", self._keys.ledger(worker)) for worker in wanted], deadline=deadline
        )
        with parsing(f"{self._keys.prefix}:ledger:…"):
            return {
                worker: WorkerOutcomes.from_fields(text_fields(fields))
                for worker, fields in zip(wanted, found, strict=True)
            }

    def _write(self, event: Event, settled: Settled) -> tuple[Script, list[str], list[Argument]]:
        keys = [
            self._keys.meta,
            self._keys.acknowledgements(event.worker_id),
            self._keys.ledger(event.worker_id),
            self._keys.missed,
            self._keys.pending,
            *(self._keys.outcomes(command) for command in settled.outcomes),
        ]
        writes: list[list[Argument]] = [[3, "HSET", *flat(settled.account.to_fields())]]
        for missed in settled.missed:
            command, _, *fields = self._record(missed)
            writes.append([4, command, *fields])
        for place, (command, outcome) in enumerate(settled.outcomes.items(), start=6):
            writes.append([5, "HDEL", f"{command}:{event.worker_id}"])
            writes.append([place, "HSET", event.worker_id, str(outcome)])
            writes.append([place, "EXPIRE", OUTCOMES_KEPT_SECONDS])
        arguments: list[Argument] = [self._epoch, event.entry_id, len(writes)]
        for place_of_key, command_name, *rest in writes:
            arguments += [place_of_key, len(rest), command_name, *rest]
        return SETTLE, keys, arguments

    def _record(self, missed: Missed) -> list[Argument]:
        fields = flat(_missed_fields(missed))
        return ["XADD", self._keys.missed, "MAXLEN", "~", MISSED_KEPT, "*", *fields]


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
        at=round(float(found["at"]), 3),
    )
