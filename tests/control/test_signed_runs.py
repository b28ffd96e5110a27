"""Runs whose learner and workers share a signing key: all works as ever, and who lacks the key is told so."""

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
OTHER = "another key of 32 bytes or more, which is nobody's"

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def runs(client: WorkerClient, model: dict[str, Any], version: int) -> None:
    wait_until(f"version {version} runs", lambda: (client.poll(model), client.version == version)[1])


@pytest.mark.parametrize(("size", "compression"), [(10, True), (300_000, True), (600_000, False)])
def test_signed_weights_arrive_whole_and_as_differences(
    learner: Learner, worker: Worker, tmp_path: Path, size: int, compression: bool
) -> None:
    comm = learner(signing_key=KEY, host_cache=tmp_path / "learner")
    weights = {"w": np.random.default_rng(1).normal(size=size).astype(np.float32)}
    early = worker(signing_key=KEY.encode(), host_cache=False)
    late = [worker(signing_key=KEY, host_cache=tmp_path) for _ in range(2)]  # these share a download
    model: dict[str, Any] = {}
    for number in range(1, 5):
        weights["w"][: 1 + size // 100] += 1.0
        receipt = comm.send_model_weights(weights, compression_enabled=compression)
        runs(early, model, number)
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
def test_signed_commands_are_obeyed_and_sent_again_to_a_server_that_lost_them(
    server: Server, learner: Learner, worker: Worker, keys: Keys
) -> None:
    """To those of whom no answer is known; and a later learner knows the signature too."""
    first = learner(signing_key=KEY)
    told: list[Any] = []
    clients = [worker(number, signing_key=KEY) for number in range(2)]
    for client in clients:
        client.on_command("level", told.append)
    command = first.send_control_command("level", {"to": 1}, expires=30.5)
    wait_until("one obeys", lambda: clients[0].poll() or command.outcomes()[0].state == "done")
    first.cleanup(over=False)
    second = learner(signing_key=KEY)
    server.client.flushall()
    wait_until("the run is back", lambda: server.client.exists(keys.control))
    wait_until("the other obeys", lambda: clients[1].poll() or len(told) == 2)
    wait_until(
        "it is settled",
        lambda: str(server.client.hget(keys.outcomes(command.id), "1"), "ascii") == "done",
    )
    clients[0].poll()
    assert told == [{"to": 1}, {"to": 1}]
    assert second.missed_updates()[1].commands == 0


def test_a_worker_with_a_key_says_what_its_learner_lacks(learner: Learner, worker: Worker) -> None:
    comm, client = learner(), worker(signing_key=KEY)
    comm.send_model_weights({"w": np.zeros(3)})
    why = "the learner signs nothing; this process wants signatures: give the learner the same key"
    with pytest.raises(DeadlineExceeded, match=why):
        client.load_weights({}, timeout=0.5)
    wait_until("it tells", lambda: why in comm.workers()[0].problem)
    command = comm.send_control_command("stop")
    wait_until("it answers", lambda: client.poll({}) or command.outcomes()[0].state == "failed")
    assert "refused: its signature is missing" in str(command.outcomes()[0])
    assert client.running
    missed = comm.missed_updates()[0]
    assert {"weights", "command"} == {one.what for one in missed.records}
    comm.cleanup()
    learner(signing_key=KEY).send_model_weights(
        {"w": np.ones(3)}
    )  # the learner gets the key, and all is well
    model: dict[str, Any] = {}
    wait_until("version 2 runs", lambda: client.poll(model) and client.version == 2)
    assert model["w"].tolist() == [1, 1, 1]


def test_a_worker_without_a_key_works_and_says_once_that_it_checks_nothing(
    learner: Learner, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    comm, client = learner(signing_key=KEY), worker()
    model: dict[str, Any] = {}
    for number in (1, 2):
        comm.send_model_weights({"w": np.zeros(3)})
        runs(client, model, number)
    comm.send_control_command("stop")
    wait_until("it stops", lambda: client.poll() or not client.running)
    assert caplog.text.count("this worker does not check that") == 1


def test_a_learner_goes_on_from_what_is_signed_with_its_key(learner: Learner, worker: Worker) -> None:
    learner(signing_key=KEY).send_model_weights({"w": np.zeros(3)})
    again = learner(signing_key=KEY)
    assert again.version == 1
    assert again.send_model_weights({"w": np.ones(3)}).version == 2
    assert worker(signing_key=KEY).load_weights({}, timeout=5.0) == 2


@pytest.mark.on_every_engine
@pytest.mark.parametrize("before", [None, OTHER])
def test_a_run_gets_a_key_while_it_goes_on(
    server: Server, learner: Learner, worker: Worker, keys: Keys, before: str | None
) -> None:
    """Numbers go on, and what was stored without this key is neither built upon nor left behind."""
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


def test_a_learner_without_a_key_leaves_no_signature_for_what_it_publishes(
    server: Server, learner: Learner, keys: Keys
) -> None:
    learner(signing_key=KEY).send_model_weights({"w": np.zeros(3)})
    comm = learner()
    comm.send_model_weights({"w": np.zeros(3)})
    assert text_fields(server.client.hgetall(keys.weights))["signatures"].startswith("1-")
    comm.send_model_weights({"w": np.zeros(3)})
    assert text_fields(server.client.hgetall(keys.weights))["signatures"] == ""


def test_commands_of_people_sign_and_check_with_the_key_that_the_environment_names(
    reachable: Reachable, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_text(KEY + "\n")
    theirs.write_text(OTHER)
    monkeypatch.setenv("RLBROKER_SIGNING_KEY_FILE", str(ours))
    with (
        WorkerCommunicator(1, redis_url=reachable.url, run=run) as comm,
        WorkerClient(reachable.url, run=run) as client,
    ):
        comm.send_model_weights({"w": np.zeros(3)})
        over = threading.Event()
        obeying = threading.Thread(
            target=lambda: [client.poll() for _ in iter(lambda: over.wait(0.01), True)]
        )
        obeying.start()

        def call(key: Path, *words: str) -> Any:
            return rlbroker(*words, "--run", run, "--url", reachable.url, RLBROKER_SIGNING_KEY_FILE=str(key))

        try:
            done = call(ours, "control", "send", "reset")
            assert done.returncode == 0, done.stderr
            failed = call(theirs, "control", "send", "reset")
            assert failed.returncode == 1
            assert "signed with another key" in " ".join(failed.stdout.split())
        finally:
            over.set()
            obeying.join()
        file = tmp_path / "w.npz"
        refused = call(theirs, "weights", "pull", "--output", str(file))
        assert refused.returncode == 2
        assert "it was signed with another key" in refused.stderr
        assert not file.exists()
        assert "signed with another key" in call(theirs, "weights", "show").stderr
        assert call(ours, "weights", "pull", "--output", str(file)).returncode == 0
        assert [one.why for one in comm.missed_updates()[0].records] == ["refused"]
