"""The fuzzer's corpus, replayed without the fuzzer: its findings stay fixed."""

from __future__ import annotations

from pathlib import Path

import decoder_targets
import pytest

pytestmark = pytest.mark.unit

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())


def test_the_corpus_reaches_every_target() -> None:
    reached = {path.read_bytes()[0] % len(decoder_targets.TARGETS) for path in CORPUS if path.stat().st_size}
    assert reached == set(range(len(decoder_targets.TARGETS)))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name[:12])
def test_an_input_decodes_or_is_refused(path: Path) -> None:
    decoder_targets.feed(path.read_bytes())
