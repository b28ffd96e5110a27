"""`rlbroker report` on a live run: one page that loads nothing, escapes what workers wrote, and fits any screen."""

from __future__ import annotations

import html
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from conftest import wait_until
from executable import rlbroker
from test_look_commands import documented, keys_of

from rlbroker import WeightsMismatch, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.local.embedded_server import RedisServer
from rlbroker.metrics.history import read_history

RUN = "report"

#: Name of a host, and of a tensor, as nobody well-meaning has it.
HOSTILE = "<script>document.title='$x$'</script>"

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

#: Asks a page, shown 1280 and 400 pixels wide, whether it fits, and how many pixels high its smallest text in plots is.
_QUESTIONS = """
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    const texts = [...page.querySelectorAll("svg text")].filter((one) => one.getClientRects().length);
    found[frame.width] = {
      title: page.title,
      too_wide: root.scrollWidth - root.clientWidth,
      pictures: [...page.querySelectorAll("svg")].filter((one) => one.clientWidth).length,
      smallest: Math.min(...texts.map((one) =>  // labels that are turned have no scale of their own
        parseFloat(getComputedStyle(one).fontSize) * one.ownerSVGElement.getScreenCTM().a)),
    };
  }
  document.body.textContent = JSON.stringify(found);
});
"""


@pytest.fixture(scope="module")
def url(embedded: RedisServer) -> Iterator[str]:
    """A server with a run of two workers: 0 runs what there is; 1, of a hostile host, cannot load it and says why."""
    client = redis.Redis.from_url(embedded.url)
    client.flushall()
    with ExitStack() as stack:
        learner = stack.enter_context(WorkerCommunicator(2, redis_url=embedded.url, run=RUN))
        diligent = stack.enter_context(WorkerClient(embedded.url, RUN))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(socket, "gethostname", lambda: HOSTILE)
            unfit = stack.enter_context(WorkerClient(embedded.url, RUN))
        for _ in range(3):
            learner.send_model_weights({"w": np.zeros(1000, np.float32)})
        with pytest.raises(WeightsMismatch):
            wait_until("1 tries", lambda: unfit.poll({HOSTILE: np.zeros(1, np.float32)}))

        def on_record() -> bool:
            diligent.poll({})
            diligent.send_experiences({"x": np.zeros((4, 3), np.float32)})
            learner.collect_experiences(timeout=0.2)
            samples = read_history(learner._connection, Keys(RUN))
            members = {info.worker_id: info for info in learner.workers()}
            return len(samples) > 2 and samples[-1].running.get(0) == 3 and bool(members[1].problem)

        wait_until("history and heartbeats say so", on_record, timeout_seconds=20.0)
        yield embedded.url
    client.flushall()
    client.close()


@pytest.fixture(scope="module")
def report(url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    done = rlbroker("report", "--output", str(path), "--run", RUN, RLBROKER_REDIS_URL=url)
    assert (done.returncode, done.stdout) == (0, "")
    assert str(path) in done.stderr
    assert [one.name for one in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_a_report_shows_what_a_run_did(report: str) -> None:
    said = html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", report, flags=re.DOTALL))
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
    assert "worker 1 cannot load the newest weights" in said
    assert f"rlbroker workers 1 --run {RUN}" in said
    assert re.search(r"superseded|failed: [1-9]", said)
    assert "(UTC" in said or ", UTC" in said


def test_a_report_loads_nothing_and_runs_nothing(report: str) -> None:
    assert not re.search(r"<script|<link|<iframe|\bon\w+=|@import|https?:", report)
    assert all(
        one.startswith(("#", "data:image/png")) for one in re.findall(r'(?:href|src)="([^"]*)"', report)
    )
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in report
    assert len(report) < 300_000


def test_what_workers_wrote_is_escaped_in_a_report(report: str) -> None:
    escaped = html.escape(HOSTILE).replace("&#x27;", "&#39;")
    findings, table = report.index("What is wrong"), report.index("Versions behind: over the history")
    plots = report.index("<svg")
    assert escaped[:30] in report[findings:plots]  # why it cannot load the weights
    assert escaped in report[table:]
    assert html.escape(HOSTILE[:18], quote=False) in report[plots : report.index("</svg>")]


def test_a_report_shows_no_password(report: str, url: str) -> None:
    password = url.split(":")[2].partition("@")[0]
    assert password
    assert password not in report


def test_the_figures_of_a_report_are_as_documented(url: str) -> None:
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


def test_a_report_that_cannot_be_written_leaves_nothing(url: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    done = rlbroker("report", "-o", str(there), "--run", RUN, RLBROKER_REDIS_URL=url)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == f"rlbroker: the report cannot be written to {there}: it is a directory\n"
    )  # before it is drawn
    assert [*tmp_path.iterdir()] == [there]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: nobody looks at the report")
def test_a_browser_shows_a_report_on_a_desk_and_on_a_telephone(report: str, tmp_path: Path) -> None:
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(report)}"></iframe>'
        for width in (1280, 400)
    )
    asking = tmp_path / "asking.html"
    asking.write_text(f"<!doctype html><meta charset=utf-8><body><script>{_QUESTIONS}</script>{frames}")
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
            asking.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    answered = re.search(r"<body>(\{.*\})</body>", done.stdout)
    assert answered, done.stdout[-1000:]
    found = json.loads(html.unescape(answered[1]))
    for width in ("1280", "400"):
        assert found[width]["title"] == f"{RUN}: report of a run"
        assert found[width]["too_wide"] == 0
        assert found[width]["pictures"] == 7  # one of the large ones, and six small ones
        assert found[width]["smallest"] >= 11
