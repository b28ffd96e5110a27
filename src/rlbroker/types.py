"""The values that callers get: batches, receipts, the roster, outcomes."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast

from rlbroker.errors import Closed, DeadlineExceeded

#: What became of one command, or of one version, at one worker.
State = Literal["waiting", "done", "failed", "unknown", "expired", "missed"]

#: Why a worker did not run a version.
Why = Literal["superseded", "failed", "away", "left"]

#: What the roster says of a worker: heard of lately, or silent for longer than its lease.
Liveness = Literal["alive", "away"]


class Batch(dict[str, Any]):
    """What a worker sent, as it went in; its facts are attributes, which no key of the user's can collide with.

    Attributes:
        worker_id: the worker that sent it.
        incarnation: which life of that worker.
        sequence: the batch's number within that life; 1, 2, 3, ….
        version: the weights that produced it; 0 before the first.
        staleness: versions published since then, when the learner collected it.
        rows: leading dimension of its first array or tensor; 0 without one.
        raw_bytes: bytes of its arrays and tensors.
        stored_bytes: bytes that went through Redis.
        sent_at: the worker's clock when it was sent, seconds since the epoch.
        received_at: the learner's clock when it was collected, seconds since the epoch.
        held_as: the stream and the id under which the learner holds it until it is acknowledged.
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


@dataclass(frozen=True)
class Registration:
    """A worker's place in the run, as the server gave it.

    Attributes:
        incarnation: this life of the worker id; 0 before it registered.
        latest_version: the latest version then.
        control_position: id of the last entry of the control stream that does not concern this life.
    """

    worker_id: int
    incarnation: int
    latest_version: int
    control_position: str


@dataclass(frozen=True)
class SendReceipt:
    """What happened to one batch on the worker's side. True if it is in the queue.

    Attributes:
        sequence: its number within this life of the worker; 0 if it was not accepted.
        version: the weights that produced it.
        rows: leading dimension of its first array or tensor; 0 without one.
        raw_bytes: bytes of its arrays and tensors.
        stored_bytes: bytes of the message.
        accepted: whether it is in the queue.
        dropped: older batches that were dropped for it.
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
        """Whether the batch was accepted; with `drop_newest` it may not be."""
        return self.accepted


@dataclass(frozen=True)
class Published:
    """The facts of a version that is out; see `PublishReceipt`."""

    version: int
    kind: Literal["full", "delta"]
    base: int
    raw_bytes: int
    stored_bytes: int
    chunks: int
    seconds: float


class PublishReceipt:
    """What `send_model_weights` did, or with `wait=False` is doing. False only if that has failed.

    Asking for any of its facts waits until the version is out, and raises what went wrong if it is not to be.
    """

    def __init__(self, work: Published | Future[Published]) -> None:
        """Tell of what was done, or of what is under way."""
        self._work = work

    def __bool__(self) -> bool:
        """Whether every worker can fetch the version, or will be able to, as far as is known."""
        if not isinstance(self._work, Future) or not self._work.done():
            return True
        return not self._work.cancelled() and self._work.exception() is None

    def __repr__(self) -> str:
        """Show the facts, if they are there."""
        if not self.done:
            return "<PublishReceipt: under way>"
        if not self:
            return "<PublishReceipt: not published>"
        return f"<PublishReceipt: {self._facts}>"

    @property
    def done(self) -> bool:
        """Whether the version is out, or will never be."""
        return not isinstance(self._work, Future) or self._work.done()

    def wait(self, timeout: float | None = None) -> Self:
        """Wait until the version is out; give the receipt itself.

        Args:
            timeout: seconds to wait; by default until it is done, which ends like any publication by itself.

        Raises:
            DeadlineExceeded: it was not done in time, and goes on.
            PeerError: it was not published; as `send_model_weights` without `wait=False`.
        """
        if isinstance(self._work, Future):
            try:
                self._work.result(timeout)
            except TimeoutError as error:
                if not self._work.done():
                    raise DeadlineExceeded(
                        f"the weights are not out after {timeout:g} s; it goes on"
                    ) from error
                raise
            except CancelledError as error:
                raise Closed("the WorkerCommunicator was closed before the weights were out") from error
        return self

    @property
    def version(self) -> int:
        """The number that the weights got."""
        return self._facts.version

    @property
    def kind(self) -> Literal["full", "delta"]:
        """How they are stored: `full`, or as a `delta` to the version before."""
        return self._facts.kind

    @property
    def base(self) -> int:
        """The version that a delta is the difference to; 0 for a full one."""
        return self._facts.base

    @property
    def raw_bytes(self) -> int:
        """Bytes of the tensors as they travel, tied ones counted once."""
        return self._facts.raw_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes that were stored for it on the server."""
        return self._facts.stored_bytes

    @property
    def chunks(self) -> int:
        """Values that hold them, besides the header."""
        return self._facts.chunks

    @property
    def seconds(self) -> float:
        """How long it took, from the call until it was out."""
        return self._facts.seconds

    @property
    def ratio(self) -> float:
        """Raw bytes for each stored byte."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 1.0

    @property
    def _facts(self) -> Published:
        self.wait()
        return self._work.result() if isinstance(self._work, Future) else self._work


@dataclass(frozen=True)
class WorkerInfo:
    """One line of the roster.

    Attributes:
        state: `alive`, or `away` when it was silent for longer than its lease.
        version: the weights that it runs; 0 for none yet.
        staleness: versions published since.
        last_seen_seconds: age of its last heartbeat, by the server's clock.
        sent: batches that it says it sent in this life.
        problem: what keeps it from applying the newest weights, if anything does.
        unconfirmed: what keeps its last batch from its level, if it has waited for that in vain.
        room_seconds: in which `send_experiences` waited in this life for room in a full queue, as it says.
        unpolled_seconds: since it was last in `poll` or `load_weights` when it was last heard of; 0 while it was. A
            worker that does not poll obeys no command and runs old weights.
        fenced_process: host and pid of another process that had this worker's id and was turned away when it spoke
            last; empty if none did since this one registered. Two processes of one id are a mistake in starting them.
        fenced_seconds: how long ago that was.
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
    """What became of a command at one worker. True if it is done."""

    state: State
    detail: str = ""

    def __bool__(self) -> bool:
        """Whether the worker did it."""
        return self.state == "done"

    def __str__(self) -> str:
        """Give the state, with its detail where there is one."""
        return f"{self.state}: {self.detail}" if self.detail else self.state

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what `str` gave: so outcomes are written in Redis."""
        state, _, detail = text.partition(": ")
        return cls(cast(State, state), detail)  # the ledger writes nothing else


@dataclass(frozen=True)
class Missed:
    """Updates that one worker did not run, as one entry of the run's `missed` stream.

    Attributes:
        what: `weights`, or `command`.
        first: first missed version, for weights.
        last: last missed version, for weights.
        command: id and name of the missed command, for commands.
        why: `superseded`, `failed`, `away` or `left`; for commands also `unknown` and `expired`;
            `refused` for what lacked the signature of the worker's key and was no version of a learner's.
        at: when it was recorded, the server's clock, seconds since the epoch.
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
        """How many updates it stands for."""
        return self.last - self.first + 1 if self.what == "weights" else 1


@dataclass(frozen=True)
class MissedUpdates:
    """What one worker missed so far.

    Attributes:
        total: versions missed since the run began.
        by_reason: the same, by why.
        commands: commands missed since the run began.
        behind: versions that are published and that it neither runs nor has missed for good yet.
        behind_since: when the first of these was published, seconds since the epoch; None when there is none.
        skips_in_a_row: how many of its latest updates each jumped over a version; 0 when the last one did not.
        skipping_since: when that row began, seconds since the epoch; None without one.
        records: the newest entries of the `missed` stream that are about it, oldest first.
        refused: versions and commands that this life of it refused for their signature, and no learner had sent.
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
    """What became of one worker's batches: produced = waiting + in_hand + delivered + what was lost.

    Attributes:
        waiting: in the queue, not yet read.
        in_hand: read by the learner, not yet acknowledged.
        delivered: acknowledged by the learner.
        lost: by reason: `stale`, `corrupt`, `poison`, `trimmed`, `dropped_oldest`, `dropped_newest`, `stopped`,
            `fenced`, `vanished`.
        duplicates: copies of batches that had been read before, not given out a second time.
    """

    waiting: int
    in_hand: int
    delivered: int
    lost: Mapping[str, int]
    duplicates: int

    @property
    def produced(self) -> int:
        """Every batch that the worker sent, whatever became of it."""
        return self.waiting + self.in_hand + self.delivered + sum(self.lost.values())


@dataclass(frozen=True)
class DeadLetter:
    """A batch that no learner could use.

    Attributes:
        incarnation: which life of the worker sent it.
        sequence: its number within that life.
        reason: `corrupt` (it does not decode), or `poison` (learners died over it).
        detail: what exactly.
        deliveries: how often it was handed out.
        version: the weights that produced it, as the worker said.
        stored_bytes: bytes of its data.
        died_at: the learner's clock, seconds since the epoch.
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
    """What `cleanup` left behind in Redis. True if nothing was.

    Attributes:
        waiting: batches that nobody read, by worker.
        unacknowledged: batches that were read and not acknowledged, by worker; the next learner gets them.
        commands: commands that were not answered.
        complete: whether the server could be asked; without it the numbers are not known.
    """

    waiting: Mapping[int, int] = field(default_factory=dict)
    unacknowledged: Mapping[int, int] = field(default_factory=dict)
    commands: int = 0
    complete: bool = True

    def __bool__(self) -> bool:
        """Whether nothing was left behind."""
        return self.complete and not (
            any(self.waiting.values()) or any(self.unacknowledged.values()) or self.commands
        )
