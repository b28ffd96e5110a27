"""`python -m benchmarks` as a person runs it, at its smallest; and that it leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RealServer

from benchmarks.network import Link, two_hosts, unavailable

ROOT = Path(__file__).parents[2]


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def test_a_quick_run_writes_its_rows_and_deletes_what_it_stored(
    real_server: RealServer, tmp_path: Path
) -> None:
    small = ("--quick", "--repetitions", "1", "--url", real_server.url, "--output", str(tmp_path))
    done = benchmarks("latency", "--only", "latency", *small)
    assert done.returncode == 0, done.stderr
    assert "naive SET + PUBLISH + GET" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"latency.json", "latency.md", "latency.png"}
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert all(len(row["ours"]) == len(row["theirs"]) == 1 and row["ratio"] > 0 for row in rows)
    assert real_server.client.keys("*") == []


def test_a_crowd_is_measured_a_model_fitted_to_it_and_a_run_computed_from_that(
    real_server: RealServer, tmp_path: Path
) -> None:
    small = ("--quick", "--repetitions", "1", "--url", real_server.url, "--output", str(tmp_path))
    done = benchmarks("scale", "--only", "growth", *small)
    assert done.returncode == 0, done.stderr
    rows = {row["work"]: row for row in json.loads((tmp_path / "growth.json").read_text())["rows"]}
    assert rows["64 KB, a download per host, publish to applied, p50: 2 workers"]["ours"][0] > 0
    assert rows["bytes from the server per MB downloaded"]["ours"][0] > 900
    assert real_server.client.keys("*") == []
    command = [sys.executable, "-m", "benchmarks.costs", str(tmp_path / "growth.json")]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "1,000" in told
    assert "Gbit/s" in told


def test_each_of_three_nodes_carries_about_a_third_of_the_weights(tmp_path: Path) -> None:
    done = benchmarks("scale", "--only", "nodes", "--quick", "--repetitions", "1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "nodes.json").read_text())["rows"]
    verdicts = {row["work"].partition(": ")[2]: row["met"] for row in rows if row["target"]}
    assert verdicts == {
        "to the busiest node, per version: 3 nodes": True,
        "from the busiest node, per version: 3 nodes": True,
        "from the masters, per version: 3 nodes, read from replicas": True,
    }


def test_a_soak_tells_the_growth_of_everybodys_memory(real_server: RealServer, tmp_path: Path) -> None:
    done = benchmarks("soak", "--quick", "--url", real_server.url, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "soak.json").read_text())["rows"]
    grown = [row["work"].partition("growth of ")[2] for row in rows if "growth" in row["work"]]
    assert grown == ["learner per minute", "workers per minute", "server per minute"]
    assert all(row["ours"] for row in rows)
    assert real_server.client.keys("*") == []


def test_a_part_that_the_scenario_does_not_have_is_an_error_that_says_so() -> None:
    done = benchmarks("latency", "--only", "link")
    assert done.returncode == 2
    assert "latency has no part 'link'" in done.stderr


def test_the_second_host_goes_away_after_ctrl_c_too() -> None:
    if reason := unavailable():
        pytest.skip(reason)
    seen: list[Link] = []

    def there(link: Link) -> tuple[bool, bool]:
        namespaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
        return link.namespace in namespaces, Path(f"/sys/class/net/{link.device}").exists()

    def interrupted() -> None:
        with two_hosts() as link:
            assert there(link) == (True, True)
            seen.append(link)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert there(seen[0]) == (False, False)
