"""`rlbroker bench` as a person runs it: it measures, prints the results, and leaves nothing on the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from urllib.parse import urlsplit

import pytest
from conftest import RealServer

from rlbroker.ops.bench import BenchReport, PublishTimings

#: The smallest measurement.
TINY = ("--megabytes", "0.1", "--seconds", "0.01")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rlbroker", "bench", *arguments]


def environment(**more: str) -> dict[str, str]:
    hidden = ("RLBROKER_REDIS_URL", "REDIS_URL")
    return {name: text for name, text in os.environ.items() if name not in hidden} | more


def bench(server: RealServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*TINY, *arguments),
        env=environment(RLBROKER_REDIS_URL=server.url, PYTHONWARNINGS="error"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    password = urlsplit(server.url).password
    assert password
    assert password not in done.stdout + done.stderr
    return done


def test_bench_prints_every_measurement_and_deletes_its_run(real_server: RealServer) -> None:
    real_server.client.set("of another program", "stays")
    done = bench(real_server)
    heads = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert heads == [
        "server",
        "round trip",
        "link",
        *["weights"] * 2,
        *["batches"] * 3,
        "verdict",
    ]
    assert all(line.startswith("… ") for line in done.stderr.splitlines()), done.stderr
    assert real_server.client.keys("*") == [b"of another program"]


def test_bench_as_json_has_every_measurement(real_server: RealServer) -> None:
    data = json.loads(bench(real_server, "--json").stdout)
    assert data.keys() == {field.name for field in fields(BenchReport)} | {"verdict"}
    assert data["published"][0].keys() == {field.name for field in fields(PublishTimings)}
    assert [one["size_bytes"] for one in data["batches"]] == [1 << 10, 64 << 10, 1 << 20]
    numbers = [number for one in (data, *data["published"], *data["batches"]) for number in one.values()]
    assert all(number > 0 for number in numbers if isinstance(number, float))


def test_the_verdict_prefers_what_arrives_sooner() -> None:
    def report(raw_ms: float, compressed_ms: float) -> BenchReport:
        published = [PublishTimings(False, 1.0, raw_ms, 1.0), PublishTimings(True, 1.0, compressed_ms, 1.0)]
        return BenchReport("server", "", 1.0, 1.0, 1.0, 1.0, published, [])

    assert "float32 weights pays (" in report(30.0, 20.0).verdict
    assert "does not pay: compression_enabled=False is as fast" in report(30.0, 60.0).verdict


def test_bench_imports_neither_torch_nor_the_demo(real_server: RealServer) -> None:
    code = """
import sys
from rlbroker.ops.cli.app import app
app(["bench", "--megabytes", "0.1", "--seconds", "0.01", "--json"], standalone_mode=False)
sys.exit(" ".join(name for name in ("torch", "rlbroker.demo", "gymnasium") if name in sys.modules) or 0)
"""
    environ = environment(RLBROKER_REDIS_URL=real_server.url)
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=60, capture_output=True)


@pytest.fixture(params=[("60", "round trip"), ("0.5", "batches of 1,024 bytes")])
def running(real_server: RealServer, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A bench that has reached this stage, in a process group of its own, as a terminal starts it."""
    seconds, stage = request.param
    process = subprocess.Popen(
        command("--megabytes", "0.1", "--seconds", seconds),
        env=environment(RLBROKER_REDIS_URL=real_server.url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stderr
        assert any(stage in line for line in process.stderr)
        yield process
        process.kill()


def test_ctrl_c_ends_bench_and_its_worker_and_deletes_its_run(
    real_server: RealServer, running: subprocess.Popen[str]
) -> None:
    os.killpg(running.pid, signal.SIGINT)
    assert "Traceback" not in running.communicate(timeout=20)[1]
    assert running.returncode == 130
    assert real_server.client.keys("*") == []


def test_bench_of_an_unreachable_server() -> None:
    done = subprocess.run(
        command("--url", "unix:///nowhere.sock"), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "rlbroker: cannot reach unix:///nowhere.sock" in done.stderr
