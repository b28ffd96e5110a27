"""How weights on a GPU are taken to the host, as far as that can be seen without one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from rlbroker.codec.image import ImageFormat, ImagePlan
from rlbroker.codec.limits import Limits
from rlbroker.weights import gpu_copy
from rlbroker.weights.gpu_copy import GpuCopy

pytestmark = pytest.mark.unit


def test_a_tree_in_host_memory_is_taken_as_it_is() -> None:
    tree = {"w": torch.ones(3)}
    staged = GpuCopy().take(tree)
    assert staged.tree is tree
    assert not staged.pending


def test_a_tree_with_a_gpus_tensors_is_copied_whole_and_ties_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is copied, as the caller may change all of it at once; clones stand for copies from a GPU."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(gpu_copy, "_on_gpu", lambda tree: True)
    shared, array = torch.randn(5), np.arange(4.0)
    tree: dict[str, Any] = OrderedDict(
        a=shared, b=shared, deep=[(array, torch.zeros(0)), torch.zeros(0)], step=3
    )
    staged = GpuCopy().take(tree)
    expected = shared.clone()
    shared.zero_()
    array[:] = 0
    assert staged.pending
    plan = ImagePlan(staged.tree)
    image = np.empty(plan.image_bytes, np.uint8)
    staged.fill(plan, image)
    assert not staged.pending
    encoded = [plan.encode_segment(index, image, compression=False) for index in range(plan.segment_count)]
    got = ImageFormat(plan.header([one.segment for one in encoded]), Limits()).tree(image)
    assert torch.equal(got["a"], expected)
    assert got["a"] is got["b"]
    assert got["deep"][0][0].tolist() == [0, 1, 2, 3]
    assert got["step"] == 3
