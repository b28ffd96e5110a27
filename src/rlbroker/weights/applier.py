"""The last step of a weight update: decoded versions are loaded into the worker's model and acknowledged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlbroker.errors import RlbrokerError
from rlbroker.weights.loading import Load
from rlbroker.weights.target_memory import normal_tensors
from rlbroker.weights.update_queue import WeightsUpdate

#: Acknowledges a version, given the version before, the version, the outcome, and a detail.
AcknowledgeVersion = Callable[[int, int, str, str], None]


@dataclass(frozen=True)
class _Step:
    """An update that is being loaded, and the version before it."""

    update: WeightsUpdate
    load: Load
    before: int


class WeightsApplier:
    """Loads versions into models and remembers the last one. The caller holds a lock while it calls `apply`.

    An interrupted call leaves its step behind, and the next call completes that first. Each part of a step may be done
    again: the ledger ignores a second acknowledgement of a version.

    Attributes:
        acknowledge: acknowledges a version; set when the worker has joined, before the first `apply`.
        problem: why the newest version could not be loaded into the model; empty if it was.
    """

    acknowledge: AcknowledgeVersion

    def __init__(self, *, keep_dtype: bool) -> None:
        """Begin without a version.

        With `keep_dtype`, an empty dictionary gets weights in the dtypes in which they were sent.
        """
        self._keep_dtype = keep_dtype
        self._step: _Step | None = None
        self._version = 0
        self.problem = ""

    @property
    def version(self) -> int:
        """The version that was applied last; 0 before the first."""
        step = self._step
        return step.update.version if step and step.load.done else self._version

    def apply(self, updates: Sequence[WeightsUpdate], model: Any, *, again: bool = False) -> bool:
        """Load updates in order, and acknowledge the outcome of each. Return whether the model got one.

        With `again`, load a version that was applied before, for another model.

        Raises:
            WeightsMismatch: the weights do not fit the model.
        """
        loaded = False
        if self._step:  # left by an interrupted call
            loaded = self._step.load.target is model
            self._complete(self._step, take=loaded or not again)
        for update in updates:
            if update.taken:
                continue
            if update.problem:
                outcome = "refused" if update.refused else "failed"
                self.acknowledge(self.version, update.version, outcome, update.problem)
            elif update.version > self.version or again:
                assert update.decoded is not None
                with normal_tensors():
                    weights = update.decoded.weights_for(model, keep_dtype=self._keep_dtype)
                self._step = _Step(update, Load(weights, model, update.decoded.metadata), self.version)
                self._complete(self._step)
                loaded = True
                continue
            update.take()
        return loaded

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
        self._version, self.problem = version, ""
        self.acknowledge(step.before, version, "applied", "")
        if take:
            step.update.take()
        self._step = None
