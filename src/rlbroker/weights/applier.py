"""The last step of a weight update: decoded versions are loaded into the worker's model and acknowledged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from rlbroker.backend.deadline import Deadline
from rlbroker.backend.locks import CallLock
from rlbroker.errors import RlbrokerError
from rlbroker.weights.loading import Load
from rlbroker.weights.subscriber import Subscriber
from rlbroker.weights.target_memory import normal_tensors
from rlbroker.weights.update_queue import WeightsUpdate

logger = logging.getLogger("rlbroker")

#: The longest that a call which waits for weights sleeps between two looks at commands and signals.
CHECK_SECONDS: Final = 0.1

#: How often a call that waits for weights says so in the log.
LOG_SECONDS: Final = 60.0

#: Acknowledges a version, given the version before, the version, the outcome, and a detail.
AcknowledgeVersion = Callable[[int, int, str, str], None]


@dataclass(eq=False)
class LoadTarget:
    """What one call loads weights into, and the version that it got; 0 before it got one."""

    model: Any
    version: int = 0


@dataclass(frozen=True)
class _Step:
    """An update that is being loaded, the call's target, and the version before it."""

    update: WeightsUpdate
    load: Load
    target: LoadTarget
    before: int


class WeightsApplier:
    """Loads versions into models and remembers the last one.

    An interrupted call leaves its step behind, and the next call completes that first. Each part of a step may be done
    again: the ledger ignores a second acknowledgement of a version.

    Attributes:
        acknowledge: acknowledges a version; set when the worker has joined, before the first load.
        problem: why the newest version could not be loaded into the model; empty if it was.
    """

    acknowledge: AcknowledgeVersion

    def __init__(self, subscriber: Subscriber, *, keep_dtype: bool) -> None:
        """Begin without a version.

        With `keep_dtype`, an empty dictionary gets weights in the dtypes in which they were sent.
        """
        self._subscriber, self._keep_dtype = subscriber, keep_dtype
        self._lock = CallLock()  #: held while weights are loaded, so that they keep their order
        self._step: _Step | None = None
        self._version = 0
        self.problem = ""

    @property
    def version(self) -> int:
        """The version that was applied last; 0 before the first."""
        step = self._step
        return step.update.version if step and step.load.done else self._version

    def apply(self, target: LoadTarget, newer_than: int | None = None) -> None:
        """Load updates in order, and acknowledge the outcome of each.

        Args:
            target: gets the newest version, and its number.
            newer_than: the target gets no version up to this one; by default, none up to the one that was applied last.

        Raises:
            WeightsMismatch: the weights do not fit the model.
        """
        self._lock.run(self._apply, target, newer_than)

    def complete(self, target: LoadTarget) -> None:
        """Complete the load into a target whose call was interrupted."""
        self._lock.run(self._complete_target, target)

    def wait(
        self,
        target: LoadTarget,
        deadline: Deadline,
        go_on: Callable[[], bool],
        *,
        newer_than: int | None = None,
        latest: int = 0,
        sought: str,
    ) -> None:
        """Load a version as soon as it is ready; return without one at the deadline.

        Args:
            target, newer_than: as in `apply`.
            go_on: called again and again meanwhile; ends the wait by returning False.
            latest: an older version is loaded only at the deadline: it may have other shapes than the model.
            sought: what is waited for, in words.
        """
        next_log, known = Deadline(LOG_SECONDS), -1
        while True:
            if newer_than is not None and self.version != known:
                # At first, and after another thread has taken what this call waits for.
                known = self.version
                self._lock.run(self._subscriber.offer_again, newer_than)
            is_last = deadline.over
            if is_last or self._subscriber.newest >= latest:
                self.apply(target, newer_than)
            if target.version or not go_on() or is_last:
                return
            if next_log.over:
                next_log = Deadline(LOG_SECONDS)
                logger.warning("still waiting for %s: %s", sought, self._subscriber.reason)
            self._subscriber.wait(min(CHECK_SECONDS, deadline.remaining))

    def _apply(self, target: LoadTarget, newer_than: int | None) -> None:
        if newer_than is None:
            newer_than = self._version
        step = self._step
        if step:  # left by an interrupted call
            wanted = step.update.version > newer_than
            if wanted and step.load.target is target.model:
                self._complete(step)
                target.version = step.update.version
            else:
                self._complete(step, take=not wanted)
        for update in self._subscriber.updates:
            if update.taken:
                continue
            if update.problem:
                outcome = "refused" if update.refused else "failed"
                self.acknowledge(self.version, update.version, outcome, update.problem)
                update.take()
            elif update.version > newer_than:
                assert update.decoded is not None
                with normal_tensors():
                    weights = update.decoded.weights_for(target.model, keep_dtype=self._keep_dtype)
                load = Load(weights, target.model, update.decoded.metadata)
                self._step = _Step(update, load, target, self.version)
                self._complete(self._step)
            elif update.version <= self._version:
                update.take()

    def _complete_target(self, target: LoadTarget) -> None:
        if self._step and self._step.target is target:
            self._complete(self._step)

    def _complete(self, step: _Step, *, take: bool = True) -> None:
        """Load and acknowledge an update; without `take`, leave it for another model."""
        version = step.update.version
        try:
            step.load.run()
        except RlbrokerError as error:
            self.problem = f"version {version}: {error}"
            self.acknowledge(step.before, version, "failed", str(error))
            step.update.take()
            self._step = None
            raise
        step.target.version = version
        self._version, self.problem = version, ""
        self.acknowledge(step.before, version, "applied", "")
        if take:
            step.update.take()
        self._step = None
