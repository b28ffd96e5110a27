"""One worker's account: for every version published while it was a member, one final outcome.

A worker's acknowledgement stream tells its whole story in order: it joined, it went from one version to
another, it did a command, it left or was given up. `settle` folds one such event into the account. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self, cast

from rlbroker.backend.replies import entry_place, whole_number
from rlbroker.types import Missed, MissedUpdates, Outcome, State

#: Characters of what a worker says that are kept.
TEXT_KEPT = 500

#: What a worker may answer to a command.
ANSWERS = ("done", "failed", "unknown", "expired")

#: What it says of weights and commands that lack its key's signature.
REFUSED = "refused"

#: What a worker refuses that no learner has sent is recorded so often in one life: anybody may make up more.
REFUSED_KEPT = 100

#: Why a command has no answer, by the event that ended the worker's membership.
_ENDED = {"joined": "away", "gone": "away", "left": "left"}


@dataclass(frozen=True)
class WorkerOutcomes:
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
        refused: what it refused in this life that no learner had sent: forged versions and commands.
        event: id of the last event that was folded in; whatever is not later was folded before.
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
    refused: int = 0
    event: str = "0-0"

    @property
    def place(self) -> tuple[int, int]:
        """How far the worker's story is told: of two accounts of a worker the later one holds."""
        return entry_place(self.event)

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
            "event": self.event,
        } | ({"refused": self.refused} if self.refused else {})
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
            refused=int(found.get("refused", 0)),
            event=found.get("event", "0-0"),
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

    def text(self, name: str) -> str:
        """Give a field, cut to what is worth keeping."""
        return self.fields.get(name, "")[:TEXT_KEPT]

    @property
    def version(self) -> int:
        """Latest version when the worker joined or left; the version that it went to."""
        return whole_number(self.fields.get("version", "")) or 0


@dataclass(frozen=True)
class Settled:
    """What one event changes: the account, the missed updates, and the outcomes of commands."""

    account: WorkerOutcomes
    missed: tuple[Missed, ...] = ()
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)


def missed_updates(
    worker_id: int,
    account: WorkerOutcomes,
    *,
    latest_version: int,
    published: Mapping[int, float],
    records: Sequence[Missed] = (),
) -> MissedUpdates:
    """Give what a worker missed.

    Args:
        worker_id: which worker.
        account: what the ledger knows of it.
        latest_version: the version that those who are up to date run.
        published: when recent versions were published, seconds since the epoch.
        records: the entries of the `missed` stream that are about it.
    """
    behind = max(0, latest_version - account.settled) if account.member else 0
    return MissedUpdates(
        worker_id=worker_id,
        total=sum(account.missed.values()),
        by_reason=dict(account.missed),
        commands=account.commands_missed,
        behind=behind,
        behind_since=published.get(account.settled + 1) if behind else None,
        skips_in_a_row=account.skips_in_a_row,
        skipping_since=account.skipping_since or None,
        records=tuple(records),
        refused=account.refused,
    )


def settle(
    account: WorkerOutcomes, event: Event, pending: Mapping[str, int], latest: int, lost: int = 0
) -> Settled:
    """Fold one event into a worker's account. What makes no sense changes nothing: workers are not trusted.

    Nor does what was folded before: a worker repeats what it thinks that the server has lost, and a server that
    went back in time tells old events again.

    Args:
        account: the account before.
        event: what happened next.
        pending: commands that wait for this worker, with the incarnation that they were sent to.
        latest: the latest version.
        lost: the latest version when the server last lost it. Who joined or left before it was published again
            was told a lower one.
    """
    if entry_place(event.entry_id) <= account.place:
        return Settled(account)
    account = replace(account, event=event.entry_id)
    refused = event.fields.get("outcome") == REFUSED
    if event.kind == "version" and (account.settled if refused else 0) < event.version <= latest:
        return _settle_version(account, event)
    if refused:
        return _settle_refused(account, event, pending)
    if event.kind == "command" and event.fields.get("outcome") in ANSWERS:
        return _settle_command(account, event, pending)
    if event.kind in _ENDED:
        return _settle_membership(account, event, pending, max(lost, min(event.version, latest)))
    return Settled(account)


def _settle_version(account: WorkerOutcomes, event: Event) -> Settled:
    applied = event.fields.get("outcome") == "applied"
    account, missed = _miss(account, event, event.version - 1, "superseded")
    if not applied:
        account, failed = _miss(account, event, event.version, "failed", event.text("detail"))
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


def _settle_command(account: WorkerOutcomes, event: Event, pending: Mapping[str, int]) -> Settled:
    command, name = event.text("command"), event.text("name")
    if command not in pending:  # it has its final state already
        return Settled(account)
    state = cast(State, event.fields["outcome"])  # one of ANSWERS
    outcome = Outcome(state, event.text("detail"))
    if outcome:
        return Settled(replace(account, commands_done=account.commands_done + 1), (), {command: outcome})
    record = _missed_command(event, f"{command} {name}".strip(), outcome.state, outcome.detail)
    account = replace(account, commands_missed=account.commands_missed + 1)
    return Settled(account, (record,), {command: outcome})


def _settle_refused(account: WorkerOutcomes, event: Event, pending: Mapping[str, int]) -> Settled:
    """Record what a worker refused. Of versions, one that no learner made, or that was settled when it joined."""
    command, detail = event.text("command"), event.text("detail")
    name = f"{command} {event.text('name')}".strip()
    if event.kind == "command" and command in pending:  # its learner lacks the key
        account = replace(account, commands_missed=account.commands_missed + 1)
        record = _missed_command(event, name, REFUSED, detail)
        return Settled(account, (record,), {command: Outcome("failed", f"refused: {detail}")})
    if event.kind not in ("command", "version"):
        return Settled(account)
    account = replace(account, refused=account.refused + 1)
    if account.refused > REFUSED_KEPT:
        return Settled(account)
    if event.kind == "command":
        return Settled(account, (_missed_command(event, name, REFUSED, detail),))
    number = event.version
    return Settled(
        account,
        (
            Missed(
                event.worker_id, event.incarnation, "weights", number, number, "", REFUSED, detail, event.at
            ),
        ),
    )


def _settle_membership(
    account: WorkerOutcomes, event: Event, pending: Mapping[str, int], version: int
) -> Settled:
    why = _ENDED[event.kind]
    missed: tuple[Missed, ...] = ()
    if account.member:
        account, missed = _miss(account, event, version, why)
    # Commands that were sent to an earlier life of this worker; one that just left has ended this life too.
    ended = event.incarnation + (event.kind == "left")
    lost = [command for command, incarnation in pending.items() if incarnation < ended]
    missed += tuple(_missed_command(event, command, why, "") for command in lost)
    joined = event.kind == "joined"
    account = replace(
        account,
        incarnation=event.incarnation,
        member=joined,
        settled=max(account.settled, version) if account.member or joined else account.settled,
        applied=0 if joined else account.applied,
        commands_missed=account.commands_missed + len(lost),
        skips_in_a_row=0,
        skipping_since=0.0,
        refused=0 if joined else account.refused,
    )
    return Settled(account, missed, {command: Outcome("missed", why) for command in lost})


def _miss(
    account: WorkerOutcomes, event: Event, last: int, why: str, detail: str = ""
) -> tuple[WorkerOutcomes, tuple[Missed, ...]]:
    """Settle every open version up to `last` as missed."""
    first = account.settled + 1
    if last < first:
        return account, ()
    record = Missed(event.worker_id, account.incarnation, "weights", first, last, "", why, detail, event.at)
    sums = {**account.missed, why: account.missed.get(why, 0) + record.count}
    return replace(account, settled=last, missed=sums), (record,)


def _missed_command(event: Event, command: str, why: str, detail: str) -> Missed:
    return Missed(event.worker_id, event.incarnation, "command", 0, 0, command, why, detail, event.at)
