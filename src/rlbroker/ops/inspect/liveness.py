"""Whether the learners and workers of a run are alive, and which of them run on a given host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import parsing, server_seconds, stored_integer, stored_seconds, text_fields
from rlbroker.config import RunSettings
from rlbroker.membership.incarnations import incarnation_command, parse_incarnations, parse_worker_ids
from rlbroker.membership.joined_run import end_epoch
from rlbroker.types import Liveness

LearnerState = Liveness | Literal["ended", "none"]


@dataclass(frozen=True)
class LearnerStatus:
    """The latest learner of a run.

    Attributes:
        epoch: its incarnation.
        state: `alive`; `ended` once the run has ended, unless a command ended it and the learner goes on; `away` after
            a lease without a heartbeat.
        last_seen_seconds: age of its last heartbeat by the server's clock; None without any.
        others: further learners with a heartbeat within their lease; they only collect.
        run_ended: whether the run has ended: its workers are told to stop.
    """

    epoch: int
    state: LearnerState
    host: str
    pid: int
    last_seen_seconds: float | None
    others: int = 0
    run_ended: bool = False


@dataclass(frozen=True)
class Participant:
    """The learner, or a worker, of a run on one host.

    Attributes:
        worker_id: None for the learner.
        state: `alive`; `away` after a lease without a heartbeat; `ended` once the run has ended.
        last_seen_seconds: age of the last heartbeat by the server's clock; None without any.
    """

    worker_id: int | None
    state: LearnerState
    last_seen_seconds: float | None

    @property
    def name(self) -> str:
        """The name for people: `learner` or `worker 3`."""
        return "learner" if self.worker_id is None else f"worker {self.worker_id}"


def find_participants(connection: Connection, run: str, host: str) -> list[Participant]:
    """Return the learner of a run if it is on this host, and the workers on this host, by id.

    A further learner, which only collects, does not record its host. A run that does not exist has no participants.

    Raises:
        WireError: the run's keys hold what no learner or worker writes.
    """
    keys = Keys(run)
    clock, meta_reply, names = connection.execute_all(
        [("TIME",), ("HGETALL", keys.meta), ("SMEMBERS", keys.workers)]
    )
    now, participants = server_seconds(clock), list[Participant]()
    with parsing(keys.meta):
        meta = text_fields(meta_reply)
        lease_seconds = RunSettings.from_fields(meta).lease_seconds
        learner = parse_learner(meta, now)
        if learner.host == host:
            participants.append(Participant(None, learner.state, learner.last_seen_seconds))
    ids = parse_worker_ids(names)
    replies = connection.execute_all(
        [("HGET", keys.heartbeat(worker), "host") for worker in ids], strict=False
    )
    # The user of a worker may read only that worker's keys: the other replies are errors.
    local = [worker for worker, reply in zip(ids, replies, strict=True) if reply == host.encode()]
    incarnations = parse_incarnations(
        local, connection.execute_all([incarnation_command(keys, worker) for worker in local], strict=False)
    )
    for worker, incarnation in incarnations.items():
        if incarnation.member:
            silent_seconds = incarnation.silent_seconds(now)
            state: Liveness = "alive" if silent_seconds < lease_seconds else "away"
            participants.append(Participant(worker, state, silent_seconds))
    return participants


def parse_learner(meta: dict[str, str], now: float) -> LearnerStatus:
    """Return the latest learner from the run's `meta`, at this time of the server; its epoch is 0 if there is none."""
    lease_seconds = RunSettings.from_fields(meta).lease_seconds
    silent_seconds = max(0.0, now - stored_seconds(meta["learner_seen"])) if "learner_seen" in meta else None
    fresh = silent_seconds is not None and silent_seconds < lease_seconds
    run_ended = end_epoch(meta.get("ended", "")) == stored_integer(meta.get("epoch"), 0)
    state: LearnerState = "alive" if fresh else "away"
    if not meta:
        state = "none"
    elif run_ended and not (fresh and meta.get("ended_by") == "command"):
        state = "ended"
    return LearnerStatus(
        epoch=stored_integer(meta.get("epoch"), 0),
        state=state,
        host=meta.get("learner_host", ""),
        pid=stored_integer(meta.get("learner_pid"), 0),
        last_seen_seconds=silent_seconds,
        others=sum(silence < lease_seconds for silence in other_learners_silent_seconds(meta, now)),
        run_ended=run_ended,
    )


def other_learners_silent_seconds(meta: dict[str, str], now: float) -> list[float]:
    """Return the seconds since the last heartbeat of each further learner; these only collect."""
    epoch = meta.get("epoch")
    return [
        max(0.0, now - stored_seconds(seen))
        for field, seen in meta.items()
        if field.startswith("seen:") and meta.get(f"learner:{field.removeprefix('seen:')}") != epoch
    ]
