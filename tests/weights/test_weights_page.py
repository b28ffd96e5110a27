"""The programs of docs/weights.md run as they are shown."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import RealServer

PAGE = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")


def program(name: str) -> str:
    """Return the block of code that the page calls by this name."""
    found = re.search(rf"^`{name}`:\n\n```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"{name} is not on the page"
    return found[1]


def run_program(name: str) -> None:
    exec(compile(program(name), name, "exec"), {"__name__": "__main__"})


def test_functional_code_takes_weights_as_values(
    real_server: RealServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLBROKER_REDIS_URL", real_server.url)
    with ThreadPoolExecutor(2) as pool:
        programs: list[Any] = [pool.submit(run_program, name) for name in ("worker.py", "learner.py")]
        for one in programs:
            one.result(timeout=60.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        *(f"worker 0: 64 actions of version {version}" for version in (1, 2, 3)),
        "{0: 'applied'}",
    ]
