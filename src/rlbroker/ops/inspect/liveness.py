"""Who of a run is on one host, and whether it lives: what a container's health check asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import parsing, server_seconds, text_fields
from rlbroker.config import RunSettings
from rlbroker.membership.incarnations import incarnation_command, incarnations_from, worker_numbers
from rlbroker.ops.inspect.runs import learner_silence, learner_state
from rlbroker.types import Liveness


@dataclass(frozen=True)
class Present:
    """The learner, or a worker, of a run on a host.

    Attributes:
        worker_id: None for the learner.
        state: `alive`; `away` when it has been silent for longer than a lease; `ended`: a learner that was cleaned up.
        last_seen_seconds: age of its last sign of life, by the server's clock; None if it never gave one.
    """

    worker_id: int | None
    state: Liveness | Literal["ended", "none"]
    last_seen_seconds: float | None

    @property
    def name(self) -> str:
        """What people call it."""
        return "learner" if self.worker_id is None else f"worker {self.worker_id}"


def find_present(connection: Connection, run: str, host: str) -> list[Present]:
    """Give the learner of a run, if it is on this host, and the workers that are, by id.

    A further learner, which only collects, does not say where it is.

    Args:
        connection: way to the server.
        run: its name; a run that is not there has nobody.
        host: as the host calls itself.

    Raises:
        WireError: what is stored is not what learners and workers write.
        PeerError: the server refused, or could not be reached in time.
    """
    keys = Keys(run)
    clock, meta_reply, names = connection.execute_all(
        [("TIME",), ("HGETALL", keys.meta), ("SMEMBERS", keys.workers)]
    )
    now, found = server_seconds(clock), list[Present]()
    with parsing(keys.meta):
        meta = text_fields(meta_reply)
        lease_seconds = RunSettings.from_fields(meta).lease_seconds
        if meta.get("learner_host") == host:
            silent_seconds = learner_silence(meta, now)
            found.append(Present(None, learner_state(meta, silent_seconds), silent_seconds))
    ids = worker_numbers(names)
    replies = connection.ask([("HGET", keys.heartbeat(worker), "host") for worker in ids])
    # A worker's user may read its own keys only.
    here = [worker for worker, said in zip(ids, replies, strict=True) if said == host.encode()]
    lives = incarnations_from(here, connection.ask([incarnation_command(keys, worker) for worker in here]))
    for worker, life in lives.items():
        if life.member:
            silent_seconds = life.silent_seconds(now)
            state: Liveness = "alive" if silent_seconds < lease_seconds else "away"
            found.append(Present(worker, state, silent_seconds))
    return found
