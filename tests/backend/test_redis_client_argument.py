"""A ready client instead of a URL: everything works with any protocol."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Reachable, wait_until

from rlbroker import WorkerClient, WorkerCommunicator


@pytest.mark.on_every_engine
@pytest.mark.parametrize(
    "settings",
    [{"protocol": 2}, {"protocol": 3}, {"protocol": 3, "legacy_responses": False}, {}],
    ids=str,
)
def test_a_run_works_with_any_client_of_redis_py(
    reachable: Reachable, run: str, settings: dict[str, Any]
) -> None:
    learner_client, worker_client = (reachable.new_client(**settings) for _ in range(2))
    with (
        WorkerCommunicator(1, redis_client=learner_client, run=run) as comm,
        WorkerClient(redis_client=worker_client, run=run) as client,
    ):
        comm.send_model_weights({"w": b"1"})
        assert client.load_weights({}, timeout=5.0) == 1
        client.send_experiences({"x": 1})
        assert [batch["x"] for _, batch in comm.collect_experiences(timeout=5.0)] == [1]
        command = comm.send_control_command("reset")
        wait_until("the worker has acknowledged the command", lambda: client.poll() or command.outcomes()[0])
        for _ in range(3):
            comm.send_model_weights({})
        wait_until("the worker runs version 4", lambda: client.poll({}) and client.version == 4)
        wait_until("the roster shows version 4", lambda: [info.version for info in comm.workers()] == [4])
        comm.collect_experiences()
        assert comm.get_queue_info()["counts"][0].delivered == 1
        wait_until("the ledger has every outcome", lambda: comm.missed_updates()[0].behind == 0)
    assert learner_client.ping()
    assert worker_client.ping()
    learner_client.close()
    worker_client.close()
