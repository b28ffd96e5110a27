"""Servers that refuse commands for a while: without scripts, without users, or busy. All clients recover."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import wait_until
from servers import FaultyServer

from rlbroker import AccessDenied, WorkerClient, WorkerCommunicator

NewServer = Callable[..., FaultyServer]

USERS = """user default on nopass ~* &* +@all
user worker on >pw ~* &* +@all -script
"""


def assert_all_works(comm: WorkerCommunicator, client: WorkerClient, number: int) -> None:
    """Check that a command, a version and a batch arrive."""
    command = comm.send_control_command("reset")
    version = comm.send_model_weights({"n": number}).version
    wait_until("the worker has applied the version", lambda: client.poll({}) or client.version == version)
    wait_until(
        "the worker has acknowledged the command",
        lambda: client.poll({}) or command.outcomes()[0].state == "done",
    )
    client.send_experiences({"n": number})
    assert [batch["n"] for _, batch in comm.collect_experiences(5.0)] == [number]


def test_the_learner_reloads_lost_scripts_for_workers_without_that_right(
    new_server: NewServer, tmp_path: Path
) -> None:
    (tmp_path / "users.acl").write_text(USERS)
    server = new_server("--aclfile", str(tmp_path / "users.acl"))
    with (
        WorkerCommunicator(1, redis_url=server.url, timeout=5.0, lease_seconds=1.0) as comm,
        WorkerClient(
            server.url.replace("//", "//worker:pw@"), worker_id=0, timeout=5.0, level="learner"
        ) as client,
    ):
        assert_all_works(comm, client, 1)
        for number in (2, 3):
            server.client().script_flush()
            time.sleep(0.5)  # some heartbeats
            assert_all_works(comm, client, number)


def test_a_user_may_be_created_some_time_after_a_restart_of_the_server(new_server: NewServer) -> None:
    server = new_server("--appendonly", "yes", "--appendfsync", "always")

    def create_user() -> None:
        server.client().execute_command("ACL", "SETUSER", "me", "on", ">pw", "~*", "&*", "+@all")

    create_user()
    url = server.url.replace("//", "//me:pw@")
    with (
        WorkerCommunicator(1, redis_url=url, timeout=6.0) as comm,
        WorkerClient(url, worker_id=0, timeout=6.0) as client,
    ):
        assert_all_works(comm, client, 1)
        server.kill()
        server.start()
        timer = threading.Timer(2.0, create_user)
        timer.start()
        assert_all_works(comm, client, 2)
        timer.join()
        assert_all_works(comm, client, 3)


def test_a_right_that_stays_missing_ends_both_sides_with_its_name(
    new_server: NewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlbroker.backend.error_mapping.REFUSAL_GRACE_SECONDS", 1.0)
    server = new_server()
    server.client().execute_command("ACL", "SETUSER", "me", "on", ">pw", "~*", "&*", "+@all")
    url = server.url.replace("//", "//me:pw@")
    with (
        WorkerCommunicator(1, redis_url=url, timeout=2.0) as comm,
        WorkerClient(url, worker_id=0, timeout=2.0) as client,
    ):
        assert_all_works(comm, client, 1)
        server.client().execute_command("ACL", "SETUSER", "me", "-evalsha")

        def ends(call: Callable[[], object]) -> bool:
            try:
                call()
            except AccessDenied as error:
                return "may not run EVALSHA" in str(error) and error.rule == "+evalsha"
            return False

        wait_until("the worker has ended", lambda: ends(client.poll), 20.0)
        wait_until("the learner has ended", lambda: ends(comm.workers), 20.0)


def test_a_wrong_password_fails_at_once(new_server: NewServer) -> None:
    began = time.monotonic()
    with pytest.raises(AccessDenied, match="check user and password"):
        WorkerClient(new_server().url.replace("//", "//me:wrong@"), timeout=8.0)
    assert time.monotonic() - began < 5.0


def test_all_recover_after_a_slow_script_of_another_client(new_server: NewServer) -> None:
    server = new_server("--lua-time-limit", "50")
    with (
        WorkerCommunicator(1, redis_url=server.url, timeout=8.0) as comm,
        WorkerClient(server.url, worker_id=0, timeout=8.0) as client,
    ):
        assert_all_works(comm, client, 1)
        script = (
            "local t = redis.call('TIME')[1] + 3; while tonumber(redis.call('TIME')[1]) < t do end return 1"
        )
        busy = threading.Thread(target=lambda: server.client().eval(script, 0))
        busy.start()
        time.sleep(0.3)
        assert_all_works(comm, client, 2)
        busy.join()
        assert_all_works(comm, client, 3)
