"""Processes that share a host cache may be killed at any moment: the others continue, and no files are left."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="host caches need the shared memory of Linux")


def run_scenario(scenario: str, directory: Path) -> dict[str, Any]:
    seed = random.randrange(1000)
    print(f"seed {seed}")
    driver = Path(__file__).with_name("cache_users.py")
    command = [sys.executable, str(driver), scenario, str(directory), str(seed)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    counts: dict[str, Any] = json.loads(result.stdout)
    print(counts)
    return counts


def test_processes_killed_at_random_moments_leave_no_damaged_images(tmp_path: Path) -> None:
    counts = run_scenario("random", tmp_path)
    assert counts["killed"] >= 20
    assert counts["found"] >= 20
    assert counts["made"] >= 20


def test_a_process_killed_at_any_system_call_harms_no_other(tmp_path: Path) -> None:
    deaths = run_scenario("every", tmp_path)
    assert deaths["alone"] >= 50
    assert deaths["beside another"] >= 50


def test_forked_children_neither_release_nor_keep_anything(tmp_path: Path) -> None:
    run_scenario("children", tmp_path)
