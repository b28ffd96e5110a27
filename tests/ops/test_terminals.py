"""Every command works on terminals and pipes that cannot express every character, or that are closed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
from conftest import RealServer
from executable import RLBROKER, environment

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys

COMMANDS = [
    ["status"],
    ["workers"],
    ["missed"],
    ["report", "--output", "-"],
    ["check"],
    ["doctor"],
    ["control", "list"],
    ["dead", "list"],
    ["weights", "list"],
    ["weights", "show"],
    ["experiences", "peek"],
    ["runs"],
    ["top"],
]

ENCODINGS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "locale C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.fixture
def served(
    real_server: RealServer, run: str, keys: Keys, learner_on_real: WorkerCommunicator
) -> dict[str, str]:
    client = real_server.client
    client.hset(
        keys.heartbeat(0), mapping={"host": b"caf\xe9-\xff", "problem": "naïve “problem” … 漢字 \x1b[31m"}
    )
    client.xadd(keys.missed, {b"\xff": b"\xfe"})
    learner_on_real.send_control_command("größe", {"naïve": "漢字"})
    return {"RLBROKER_REDIS_URL": real_server.url, "RLBROKER_RUN": run}


@pytest.fixture
def learner_on_real(real_server: RealServer, run: str) -> Iterator[WorkerCommunicator]:
    with WorkerCommunicator(1, redis_url=real_server.url, run=run) as comm:
        comm.send_model_weights({"größe": np.zeros(3)})
        with WorkerClient(real_server.url, run) as client:
            client._heartbeat._thread.stop(5.0)
            client.send_experiences({"größe": np.zeros(3)})
            yield comm


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_command_fails_for_characters_that_its_output_cannot_express(
    served: dict[str, str], encoding: str
) -> None:
    for command in COMMANDS:
        done = subprocess.run(
            [RLBROKER, *command],
            env=environment(**served, **ENCODINGS[encoding]),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert done.returncode in ((0, 1, 2) if command[0] in ("check", "doctor") else (0,)), (command, done)
        assert b"unexpected" not in done.stderr, (command, done.stderr)
        assert command[0] == "report" or b"\x1b[31m" not in done.stdout


@pytest.mark.parametrize("closed", ["stdout", "stderr", "reader"])
def test_a_closed_output_is_no_bug(served: dict[str, str], closed: str) -> None:
    redirection = {"stdout": ">&-", "stderr": "2>&-", "reader": "| true"}[closed]
    for command in (["status"], ["missed"], ["doctor"], ["report", "--output", "-"]):
        line = f"set -o pipefail; {RLBROKER} {' '.join(command)} {redirection}"
        done = subprocess.run(
            ["bash", "-c", line],
            env=environment(**served),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            check=False,
        )
        allowed = (0, 1, 2, 141) if command[0] in ("check", "doctor") else (0, 141)
        assert done.returncode in allowed, (command, done)
        assert b"unexpected" not in done.stderr, (command, done.stderr)
        assert b"Traceback" not in done.stderr, (command, done.stderr)


def test_doctor_tells_ok_from_critical_in_ascii(served: dict[str, str], real_server: RealServer) -> None:
    real_server.client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        done = subprocess.run(
            [RLBROKER, "doctor"],
            env=environment(**served, **ENCODINGS["ascii"]),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
    finally:
        real_server.client.config_set("maxmemory-policy", "noeviction")
    marks = {line.split()[1]: line.split()[0] for line in done.stdout.splitlines() if line[1:2] == b" "}
    assert (marks[b"version"], marks[b"eviction"]) == (b"+", b"x"), done.stdout
