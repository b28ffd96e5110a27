"""Copies of weights on a GPU to host memory, as far as they can be tested without a GPU."""

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


def test_a_tree_in_host_memory_is_not_copied() -> None:
    tree = {"w": torch.ones(3)}
    on_host = GpuCopy().to_host(tree)
    assert on_host.tree is tree
    assert not on_host.pending


def test_a_tree_with_tensors_on_a_gpu_is_copied_whole_and_ties_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may change the whole tree at once. Clones stand for copies from a GPU."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(gpu_copy, "_is_on_gpu", lambda tree: True)
    shared, array = torch.randn(5), np.arange(4.0)
    tree: dict[str, Any] = OrderedDict(
        a=shared, b=shared, deep=[(array, torch.zeros(0)), torch.zeros(0)], step=3
    )
    on_host = GpuCopy().to_host(tree)
    expected = shared.clone()
    shared.zero_()
    array[:] = 0
    assert on_host.pending
    plan = ImagePlan(on_host.tree)
    image = np.empty(plan.image_bytes, np.uint8)
    on_host.fill(plan, image)
    assert not on_host.pending
    encoded = [plan.encode_segment(index, image, compression=False) for index in range(plan.segment_count)]
    got = ImageFormat(plan.header([one.segment for one in encoded]), Limits()).tree(image)
    assert torch.equal(got["a"], expected)
    assert got["a"] is got["b"]
    assert got["deep"][0][0].tolist() == [0, 1, 2, 3]
    assert got["step"] == 3
