"""Runs with a signing key: everything works as without one, and a process without the key learns why it is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Reachable, Server, wait_until
from executable import rlbroker

from rlbroker import DeadlineExceeded, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import text_fields

KEY = "k" * 40
OTHER = "another key of 32 bytes or more, shared by no process"

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def apply(client: WorkerClient, model: dict[str, Any], version: int) -> None:
    """Let a worker poll until it runs a version."""
    wait_until(f"version {version} is applied", lambda: (client.poll(model), client.version == version)[1])


@pytest.mark.parametrize(("size", "compression"), [(10, True), (300_000, True), (600_000, False)])
def test_signed_weights_arrive_in_full_and_as_deltas(
    learner: Learner, worker: Worker, tmp_path: Path, size: int, compression: bool
) -> None:
    comm = learner(signing_key=KEY, host_cache=tmp_path / "learner")
    weights = {"w": np.random.default_rng(1).normal(size=size).astype(np.float32)}
    early = worker(signing_key=KEY.encode(), host_cache=False)
    late = [worker(signing_key=KEY, host_cache=tmp_path) for _ in range(2)]  # they share one download
    model: dict[str, Any] = {}
    for number in range(1, 5):
        weights["w"][: 1 + size // 100] += 1.0
        receipt = comm.send_model_weights(weights, compression_enabled=compression)
        apply(early, model, number)
        assert np.array_equal(model["w"], weights["w"])
    assert receipt.kind == ("delta" if size == 300_000 else "full")
    for client in late:
        found: dict[str, Any] = {}
        assert client.load_weights(found, timeout=5.0) == 4
        assert np.array_equal(found["w"], weights["w"])
    assert not [
        one for missed in comm.missed_updates().values() for one in missed.records if one.why == "refused"
    ]


@pytest.mark.on_every_engine
def test_signed_commands_are_done_and_sent_again_to_a_server_that_lost_them(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    """A later learner sends them too, with their signatures, to workers that have not acknowledged them."""
    first = learner(signing_key=KEY)
    received: list[Any] = []
    clients = [worker(number, signing_key=KEY) for number in range(2)]
    for client in clients:
        client.on_command("level", received.append)
    command = first.send_control_command("level", {"to": 1}, expires=30.5)
    wait_until("one worker has done it", lambda: clients[0].poll() or command.outcomes()[0].state == "done")
    first.cleanup(stop_workers=False)
    second = learner(signing_key=KEY)
    server.client.flushall()
    wait_until("the run is back", lambda: server.client.exists(keys.control))
    wait_until("the other worker has done it", lambda: clients[1].poll() or len(received) == 2)
    wait_until(
        "it is settled",
        lambda: str(server.client.hget(keys.outcomes(command.id), "1"), "ascii") == "done",
    )
    clients[0].poll()
    assert received == [{"to": 1}, {"to": 1}]
    assert second.missed_updates()[1].commands == 0


def test_a_worker_with_a_key_reports_that_its_learner_has_none(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker(signing_key=KEY)
    comm.send_model_weights({"w": np.zeros(3)})
    reason = "the learner does not sign, but this process requires signatures; give the learner the same key"
    with pytest.raises(DeadlineExceeded, match=reason):
        client.load_weights({}, timeout=0.5)
    wait_until("a heartbeat reports it", lambda: reason in comm.workers()[0].problem)
    command = comm.send_control_command("stop")
    wait_until("it is acknowledged", lambda: client.poll({}) or command.outcomes()[0].state == "failed")
    assert "refused: its signature is missing" in str(command.outcomes()[0])
    assert client.running
    missed = comm.missed_updates()[0]
    assert {"weights", "command"} == {one.what for one in missed.records}
    comm.cleanup(stop_workers=False)
    learner(signing_key=KEY).send_model_weights({"w": np.ones(3)})  # a learner with the key
    model: dict[str, Any] = {}
    wait_until("version 2 runs", lambda: client.poll(model) and client.version == 2)
    assert model["w"].tolist() == [1, 1, 1]


def test_a_worker_without_a_key_works_and_warns_once_that_it_checks_no_signatures(
    learner: Learner, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    comm, client = learner(signing_key=KEY), worker()
    model: dict[str, Any] = {}
    for number in (1, 2):
        comm.send_model_weights({"w": np.zeros(3)})
        apply(client, model, number)
    comm.send_control_command("stop")
    wait_until("it stops", lambda: client.poll() or not client.running)
    assert caplog.text.count("this worker does not check the signatures") == 1


def test_a_restarted_learner_continues_from_weights_that_are_signed_with_its_key(
    learner: Learner, worker: Worker
) -> None:
    learner(signing_key=KEY).send_model_weights({"w": np.zeros(3)})
    restarted = learner(signing_key=KEY)
    assert restarted.version == 1
    assert restarted.send_model_weights({"w": np.ones(3)}).version == 2
    assert worker(signing_key=KEY).load_weights({}, timeout=5.0) == 2


@pytest.mark.on_every_engine
@pytest.mark.parametrize("before", [None, OTHER])
def test_a_running_run_can_get_a_key(
    server: Server, learner: Learner, worker: Worker, keys: Keys, before: str | None
) -> None:
    """Versions continue; weights stored without this key are no base of a delta, and expire."""
    first = learner(signing_key=before)
    first.send_model_weights({"w": np.zeros(30_000)})
    first.send_model_weights({"w": np.zeros(30_000)})
    old = list(server.client.scan_iter(keys.chunk("*", 0)))
    first.cleanup()
    comm = learner(signing_key=KEY)
    receipt = comm.send_model_weights({"w": np.ones(30_000)})
    assert (receipt.version, receipt.kind) == (3, "full")
    assert all(server.client.ttl(name) > 0 for name in old)
    assert worker(signing_key=KEY).load_weights({}, timeout=5.0) == 3


def test_a_learner_without_a_key_removes_old_signatures_when_it_publishes(
    server: Server, learner: Learner, keys: Keys
) -> None:
    learner(signing_key=KEY).send_model_weights({"w": np.zeros(3)})
    comm = learner()
    comm.send_model_weights({"w": np.zeros(3)})
    assert text_fields(server.client.hgetall(keys.weights))["signatures"].startswith("1-")
    comm.send_model_weights({"w": np.zeros(3)})
    assert text_fields(server.client.hgetall(keys.weights))["signatures"] == ""


def test_the_command_line_signs_and_checks_with_the_key_of_the_environment(
    reachable: Reachable, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    own.write_text(KEY + "\n")
    other.write_text(OTHER)
    monkeypatch.setenv("RLBROKER_SIGNING_KEY_FILE", str(own))
    with (
        WorkerCommunicator(1, redis_url=reachable.url, run=run) as comm,
        WorkerClient(reachable.url, run=run) as client,
    ):
        comm.send_model_weights({"w": np.zeros(3)})
        finished = threading.Event()
        polling = threading.Thread(
            target=lambda: [client.poll() for _ in iter(lambda: finished.wait(0.01), True)]
        )
        polling.start()

        def call(key: Path, *words: str) -> Any:
            return rlbroker(*words, "--run", run, "--url", reachable.url, RLBROKER_SIGNING_KEY_FILE=str(key))

        try:
            done = call(own, "control", "send", "reset")
            assert done.returncode == 0, done.stderr
            failed = call(other, "control", "send", "reset")
            assert failed.returncode == 1
            assert "signed with another key" in " ".join(failed.stdout.split())
        finally:
            finished.set()
            polling.join()
        file = tmp_path / "w.npz"
        refused = call(other, "weights", "pull", "--output", str(file))
        assert refused.returncode == 2
        assert "it was signed with another key" in refused.stderr
        assert not file.exists()
        assert "signed with another key" in call(other, "weights", "show").stderr
        assert call(own, "weights", "pull", "--output", str(file)).returncode == 0
        assert [one.why for one in comm.missed_updates()[0].records] == ["refused"]
