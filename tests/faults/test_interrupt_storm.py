"""A learner and a worker that get Ctrl-C and alarms all the time: nothing is lost, doubled or stuck."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Reachable

HERE = Path(__file__).parent
PROGRAM = HERE / "storm_process.py"


class Process:
    """A learner or a worker of a run, in a process of its own."""

    def __init__(self, role: str, url: str, run: str, seconds: float, folder: Path) -> None:
        self.errors = folder / f"{role}.stderr"
        self._output = folder / f"{role}.stdout"
        folders = filter(None, [str(HERE.parent / "support"), os.environ.get("PYTHONPATH")])
        with self._output.open("wb") as output, self.errors.open("wb") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, str(PROGRAM), role, run, str(seconds)],
                env={**os.environ, "RLBROKER_REDIS_URL": url, "PYTHONPATH": os.pathsep.join(folders)},
                stdout=output,
                stderr=errors,
            )

    def lines(self) -> list[str]:
        return self._output.read_text().splitlines()

    def result(self) -> dict[str, Any]:
        """Wait until the process has ended, and return its report."""
        try:
            self.popen.wait(timeout=60.0)
        except subprocess.TimeoutExpired:
            self.popen.send_signal(signal.SIGABRT)  # prints where it hangs
            self.popen.wait()
        assert self.popen.returncode == 0, self.errors.read_text()
        found: dict[str, Any] = json.loads(self.lines()[-1])
        return found

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait()


def bombard(processes: list[Process], seed: int) -> None:
    """Send signals, with 1 to 20 ms in between, from when all processes are ready until all are calm."""
    chance = random.Random(seed)
    while not all("ready" in process.lines() for process in processes):
        assert all(process.popen.poll() is None for process in processes)
        time.sleep(0.01)
    storms = list(processes)
    while storms:
        time.sleep(chance.uniform(0.001, 0.02) / len(storms))
        process = chance.choice(storms)
        process.popen.send_signal(chance.choice([signal.SIGINT, signal.SIGALRM]))
        storms = [one for one in storms if "calm" not in one.lines() and one.popen.poll() is None]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("stormed", ["learner", "worker", "both"])
def test_a_storm_of_signals_loses_and_doubles_nothing(
    reachable: Reachable, run: str, tmp_path: Path, stormed: str, full: bool
) -> None:
    seconds = 30.0 if full else 4.0
    processes = {role: Process(role, reachable.url, run, seconds, tmp_path) for role in ("learner", "worker")}
    try:
        bombard([process for role, process in processes.items() if stormed in (role, "both")], seed=18)
        worker, learner = processes["worker"].result(), processes["learner"].result()
    finally:
        for process in processes.values():
            process.end()
    errors = learner["errors"] + worker["errors"]
    assert not errors, "\n".join(errors)
    times = Counter(learner["got"])
    assert set(worker["confirmed"]) <= set(times), "batches are lost"
    assert max(times.values()) == 1, "batches came twice"
    assert (learner["delivered"], learner["lost"], learner["left"]) == (len(times), {}, 0)
    versions = [version for _, version in learner["published"]]
    assert versions == sorted(set(versions))
    numbers = {version: number for number, version in learner["published"]}
    loaded = worker["loaded"]
    assert loaded == sorted(loaded), "an older version was loaded"
    others = [(number, version) for number, version in loaded if numbers.get(version, number) != number]
    assert not others, "weights of another version"
    assert max(Counter(worker["obeyed"]).values(), default=1) == 1, "a command was obeyed twice"
    assert learner["pending"] == [0]
    # The storm was one, and there was work in it.
    for role in ("learner", "worker") if stormed == "both" else (stormed,):
        assert sum(processes[role].result()["interrupted"].values()) > 20
    assert len(worker["confirmed"]) > 20
