"""`rlbroker workers`, `missed`, `runs` and `check` on a live run; and every command's JSON against docs/commands.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from conftest import wait_until
from executable import RLBROKER, cells, environment, rlbroker

from rlbroker import WeightsMismatch, WorkerClient, WorkerCommunicator
from rlbroker.local.embedded_server import RedisServer

RUN = "pong"
PAGE = Path(__file__).parents[2] / "docs" / "commands.md"


@pytest.fixture(scope="module")
def url(embedded: RedisServer) -> Iterator[str]:
    """A server with a run of three workers, of which the learner expects four.

    Worker 0 runs version 20, worker 1 runs version 3, and worker 2 could not load any version. Worker 0 missed
    versions, and has one waiting batch; no worker has answered the command `noop`.
    """
    client = redis.Redis.from_url(embedded.url)
    client.flushall()
    with ExitStack() as stack:
        learner = stack.enter_context(WorkerCommunicator(4, redis_url=embedded.url, run=RUN))
        current, slow, broken = (stack.enter_context(WorkerClient(embedded.url, RUN)) for _ in range(3))
        for _ in range(3):
            learner.send_model_weights({"w": np.zeros(10, np.float32)})
        wait_until("0 runs version 3", lambda: current.poll({}) and current.version == 3)
        wait_until("1 runs version 3", lambda: slow.poll({}) and slow.version == 3)
        wait_until("2 has received version 3", lambda: broken._subscriber.newest == 3)
        with pytest.raises(WeightsMismatch):
            wait_until("2 fails to load it", lambda: broken.poll({"other": np.zeros(1, np.float32)}))
        for _ in range(17):
            learner.send_model_weights({"w": np.zeros(10, np.float32)})
        wait_until("0 runs version 20", lambda: current.poll({}) and current.version == 20)
        current.send_experiences({"x": np.zeros(3, np.float32)})
        learner.send_control_command("noop")

        def is_recorded() -> bool:
            members = {info.worker_id: info for info in learner.workers()}
            missed = learner.missed_updates()
            reported = members[0].version == 20 and members[0].sent == 1 and bool(members[2].problem)
            return reported and missed[0].behind == 0

        wait_until("heartbeats and ledger have recorded it", is_recorded)
        yield embedded.url
    client.flushall()
    client.close()


def ask(url: str, *arguments: str, code: int = 0) -> str:
    done = rlbroker(*arguments, RLBROKER_REDIS_URL=url)
    assert (done.returncode, done.stderr) == (code, "")
    return done.stdout


def test_workers_are_listed_with_their_version(url: str) -> None:
    output = ask(url, "workers")
    assert cells(output, 0) | {"state": "alive", "version": "20", "stale": "0", "sent": "1"} == cells(
        output, 0
    )
    assert cells(output, 1) | {"version": "3", "stale": "17"} == cells(output, 1)
    assert "! worker 1 is 17 versions behind: it runs 3 of 20" in output
    assert f"    rlbroker workers 1 --run {RUN}\n" in output


def test_one_worker_is_shown_with_its_missed_updates(url: str) -> None:
    output = ask(url, "workers", "2")
    assert f"worker 2 of {RUN}: alive" in output
    assert f"pid {os.getpid()}" in output
    assert re.search(r"unanswered   1 command,", output)
    assert re.search(r"missed \S+ s ago +version 3: failed, ", output)
    assert "✗ worker 2 cannot load the newest weights: version 3: " in output
    assert "worker 1" not in output


def test_an_unknown_worker_is_answered_with_those_that_exist(url: str) -> None:
    done = rlbroker("workers", "9", "--run", RUN, RLBROKER_REDIS_URL=url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"rlbroker: there is no worker 9 in the run '{RUN}'; its workers are: 0, 1, 2\n"


def test_missed_updates_are_filtered_by_worker_and_reason(url: str) -> None:
    failed = ask(url, "missed", "--why", "failed")
    row = cells(failed, r"[\d.]+ s")
    assert (row["worker"], row["which"], row["count"], row["why"]) == ("2", "3", "1", "failed")
    found = json.loads(ask(url, "missed", "--worker", "0", "--json"))["missed"]
    assert {one["worker_id"] for one in found} == {0}
    assert {one["why"] for one in found} == {"superseded"}
    nothing = rlbroker("missed", "--since", "0s", "--run", RUN, RLBROKER_REDIS_URL=url)
    assert (nothing.returncode, nothing.stdout) == (0, "")
    assert "nothing was missed in this time" in nothing.stderr


def test_runs_are_listed(url: str) -> None:
    row = cells(ask(url, "runs"), RUN)
    assert row | {"learner": "alive", "version": "20", "workers": "3 of 3 alive"} == row


def test_check_prints_findings_and_has_the_exit_codes_of_monitoring_plugins(url: str) -> None:
    output = ask(url, "check", code=2)
    first, *others = output.splitlines()
    assert re.match(
        rf"CRITICAL: {RUN}: \d findings \| version=20 alive=3 max_staleness=20 waiting=1 missed=\d+$", first
    )
    assert others[0].startswith("CRITICAL: worker 2 cannot load the newest weights")
    assert f"WARNING: 3 workers are alive; 4 are expected (rlbroker workers --run {RUN})" in others
    assert any(line.startswith("WARNING: worker 1 is 17 versions behind") for line in others)


def test_check_applies_the_given_limits(url: str) -> None:
    options = ("--staleness", "18", "--min-workers", "3", "--max-missed", "0", "--json")
    data = json.loads(ask(url, "check", *options, code=2))
    found = {one["code"]: one for one in data["findings"]}
    assert found.keys() >= {"worker_cannot_load", "updates_failed", "too_many_missed"}
    assert not found.keys() & {"worker_behind", "too_few_workers"}
    assert (data["state"], data["alive"], data["waiting"]) == ("critical", 3, 1)


def test_check_of_a_run_that_cannot_be_read_is_unknown(url: str) -> None:
    done = rlbroker("check", "--run", "pnog", RLBROKER_REDIS_URL=url)
    assert done.returncode == 3
    assert re.match(rf"UNKNOWN: there is no run 'pnog' .*; its runs are: {RUN}; ", done.stdout)
    assert done.stderr == ""


def test_hints_work_as_printed(url: str) -> None:
    hints = [one["hint"] for one in json.loads(ask(url, "status", "--json"))["findings"]]
    shown = re.findall(r"^    (rlbroker .*)$", ask(url, "status"), re.MULTILINE)
    assert len(shown) == len(hints) > 3
    for hint in set(shown):
        done = rlbroker(*hint.split()[1:], RLBROKER_REDIS_URL=url)
        assert (done.returncode, done.stderr) == (0, ""), hint
        assert done.stdout


def test_a_closed_pipe_is_not_an_error(url: str) -> None:
    command = f"{RLBROKER} workers | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], env=environment(RLBROKER_REDIS_URL=url), capture_output=True, check=False
    )
    assert done.stderr == b""
    assert done.returncode in (0, 1, 141)


# The page


def documented(name: str) -> set[str]:
    """Return the keys in the JSON table of a command's section of the page."""
    heading = re.search(rf"^##+ rlbroker {name}\n", PAGE.read_text(), re.MULTILINE)
    assert heading, "the page has no section for it"
    section = re.split(r"^##+ rlbroker", PAGE.read_text()[heading.end() :], maxsplit=1, flags=re.MULTILINE)[0]
    table = section.partition("\nJSON:\n")[2]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


def keys_of(value: Any, name: str = "", *, ids: str = "workers") -> Iterator[str]:
    """Yield the keys of a command's JSON as the page writes them."""
    if isinstance(value, list) and value:
        for item in value:
            yield from keys_of(item, f"{name}[]")
    elif isinstance(value, dict) and value:
        for key, one in value.items():
            yield from keys_of(one, f"{name}.<id>" if name == ids else f"{name}.{key}".lstrip("."))
    else:
        yield name


@pytest.mark.parametrize(
    "name",
    [
        *("status", "workers", "missed", "runs", "check", "doctor", "report", "prune", "experiences peek"),
        "check --self",
        *("weights list", "weights show", "control list"),
    ],
)
def test_the_json_of_a_command_is_as_documented(url: str, name: str) -> None:
    more = {"prune": ["--dry-run"], "check --self": ["--run", RUN]}.get(name, [])
    done = rlbroker(*name.split(), "--json", *more, RLBROKER_REDIS_URL=url)
    found, page = set(keys_of(json.loads(done.stdout))), documented(name)
    if name == "report":  # as the page states
        page |= documented("status")
    assert page
    # A null or an empty list has no keys below it, and an object without fixed keys is the end of a name.
    unknown = {key for key in found if not any(_is_prefix(key, one) for one in page)}
    assert not unknown, "the page lacks them"
    missing = {key for key in page if not any(_is_prefix(key, one) for one in found)}
    assert not missing, "the JSON lacks them"


def _is_prefix(first: str, second: str) -> bool:
    long, short = sorted((first, second), key=len, reverse=True)
    return long == short or long.startswith((f"{short}.", f"{short}["))
