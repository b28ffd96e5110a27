"""The settings of one learner, checked before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from rlbroker.config import (
    MAX_SHARDS,
    MAX_WORKER_ID,
    MIN_TAKE_OVER_SECONDS,
    Acknowledge,
    RunSettings,
    SamplesPerInsert,
    check_choice,
    check_count,
    check_positive_int,
    check_positive_seconds,
    check_run_name,
)
from rlbroker.errors import InvalidArgument


@dataclass(frozen=True)
class LearnerOptions:
    """The settings of one learner, documented by `WorkerCommunicator`; those of the whole run are in `run_settings`."""

    num_workers: int
    run_settings: RunSettings
    acknowledge: Acknowledge
    max_staleness: int | None
    max_deliveries: int | None
    samples_per_insert: SamplesPerInsert | None
    learner_name: str
    publishes: bool
    take_over_seconds: float
    shards: int | None

    def __post_init__(self) -> None:
        """Raise `InvalidArgument` for a setting that cannot work."""
        for name in ("num_workers", "max_deliveries", "shards"):
            if name == "num_workers" or getattr(self, name) is not None:
                object.__setattr__(self, name, check_positive_int(name, getattr(self, name)))
        if self.max_staleness is not None:
            object.__setattr__(self, "max_staleness", check_count("max_staleness", self.max_staleness))
        object.__setattr__(
            self, "take_over_seconds", check_positive_seconds("take_over_seconds", self.take_over_seconds)
        )
        if self.num_workers > MAX_WORKER_ID + 1:
            raise InvalidArgument(
                f"num_workers must be at most {MAX_WORKER_ID + 1:,}; got {self.num_workers}"
            )
        check_choice("acknowledge", self.acknowledge, get_args(Acknowledge))
        if not isinstance(self.samples_per_insert, SamplesPerInsert | None):
            raise InvalidArgument(
                f"samples_per_insert must be a SamplesPerInsert; got {type(self.samples_per_insert).__name__}"
            )
        check_run_name(self.learner_name, what="learner_name")
        if self.take_over_seconds < MIN_TAKE_OVER_SECONDS:
            raise InvalidArgument(
                f"take_over_seconds must be at least {MIN_TAKE_OVER_SECONDS:g}, because a learner cannot renew its "
                f"pending batches more often; got {self.take_over_seconds!r}"
            )
        if self.shards is not None and self.shards > MAX_SHARDS:
            raise InvalidArgument(f"shards must be at most {MAX_SHARDS}; got {self.shards}")
