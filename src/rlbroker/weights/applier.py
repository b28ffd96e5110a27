"""The last step of a weight update: decoded versions are loaded into the worker's model and acknowledged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlbroker.weights.loading import load
from rlbroker.weights.subscriber import Subscriber
from rlbroker.weights.update_queue import WeightsUpdate

#: Acknowledges a version, given the version before, the version, the outcome, and a detail.
AcknowledgeVersion = Callable[[int, int, str, str], None]


class WeightsApplier:
    """Loads versions into models and remembers the last one. The caller holds a lock while it calls `apply`.

    Attributes:
        version: the version that was applied last; 0 before the first.
        problem: why the newest version could not be loaded into the model; empty if it was.
    """

    def __init__(self, subscriber: Subscriber, *, keep_dtype: bool) -> None:
        """Begin without a version.

        With `keep_dtype`, an empty dictionary gets weights in the dtypes in which they were sent.
        """
        self._subscriber, self._keep_dtype = subscriber, keep_dtype
        self.version = 0
        self.problem = ""

    def apply(
        self,
        updates: Sequence[WeightsUpdate],
        model: Any,
        acknowledge: AcknowledgeVersion,
        *,
        again: bool = False,
    ) -> bool:
        """Load updates in order, and acknowledge the outcome of each. Return whether one was loaded.

        With `again`, load a version that was applied before, for another model.

        Raises:
            WeightsMismatch: the weights do not fit the model.
        """
        loaded = False
        for update in updates:
            if update.version <= self.version and not again:
                continue
            if update.problem:
                outcome = "refused" if update.refused else "failed"
                acknowledge(self.version, update.version, outcome, update.problem)
                continue
            try:
                assert update.decoded is not None
                load(update.decoded.weights_for(model, keep_dtype=self._keep_dtype), model)
            except Exception as error:
                self.problem = f"version {update.version}: {error}"
                acknowledge(self.version, update.version, "failed", str(error))
                raise
            except BaseException:  # Ctrl-C: the model may hold a part of the version, so fetch it again
                self._subscriber.fetch_again()
                raise
            before, self.version, self.problem = self.version, update.version, ""
            acknowledge(before, update.version, "applied", "")
            loaded = True
        return loaded
