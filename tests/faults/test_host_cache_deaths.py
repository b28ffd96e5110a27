"""Whoever shares a host cache may be killed at any moment: the others go on, and nothing is left in the end."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="host caches need shared memory as Linux has it"
)


def play(scenario: str, directory: Path) -> dict[str, Any]:
    seed = random.randrange(1000)
    print(f"seed {seed}")
    driver = Path(__file__).with_name("cache_users.py")
    command = [sys.executable, str(driver), scenario, str(directory), str(seed)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    figures: dict[str, Any] = json.loads(ended.stdout)
    print(figures)
    return figures


def test_processes_killed_at_random_moments_leave_whole_images(tmp_path: Path) -> None:
    figures = play("random", tmp_path)
    assert figures["killed"] >= 20
    assert figures["found"] >= 20
    assert figures["made"] >= 20
    assert figures["no_memory"] == 0


def test_a_process_killed_at_any_call_of_the_system_harms_nobody(tmp_path: Path) -> None:
    figures = play("every", tmp_path)
    assert figures["alone"] >= 50
    assert figures["in company"] >= 50


def test_forked_children_neither_free_nor_keep_anything(tmp_path: Path) -> None:
    play("children", tmp_path)
