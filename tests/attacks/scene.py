"""The scene of the attacks: a guarded server with a learner and an honest worker that must keep working."""

from __future__ import annotations

from typing import Any

import numpy as np
from conftest import wait_until
from guarded import RUN, GuardedServer

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys

KEYS = Keys(RUN)


class Scene:
    """An honest learner, the honest worker 1, and an attacker with the password of worker 0."""

    def __init__(self, server: GuardedServer) -> None:
        self.server = server
        self.learner = WorkerCommunicator(
            2, redis_url=server.url(f"{RUN}-learner"), run=RUN, lease_seconds=1.0, acknowledge="manual"
        )
        self.worker = WorkerClient(server.url(f"{RUN}-worker-1"), RUN, worker_id=1, host_cache=False)
        self.admin = server.client("admin")
        self.attacker: Any = server.client(f"{RUN}-worker-0")
        self.model: dict[str, Any] = {}
        self.sent = 0

    def join_as_attacker(self) -> WorkerClient:
        """Register the attacker as an ordinary worker, too."""
        return WorkerClient(self.server.url(f"{RUN}-worker-0"), RUN, worker_id=0, host_cache=False)

    def check_works(self) -> None:
        """Check that the honest worker applies a version, does a command, and that its batch is collected."""
        version = self.learner.send_model_weights({"w": np.full(8, float(self.sent))}).version
        wait_until("it is applied", lambda: self.worker.poll(self.model) and self.worker.version == version)
        assert self.model["w"].tolist() == [float(self.sent)] * 8
        command = self.learner.send_control_command("reset", worker_ids=[1])
        wait_until(
            "the command is done", lambda: [self.worker.poll()] and command.outcomes()[1].state == "done"
        )
        self.sent += 1
        self.worker.send_experiences({"number": self.sent})
        numbers = wait_until("its batch is collected", self.collect)
        assert numbers == [self.sent]
        assert self.worker.running

    def collect(self, worker: int = 1) -> list[Any]:
        """Collect and acknowledge batches; return the numbers in those of a worker, in order."""
        pairs = self.learner.collect_experiences(timeout=0.2)
        self.learner.acknowledge(pairs)
        return [batch["number"] for one, batch in pairs if one == worker]

    def close(self) -> None:
        self.worker.close()
        self.learner.cleanup()
