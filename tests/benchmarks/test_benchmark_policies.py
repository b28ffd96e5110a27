"""Tests of the recordings of weights, with trainings that take seconds."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.policies import RECORDINGS, load
from benchmarks.training import TrainingSize

pytestmark = pytest.mark.unit

TINY = TrainingSize(updates=1, width=8, versions=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_versions_of_a_recording_differ_only_in_their_values(name: str, folder: Path) -> None:
    versions = load(name, folder, size=TINY)
    assert len(versions) == TINY.versions
    for before, after in pairwise(versions):
        assert [(key, tensor.shape, tensor.dtype) for key, tensor in before.items()] == [
            (key, tensor.shape, tensor.dtype) for key, tensor in after.items()
        ]
        assert any(not torch.equal(before[key], after[key]) for key in before)


def test_an_existing_recording_is_not_created_again(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = load("ppo", folder, size=TINY)
    capfd.readouterr()
    again = load("ppo", folder, size=TINY)
    assert not capfd.readouterr().err
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, again, strict=True) for key in a)


def test_the_same_training_gives_the_same_weights(tmp_path: Path, folder: Path) -> None:
    one, other = load("ppo", folder, size=TINY), load("ppo", tmp_path, size=TINY)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in a)


def test_published_weights_are_the_master_weights_rounded(folder: Path) -> None:
    published, master = (load(name, folder, size=TINY) for name in ("transformer", "transformer-master"))
    for copy, version in zip(published, master, strict=True):
        assert all(torch.equal(copy[key], version[key].bfloat16()) for key in version)
