"""Copies of weights on a GPU to host memory, as far as they can be tested without a GPU."""

from __future__ import annotations

from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from rlbroker.codec.image import ImageFormat, ImagePlan
from rlbroker.codec.limits import Limits
from rlbroker.weights import gpu_copy
from rlbroker.weights.gpu_copy import Copies, GpuCopy

pytestmark = pytest.mark.unit


def received(plan: ImagePlan, copies: Copies) -> Any:
    """Return what a worker gets."""
    image = np.empty(plan.image_bytes, np.uint8)
    copies.fill(plan, image)
    assert not copies.pending
    encoded = [plan.encode_segment(index, image, compression=False) for index in range(plan.segment_count)]
    return ImageFormat(plan.header([one.segment for one in encoded]), Limits()).tree(image)


def test_a_tree_in_host_memory_is_not_copied() -> None:
    weights = torch.ones(3)
    plan = ImagePlan({"w": weights})
    assert not GpuCopy().start(plan).pending
    assert plan.sources[0] is weights


def test_a_tree_with_tensors_on_a_gpu_is_copied_whole_and_ties_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may change the whole tree at once. Clones stand for copies from a GPU."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    shared, array, z = torch.randn(5), np.arange(4.0), torch.randn(3, dtype=torch.complex64)
    tree: dict[str, Any] = OrderedDict(
        a=shared,
        b=shared,
        deep=[(array, torch.zeros(0)), torch.zeros(0)],
        step=3,
        frozen=MappingProxyType({"z": z, "conjugate": z.conj()}),
        sign=z.conj().imag,
    )
    plan = ImagePlan(tree)
    on_gpu = iter([True])
    monkeypatch.setattr(gpu_copy, "_is_on_gpu", lambda source: next(on_gpu, False))
    copies = GpuCopy().start(plan)
    expected, z_before = shared.clone(), z.clone()
    shared.zero_()
    z.zero_()
    array[:] = 0
    assert copies.pending
    got = received(plan, copies)
    assert torch.equal(got["a"], expected)
    assert got["a"] is got["b"]
    assert got["deep"][0][0].tolist() == [0, 1, 2, 3]
    assert got["step"] == 3
    assert torch.equal(got["frozen"]["z"], z_before)
    assert torch.equal(got["frozen"]["conjugate"], z_before.conj().resolve_conj())
    assert torch.equal(got["sign"], -z_before.imag)
