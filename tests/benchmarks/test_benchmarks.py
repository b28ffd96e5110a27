"""Tests of the command `python -m benchmarks` with its smallest sizes: rows, files, and clean-up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RealServer

from benchmarks.network import Link, two_hosts, unavailable

ROOT = Path(__file__).parents[2]


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def test_a_quick_run_writes_its_rows_and_deletes_its_keys(real_server: RealServer, tmp_path: Path) -> None:
    small = ("--quick", "--repetitions", "1", "--url", real_server.url, "--output", str(tmp_path))
    done = run_benchmarks("latency", "--only", "latency", *small)
    assert done.returncode == 0, done.stderr
    assert "naive SET + PUBLISH + GET" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"latency.json", "latency.md", "latency.png"}
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert all(len(row["ours"]) == len(row["theirs"]) == 1 and row["ratio"] > 0 for row in rows)
    assert real_server.client.keys("*") == []


def test_simulated_workers_are_measured_and_the_fitted_model_predicts_a_run(
    real_server: RealServer, tmp_path: Path
) -> None:
    small = ("--quick", "--repetitions", "1", "--url", real_server.url, "--output", str(tmp_path))
    done = run_benchmarks("scale", "--only", "growth", *small)
    assert done.returncode == 0, done.stderr
    rows = {row["work"]: row for row in json.loads((tmp_path / "growth.json").read_text())["rows"]}
    assert rows["64 KB, a download per host, publish to applied, p50: 2 workers"]["ours"][0] > 0
    assert rows["bytes from the server per MB downloaded"]["ours"][0] > 900
    assert real_server.client.keys("*") == []
    command = [sys.executable, "-m", "benchmarks.costs", str(tmp_path / "growth.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "1,000" in done.stdout
    assert "Gbit/s" in done.stdout


def test_each_of_three_nodes_carries_about_a_third_of_the_weights(tmp_path: Path) -> None:
    done = run_benchmarks(
        "scale", "--only", "nodes", "--quick", "--repetitions", "1", "--output", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "nodes.json").read_text())["rows"]
    met = {row["work"].partition(": ")[2]: row["met"] for row in rows if row["target"]}
    assert met == {
        "to the busiest node, per version: 3 nodes": True,
        "from the busiest node, per version: 3 nodes": True,
        "from the masters, per version: 3 nodes, read from replicas": True,
    }


def test_a_soak_reports_the_growth_of_memory_of_learner_workers_and_server(
    real_server: RealServer, tmp_path: Path
) -> None:
    done = run_benchmarks("soak", "--quick", "--url", real_server.url, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "soak.json").read_text())["rows"]
    growth = [row["work"].partition("growth of ")[2] for row in rows if "growth" in row["work"]]
    assert growth == ["learner per minute", "workers per minute", "server per minute"]
    assert all(row["ours"] for row in rows)
    assert real_server.client.keys("*") == []


def test_an_unknown_part_of_a_scenario_is_an_error() -> None:
    done = run_benchmarks("latency", "--only", "link")
    assert done.returncode == 2
    assert "latency has no part 'link'" in done.stderr


def test_the_second_host_is_removed_after_ctrl_c() -> None:
    if reason := unavailable():
        pytest.skip(reason)
    links: list[Link] = []

    def exists(link: Link) -> tuple[bool, bool]:
        namespaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
        return link.namespace in namespaces, Path(f"/sys/class/net/{link.device}").exists()

    def interrupt() -> None:
        with two_hosts() as link:
            assert exists(link) == (True, True)
            links.append(link)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert exists(links[0]) == (False, False)
