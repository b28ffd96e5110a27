"""The two sides of docs/rounds.md train together as they are printed."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import RealServer, wait_until

from rlbroker import Batch
from rlbroker.backend.keys import Keys

PAGE = Path(__file__).parents[2] / "docs" / "rounds.md"

ITERATIONS = 5


def test_learner_and_workers_of_the_page_train_in_rounds(
    real_server: RealServer, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    learner, worker = (block.replace('run="ppo"', f"run={run!r}") for block in blocks)
    learner = learner.replace("range(100)", f"range({ITERATIONS})").replace("num_workers=8", "num_workers=2")
    rounds: list[list[tuple[int, float]]] = []

    class Policy(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 1)
            torch.nn.init.zeros_(self.weight)

    def rollout(policy: Policy) -> dict[str, Any]:
        return {"weight": policy.weight[0, 0].item()}

    def update(policy: Policy, batches: list[Batch]) -> None:
        rounds.append([(batch.version, batch["weight"]) for batch in batches])
        with torch.no_grad():
            policy.weight += 1.0

    training: Any = ModuleType("training")
    training.Policy, training.rollout, training.update = Policy, rollout, update
    monkeypatch.setitem(sys.modules, "training", training)
    monkeypatch.setenv("RLBROKER_REDIS_URL", real_server.url)
    workers = [threading.Thread(target=exec, args=(worker, {})) for _ in range(2)]
    for one in workers:
        one.start()
    wait_until("both have joined", lambda: real_server.client.scard(Keys(run).workers) == 2, 30.0)
    exec(learner, {})
    for one in workers:
        one.join(20.0)
        assert not one.is_alive()
    assert len(rounds) == ITERATIONS
    for iteration, batches in enumerate(rounds):
        assert set(batches) == {(iteration + 1, float(iteration))}
    assert len(rounds[-1]) == 2
