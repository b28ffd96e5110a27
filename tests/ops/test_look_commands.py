"""`rlbroker workers`, `missed`, `runs` and `check` on a live run, and their JSON as docs/commands.md has it."""

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
    """A server with a run of three workers that a learner of four expects.

    Worker 0 runs version 20, worker 1 version 3, and worker 2 could not load any. Worker 0 missed versions, and has
    one batch waiting; nobody has answered the command `noop`.
    """
    client = redis.Redis.from_url(embedded.url)
    client.flushall()
    with ExitStack() as stack:
        learner = stack.enter_context(WorkerCommunicator(4, redis_url=embedded.url, run=RUN))
        diligent, slow, unfit = (stack.enter_context(WorkerClient(embedded.url, RUN)) for _ in range(3))
        for _ in range(3):
            learner.send_model_weights({"w": np.zeros(10, np.float32)})
        wait_until("0 runs version 3", lambda: diligent.poll({}) and diligent.version == 3)
        wait_until("1 runs version 3", lambda: slow.poll({}) and slow.version == 3)
        wait_until("2 has the newest before it looks", lambda: unfit._subscriber.newest == 3)
        with pytest.raises(WeightsMismatch):
            wait_until("2 tries", lambda: unfit.poll({"other": np.zeros(1, np.float32)}))
        for _ in range(17):
            learner.send_model_weights({"w": np.zeros(10, np.float32)})
        wait_until("0 runs version 20", lambda: diligent.poll({}) and diligent.version == 20)
        diligent.send_experiences({"x": np.zeros(3, np.float32)})
        learner.send_control_command("noop")

        def on_record() -> bool:
            members = {info.worker_id: info for info in learner.workers()}
            missed = learner.missed_updates()
            said = members[0].version == 20 and members[0].sent == 1 and bool(members[2].problem)
            return said and missed[0].behind == 0

        wait_until("the heartbeats and the ledger say so", on_record)
        yield embedded.url
    client.flushall()
    client.close()


def ask(url: str, *arguments: str, code: int = 0) -> str:
    done = rlbroker(*arguments, RLBROKER_REDIS_URL=url)
    assert (done.returncode, done.stderr) == (code, "")
    return done.stdout


def test_workers_are_listed_with_what_they_run(url: str) -> None:
    said = ask(url, "workers")
    assert cells(said, 0) | {"state": "alive", "version": "20", "stale": "0", "sent": "1"} == cells(said, 0)
    assert cells(said, 1) | {"version": "3", "stale": "17"} == cells(said, 1)
    assert "! worker 1 is 17 versions behind: it runs 3 of 20" in said
    assert f"    rlbroker workers 1 --run {RUN}\n" in said


def test_one_worker_is_shown_with_what_it_missed(url: str) -> None:
    said = ask(url, "workers", "2")
    assert f"worker 2 of {RUN}: alive" in said
    assert f"pid {os.getpid()}" in said
    assert re.search(r"unanswered   1 command,", said)
    assert re.search(r"missed \S+ s ago +version 3: failed, ", said)
    assert "✗ worker 2 cannot load the newest weights: version 3: " in said
    assert "worker 1" not in said


def test_a_worker_that_is_not_there_is_named_with_those_that_are(url: str) -> None:
    done = rlbroker("workers", "9", "--run", RUN, RLBROKER_REDIS_URL=url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"rlbroker: there is no worker 9 in the run '{RUN}'; its workers are: 0, 1, 2\n"


def test_missed_updates_are_listed_by_worker_and_reason(url: str) -> None:
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


def test_check_names_what_is_wrong_and_ends_as_monitoring_plugins_do(url: str) -> None:
    said = ask(url, "check", code=2)
    first, *others = said.splitlines()
    assert re.match(
        rf"CRITICAL: {RUN}: \d findings \| version=20 alive=3 max_staleness=20 waiting=1 missed=\d+$", first
    )
    assert others[0].startswith("CRITICAL: worker 2 cannot load the newest weights")
    assert f"WARNING: 3 workers are alive; 4 are expected (rlbroker workers --run {RUN})" in others
    assert any(line.startswith("WARNING: worker 1 is 17 versions behind") for line in others)


def test_check_keeps_to_the_limits_that_are_given(url: str) -> None:
    options = ("--staleness", "18", "--min-workers", "3", "--max-missed", "0", "--json")
    said = json.loads(ask(url, "check", *options, code=2))
    found = {one["code"]: one for one in said["findings"]}
    assert found.keys() >= {"worker_cannot_load", "updates_failed", "too_many_missed"}
    assert not found.keys() & {"worker_behind", "too_few_workers"}
    assert (said["state"], said["alive"], said["waiting"]) == ("critical", 3, 1)


def test_check_of_what_cannot_be_read_is_unknown(url: str) -> None:
    done = rlbroker("check", "--run", "pnog", RLBROKER_REDIS_URL=url)
    assert done.returncode == 3
    assert re.match(rf"UNKNOWN: there is no run 'pnog' .*; runs there are: {RUN}; ", done.stdout)
    assert done.stderr == ""


def test_hints_work_when_they_are_typed(url: str) -> None:
    hints = [one["hint"] for one in json.loads(ask(url, "status", "--json"))["findings"]]
    shown = re.findall(r"^    (rlbroker .*)$", ask(url, "status"), re.MULTILINE)
    assert len(shown) == len(hints) > 3
    for hint in set(shown):
        done = rlbroker(*hint.split()[1:], RLBROKER_REDIS_URL=url)
        assert (done.returncode, done.stderr) == (0, ""), hint
        assert done.stdout


def test_a_reader_that_goes_away_is_no_error(url: str) -> None:
    command = f"{RLBROKER} workers | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], env=environment(RLBROKER_REDIS_URL=url), capture_output=True, check=False
    )
    assert done.stderr == b""
    assert done.returncode in (0, 1, 141)


# What the page says


def documented(name: str) -> set[str]:
    """The keys in the JSON table of a command, as the page has them."""
    heading = re.search(rf"^##+ rlbroker {name}\n", PAGE.read_text(), re.MULTILINE)
    assert heading, "it has no chapter"
    section = re.split(r"^##+ rlbroker", PAGE.read_text()[heading.end() :], maxsplit=1, flags=re.MULTILINE)[0]
    table = section.partition("\nJSON:\n")[2]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


def keys_of(value: Any, name: str = "", *, ids: str = "workers") -> Iterator[str]:
    """The keys of what a command gave, as the page writes them."""
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
    if name == "report":  # as the page says
        page |= documented("status")
    assert page
    # What is below a null or an empty list is not there, and what has no certain keys ends the name.
    unknown = {key for key in found if not any(_begin_alike(key, one) for one in page)}
    assert not unknown, "the page does not speak of them"
    missing = {key for key in page if not any(_begin_alike(key, one) for one in found)}
    assert not missing, "they are not there"


def _begin_alike(first: str, second: str) -> bool:
    long, short = sorted((first, second), key=len, reverse=True)
    return long == short or long.startswith((f"{short}.", f"{short}["))
