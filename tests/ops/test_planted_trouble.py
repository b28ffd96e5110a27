"""An operator finds planted faults of every kind, and the command printed next to each works when it is typed."""

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
from executable import cells, environment, rlbroker
from planted import BEHIND, DEAD, POISONER, TWIN, VERSIONS_BEHIND, Planted, plant

from rlbroker.local.embedded_server import RedisServer

#: The planted faults: the code of the finding and its worker.
FAULTS = {
    ("server_evicts", None),
    ("worker_behind", BEHIND),
    ("worker_away", DEAD),
    ("worker_fenced", TWIN),
    ("dead_letters", POISONER),
}


@pytest.fixture(scope="module")
def planted() -> Iterator[Planted]:
    with RedisServer(bind="127.0.0.1") as server, plant(server) as planted:
        assert server.network_url  # redis-cli takes no other URL
        yield replace(planted, url=server.network_url)


def ask(planted: Planted, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = rlbroker(*arguments, RLBROKER_REDIS_URL=planted.url)
    assert "Traceback" not in done.stderr
    return done


def findings(planted: Planted, command: str) -> set[tuple[str, Any]]:
    output = json.loads(ask(planted, *command.split(), "--json").stdout)
    return {(finding["code"], finding["worker"]) for finding in output["findings"]}


@pytest.mark.parametrize("command", ["status", "check", "workers"])
def test_the_faults_are_reported_by(command: str, planted: Planted) -> None:
    expected = {fault for fault in FAULTS if command != "workers" or fault[1] is not None}
    assert findings(planted, command) >= expected


def test_each_finding_names_its_worker_and_the_fault(planted: Planted) -> None:
    output = ask(planted, "status").stdout
    assert f"worker {BEHIND} is {VERSIONS_BEHIND} versions behind: it runs 3 of 20" in output
    assert re.search(rf"worker {DEAD} \(\S+ pid \d+\) is away: last seen [\d.]+ s ago", output)
    assert re.search(rf"another process \(\S+:\d+\) with the id of worker {TWIN} was fenced", output)
    assert f"1 batch of worker {POISONER} could not be used" in output
    assert "maxmemory-policy allkeys-lru: it deletes weights and experiences" in output


def test_a_silent_worker_has_not_polled_since_its_last_heartbeat(planted: Planted) -> None:
    row = cells(ask(planted, "workers").stdout, DEAD)
    detail = re.search(r"polled (\S+) (?:s|min) ago", ask(planted, "workers", str(DEAD)).stdout)
    assert detail
    seen, polled = (float(row[name].split()[0]) for name in ("seen", "polled"))
    assert min(polled, float(detail[1])) >= seen > 1.0


def test_check_ends_with_the_critical_exit_code(planted: Planted) -> None:
    assert ask(planted, "check").returncode == 2


def test_missed_lists_versions(planted: Planted) -> None:
    assert json.loads(ask(planted, "missed", "--json").stdout)["missed"]


def test_every_hint_works_when_it_is_typed(planted: Planted) -> None:
    """The redis-cli command comes last, because it repairs a fault."""
    lines = {*re.findall(r"^    ((?:rlbroker|redis-cli) .*)$", ask(planted, "status").stdout, re.MULTILINE)}
    rlbroker_lines = sorted(line for line in lines if line.startswith("rlbroker "))
    assert len(rlbroker_lines) >= 4
    for line in rlbroker_lines:
        done = ask(planted, *shlex.split(line)[1:])
        assert done.returncode == 0, (line, done.stderr)
        assert done.stdout.strip(), line
    (repair,) = lines - {*rlbroker_lines}
    if shutil.which("redis-cli") is None:
        pytest.skip("redis-cli is not installed: apt install redis-tools")
    typed = ["bash", "-c", repair]
    environ = environment(RLBROKER_REDIS_URL=planted.url)
    done = subprocess.run(typed, env=environ, capture_output=True, text=True, check=True, timeout=10)
    assert "OK" in done.stdout
    assert ("server_evicts", None) not in findings(planted, "status")
