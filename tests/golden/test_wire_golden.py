"""Messages written by earlier releases are read for ever; a missing file is a failure."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch
from wire_v1 import EXPECTED, HERE

from rlbroker import wire


def bits(value: Any) -> Any:
    """Return something that is equal exactly if type, dtype, shape and bits are."""
    if isinstance(value, dict):
        return [(key, bits(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [bits(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, np.ndarray | np.generic):
        return type(value), value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return float, struct.pack("<d", value)
    return type(value), value


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_message_of_an_earlier_release_is_read(name: str) -> None:
    assert bits(wire.decode((HERE / name).read_bytes())) == bits(EXPECTED[name]())


def test_tied_leaves_of_an_earlier_release_are_tied() -> None:
    got = wire.decode((HERE / "v1-large.bin").read_bytes())
    assert got["w"] is got["tied"][0]


def test_each_codec_has_a_golden_message() -> None:
    summary = wire.describe((HERE / "v1-large.bin").read_bytes())
    assert 0 < summary["compressed_segments"] < summary["segments"]


def test_no_golden_file_is_forgotten_and_the_version_has_some() -> None:
    assert {path.name for path in HERE.glob("*.bin") if path.name.startswith("v")} == set(EXPECTED)
    assert any(name.startswith(f"v{wire.FORMAT_VERSION}-") for name in EXPECTED)
