"""An operator finds planted trouble of every kind, and what is printed next to it works when it is typed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from executable import environment, rlbroker
from planted import BEHIND, DEAD, POISONER, TWIN, VERSIONS_BEHIND, Planted, plant

from rlbroker.local.embedded_server import RedisServer

#: What was planted, by the code of its finding and the worker that it is about.
TROUBLE = {
    ("server_evicts", None),
    ("worker_behind", BEHIND),
    ("worker_away", DEAD),
    ("worker_fenced", TWIN),
    ("dead_letters", POISONER),
}


@pytest.fixture(scope="module")
def planted() -> Iterator[Planted]:
    with RedisServer(bind="127.0.0.1") as server, plant(server) as found:
        assert server.network_url  # as redis-cli takes it
        yield replace(found, url=server.network_url)


def ask(planted: Planted, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = rlbroker(*arguments, RLBROKER_REDIS_URL=planted.url)
    assert "Traceback" not in done.stderr
    return done


def findings(planted: Planted, command: str) -> set[tuple[str, Any]]:
    said = json.loads(ask(planted, *command.split(), "--json").stdout)
    return {(one["code"], one["worker"]) for one in said["findings"]}


@pytest.mark.parametrize("command", ["status", "check", "workers"])
def test_the_trouble_is_named_by(command: str, planted: Planted) -> None:
    expected = {one for one in TROUBLE if command != "workers" or one[1] is not None}
    assert findings(planted, command) >= expected


def test_the_words_say_which_worker_and_what(planted: Planted) -> None:
    said = ask(planted, "status").stdout
    assert f"worker {BEHIND} is {VERSIONS_BEHIND} versions behind: it runs 3 of 20" in said
    assert re.search(rf"worker {DEAD} \(\S+ pid \d+\) is away: last heard of [\d.]+ s ago", said)
    assert re.search(rf"a second process \(\S+:\d+\) used the id of worker {TWIN}, and was turned away", said)
    assert f"1 batch of worker {POISONER} could not be used" in said
    assert "maxmemory-policy allkeys-lru: it deletes weights and experiences" in said


def test_check_is_critical(planted: Planted) -> None:
    assert ask(planted, "check").returncode == 2


def test_missed_names_what_the_dead_worker_did_not_run(planted: Planted) -> None:
    said = json.loads(ask(planted, "missed", "--json").stdout)["missed"]
    assert said


def test_every_hint_works_when_it_is_typed(planted: Planted) -> None:
    """Those of redis-cli come last: they mend what was found."""
    lines = {*re.findall(r"^    ((?:rlbroker|redis-cli) .*)$", ask(planted, "status").stdout, re.MULTILINE)}
    ours = sorted(line for line in lines if line.startswith("rlbroker "))
    assert len(ours) >= 4
    for line in ours:
        done = ask(planted, *shlex.split(line)[1:])
        assert done.returncode == 0, (line, done.stderr)
        assert done.stdout.strip(), line
    (mends,) = lines - {*ours}
    if shutil.which("redis-cli") is None:
        pytest.skip("redis-cli is not installed: apt install redis-tools")
    typed = ["bash", "-c", mends]
    environ = environment(RLBROKER_REDIS_URL=planted.url)
    done = subprocess.run(typed, env=environ, capture_output=True, text=True, check=True, timeout=10)
    assert "OK" in done.stdout
    assert ("server_evicts", None) not in findings(planted, "status")
