"""The final outcome of every version and command at one worker. Pure.

A worker's acknowledgement stream is its history in order: it joined, it went from one version to another, it did a
command, it left or was forgotten. `settle` folds one such event into the worker's outcomes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

from rlbroker.backend.replies import entry_id, entry_place, stored_integer, stored_seconds, whole_number
from rlbroker.types import Missed, MissedUpdates, Outcome, State

#: Length to which text from a worker is cut.
TEXT_LENGTH = 500

#: The states in which a worker can acknowledge a command.
ACKNOWLEDGED_STATES = ("done", "failed", "unknown", "expired")

#: The outcome of versions and commands that lack the signature of the worker's key.
REFUSED = "refused"

#: The most forged versions and commands that are recorded in one incarnation: an attacker can send any number.
REFUSED_KEPT = 100

#: Why versions and commands were missed, by the event that ended an incarnation.
_REASONS = {"joined": "away", "gone": "away", "left": "left"}


@dataclass(frozen=True)
class WorkerOutcomes:
    """What became of versions and commands at one worker: the fields of its `ledger:` hash.

    Attributes:
        incarnation: the incarnation that the other fields describe.
        member: whether versions that are published now concern the worker.
        settled: every version up to this one has its final outcome, or was published before the worker joined.
        joined_version: the latest version when the worker joined, while the worker has neither applied nor failed to
            load any; 0 otherwise. Its failure counts, although it was published before.
        applied: the version that the worker runs.
        applied_total: versions that it applied since the run began.
        missed: versions that it missed since the run began, by reason.
        commands_done: commands that it did.
        commands_missed: commands that it did not do.
        skips_in_a_row: the number of its latest updates that each jumped over a version.
        skipping_since: when the first of these happened, seconds since the epoch.
        refused: forged versions and commands that this incarnation refused.
        event: id of the last event that was folded in; events up to this one are ignored.
    """

    incarnation: int = 0
    member: bool = False
    settled: int = 0
    joined_version: int = 0
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
    def position(self) -> tuple[int, int]:
        """The id of the last event as numbers. The outcomes with the later position are the newer ones."""
        return entry_place(self.event)

    def to_fields(self) -> dict[str, str]:
        """Return the fields of the hash."""
        plain = {
            "incarnation": self.incarnation,
            "member": int(self.member),
            "settled": self.settled,
            "joined_version": self.joined_version,
            "applied": self.applied,
            "applied_total": self.applied_total,
            "commands_done": self.commands_done,
            "commands_missed": self.commands_missed,
            "skips_in_a_row": self.skips_in_a_row,
            "skipping_since": f"{self.skipping_since:.3f}",
            "event": self.event,
        } | ({"refused": self.refused} if self.refused else {})
        return {name: str(value) for name, value in plain.items()} | {
            f"missed:{reason}": str(count) for reason, count in self.missed.items()
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, str]) -> Self:
        """Parse the fields of the hash. A worker without a hash has the default outcomes.

        Raises:
            ValueError: a field is invalid.
        """
        return cls(
            incarnation=stored_integer(fields.get("incarnation"), 0),
            member=fields.get("member") == "1",
            settled=stored_integer(fields.get("settled"), 0),
            joined_version=stored_integer(fields.get("joined_version"), 0),
            applied=stored_integer(fields.get("applied"), 0),
            applied_total=stored_integer(fields.get("applied_total"), 0),
            missed={
                name.removeprefix("missed:"): stored_integer(count)
                for name, count in fields.items()
                if name.startswith("missed:")
            },
            commands_done=stored_integer(fields.get("commands_done"), 0),
            commands_missed=stored_integer(fields.get("commands_missed"), 0),
            skips_in_a_row=stored_integer(fields.get("skips_in_a_row"), 0),
            skipping_since=stored_seconds(fields.get("skipping_since", "0")),
            refused=stored_integer(fields.get("refused"), 0),
            event=entry_id(fields.get("event", "0-0")),
        )


@dataclass(frozen=True)
class Event:
    """One entry of a worker's acknowledgement stream.

    Attributes:
        entry_id: its id, `<incarnation>-<number>`.
        worker_id: the worker.
        kind: `joined`, `version`, `command`, `left` or `gone`.
        fields: the other fields; the worker wrote them, so nothing in them is trusted.
        at: when the ledger read it, seconds since the epoch, by the server's clock.
    """

    entry_id: str
    worker_id: int
    kind: str
    fields: Mapping[str, str]
    at: float

    @property
    def incarnation(self) -> int:
        """The incarnation that the event belongs to."""
        return int(self.entry_id.partition("-")[0])

    @property
    def version(self) -> int:
        """The version that the worker went to; for `joined`, `left` and `gone` the latest version at that time."""
        return whole_number(self.fields.get("version", "")) or 0

    @property
    def again(self) -> bool:
        """Whether the worker repeats that it joined, because the server had lost that."""
        return self.fields.get("again") == "1"

    def text(self, name: str) -> str:
        """Return a field, cut to a bounded length."""
        return self.fields.get(name, "")[:TEXT_LENGTH]


@dataclass(frozen=True)
class Settled:
    """The result of folding in one event.

    Attributes:
        worker_outcomes: the worker's outcomes after the event.
        missed: records of versions and commands that were missed.
        command_outcomes: final outcomes by command id.
        applied: the version that was applied; 0 for none.
    """

    worker_outcomes: WorkerOutcomes
    missed: tuple[Missed, ...] = ()
    command_outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    applied: int = 0


def settle(
    outcomes: WorkerOutcomes, event: Event, pending: Mapping[str, int], latest: int, lost: int = 0
) -> Settled:
    """Fold one event into a worker's outcomes.

    An invalid event changes nothing, because workers are not trusted. Nor does an event that was folded in before: it
    comes again if a worker repeats what the server may have lost, or if a server was reset to an older state.

    Args:
        outcomes: the worker's outcomes before the event.
        pending: ids of the worker's commands without a final outcome, each with the incarnation that it was sent to.
        latest: the latest version.
        lost: the latest version when the server last lost the run. The events of workers that joined or left between
            then and the next publication name a lower one.
    """
    if entry_place(event.entry_id) <= outcomes.position:
        return Settled(outcomes)
    outcomes = replace(outcomes, event=event.entry_id)
    refused = event.fields.get("outcome") == REFUSED
    if event.kind == "version" and (outcomes.settled if refused else 0) < event.version <= latest:
        return _settle_version(outcomes, event)
    if refused:
        return _settle_refused(outcomes, event, pending)
    if event.kind == "command" and event.fields.get("outcome") in ACKNOWLEDGED_STATES:
        return _settle_command(outcomes, event, pending)
    if event.kind in _REASONS:
        version = min(event.version, latest)
        # A worker that joins again after a loss names the version up to which all are settled.
        return _settle_membership(outcomes, event, pending, version if event.again else max(version, lost))
    return Settled(outcomes)


def summarize_missed(
    worker_id: int,
    outcomes: WorkerOutcomes,
    *,
    latest_version: int,
    published: Mapping[int, float],
    records: Sequence[Missed] = (),
) -> MissedUpdates:
    """Return what a worker missed.

    Args:
        published: when recent versions were published, seconds since the epoch.
        records: entries of the `missed` stream about this worker.
    """
    behind = max(0, latest_version - outcomes.settled) if outcomes.member else 0
    return MissedUpdates(
        worker_id=worker_id,
        total=sum(outcomes.missed.values()),
        by_reason=dict(outcomes.missed),
        commands=outcomes.commands_missed,
        behind=behind,
        behind_since=published.get(outcomes.settled + 1) if behind else None,
        skips_in_a_row=outcomes.skips_in_a_row,
        skipping_since=outcomes.skipping_since or None,
        records=tuple(records),
        refused=outcomes.refused,
    )


def missed_to_fields(missed: Missed) -> dict[str, Any]:
    """Return the fields of an entry of the `missed` stream."""
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


def missed_from_fields(fields: Mapping[str, str]) -> Missed:
    """Parse an entry of the `missed` stream.

    Raises:
        KeyError: a field is missing.
        ValueError: a field is invalid.
    """
    return Missed(
        worker_id=stored_integer(fields["worker"]),
        incarnation=stored_integer(fields["incarnation"]),
        what="command" if fields["what"] == "command" else "weights",
        first=stored_integer(fields["from"]),
        last=stored_integer(fields["to"]),
        command=fields["command"],
        why=fields["why"],
        detail=fields["detail"],
        at=round(stored_seconds(fields["at"]), 3),
    )


def _settle_version(outcomes: WorkerOutcomes, event: Event) -> Settled:
    applied = event.fields.get("outcome") == "applied"
    if not applied and event.version == outcomes.joined_version == outcomes.settled:
        outcomes = replace(outcomes, settled=event.version - 1)  # open it, so that its failure counts
    outcomes = replace(outcomes, joined_version=0)
    outcomes, missed = _miss(outcomes, event, event.version - 1, "superseded")
    if not applied:
        outcomes, failed = _miss(outcomes, event, event.version, "failed", event.text("detail"))
        return Settled(outcomes, missed + failed)
    skipped = bool(missed)
    new = event.version > outcomes.settled
    return Settled(
        replace(
            outcomes,
            settled=max(outcomes.settled, event.version),
            applied=event.version,
            applied_total=outcomes.applied_total + new,
            skips_in_a_row=outcomes.skips_in_a_row + 1 if skipped else 0,
            skipping_since=(outcomes.skipping_since or event.at) if skipped else 0.0,
        ),
        missed,
        applied=event.version,
    )


def _settle_command(outcomes: WorkerOutcomes, event: Event, pending: Mapping[str, int]) -> Settled:
    command, name = event.text("command"), event.text("name")
    if command not in pending:  # it has its final outcome already
        return Settled(outcomes)
    state = cast(State, event.fields["outcome"])  # one of ACKNOWLEDGED_STATES
    outcome = Outcome(state, event.text("detail"))
    if outcome:
        return Settled(replace(outcomes, commands_done=outcomes.commands_done + 1), (), {command: outcome})
    record = _missed_command(event, f"{command} {name}".strip(), outcome.state, outcome.detail)
    outcomes = replace(outcomes, commands_missed=outcomes.commands_missed + 1)
    return Settled(outcomes, (record,), {command: outcome})


def _settle_refused(outcomes: WorkerOutcomes, event: Event, pending: Mapping[str, int]) -> Settled:
    """Record a refused command, or a refused version that no learner published or that is settled already."""
    command, detail = event.text("command"), event.text("detail")
    name = f"{command} {event.text('name')}".strip()
    if event.kind == "command" and command in pending:  # a learner without the key sent it
        outcomes = replace(outcomes, commands_missed=outcomes.commands_missed + 1)
        record = _missed_command(event, name, REFUSED, detail)
        return Settled(outcomes, (record,), {command: Outcome("failed", f"refused: {detail}")})
    if event.kind not in ("command", "version"):
        return Settled(outcomes)
    outcomes = replace(outcomes, refused=outcomes.refused + 1)
    if outcomes.refused > REFUSED_KEPT:
        return Settled(outcomes)
    if event.kind == "command":
        return Settled(outcomes, (_missed_command(event, name, REFUSED, detail),))
    return Settled(
        outcomes, (_missed_versions(event, event.incarnation, event.version, event.version, REFUSED, detail),)
    )


def _settle_membership(
    outcomes: WorkerOutcomes, event: Event, pending: Mapping[str, int], version: int
) -> Settled:
    reason = _REASONS[event.kind]
    missed: tuple[Missed, ...] = ()
    if outcomes.member:
        outcomes, missed = _miss(outcomes, event, version, reason)
    # Commands to ended incarnations are lost. `left` carries the incarnation that ends, other events the next one.
    ended = event.incarnation + (event.kind == "left")
    lost = [command for command, incarnation in pending.items() if incarnation < ended]
    missed += tuple(_missed_command(event, command, reason, "") for command in lost)
    joined = event.kind == "joined"
    joined_version = outcomes.joined_version
    if joined and (event.again or joined_version != version <= outcomes.settled):
        joined_version = 0  # it has an outcome, or was loaded, in an earlier incarnation
    elif joined:
        joined_version = version
    outcomes = replace(
        outcomes,
        incarnation=event.incarnation,
        member=joined,
        settled=max(outcomes.settled, version) if outcomes.member or joined else outcomes.settled,
        joined_version=joined_version,
        applied=0 if joined else outcomes.applied,
        commands_missed=outcomes.commands_missed + len(lost),
        skips_in_a_row=0,
        skipping_since=0.0,
        refused=0 if joined else outcomes.refused,
    )
    return Settled(outcomes, missed, {command: Outcome("missed", reason) for command in lost})


def _miss(
    outcomes: WorkerOutcomes, event: Event, last: int, reason: str, detail: str = ""
) -> tuple[WorkerOutcomes, tuple[Missed, ...]]:
    """Settle every open version up to `last` as missed."""
    first = outcomes.settled + 1
    if last < first:
        return outcomes, ()
    record = _missed_versions(event, outcomes.incarnation, first, last, reason, detail)
    sums = {**outcomes.missed, reason: outcomes.missed.get(reason, 0) + record.count}
    return replace(outcomes, settled=last, missed=sums), (record,)


def _missed_versions(
    event: Event, incarnation: int, first: int, last: int, reason: str, detail: str
) -> Missed:
    return Missed(event.worker_id, incarnation, "weights", first, last, "", reason, detail, event.at)


def _missed_command(event: Event, command: str, reason: str, detail: str) -> Missed:
    return Missed(event.worker_id, event.incarnation, "command", 0, 0, command, reason, detail, event.at)
