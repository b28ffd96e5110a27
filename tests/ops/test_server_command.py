"""`rlbroker server`: the server runs as long as the command."""

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
    """Return a function that starts `rlbroker server`, and returns its process, the URL and the server's process id."""
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


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("arguments", "end"),
    [((), signal.SIGINT), (("--bind", "127.0.0.1"), signal.SIGTERM)],
    ids=["socket-ctrl-c", "network-terminated"],
)
def test_a_server_can_be_used_until_the_command_is_stopped(
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
    assert is_running(pid)
    process.send_signal(end)
    assert process.wait(timeout=10) == 130
    assert not is_running(pid)
    assert process.stderr is not None
    assert process.stderr.read() == ""
    if not arguments:
        assert not Path(urlsplit(url).path).parent.exists()


def test_a_killed_command_stops_its_server(
    serve: Callable[..., tuple[subprocess.Popen[str], str, int]],
) -> None:
    process, _, pid = serve()
    process.kill()
    wait_until("the server is gone", lambda: not is_running(pid))


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
def test_wrong_options_are_named(arguments: tuple[str, ...], problem: str) -> None:
    done = rlbroker("server", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert problem in done.stderr
