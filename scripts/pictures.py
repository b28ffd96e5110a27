"""Create the pictures of `rlbroker top` and `rlbroker report` of a run with problems.

The run is real and uses a real server. Its workers do little work, and its learner sleeps instead of training.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
from executable import RLBROKER
from PIL import Image
from planted import BEHIND, Planted, plant
from rich import _export_format
from rich.console import Console
from rich.text import Text
from screens import Screen

from rlbroker import QueueFull, WorkerClient
from rlbroker.local.embedded_server import RedisServer
from rlbroker.membership import heartbeat, roster

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RUN = "pong"

#: The size of the terminal, and the age of the run when the pictures are taken: the charts are full then.
COLUMNS, ROWS = 110, 34
SECONDS = 45.0

#: Workers besides those with planted problems: the seconds of a rollout, and the seconds between polls.
ROLLOUTS = {5: (0.1, 0.5), 6: (0.12, 1.5), 7: (0.15, 3.0), 8: (0.1, 5.0), 9: (0.004, 0.5), 10: (0.004, 0.5)}

#: Workers that at times send faster than the learner collects. The first waits for room, the second drops old batches.
BLOCKING, DROPPING = 9, 10

#: The roster keeps a dead worker for ten times as long.
LEASE_SECONDS = 6.0

WEIGHTS = {"layer": np.random.default_rng(1).normal(size=(400, 1000)).astype(np.float32)}

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Create both pictures. If one fails, report the problem and still create the other."""
    problems = []
    # On a TCP port, so that the pictures show a short address.
    with (
        RedisServer(bind="127.0.0.1") as server,
        run_with_problems(server) as planted,
        TemporaryDirectory() as folder,
    ):
        capture_top(planted, DOCS / "top.svg")
        browser = next(filter(None, map(shutil.which, BROWSERS)), None)
        if browser is None:
            problems.append(f"docs/report.png needs one of {', '.join(BROWSERS)} on the PATH")
        else:
            page = Path(folder) / "report.html"
            try:
                write_report(planted, page)
                take_screenshot(browser, page, DOCS / "report.png")
            except subprocess.CalledProcessError as error:
                problems.append(f"docs/report.png: {error}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(bool(problems))


@contextmanager
def run_with_problems(server: RedisServer) -> Iterator[Planted]:
    """Run learner and workers in the background; enter the context after `SECONDS`."""
    with ExitStack() as stack:
        name_hosts(stack)
        planted = stack.enter_context(
            plant(
                server,
                RUN,
                url=server.network_url,
                weights=WEIGHTS,
                num_workers=11,
                max_queue_size=64,
                lease_seconds=LEASE_SECONDS,
                timeout=10.0,
            )
        )
        clients = dict(planted.workers)
        for worker in ROLLOUTS:
            when_full: Any = "drop_oldest" if worker == DROPPING else "block"
            client = WorkerClient(planted.url, RUN, worker_id=worker, when_full=when_full)
            clients[worker] = stack.enter_context(client)
        over = threading.Event()
        threads = [threading.Thread(target=train, args=(planted, over))]
        for worker, client in clients.items():
            if worker != BEHIND:
                threads.append(threading.Thread(target=roll_out, args=(worker, client, over)))
        for thread in threads:
            thread.start()
        print(f"==> the run has started; the pictures follow in {SECONDS:.0f} s", file=sys.stderr)
        try:
            time.sleep(SECONDS)
            yield planted
        finally:
            over.set()
            for thread in threads:
                thread.join()


def name_hosts(stack: ExitStack) -> None:
    """Replace host names and pids by those of a small network, because they appear in the pictures."""
    real = roster.socket, heartbeat.socket, heartbeat.os
    hosts, pids = itertools.cycle(range(1, 5)), itertools.count(4211, 57)
    roster.socket = SimpleNamespace(gethostname=lambda: "trainer")  # type: ignore[attr-defined] # in place of the module
    heartbeat.socket = SimpleNamespace(  # type: ignore[attr-defined] # in place of the module
        gethostname=lambda: f"node-{next(hosts)}"
    )
    heartbeat.os = SimpleNamespace(getpid=lambda: next(pids))  # type: ignore[attr-defined] # in place of the module

    def restore() -> None:
        roster.socket, heartbeat.socket, heartbeat.os = real  # type: ignore[attr-defined] # in place of the module

    stack.callback(restore)


def train(planted: Planted, over: threading.Event) -> None:
    """Collect all the time and publish every 1.2 s, at a speed that varies like that of real training."""
    started, due = time.monotonic(), 0.0
    while not over.is_set():
        seconds = time.monotonic() - started
        planted.learner.acknowledge(planted.learner.collect_experiences(timeout=0.2, max_batches=16))
        time.sleep(0.06 + 0.05 * math.sin(seconds / 3))
        if seconds >= due:
            WEIGHTS["layer"] *= 1.001
            planted.learner.send_model_weights(WEIGHTS)
            due = seconds + 1.2


def roll_out(worker: int, client: WorkerClient, over: threading.Event) -> None:
    """Send batches. Poll too, if the worker is not polled by the planted run."""
    rollout_seconds, poll_seconds = ROLLOUTS.get(worker, (0.2, None))
    model: dict[str, Any] = {}
    batch = {"obs": np.zeros((32, 24), np.float32), "rewards": np.zeros(32, np.float32)}
    due = 0.0
    while not over.is_set():
        now = time.monotonic()
        if poll_seconds is not None and now >= due:
            client.poll(model)
            due = now + poll_seconds
        with suppress(QueueFull):
            client.send_experiences(batch, timeout=1.0)
        sends_slowly = worker in (BLOCKING, DROPPING) and math.sin(now / 4) < 0
        over.wait(0.2 if sends_slowly else rollout_seconds)


def capture_top(planted: Planted, picture: Path) -> None:
    """Draw the terminal after `rlbroker top` has run for some seconds."""
    command = [RLBROKER, "top", "--run", RUN]
    with Screen(command, COLUMNS, ROWS, RLBROKER_REDIS_URL=planted.url) as screen:
        screen.shows("q quit")
        end = time.monotonic() + 6.0
        screen.until("rates are known", lambda: time.monotonic() > end)
        drawn = [line_of(screen._screen.buffer[row]) for row in range(ROWS)]
        screen.type("q")
        screen.ends()
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a file to write to
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        for line in drawn:
            console.print(line, no_wrap=True)
        svg = console.export_svg(title="rlbroker top", code_format=svg_format())
    picture.write_text(svg, encoding="utf-8")
    print(f"==> {picture.relative_to(ROOT)}", file=sys.stderr)


def line_of(cells: Any) -> Text:
    """Return one line of the terminal with its colours."""
    text = Text()
    for column in range(COLUMNS):
        cell = cells[column]
        styles = [style for style in ("bold", "reverse") if getattr(cell, style)]
        if cell.fg != "default":
            styles.append({"brown": "yellow"}.get(cell.fg, cell.fg))
        text.append(cell.data, " ".join(styles))
    return text


def svg_format() -> str:
    """Return rich's SVG template without its web font, because a picture in a README cannot load one."""
    without = re.sub(r"@font-face \{\{.*?\}\}", "", _export_format.CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return without.replace("Fira Code", "DejaVu Sans Mono, Menlo, Consolas")


def write_report(planted: Planted, page: Path) -> None:
    """Run `rlbroker report` to write its page."""
    command = [RLBROKER, "report", "--run", RUN, "--output", page]
    subprocess.run(command, env=os.environ | {"RLBROKER_REDIS_URL": planted.url}, check=True)


def take_screenshot(browser: str, page: Path, picture: Path) -> None:
    """Write a screenshot of the page in a headless browser, 1280 pixels wide."""
    subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--window-size=1280,2040", f"--screenshot={picture}", page.as_uri()),
        ],
        stderr=subprocess.DEVNULL,
        check=True,
    )
    with Image.open(picture) as taken:
        taken.quantize(128).save(picture, optimize=True)
    print(f"==> {picture.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
