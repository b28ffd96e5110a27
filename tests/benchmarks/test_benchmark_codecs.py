"""What the benchmarks say of compressed weights is counted right; that all comes back, they check themselves."""

from __future__ import annotations

import pytest
import torch

from benchmarks.codecs import Images, Passage, pays_below

pytestmark = pytest.mark.unit


def test_the_part_that_changed_is_counted_in_elements_of_what_is_sent() -> None:
    before = {"weight": torch.ones(1000), "bias": torch.ones(24)}
    after = {"weight": torch.ones(1000), "bias": torch.ones(24)}
    after["weight"][:100] += 1e-5  # lost in bfloat16
    after["bias"][:4] += 1.0
    assert Images.of([before, after]).changed == pytest.approx(104 / 1024)
    assert Images.of([before, after], "bfloat16").changed == pytest.approx(4 / 1024)


def test_full_and_delta_are_measured_on_the_same_versions() -> None:
    torch.manual_seed(0)
    versions = [{"weight": torch.randn(50_000)} for _ in range(3)]
    versions[2] = {"weight": versions[1]["weight"].clone()}
    images = Images.of(versions)
    full, deltas = images.full(), images.deltas()
    assert len(full) == len(deltas) == 2
    assert {each.raw_bytes for each in full + deltas} == {200_000}
    assert deltas[1].stored_bytes < 100 < full[1].stored_bytes


def test_compressing_pays_while_the_link_is_slower_than_what_it_saves() -> None:
    passage = Passage(raw_bytes=100, stored_bytes=25, encode_seconds=1.0, decode_seconds=1.0)
    link = pays_below([passage], [passage.encode_rate], [passage.decode_rate])
    assert 1.0 + 25 / link + 1.0 == pytest.approx(100 / link)
