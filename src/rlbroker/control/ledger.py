"""The ledger: it gives every version and command its final outcome at every worker.

The learner reads the workers' acknowledgement streams and folds each event into the worker's outcomes (outcomes.py).
The script `settle.lua` then writes the new outcomes and removes the event in one step. So each event counts once,
whichever learner settles it and however often it retries.

The learner also remembers the outcomes and the records of missed updates, and writes them back to a server that lost
them. If its outcomes of a worker and the server's differ, those with the later event are valid.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from rlbroker.backend.connection import Argument, Connection, flat
from rlbroker.backend.deadline import ONE_TRY, Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.locks import CallLock
from rlbroker.backend.replies import (
    default_if_wrong_type,
    entry_place,
    number_in,
    parsing,
    server_seconds,
    stored_integer,
    stream_entries,
    text_fields,
)
from rlbroker.backend.scripts import Script
from rlbroker.control.ledger_reader import read_missed_records, read_outcomes
from rlbroker.control.outcomes import (
    REFUSED,
    TEXT_LENGTH,
    Event,
    Settled,
    WorkerOutcomes,
    missed_to_fields,
    settle,
    summarize_missed,
)
from rlbroker.control.settlements import WAITING, Settlements
from rlbroker.control.version_outcomes import LEFT, SUPERSEDED, VersionOutcomes
from rlbroker.errors import WrongKeyType
from rlbroker.membership.incarnations import believed_claim, incarnation_command, parse_incarnations
from rlbroker.types import Missed, MissedUpdates, Outcome

logger = logging.getLogger("rlbroker")

#: Entries of one acknowledgement stream: ids and fields.
Entries = list[tuple[str, dict[bytes, bytes] | None]]

#: By worker: ids of the commands without a final outcome, each with the incarnation that it was sent to.
Pending = dict[int, dict[str, int]]

#: How long the outcomes of a command stay readable.
OUTCOMES_KEPT_SECONDS: Final = 24 * 3600

#: The most entries of one worker that one read returns.
READ_COUNT: Final = 256

#: The fewest entries that the `missed` stream keeps. Older ones remain as sums in each worker's outcomes.
MISSED_KEPT = 10_000

SETTLE = Script.load("control/lua/settle.lua")

RESTORE_OUTCOMES = Script.load("control/lua/restore_outcomes.lua")


class Ledger:
    """Settles what the workers acknowledged, and reports what they missed."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        epoch: int,
        last_version: Callable[[], int],
        signed: bool,
        note_outcomes: Callable[[int, Mapping[str, Outcome]], None],
        settlements: Settlements,
    ) -> None:
        """Prepare a ledger; nothing is read yet.

        Args:
            last_version: returns the highest version that a worker may run; the server may have lost it.
            signed: whether versions are signed. Then the latest version on the server is not trusted: it may be forged.
            note_outcomes: called with a worker and the final outcomes of commands at this worker.
            settlements: notified of every settlement.
        """
        self._connection, self._keys, self._epoch = connection, keys, epoch
        self._last_version, self._note_outcomes, self._signed = last_version, note_outcomes, signed
        self._settlements = settlements
        self._lock = CallLock()
        self._outcomes: dict[int, WorkerOutcomes] = {}
        self._missed: deque[Missed] = deque(maxlen=MISSED_KEPT)
        #: By worker and event: settlements that were sent and whose reply was lost, so they may have been applied.
        self._unconfirmed: dict[tuple[int, str], Settled] = {}
        self._lost_version = 0  #: the latest version when the server last lost the run
        #: What became of versions at the workers since this learner opened the run.
        self.versions = VersionOutcomes()
        #: The newest version that a worker could not read or load.
        self.failed_version = 0

    def remember(self, workers: Sequence[int]) -> None:
        """Remember what earlier learners settled, because the server may lose that too."""
        records = read_missed_records(self._connection, self._keys)
        outcomes = self.read_outcomes(workers)
        self._lock.run(self._add_remembered, outcomes, records)

    def _add_remembered(self, outcomes: Mapping[int, WorkerOutcomes], records: Iterable[Missed]) -> None:
        self._outcomes.update(outcomes)
        self._missed.extend(records)

    @property
    def missed_versions(self) -> int:
        """Versions that were missed, summed over all workers that this learner knows."""
        return sum(sum(outcomes.missed.values()) for outcomes in list(self._outcomes.values()))

    def wait(self, workers: Sequence[int], seconds: float) -> bool:
        """Wait for acknowledgements, and return whether there are any to settle."""
        if self._unconfirmed or not workers:
            return bool(self._unconfirmed)
        command = self._read_command(workers, "BLOCK", max(1, int(seconds * 1000)))
        try:
            return bool(self._connection.execute(*command, deadline=ONE_TRY))
        except WrongKeyType:
            return True  # `settle` deletes this key, and reads the others

    def settle(self, workers: Sequence[int], deadline: Deadline) -> None:
        """Settle the acknowledgements that have arrived, or as many as the deadline allows.

        Raises:
            Fenced: a newer learner publishes in this run.
            RunLost: the server has lost the run, and it was not restored in time.
        """
        while self._connection.retry(lambda: self._settle_some(workers, deadline), deadline):
            if deadline.over:
                return

    def restore(self) -> None:
        """Write back what the server may have lost. Changes nothing if it lost nothing.

        Raises:
            Fenced: a newer learner publishes in this run.
        """
        self._lock.run(self._restore)

    def _restore(self) -> None:
        self._confirm_applied()
        commands = [
            ("XRANGE", self._keys.acknowledgements(worker), entry_id, entry_id)
            for worker, entry_id in self._unconfirmed
        ]
        found = self._connection.execute_all(commands, strict=False)
        # An event that is not in the stream any more was settled, and the server lost its effects. If it was not
        # settled after all, it will be sent again and ignored.
        self._confirm_up_to(
            {
                worker: entry_place(entry_id)
                for (worker, entry_id), entries in zip(self._unconfirmed, found, strict=True)
                if not default_if_wrong_type(entries, ())
            }
        )
        stored = self._connection.execute("HGET", self._keys.weights, "version")
        latest = self._last_version()
        if (number_in(stored) or 0) < latest:
            self._lost_version = latest
        calls = [
            RESTORE_OUTCOMES.call(
                (self._keys.meta, self._keys.ledger(worker)),
                (self._epoch, *outcomes.position, *flat(outcomes.to_fields())),
            )
            for worker, outcomes in self._outcomes.items()
        ]
        self._connection.execute_all(calls)
        self._restore_missed()

    def read_outcomes(self, workers: Iterable[int]) -> dict[int, WorkerOutcomes]:
        """Return the outcomes of each worker, as the server has them."""
        return read_outcomes(self._connection, self._keys, workers)

    def version_outcome(self, worker: int, version: int, incarnation: int) -> Outcome:
        """Return what became of a version at a worker that was a member in this incarnation."""
        found = self.versions.find(worker, version)
        if found is not None:
            return found
        # Otherwise the worker joined later, or has not acknowledged anything since.
        outcomes = self._outcomes.get(worker, WorkerOutcomes())
        if outcomes.applied > version:
            return SUPERSEDED
        return LEFT if outcomes.incarnation >= incarnation and not outcomes.member else WAITING

    def missed_updates(
        self,
        workers: Iterable[int],
        *,
        latest_version: int,
        published: Mapping[int, float],
    ) -> dict[int, MissedUpdates]:
        """Return what each worker missed.

        Args:
            published: when recent versions were published, seconds since the epoch.
        """
        records: dict[int, list[Missed]] = {}
        for record in read_missed_records(self._connection, self._keys):
            records.setdefault(record.worker_id, []).append(record)
        return {
            worker: summarize_missed(
                worker,
                outcomes,
                latest_version=latest_version,
                published=published,
                records=records.get(worker, ()),
            )
            for worker, outcomes in self.read_outcomes(workers).items()
        }

    # Settling

    def _read_command(self, workers: Sequence[int], *options: Argument) -> tuple[Argument, ...]:
        """Return the command that reads acknowledgements; always from the start, because settled ones are removed."""
        streams = [self._keys.acknowledgements(worker) for worker in workers]
        return ("XREAD", "COUNT", READ_COUNT, *options, "STREAMS", *streams, *("0-0" for _ in streams))

    def _read(self, workers: Sequence[int]) -> list[tuple[int, Entries]]:
        """Return the acknowledgements of each worker that has any."""
        if not workers:
            return []
        try:
            replies = [self._connection.execute(*self._read_command(workers), deadline=ONE_TRY)]
        except WrongKeyType:
            replies = self._read_one_by_one(workers)
        worker_of = {self._keys.acknowledgements(worker): worker for worker in workers}
        streams = [stream for reply in replies for stream in stream_entries(reply)]
        return [(worker_of[key], entries) for key, entries in streams if entries]

    def _read_one_by_one(self, workers: Sequence[int]) -> list[Any]:
        """Return the reply for each worker, and delete keys of another type: a worker made them so."""
        commands = [self._read_command([worker]) for worker in workers]
        replies = self._connection.execute_all(commands, strict=False, deadline=ONE_TRY)
        for worker, reply in zip(workers, replies, strict=True):
            if isinstance(reply, WrongKeyType):
                key = self._keys.acknowledgements(worker)
                logger.warning("worker %d made %s a key that is no stream; it is deleted", worker, key)
                self._connection.execute("UNLINK", key, deadline=ONE_TRY)
        return [default_if_wrong_type(reply, ()) for reply in replies]

    def _settle_some(self, workers: Sequence[int], deadline: Deadline) -> bool:
        """Settle what one read returns, in one try, and return whether there may be more.

        The lock prevents two threads from folding the same event into one worker's outcomes. It is held for one try
        only: a thread that waits for the run to be restored must not block `restore`.
        """
        return self._lock.run_within(deadline.remaining, self._settle_next, workers) or False

    def _settle_next(self, workers: Sequence[int]) -> bool:
        self._confirm_applied()
        return self._settle(self._read(workers))

    def _settle(self, streams: Sequence[tuple[int, Entries]]) -> bool:
        """Settle the events of one read, in one try, and return whether there may be more."""
        if not streams:
            return False
        workers = [worker for worker, _ in streams]
        clock, stored_version, pending_fields, *ledgers = self._connection.execute_all(
            [
                ("TIME",),
                ("HGET", self._keys.weights, "version"),
                ("HGETALL", self._keys.pending),
                *(("HGETALL", self._keys.ledger(worker)) for worker in workers),
            ],
            deadline=ONE_TRY,
        )
        replies = self._connection.execute_all(
            [incarnation_command(self._keys, worker) for worker in workers], deadline=ONE_TRY, strict=False
        )
        incarnations = parse_incarnations(workers, replies)
        now = round(server_seconds(clock), 3)  # as it is written, so that `restore` recognises the record
        latest = self._last_version()
        if not self._signed:
            latest = max(number_in(stored_version) or 0, latest)
        with parsing(self._keys.pending):
            pending = _pending_by_worker(text_fields(pending_fields))
        self._find_pending(streams, pending)
        calls, results = list[tuple[Argument, ...]](), dict[tuple[int, str], Settled]()
        more = False
        for (worker, entries), ledger in zip(streams, ledgers, strict=True):
            if worker not in incarnations:
                continue  # it was lost after the stream was read, and is restored soon
            more |= len(entries) == READ_COUNT
            with parsing(self._keys.ledger(worker)):
                stored = WorkerOutcomes.from_fields(text_fields(ledger))
            outcomes = max(stored, self._outcomes.get(worker, stored), key=lambda one: one.position)
            # An incarnation beyond the worker's newest is forged. So is one far beyond the clock: then the worker has
            # forged its newest incarnation too.
            limit = min(incarnations[worker].number, 2000 * now)
            # A new learner may not know yet which versions were used before the server lost them.
            known = max(latest, believed_claim(incarnations[worker].claimed_version, latest))
            events = [_parse_event(worker, entry_id, fields, now) for entry_id, fields in entries]
            for event, settled in self._fold(outcomes, events, pending.get(worker, {}), known, limit):
                calls.append(self._settle_call(event, settled))
                results[worker, event.entry_id] = settled
        self._write(calls, results)
        return more

    def _write(
        self,
        calls: Sequence[tuple[Argument, ...]],
        results: Mapping[tuple[int, str], Settled],
    ) -> None:
        """Run the calls of `settle.lua`, and remember their results; after an error they may have been applied."""
        self._unconfirmed |= results
        self._connection.execute_all(calls, deadline=ONE_TRY)
        self._confirm_up_to({worker: entry_place(entry_id) for worker, entry_id in results})

    def _fold(
        self,
        outcomes: WorkerOutcomes,
        events: Sequence[Event],
        pending: Mapping[str, int],
        latest: int,
        newest_incarnation: float,
    ) -> Iterator[tuple[Event, Settled]]:
        """Fold the events of one worker into its outcomes, one after the other, and yield what each one changes.

        Events of forged incarnations, which are beyond the newest one, change nothing.
        """
        for event in events:
            if event.incarnation > newest_incarnation:
                settled = Settled(outcomes)
            else:
                settled = settle(outcomes, event, pending, latest, self._lost_version)
            if event.kind == "version" and event.fields.get("outcome") in ("failed", REFUSED):
                self.failed_version = max(self.failed_version, min(event.version, latest))
            yield event, settled
            outcomes = settled.worker_outcomes
            pending = {
                command: incarnation
                for command, incarnation in pending.items()
                if command not in settled.command_outcomes
            }

    def _find_pending(self, streams: Sequence[tuple[int, Entries]], pending: Pending) -> None:
        """Add acknowledged commands that `pending` lacks although their outcome is `waiting`: the server lost it."""
        acknowledged = []
        for worker, entries in streams:
            for entry_id, fields in entries:
                texts = text_fields(fields)
                command = texts.get("command", "")[:TEXT_LENGTH]
                if texts.get("event") == "command" and command not in pending.get(worker, {}):
                    acknowledged.append((worker, command, entry_place(entry_id)[0]))
        states = self._connection.execute_all(
            [("HGET", self._keys.outcomes(command), worker) for worker, command, _ in acknowledged],
            deadline=ONE_TRY,
        )
        for (worker, command, incarnation), state in zip(acknowledged, states, strict=True):
            if state == b"waiting":
                pending.setdefault(worker, {})[command] = incarnation

    def _settle_call(self, event: Event, settled: Settled) -> tuple[Argument, ...]:
        """Return the call of `settle.lua` that removes an event and writes its effects."""
        keys = [
            self._keys.meta,
            self._keys.acknowledgements(event.worker_id),
            self._keys.ledger(event.worker_id),
            self._keys.missed,
            self._keys.pending,
            *(self._keys.outcomes(command) for command in settled.command_outcomes),
        ]
        records = [flat(missed_to_fields(missed)) for missed in settled.missed]
        arguments: list[Argument] = [
            *(self._epoch, event.entry_id, event.worker_id, OUTCOMES_KEPT_SECONDS, MISSED_KEPT),
            *(len(records), len(records[0]) if records else 0, *itertools.chain(*records)),
        ]
        for command, outcome in settled.command_outcomes.items():
            arguments += [command, str(outcome)]
        return SETTLE.call(keys, arguments + flat(settled.worker_outcomes.to_fields()))

    def _xadd_missed(self, missed: Missed) -> list[Argument]:
        """Return the command that records a missed update."""
        fields = flat(missed_to_fields(missed))
        return ["XADD", self._keys.missed, "MAXLEN", "~", MISSED_KEPT, "*", *fields]

    # Remembering

    def _confirm_applied(self) -> None:
        """Confirm the settlements that the server has applied although their reply was lost."""
        if self._unconfirmed:
            workers = {worker for worker, _ in self._unconfirmed}
            stored = read_outcomes(self._connection, self._keys, workers, deadline=ONE_TRY)
            self._confirm_up_to({worker: outcomes.position for worker, outcomes in stored.items()})

    def _confirm_up_to(self, places: Mapping[int, tuple[int, int]]) -> None:
        """Remember the settlements of each worker up to this place of its stream. An interrupted call is repeated."""
        for (worker, entry_id), settled in list(self._unconfirmed.items()):
            if entry_place(entry_id) > places.get(worker, (0, 0)):
                continue
            outcomes = settled.worker_outcomes
            if outcomes.position > self._outcomes.get(worker, WorkerOutcomes()).position:
                self._missed.extend(settled.missed)
                self.versions.note(worker, settled)
                self._outcomes[worker] = outcomes
            self._note_outcomes(worker, settled.command_outcomes)
            del self._unconfirmed[worker, entry_id]
            self._settlements.notify()

    def _restore_missed(self) -> None:
        """Write back the records of missed updates that the server lost."""
        if not self._missed:
            return
        newest = read_missed_records(self._connection, self._keys, count=1)
        if newest == [self._missed[-1]]:
            return  # then all older records are there too
        kept = set(read_missed_records(self._connection, self._keys))
        lost = [self._xadd_missed(missed) for missed in dict.fromkeys(self._missed) if missed not in kept]
        self._connection.execute_all(lost)


def _parse_event(worker: int, entry_id: str, fields: dict[bytes, bytes] | None, now: float) -> Event:
    """Parse an entry of an acknowledgement stream."""
    texts = text_fields(fields)
    return Event(entry_id, worker, texts.get("event", ""), texts, now)


def _pending_by_worker(fields: Mapping[str, str]) -> Pending:
    """Parse the hash `pending`."""
    pending: Pending = {}
    for name, value in fields.items():
        command, _, worker = name.rpartition(":")
        pending.setdefault(stored_integer(worker), {})[command] = stored_integer(value.split()[0])
    return pending
