"""The values that callers receive: batches, receipts, the roster, outcomes, counts.

Sizes are in bytes and durations in seconds. Timestamps are seconds since the Unix epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypedDict, cast

if TYPE_CHECKING:
    import torch

#: What weights are loaded into: a module, or a dictionary of tensors and arrays.
Model: TypeAlias = "torch.nn.Module | MutableMapping[str, Any]"

#: The outcome of one command, or of one version, at one worker.
State = Literal["waiting", "done", "applied", "failed", "unknown", "expired", "missed"]

#: Why a worker did not run a version.
Why = Literal["superseded", "failed", "away", "left"]

#: A worker's state in the roster: `alive`, or `away` when it was silent for its lease.
Liveness = Literal["alive", "away"]


class Batch(dict[str, Any]):
    """The dictionary that a worker sent, with its metadata in attributes, which cannot collide with the user's keys.

    It can be sent on, pickled, copied, and saved and loaded with torch. torch and JAX know it as a pytree node: what
    they make of it, `tree_map(f, batch)` for example, is a `Batch` without metadata.

    Attributes:
        worker_id: the worker that sent it.
        incarnation: the incarnation of that worker.
        sequence: its number within that incarnation: 1, 2, 3, ….
        version: the version of the weights that produced it; 0 before the first.
        staleness: number of versions published since that one, when the learner collected it.
        rows: as the worker said; otherwise the leading dimension of its first array or tensor, 0 without one.
        raw_bytes: size of its arrays, tensors and long bytes; each tied one counts once.
        stored_bytes: size of its message in Redis.
        sent_at: time of sending, by the worker's clock.
        received_at: time of collection, by the learner's clock.
        held_as: stream and entry id of the batch, which is pending until the learner acknowledges it.
    """

    __slots__ = (
        "held_as",
        "incarnation",
        "raw_bytes",
        "received_at",
        "rows",
        "sent_at",
        "sequence",
        "staleness",
        "stored_bytes",
        "version",
        "worker_id",
    )

    worker_id: int
    incarnation: int
    sequence: int
    version: int
    staleness: int
    rows: int
    raw_bytes: int
    stored_bytes: int
    sent_at: float
    received_at: float
    held_as: tuple[str, str]

    def __reduce__(self) -> tuple[Any, ...]:
        """Describe this batch for pickle and copy in the way that `torch.load(weights_only=True)` accepts."""
        metadata = {name: getattr(self, name) for name in self.__slots__ if hasattr(self, name)}
        return type(self), (dict(self),), (None, metadata)


@dataclass(frozen=True)
class Registration:
    """A worker's membership in the run, granted by the server.

    Attributes:
        worker_id: the worker.
        incarnation: its incarnation; 0 before it registered.
        latest_version: the latest version at that time.
        control_position: id of the last entry of the control stream from before this incarnation.
    """

    worker_id: int
    incarnation: int
    latest_version: int
    control_position: str


@dataclass(frozen=True)
class SendReceipt:
    """The result of sending one batch. True if the batch is in the queue.

    Attributes:
        worker_id: the worker that sent it.
        incarnation: the incarnation of that worker.
        sequence: its number within that incarnation; 0 if it was not accepted.
        version: the version of the weights that produced it.
        rows: as the caller said; otherwise the leading dimension of its first array or tensor, 0 without one.
        raw_bytes: size of its arrays, tensors and long bytes; each tied one counts once.
        stored_bytes: size of its message.
        accepted: whether it is in the queue.
        dropped: number of older batches that were dropped to make room.
    """

    worker_id: int
    incarnation: int
    sequence: int
    version: int
    rows: int
    raw_bytes: int
    stored_bytes: int
    accepted: bool
    dropped: int = 0

    def __bool__(self) -> bool:
        """Return whether the batch was accepted; with `drop_newest` it may not be."""
        return self.accepted


@dataclass(frozen=True)
class WorkerInfo:
    """One worker in the roster.

    Attributes:
        worker_id: the worker.
        incarnation: its incarnation. The counts and durations below are of this incarnation.
        state: `alive`, or `away` when it was silent for its lease. Silence counts only while the learner could reach
            the server.
        host: name of the host that it runs on.
        pid: its process id there.
        version: the version of the weights that it runs; 0 before the first.
        staleness: number of versions published since that one.
        last_seen_seconds: age of its last heartbeat, by the server's clock.
        sent: number of batches that it reports as sent.
        problem: the reason that it cannot apply the latest weights; empty if it can.
        unconfirmed: the reason that its last batch has not reached its level within the timeout; empty if it has.
        room_seconds: total time that `send_experiences` waited for room in a full queue, as it reports.
        unpolled_seconds: time since its last `poll`, or other call that loads weights, at its last heartbeat; 0 during
            one. A worker that does not poll obeys no command and runs old weights.
        fenced_process: host and pid of the last other process with this worker's id that was fenced since this one
            registered; empty without one. Two processes were then started with one id by mistake.
        fenced_seconds: age of that event; None without one.
    """

    worker_id: int
    incarnation: int
    state: Liveness
    host: str
    pid: int
    version: int
    staleness: int
    last_seen_seconds: float
    sent: int
    problem: str
    unconfirmed: str = ""
    room_seconds: float = 0.0
    unpolled_seconds: float = 0.0
    fenced_process: str = ""
    fenced_seconds: float | None = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command, or of a version, at one worker. True if it is done or applied.

    Attributes:
        state: `waiting` for the acknowledgement; `done`, or for a version `applied`; `failed`; `unknown`, if the worker
            has no handler for the command, or is not a member of the run; `expired`; or `missed`, if the worker was
            away or left, or did not run the version.
        detail: the reason, such as the text of the handler's error; may be empty.
    """

    state: State
    detail: str = ""

    def __bool__(self) -> bool:
        """Return whether the worker did it."""
        return self.state in ("done", "applied")

    def __str__(self) -> str:
        """Return the state, with its detail where there is one."""
        return f"{self.state}: {self.detail}" if self.detail else self.state

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Parse the result of `str`, which is how outcomes are stored in Redis."""
        state, _, detail = text.partition(": ")
        return cls(cast(State, state), detail)  # the ledger writes nothing else


@dataclass(frozen=True)
class Missed:
    """Versions or a command that one worker missed: one entry of the run's `missed` stream.

    Attributes:
        worker_id: the worker.
        incarnation: its incarnation.
        what: `weights` or `command`.
        first: first missed version, for weights.
        last: last missed version, for weights.
        command: id and name of the missed command, for commands.
        why: `superseded`, `failed`, `away` or `left`; for commands also `unknown` and `expired`; `refused` for a
            forgery, which no learner had sent and which lacked a signature of the worker's key.
        detail: more about the reason; may be empty.
        at: time of the record, by the server's clock.
    """

    worker_id: int
    incarnation: int
    what: Literal["weights", "command"]
    first: int
    last: int
    command: str
    why: str
    detail: str
    at: float

    @property
    def count(self) -> int:
        """The number of versions or commands in this record."""
        return self.last - self.first + 1 if self.what == "weights" else 1


@dataclass(frozen=True)
class MissedUpdates:
    """Everything that one worker missed so far.

    Attributes:
        worker_id: the worker.
        total: number of versions missed since the run began.
        by_reason: the same number, by `Missed.why`.
        commands: number of commands missed since the run began.
        behind: number of published versions that it neither applied nor finally missed.
        behind_since: time when the first of these was published; None if there is none.
        skips_in_a_row: number of its latest updates that each skipped a version; 0 if the last one did not.
        skipping_since: time when that series began; None without one.
        records: the newest entries of the `missed` stream for this worker, oldest first.
        refused: number of forged versions and commands that this incarnation refused for their signature.
    """

    worker_id: int
    total: int
    by_reason: Mapping[str, int]
    commands: int
    behind: int
    behind_since: float | None
    skips_in_a_row: int
    skipping_since: float | None
    records: tuple[Missed, ...]
    refused: int = 0


@dataclass(frozen=True)
class QueueCounts:
    """The number of one worker's batches in each state: produced = waiting + in_hand + delivered + lost.

    Attributes:
        waiting: in the queue, not yet read.
        in_hand: pending: read by the learner, not yet acknowledged.
        delivered: acknowledged by the learner.
        lost: by reason: `stale`, `corrupt`, `poison`, `trimmed`, `dropped_oldest`, `dropped_newest`, `stopped`,
            `fenced`, `vanished`.
        duplicates: copies of batches that had been read before; they are not delivered again.
    """

    waiting: int
    in_hand: int
    delivered: int
    lost: Mapping[str, int]
    duplicates: int

    @property
    def produced(self) -> int:
        """The number of batches that the worker sent."""
        return self.waiting + self.in_hand + self.delivered + sum(self.lost.values())


class QueueInfo(TypedDict):
    """What `get_queue_info` returns: three lists by worker id, and the counts of each worker's batches.

    Attributes:
        experience_queue_sizes: batches waiting.
        model_queue_sizes: versions neither applied nor missed yet.
        control_queue_sizes: commands not acknowledged yet.
        counts: what became of the worker's batches, by worker id.
    """

    experience_queue_sizes: list[int]
    model_queue_sizes: list[int]
    control_queue_sizes: list[int]
    counts: dict[int, QueueCounts]


@dataclass(frozen=True)
class DeadLetter:
    """A batch that no learner could use.

    Attributes:
        worker_id: the worker that sent it.
        incarnation: the incarnation of that worker.
        sequence: its number within that incarnation.
        reason: `corrupt`, if it does not decode, or `poison`, if learners died while they had it.
        detail: more about the reason.
        deliveries: number of times that it was delivered.
        version: the version of the weights that produced it, as the worker reported.
        stored_bytes: size of its message.
        died_at: time when it became a dead letter, by the learner's clock.
        entry_id: id of its entry in the stream of dead letters.
    """

    worker_id: int
    incarnation: int
    sequence: int
    reason: str
    detail: str
    deliveries: int
    version: int
    stored_bytes: int
    died_at: float
    entry_id: str


@dataclass(frozen=True)
class CleanupReport:
    """The batches and commands that `cleanup` left in Redis. True if there are none.

    Attributes:
        waiting: number of unread batches, by worker.
        unacknowledged: number of batches that were read and not acknowledged, by worker; the next learner receives
            them.
        commands: number of commands without an acknowledgement, apart from the `stop`.
        stopped: the answer of each worker to the `stop`, by worker id; empty if none was sent.
        complete: whether the server could be asked; if not, the numbers are unknown.
    """

    waiting: Mapping[int, int] = field(default_factory=dict)
    unacknowledged: Mapping[int, int] = field(default_factory=dict)
    commands: int = 0
    stopped: Mapping[int, Outcome] = field(default_factory=dict)
    complete: bool = True

    def __bool__(self) -> bool:
        """Return whether nothing was left."""
        return self.complete and not (
            any(self.waiting.values()) or any(self.unacknowledged.values()) or self.commands
        )
