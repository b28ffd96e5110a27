"""`rlbroker server`: the server lives as long as the command."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import wait_until
from executable import rlbroker, start

from rlbroker import WorkerCommunicator


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[subprocess.Popen[str], str, int]]]:
    """Starts `rlbroker server`; gives the process, its URL, and the server's process id."""
    with ExitStack() as stack:

        def begin(*arguments: str) -> tuple[subprocess.Popen[str], str, int]:
            process = stack.enter_context(start("server", *arguments))
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stderr is not None
            export = re.fullmatch(r"export RLBROKER_REDIS_URL='([^']+)'\n", process.stdout.readline())
            pid = re.search(r", process (\d+); Ctrl-C ends it", process.stderr.readline())
            assert export is not None
            assert pid is not None
            return process, export[1], int(pid[1])

        yield begin


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("arguments", "end"),
    [((), signal.SIGINT), (("--bind", "127.0.0.1"), signal.SIGTERM)],
    ids=["socket-ctrl-c", "network-terminated"],
)
def test_a_server_can_be_used_and_goes_away(
    arguments: tuple[str, ...],
    end: signal.Signals,
    run: str,
    serve: Callable[..., tuple[subprocess.Popen[str], str, int]],
) -> None:
    process, url, pid = serve(*arguments)
    assert urlsplit(url).scheme == ("redis" if arguments else "unix")
    with WorkerCommunicator(1, redis_url=url, run=run) as communicator:
        assert communicator.send_model_weights({"w": np.ones(3)}).version == 1
        assert f"run      {run} on" in rlbroker("status", RLBROKER_REDIS_URL=url).stdout
    assert runs(pid)
    process.send_signal(end)
    assert process.wait(timeout=10) == 130
    assert not runs(pid)
    assert process.stderr is not None
    assert process.stderr.read() == ""
    if not arguments:
        assert not Path(urlsplit(url).path).parent.exists()


def test_a_killed_command_takes_its_server_along(
    serve: Callable[..., tuple[subprocess.Popen[str], str, int]],
) -> None:
    process, _, pid = serve()
    process.kill()
    wait_until("the server is gone", lambda: not runs(pid))


def test_a_server_that_dies_is_reported(
    serve: Callable[..., tuple[subprocess.Popen[str], str, int]],
) -> None:
    process, _, pid = serve()
    os.kill(pid, signal.SIGKILL)
    _, problem = process.communicate(timeout=10)
    assert process.returncode == 2
    assert problem.startswith("rlbroker: the server ended by itself")
    assert "Traceback" not in problem


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(("--port", "7000"), "--port needs --bind"), (("--bind", "nonsense"), "nonsense")],
)
def test_a_server_says_what_is_wrong_with_its_options(arguments: tuple[str, ...], problem: str) -> None:
    done = rlbroker("server", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert problem in done.stderr
