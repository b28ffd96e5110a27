"""Every call ends within its timeout, whatever the server does and however the client was made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from proxy import Proxy
from servers import FaultyServer
from typer.testing import CliRunner

from rlbroker import ConnectionFailed, PeerError, WorkerClient, WorkerCommunicator
from rlbroker.ops.cli.app import app
from rlbroker.ops.inspect import (
    snapshot,  # noqa: F401 - imported now, not within a measured time
)

NewServer = Callable[..., FaultyServer]

#: How much longer than its timeout a call may take.
GRACE_SECONDS = 1.0


@contextlib.contextmanager
def assert_within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds + GRACE_SECONDS, f"the call took {took:.1f} s"


@pytest.mark.parametrize("after_a_call", [False, True])
def test_closing_ends_within_the_timeout_when_the_server_hangs(
    new_server: NewServer, after_a_call: bool
) -> None:
    server = new_server()
    comm = WorkerCommunicator(1, redis_url=server.url, timeout=2.0)
    client = WorkerClient(server.url, worker_id=0, timeout=2.0, level="learner")
    client.send_experiences({"n": 1})
    comm.collect_experiences(2.0)
    server.freeze()
    if after_a_call:
        for call in (lambda: client.send_experiences({"n": 2}), lambda: comm.send_model_weights({"n": 1})):
            with assert_within(2.0), pytest.raises(PeerError):
                call()
    with assert_within(2.0):
        comm.cleanup()
    with assert_within(2.0):
        client.close()


@pytest.mark.parametrize("call", ["wait", "load_weights", "flush", "send_experiences"])
def test_a_call_keeps_its_own_timeout_when_the_server_hangs(new_server: NewServer, call: str) -> None:
    server = new_server()
    comm = WorkerCommunicator(1, redis_url=server.url, timeout=8.0)
    client = WorkerClient(server.url, worker_id=0, timeout=8.0, level="learner")
    client.send_experiences({"n": 1})
    command = comm.send_control_command("reset")
    calls: dict[str, Callable[[], Any]] = {
        "wait": lambda: command.wait(0.3),
        "load_weights": lambda: client.load_weights({}, timeout=0.3),
        "flush": lambda: client.flush(0.3),
        "send_experiences": lambda: client.send_experiences({"n": 2}, timeout=0.3),
    }
    server.freeze()
    with assert_within(0.3), pytest.raises(PeerError):
        calls[call]()
    server.thaw()
    client.close()
    comm.cleanup()


def test_all_replies_of_a_call_share_its_timeout(new_server: NewServer) -> None:
    proxy = Proxy(new_server().address)
    comm = WorkerCommunicator(1, redis_url=proxy.url, timeout=3.0)
    proxy.slow_down(delay_seconds=1.6)
    with assert_within(3.0), pytest.raises(ConnectionFailed):
        comm.get_queue_info()
    with assert_within(3.0):
        comm.cleanup()
    proxy.close()


def test_the_status_command_keeps_its_timeout(new_server: NewServer) -> None:
    proxy = Proxy(new_server().address)
    with WorkerCommunicator(1, redis_url=proxy.url, timeout=5.0):
        proxy.slow_down(delay_seconds=0.7)
        with assert_within(1.5):
            found = CliRunner().invoke(app, ["status", "--url", proxy.url, "--timeout", "1.5"])
        assert found.exit_code == 2
        assert "cannot reach" in found.output
        proxy.slow_down()
    proxy.close()


@pytest.mark.parametrize("settings", [{}, {"socket_timeout": None}, {"socket_timeout": 60.0}], ids=str)
@pytest.mark.parametrize("how", ["frozen", "half-open"])
def test_a_given_client_with_its_own_retries_keeps_the_timeout(
    new_server: NewServer, settings: dict[str, Any], how: str
) -> None:
    server = new_server()
    proxy = Proxy(server.address)
    comm = WorkerCommunicator(1, redis_client=redis.Redis(port=proxy.port, **settings), timeout=2.0)
    with proxy.silence(dropping=True) if how == "half-open" else contextlib.nullcontext():
        if how == "frozen":
            server.freeze()
        with assert_within(2.0), pytest.raises(ConnectionFailed):
            comm.workers()
        with assert_within(2.0):
            comm.cleanup()
    proxy.close()
