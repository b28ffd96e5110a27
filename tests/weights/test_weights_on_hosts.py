"""Weights of one host: downloaded once, sent without waiting, in a lower precision, and without a cache too."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Server, wait_until

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.errors import Closed, ConnectionFailed, DeadlineExceeded, InvalidArgument, UnsupportedType
from rlbroker.weights.download import Downloader
from rlbroker.weights.upload import Uploader

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def model() -> torch.nn.Sequential:
    """Large enough to be shared and to be sent as a difference."""
    return torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.BatchNorm1d(512), torch.nn.Linear(512, 64))


def weight(network: torch.nn.Sequential) -> torch.Tensor:
    found = network[0].weight
    assert isinstance(found, torch.Tensor)
    return found


def equal(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def apply(client: WorkerClient, own: torch.nn.Module, version: int) -> None:
    wait_until(f"version {version} runs", lambda: client.poll(own) or client.version == version)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was downloaded, by the version's image."""
    found: list[str] = []
    download = Downloader._download

    def noted(self: Downloader, pointer: Any, held: Any, name: str) -> Any:
        found.append(name)
        return download(self, pointer, held, name)

    monkeypatch.setattr(Downloader, "_download", noted)
    return found


@pytest.fixture
def other_host(tmp_path: Path) -> Path:
    """What stands for the shared memory of a host without a learner."""
    (tmp_path / "host").mkdir()
    return tmp_path / "host"


def test_workers_of_one_host_download_each_version_once(
    learner: Learner, worker: Worker, other_host: Path, downloads: list[str]
) -> None:
    comm, trained = learner(), model()
    clients = [worker(worker_id=number, host_cache=other_host) for number in range(3)]
    acting = [model() for _ in clients]
    for version in range(1, 4):
        with torch.no_grad():
            weight(trained).add_(1e-6)
        comm.send_model_weights(trained.state_dict())
        for client, own in zip(clients, acting, strict=True):
            apply(client, own, version)
            assert equal(own, trained)
    assert len(downloads) == len(set(downloads)) == 3
    for client in clients:
        client.close()
    assert list((other_host).rglob("image-*")) == []


def test_workers_beside_the_learner_download_nothing(
    learner: Learner, worker: Worker, other_host: Path, downloads: list[str]
) -> None:
    comm, trained, acting = learner(host_cache=other_host), model(), model()
    client = worker(host_cache=str(other_host))
    comm.send_model_weights(trained.state_dict())
    client.load_weights(acting)
    assert equal(acting, trained)
    assert downloads == []


@pytest.mark.parametrize("where", ["nowhere", "off", "file"])
def test_a_worker_without_shared_memory_just_works(
    learner: Learner, worker: Worker, tmp_path: Path, where: str, downloads: list[str]
) -> None:
    (tmp_path / "file").touch()
    comm, trained, acting = learner(), model(), model()
    client = worker(host_cache=False if where == "off" else tmp_path / where)
    for _ in range(2):
        comm.send_model_weights(trained.state_dict())
        client.load_weights(acting)
        assert equal(acting, trained)
    assert len(downloads) == 2


def test_the_environment_turns_the_cache_off(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch, downloads: list[str]
) -> None:
    monkeypatch.setenv("RLBROKER_HOST_CACHE", "off")
    comm, trained, acting = learner(), model(), model()
    comm.send_model_weights(trained.state_dict())
    worker().load_weights(acting)
    assert len(downloads) == 1


def test_a_place_for_the_cache_that_is_none_is_refused(learner: Learner) -> None:
    with pytest.raises(InvalidArgument, match="host_cache must be True, False or a directory"):
        learner(host_cache=3)


def test_what_fills_a_dictionary_is_the_users_own(learner: Learner, worker: Worker) -> None:
    comm, client, trained = learner(), worker(), model()
    comm.send_model_weights(trained.state_dict())
    first: dict[str, torch.Tensor] = {}
    client.load_weights(first)
    for tensor in first.values():
        tensor.zero_()
    comm.send_model_weights(trained.state_dict())
    second: dict[str, torch.Tensor] = {}
    wait_until("version 2 is loaded", lambda: client.poll(second))
    assert torch.equal(second["0.weight"], weight(trained))
    assert not first["0.weight"].any()


def test_weights_that_are_sent_without_waiting_may_change_at_once(
    learner: Learner, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, trained, acting = learner(), model(), model()
    go_on = threading.Event()
    store = Uploader.store

    def later(self: Uploader, *arguments: Any, **settings: Any) -> Any:
        assert go_on.wait(10)
        return store(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Uploader, "store", later)
        before = model()
        before.load_state_dict(trained.state_dict())
        receipt = comm.send_model_weights(trained.state_dict(), wait=False)
        assert not receipt.done
        assert receipt
        with torch.no_grad():
            weight(trained).zero_()
        with pytest.raises(DeadlineExceeded, match="not out after 0"):
            receipt.wait(0.01)
        go_on.set()
        assert receipt.wait(10).version == 1
    assert receipt.done
    worker().load_weights(acting)
    assert equal(acting, before)


def test_cleanup_waits_for_what_is_under_way(learner: Learner, worker: Worker) -> None:
    comm, trained, acting = learner(), model(), model()
    receipts = [comm.send_model_weights(trained.state_dict(), wait=False) for _ in range(3)]
    comm.cleanup()
    assert [receipt.version for receipt in receipts] == [1, 2, 3]
    worker().load_weights(acting)
    assert equal(acting, trained)


def test_a_receipt_says_that_weights_could_not_be_sent(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Uploader, *arguments: Any, **settings: Any) -> None:
        raise ConnectionFailed("the server is away")

    comm = learner()
    with monkeypatch.context() as patch:
        patch.setattr(Uploader, "store", fail)
        receipt = comm.send_model_weights(model().state_dict(), wait=False)
        with pytest.raises(ConnectionFailed, match="the server is away"):
            receipt.wait(10)
        with pytest.raises(ConnectionFailed, match="the server is away"):
            _ = receipt.version
    assert not receipt
    wait_until("it is in the log", lambda: "were not published: the server is away" in caplog.text)
    assert comm.send_model_weights(model().state_dict()).version == 1


def test_what_cannot_travel_is_said_at_once_also_without_waiting(learner: Learner) -> None:
    comm = learner()
    with pytest.raises(UnsupportedType, match="optimizer"):
        comm.send_model_weights({"optimizer": object()}, wait=False)
    assert comm.send_model_weights({"step": 1}).version == 1


def test_after_cleanup_nothing_is_sent_without_waiting(learner: Learner) -> None:
    comm = learner()
    comm.cleanup()
    with pytest.raises(Closed):
        comm.send_model_weights({"step": 1}, wait=False)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_lower_precision_is_cast_back_unless_told_otherwise(
    learner: Learner, worker: Worker, dtype: Any
) -> None:
    comm, trained, acting = learner(), model(), model()
    array = np.linspace(0, 1, 7, dtype=np.float32)
    receipt = comm.send_model_weights({**trained.state_dict(), "array": array}, dtype=dtype)
    assert receipt.raw_bytes < sum(value.nbytes for value in trained.state_dict().values()) * 0.51
    rounded = {
        name: value.bfloat16().float() if value.is_floating_point() else value
        for name, value in trained.state_dict().items()
    }
    received: dict[str, Any] = {}
    client = worker()
    client.load_weights(received)
    assert np.array_equal(received.pop("array"), torch.from_numpy(array).bfloat16().float().numpy())
    for name, value in rounded.items():
        assert received[name].dtype == value.dtype
        assert torch.equal(received[name], value)
    kept: dict[str, Any] = {}
    worker(keep_dtype=True).load_weights(kept)
    assert kept["0.weight"].dtype == torch.bfloat16
    comm.send_model_weights(trained.state_dict(), dtype=dtype)
    wait_until("it runs in the model", lambda: client.poll(acting))
    assert weight(acting).dtype == torch.float32
    assert torch.equal(weight(acting), rounded["0.weight"])


def test_a_precision_that_there_is_not_is_refused(learner: Learner) -> None:
    comm = learner()
    for dtype in ("int8", "complex64", "float31", "qint8", ""):
        with pytest.raises(InvalidArgument, match="dtype"):
            comm.send_model_weights({"w": torch.ones(3)}, dtype=dtype)
    assert comm.version == 0


def test_small_changes_cost_few_bytes(server: Server, learner: Learner, worker: Worker) -> None:
    comm, trained, acting = learner(), model(), model()
    client = worker()
    full = comm.send_model_weights(trained.state_dict())
    client.load_weights(acting)
    with torch.no_grad():
        weight(trained)[0] += 1
    delta = comm.send_model_weights(trained.state_dict())
    assert (full.kind, delta.kind, delta.base) == ("full", "delta", 1)
    assert delta.stored_bytes < full.stored_bytes / 20
    wait_until("it runs", lambda: client.poll(acting))
    assert equal(acting, trained)
    raw = comm.send_model_weights(trained.state_dict(), compression_enabled=False)
    assert (raw.kind, raw.raw_bytes < raw.stored_bytes) == ("full", True)
