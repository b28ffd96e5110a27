"""Workers of one host share each download, and work the same without shared memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wait_until

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.errors import InvalidArgument
from rlbroker.weights.download import Downloader

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def model() -> torch.nn.Sequential:
    """Return a model that is large enough to be shared and to be sent as a delta."""
    return torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.BatchNorm1d(512), torch.nn.Linear(512, 64))


def equal(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that were downloaded."""
    found: list[str] = []
    download = Downloader._download

    def note(self: Downloader, manifest: Any, previous: Any, name: str) -> Any:
        found.append(name)
        return download(self, manifest, previous, name)

    monkeypatch.setattr(Downloader, "_download", note)
    return found


@pytest.fixture
def other_host(tmp_path: Path) -> Path:
    """A folder that stands for the shared memory of a host without a learner."""
    (tmp_path / "host").mkdir()
    return tmp_path / "host"


def test_workers_of_one_host_download_each_version_once(
    learner: Learner, worker: Worker, other_host: Path, downloads: list[str]
) -> None:
    comm, trained = learner(), model()
    clients = [worker(worker_id=number, host_cache=other_host) for number in range(3)]
    acting = [model() for _ in clients]

    def runs(client: WorkerClient, target: torch.nn.Module, version: int) -> bool:
        return client.poll(target) or client.version == version

    for version in range(1, 4):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(1e-6)
        comm.send_model_weights(trained.state_dict())
        for client, own in zip(clients, acting, strict=True):
            wait_until(f"version {version} runs", lambda: runs(client, own, version))  # noqa: B023
            assert equal(own, trained)
    assert len(downloads) == len(set(downloads)) == 3
    for client in clients:
        client.close()
    assert list(other_host.rglob("image-*")) == []


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
def test_a_worker_without_shared_memory_downloads_by_itself(
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


def test_a_host_cache_that_is_not_a_directory_is_refused(learner: Learner) -> None:
    with pytest.raises(InvalidArgument, match="host_cache must be True, False or a directory"):
        learner(host_cache=3)
