"""What `send_model_weights` returns: a version that is published, or on its way, and where it is applied."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, SupportsIndex

from rlbroker.errors import Closed, DeadlineExceeded
from rlbroker.types import Outcome


@dataclass(frozen=True)
class Published:
    """A published version; `PublishReceipt` documents the attributes."""

    version: int
    kind: Literal["full", "delta"]
    base: int
    raw_bytes: int
    stored_bytes: int
    chunks: int
    seconds: float


class PendingPublication(Protocol):
    """A version that is being published in the background."""

    @property
    def done(self) -> bool:
        """Whether publishing has ended."""

    @property
    def failed(self) -> bool:
        """Whether publishing has failed."""

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until publishing has ended; return whether it has."""

    def result(self) -> Published:
        """Wait for the version; raise the error if publishing failed."""


class AppliedVersions(Protocol):
    """What knows which workers have applied a version."""

    def wait(
        self,
        version_within: Callable[[float], int],
        timeout: float | None,
        worker_ids: Iterable[SupportsIndex] | None,
    ) -> dict[int, Outcome]:
        """Wait for the outcomes of the version that a function returns; see `PublishReceipt.wait_applied`."""


class PublishReceipt:
    """The result of `send_model_weights`, which may be pending with `wait=False`. False only if publishing failed.

    Each attribute except `done` waits until the version is published, and raises the error if publishing failed.
    """

    def __init__(self, work: Published | PendingPublication, applied: AppliedVersions | None = None) -> None:
        """Wrap the published version, or one that is being published, and what knows the workers' outcomes."""
        self._work, self._applied = work, applied

    def __bool__(self) -> bool:
        """Return False if publishing failed; True if it succeeded or is pending."""
        return isinstance(self._work, Published) or not self._work.failed

    def __repr__(self) -> str:
        """Show the published version, or why there is none."""
        if not self.done:
            return "<PublishReceipt: pending>"
        if not self:
            return "<PublishReceipt: not published>"
        return f"<PublishReceipt: {self._published}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy what was published, without the connection to the learner."""
        return type(self), (self._published,)

    @property
    def done(self) -> bool:
        """Whether publishing has ended, with or without success."""
        return isinstance(self._work, Published) or self._work.done

    def wait(self, timeout: float | None = None) -> Self:
        """Wait until the version is published; return this receipt.

        Args:
            timeout: seconds to wait; None to wait until publishing ends, which has a deadline of its own.

        Raises:
            DeadlineExceeded: publishing has not ended within the timeout, and continues.
            Closed: the learner was closed before the version was published.
            PeerError: the version was not published; the same error as without `wait=False`.
        """
        if not isinstance(self._work, Published):
            if not self._work.wait(timeout):
                raise DeadlineExceeded(
                    f"the weights are not published after {timeout:g} s; publishing continues"
                )
            self._work.result()
        return self

    def wait_applied(
        self, timeout: float | None = None, worker_ids: Iterable[SupportsIndex] | None = None
    ) -> dict[int, Outcome]:
        """Wait until every worker has applied or missed the version, and return the outcomes, by worker id.

        A worker loads weights when it polls; while it waits for room in its queue, it does not. With small queues,
        collect in between.

        An outcome belongs to the worker id, whichever of its processes brought it about. A process that replaces one
        that applied or missed the version is not waited for: the outcome stays as it is, `missed` with `left` or
        `away` too, and becomes `applied` once the new process loads the version. ::

            late = {id: outcome for id, outcome in receipt.wait_applied(timeout=5.0).items() if not outcome}

        Args:
            timeout: seconds to wait at most, also for the version to be published; the communicator's timeout by
                default.
            worker_ids: the workers to wait for; None for all members of the run, and those that have left since. The
                outcome of those that are not members is `unknown`.

        Returns:
            Outcomes in the state `applied`; `missed`, with the reason in `detail`: `superseded` by a newer version,
            `failed`, or the worker was `away` or has `left`; or `waiting`. If the server lost the version, it was
            published again as another one: `superseded`, where that was loaded instead.

        Raises:
            InvalidArgument: the timeout or the ids are invalid.
            UnknownWorker: none of the ids is a member of the run.
            Closed: the learner was closed.
            Fenced: a newer learner has taken over the run.
            PeerError: the version was not published; or the server refused, or could not be reached in time.
        """
        if self._applied is None:
            raise Closed(
                "this is a copy of a receipt; only the learner that got the receipt can wait with it"
            )
        return self._applied.wait(self._version_within, timeout, worker_ids)

    def _version_within(self, seconds: float) -> int:
        """Return the version; 0 if publishing does not end within some seconds."""
        if not isinstance(self._work, Published) and not self._work.wait(seconds):
            return 0
        return self.version

    @property
    def version(self) -> int:
        """The number of the version."""
        return self._published.version

    @property
    def kind(self) -> Literal["full", "delta"]:
        """How the weights are stored: `full`, or as a `delta` to the version before."""
        return self._published.kind

    @property
    def base(self) -> int:
        """The version that a delta applies to; 0 for a full one."""
        return self._published.base

    @property
    def raw_bytes(self) -> int:
        """Size of the tensors as they travel, in bytes; each tied one counts once."""
        return self._published.raw_bytes

    @property
    def stored_bytes(self) -> int:
        """Size of what was stored on the server, in bytes."""
        return self._published.stored_bytes

    @property
    def chunks(self) -> int:
        """Number of chunks, without the header's."""
        return self._published.chunks

    @property
    def seconds(self) -> float:
        """Duration from the call until the version was published."""
        return self._published.seconds

    @property
    def ratio(self) -> float:
        """Raw bytes per stored byte."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 1.0

    @property
    def _published(self) -> Published:
        return self._work if isinstance(self._work, Published) else self._work.result()
