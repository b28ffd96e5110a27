"""Tests of the sizes and rates in the benchmark of codecs. The benchmark itself checks the restored weights."""

from __future__ import annotations

import pytest
import torch

from benchmarks.codecs import CodecTiming, Images, break_even_rate

pytestmark = pytest.mark.unit


def test_the_changed_fraction_is_counted_in_elements_of_the_sent_dtype() -> None:
    before = {"weight": torch.ones(1000), "bias": torch.ones(24)}
    after = {"weight": torch.ones(1000), "bias": torch.ones(24)}
    after["weight"][:100] += 1e-5  # lost in bfloat16
    after["bias"][:4] += 1.0
    assert Images.from_versions([before, after]).changed == pytest.approx(104 / 1024)
    assert Images.from_versions([before, after], "bfloat16").changed == pytest.approx(4 / 1024)


def test_full_and_delta_are_measured_on_the_same_versions() -> None:
    torch.manual_seed(0)
    versions = [{"weight": torch.randn(50_000)} for _ in range(3)]
    versions[2] = {"weight": versions[1]["weight"].clone()}
    images = Images.from_versions(versions)
    full, deltas = images.full(), images.deltas()
    assert len(full) == len(deltas) == 2
    assert {timing.raw_bytes for timing in full + deltas} == {200_000}
    assert deltas[1].stored_bytes < 100 < full[1].stored_bytes


def test_at_the_break_even_rate_compression_takes_as_long_as_it_saves() -> None:
    timing = CodecTiming(raw_bytes=100, stored_bytes=25, encode_seconds=1.0, decode_seconds=1.0)
    link = break_even_rate([timing], [timing.encode_rate], [timing.decode_rate])
    assert 1.0 + 25 / link + 1.0 == pytest.approx(100 / link)
