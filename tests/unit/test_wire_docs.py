from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from wire_trees import assert_same

from rlbroker import wire

PAGE = (Path(__file__).parents[2] / "docs" / "wire-format.md").read_text(encoding="utf-8")


def test_the_hexdump_in_the_documentation_is_what_is_written() -> None:
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
    assert wire.encode(tree) == message
    assert_same(wire.decode(message), tree)


def test_the_documentation_tells_the_limits() -> None:
    limits = wire.Limits()
    assert f"| header | {limits.max_header_bytes >> 20} MiB |" in PAGE
    assert f"| leaves | {limits.max_leaves:,} |" in PAGE
    assert f"| nesting | {limits.max_depth} |" in PAGE
    assert limits.max_raw_bytes == 1 << 30
