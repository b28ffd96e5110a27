"""`rlbroker report` on a live run: one page that loads nothing, escapes what workers wrote, and fits any screen."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from conftest import wait_until
from executable import rlbroker
from test_live_run_commands import documented, keys_of

from rlbroker import WeightsMismatch, WorkerClient, WorkerCommunicator
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.local.embedded_server import RedisServer
from rlbroker.metrics.history import read_history

RUN = "report"

#: A malicious name of a host, and of a tensor.
HOSTILE = "<script>document.title='$x$'</script>"

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

#: Measures pages in frames: how much too wide they are, and how many pixels high the smallest text in plots is.
_MEASURE = """
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    const pictures = [...page.images].filter((one) => one.clientWidth);
    found[frame.width] = {
      title: page.title,
      too_wide: root.scrollWidth - root.clientWidth,
      pictures: pictures.length,
      smallest: Math.min(...pictures.map((one) => 11.5 * one.clientWidth / one.naturalWidth)),  // pixels of text
    };
  }
  document.body.textContent = JSON.stringify(found);
});
"""


@pytest.fixture(scope="module")
def url(embedded: RedisServer) -> Iterator[str]:
    """A server with a run of two workers: 0 runs the latest version; 1, on a hostile host, cannot load it."""
    client = redis.Redis.from_url(embedded.url)
    client.flushall()
    with ExitStack() as stack:
        connection = stack.enter_context(closing(Connection(embedded.url)))
        learner = stack.enter_context(WorkerCommunicator(2, redis_url=embedded.url, run=RUN))
        current = stack.enter_context(WorkerClient(embedded.url, RUN))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(socket, "gethostname", lambda: HOSTILE)
            broken = stack.enter_context(WorkerClient(embedded.url, RUN))
        for _ in range(3):
            learner.send_model_weights({"w": np.zeros(1000, np.float32)})
        with pytest.raises(WeightsMismatch):
            wait_until("1 fails to load it", lambda: broken.poll({HOSTILE: np.zeros(1, np.float32)}))

        def is_recorded() -> bool:
            current.poll({})
            current.send_experiences({"x": np.zeros((4, 3), np.float32)})
            learner.collect_experiences(timeout=0.2)
            samples = read_history(connection, Keys(RUN))
            members = {info.worker_id: info for info in learner.workers()}
            return len(samples) > 2 and samples[-1].running.get(0) == 3 and bool(members[1].problem)

        wait_until("history and heartbeats have recorded it", is_recorded, timeout_seconds=20.0)
        yield embedded.url
    client.flushall()
    client.close()


@pytest.fixture(scope="module")
def report(url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the run."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    done = rlbroker("report", "--output", str(path), "--run", RUN, RLBROKER_REDIS_URL=url)
    assert (done.returncode, done.stdout) == (0, "")
    assert str(path) in done.stderr
    assert [one.name for one in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_a_report_has_all_sections_and_findings(report: str) -> None:
    output = html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", report, flags=re.DOTALL))
    headings = re.findall(r"<h2>(.*?)</h2>", report)
    assert headings == [
        "What is wrong",
        "Versions over time",
        "Bottleneck",
        "Throughput",
        "Staleness",
        "Waits and work",
        "Weights",
        "Queues",
        "Workers",
        "Workers",
        "Batches lost",
        "Versions missed",
        "Settings",
    ]
    assert "worker 1 cannot load the newest weights" in output
    assert f"rlbroker workers 1 --run {RUN}" in output
    assert re.search(r"superseded|failed: [1-9]", output)
    assert "(UTC" in output or ", UTC" in output


def test_a_report_loads_nothing_and_has_no_scripts(report: str) -> None:
    assert not re.search(r"<script|<link|<iframe|\bon\w+=|@import|https?:", report)
    assert all(
        one.startswith(("#", "data:image/svg+xml;base64,"))
        for one in re.findall(r'(?:href|src)="([^"]*)"', report)
    )
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in report
    assert len(report) < 300_000


def test_text_from_workers_is_escaped(report: str) -> None:
    escaped = html.escape(HOSTILE).replace("&#x27;", "&#39;")
    findings, table = report.index("What is wrong"), report.index("Versions behind: over the history")
    plots = report.index("<img")
    assert escaped[:30] in report[findings:plots]  # the reason why worker 1 cannot load the weights
    assert escaped in report[table:]
    (largest, *_) = re.findall(r"data:image/svg\+xml;base64,([^\"]*)", report)
    assert html.escape(HOSTILE[:18], quote=False) in base64.b64decode(largest).decode()


def test_a_report_shows_no_password(report: str, url: str) -> None:
    password = url.split(":")[2].partition("@")[0]
    assert password
    assert password not in report


def test_the_json_of_a_report_is_as_documented(url: str) -> None:
    done = rlbroker("report", "--json", "--run", RUN, "--since", "1h", RLBROKER_REDIS_URL=url)
    assert (done.returncode, done.stderr) == (0, "")
    found: Any = json.loads(done.stdout)
    page = documented("report") | documented("status")
    unknown = {
        key
        for key in keys_of(found)
        if not any(key == one or key.startswith((f"{one}.", f"{one}[")) for one in page)
    }
    assert not unknown
    for name in documented("report"):
        assert any(key.startswith(name) for key in keys_of(found)) or name.startswith("losses"), name
    assert found["history"]["samples"] > 2
    assert found["totals"]["published"] <= 3


def test_a_report_that_cannot_be_written_leaves_no_file(url: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    done = rlbroker("report", "-o", str(there), "--run", RUN, RLBROKER_REDIS_URL=url)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"rlbroker: the report cannot be written to {there}: it is a directory\n"
    assert [*tmp_path.iterdir()] == [there]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_report_fits_wide_and_narrow_screens(report: str, tmp_path: Path) -> None:
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(report)}"></iframe>'
        for width in (1280, 400)
    )
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html><meta charset=utf-8><body><script>{_MEASURE}</script>{frames}")
    assert CHROMIUM
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--v=0",
            "--dump-dom",
            "--window-size=1400,900",
            wrapper.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    measured = re.search(r"<body>(\{.*\})</body>", done.stdout)
    assert measured, done.stdout[-1000:]
    found = json.loads(html.unescape(measured[1]))
    for width in ("1280", "400"):
        assert found[width]["title"] == f"{RUN}: report of a run"
        assert found[width]["too_wide"] == 0
        assert found[width]["pictures"] == 7  # one large picture, and six small ones
        assert found[width]["smallest"] >= 11
