"""Weights on a GPU: workers get the values of the call, while training continues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import RealServer, wait_until

from rlbroker import WorkerClient, WorkerCommunicator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


def model() -> torch.nn.Sequential:
    layers = [torch.nn.Linear(1024, 1024), torch.nn.BatchNorm1d(1024), torch.nn.Linear(1024, 1024)]
    return torch.nn.Sequential(*layers).cuda()


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_full_versions_and_deltas_have_the_bits_of_the_gpu(
    real_server: RealServer, learner: Learner, worker: Worker, wait: bool, dtype: str | None
) -> None:
    comm, client, trained = learner(), worker(), model()
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-5)
    received: dict[str, Any] = {}
    kinds = []
    for version in range(1, 5):
        expected = {
            name: (value.to(torch.bfloat16) if dtype and value.is_floating_point() else value).cpu().clone()
            for name, value in trained.state_dict().items()
        }
        receipt = comm.send_model_weights(trained.state_dict(), dtype=dtype, wait=wait)
        loss = trained(torch.randn(64, 1024, device="cuda")).square().mean()  # at once, on the same weights
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert receipt.wait(30).version == version
        kinds.append(receipt.kind)
        received.clear()
        wait_until(f"version {version} is there", lambda: client.poll(received))
        for name, value in expected.items():
            assert received[name].device.type == "cpu"
            assert torch.equal(received[name], value.to(received[name].dtype))
    assert kinds == ["full", "delta", "delta", "delta"]


def test_training_that_continues_at_once_does_not_change_what_is_sent(
    real_server: RealServer, learner: Learner, worker: Worker
) -> None:
    """The training stream waits for the copies before it changes the weights."""
    comm, client = learner(), worker()
    weights = {"w": torch.ones(64 << 20, device="cuda")}
    receipt = comm.send_model_weights(weights, compression_enabled=False, wait=False)
    weights["w"].zero_()
    receipt.wait(60)
    received: dict[str, torch.Tensor] = {}
    client.load_weights(received)
    assert received["w"].min() == 1


def test_tied_weights_stay_tied(real_server: RealServer, learner: Learner, worker: Worker) -> None:
    shared = torch.randn(1000, device="cuda")
    learner().send_model_weights({"a": shared, "b": shared, "host": torch.ones(3)})
    received: dict[str, torch.Tensor] = {}
    worker().load_weights(received)
    assert received["a"] is received["b"]
    assert torch.equal(received["a"], shared.cpu())


def test_a_worker_on_a_gpu_loads_into_its_model(
    real_server: RealServer, learner: Learner, worker: Worker
) -> None:
    trained, acting = model(), model()
    learner().send_model_weights(trained.state_dict())
    worker().load_weights(acting)
    for one, other in zip(trained.state_dict().values(), acting.state_dict().values(), strict=True):
        assert torch.equal(one, other)
