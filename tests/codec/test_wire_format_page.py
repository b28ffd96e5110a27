"""The examples and numbers of docs/wire-format.md, compared with the code."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from codec_trees import assert_same

from rlbroker.codec import delta
from rlbroker.codec.format import SPARSE
from rlbroker.codec.limits import Limits
from rlbroker.codec.message import decode, encode

pytestmark = pytest.mark.unit

PAGE = (Path(__file__).parents[2] / "docs" / "wire-format.md").read_text(encoding="utf-8")


def test_the_hexdump_in_the_documentation_is_what_encode_writes() -> None:
    dump = re.search(r"```hexdump\n(.*?)```", PAGE, re.DOTALL)
    assert dump
    message = b""
    for line in dump[1].splitlines():
        assert len(message) == int(line[:4], 16)
        message += bytes.fromhex(line[6:55])
    tree = {
        "obs": np.arange(6, dtype=np.float32).reshape(2, 3) / 2,
        "done": np.array([False, True]),
        "step": 7,
        "pair": (1.5, None),
    }
    assert encode(tree) == message
    assert_same(decode(message), tree)


def test_the_sparse_segment_in_the_documentation_is_valid() -> None:
    dump = re.search(r"```\n(02 00 00 00 .*?)```", PAGE, re.DOTALL)
    assert dump
    stored = bytes.fromhex(" ".join(line[:40] for line in dump[1].splitlines()))
    base = np.array([0, 0x3F80, 2, 3, 0x4000, 5, 6, 7], "<u2")
    new = np.array([0, 0x3F81, 2, 3, 0x3FFF, 5, 6, 7], "<u2")
    out = np.empty(16, np.uint8)
    delta.apply_unchecked(SPARSE, memoryview(stored), 2, base.view(np.uint8), out)
    assert (out == new.view(np.uint8)).all()


def test_the_documentation_names_the_limits() -> None:
    limits = Limits()
    assert f"| header | {limits.max_header_bytes >> 20} MiB |" in PAGE
    assert f"| leaves | {limits.max_leaves:,} |" in PAGE
    assert f"| nesting | {limits.max_depth} |" in PAGE
    assert limits.max_raw_bytes == 1 << 30
