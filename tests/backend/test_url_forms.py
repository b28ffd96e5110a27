"""Every form of a URL that redis-py reads works, or is refused with a message that says why and shows no password."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import redis
from conftest import RealServer
from secrets_in_errors import SECRET, texts
from typer.testing import CliRunner

from rlbroker import ConnectionFailed, InvalidArgument, RlbrokerError, WorkerClient, WorkerCommunicator
from rlbroker.backend.client import BaseClient
from rlbroker.backend.connection import Connection
from rlbroker.config import URL_VARIABLES
from rlbroker.ops.cli.app import app

LOCAL = {"host": "localhost", "port": 6379}

#: Single servers: the URL, and the settings of the connections that it stands for.
FORMS: dict[str, dict[str, Any]] = {
    "redis://myhost": {"host": "myhost", "port": 6379},
    "redis://myhost/": {"host": "myhost", "port": 6379},
    "redis://myhost:6380": {"host": "myhost", "port": 6380},
    "redis://myhost:": {"host": "myhost", "port": 6379},
    "redis://myhost/3": {"host": "myhost", "port": 6379, "db": 3},
    "redis://myhost/3/": {"host": "myhost", "db": 3},
    "redis://myhost/%33": {"host": "myhost", "db": 3},
    "redis://myhost?db=3": {"host": "myhost", "db": 3},
    "redis://myhost/2?db=3": {"host": "myhost", "db": 3},
    "redis://": LOCAL,
    "redis:///": LOCAL,
    "redis:///2": {**LOCAL, "db": 2},
    "redis://:6380": {"host": "localhost", "port": 6380},
    f"redis://:{SECRET}@": {**LOCAL, "password": SECRET},
    f"redis://:{SECRET}@myhost": {"host": "myhost", "port": 6379, "password": SECRET},
    f"redis://me:{SECRET}@myhost:1/0": {"host": "myhost", "username": "me", "password": SECRET},
    "redis://me@myhost": {"host": "myhost", "username": "me"},
    "redis://:@myhost": {"host": "myhost"},
    f"redis://me:{SECRET}%40%2F%3F%23@myhost": {"host": "myhost", "password": f"{SECRET}@/?#"},
    f"redis://me:{SECRET}@with@myhost": {"host": "myhost", "password": f"{SECRET}@with"},
    f"redis://myhost?username=me&password={SECRET}": {"username": "me", "password": SECRET},
    "redis://127.0.0.1": {"host": "127.0.0.1", "port": 6379},
    "redis://[::1]": {"host": "::1", "port": 6379},
    "redis://[::1]:6380/1": {"host": "::1", "port": 6380, "db": 1},
    f"redis://:{SECRET}@[fe80::1]": {"host": "fe80::1", "port": 6379},
    "REDIS://myhost": {"host": "myhost", "port": 6379},
    "Redis://MyHost/1": {"host": "myhost", "port": 6379, "db": 1},
    "  redis://myhost/1 \n": {"host": "myhost", "port": 6379, "db": 1},
    "rediss://h": {"host": "h", "port": 6379},
    "REDISS://h:7": {"host": "h", "port": 7},
    "unix:///run/redis.sock": {"path": "/run/redis.sock"},
    "UNIX:///run/redis.sock": {"path": "/run/redis.sock"},
    "unix://localhost/run/redis.sock": {"path": "/run/redis.sock"},
    "unix:///run/redis.sock?db=2": {"path": "/run/redis.sock", "db": 2},
    f"unix://me:{SECRET}@/run/a%20b.sock?db=2": {"path": "/run/a b.sock", "password": SECRET, "db": 2},
    "redis://myhost?socket_timeout=0.5&socket_connect_timeout=2": {"socket_timeout": 0.5},
    "redis://myhost?protocol=3": {"protocol": 3},
    "redis://myhost?client_name=a&socket_keepalive=True&health_check_interval=5": {"client_name": "a"},
    "redis://h#fragment": {"host": "h"},
}

#: Several servers: the URL, and their hosts.
SEVERAL = {
    "redis+cluster://a": (("a", 6379),),
    "redis+cluster://a:1,b:2/0": (("a", 1), ("b", 2)),
    f"rediss+cluster://me:{SECRET}@a,b:2": (("a", 6379), ("b", 2)),
    "REDIS+CLUSTER://a:1": (("a", 1),),
    "redis+cluster://[::1]:1,[::2]": (("::1", 1), ("::2", 6379)),
    "redis+sentinel://a,b:2/mymaster": (("a", 26379), ("b", 2)),
    "Redis+Sentinel://a/mymaster/3": (("a", 26379),),
    f"rediss+sentinel://:{SECRET}@[::1]/mymaster?sentinel_password={SECRET}": (("::1", 26379),),
}

#: What is refused, and what the message says.
REFUSED = {
    "redis://h:0": "port 0",
    f"redis://me:{SECRET}@h:0/1": "port 0",
    "redis+cluster://a:1,b:0": "port 0",
    "redis+sentinel://a:0/mymaster": "port 0",
    f"redis://:{SECRET}@h:70000": "port",
    f"redis://:{SECRET}@h:-1": "port",
    f"redis://:{SECRET}@h:x": "port",
    f"redis://h:{SECRET}": "port",
    f"redis://me:{SECRET}/x@h": "%2F",
    f"redis://me:{SECRET}#x@h": "%23",
    "redis://::1:6379": "[::1]",
    f"redis://:{SECRET}@[::1": "IPv6",
    f"redis://:{SECRET}@h/x": "database",
    f"redis://:{SECRET}@h/-1": "database",
    f"redis://:{SECRET}@h/1/2": "database",
    f"redis://:{SECRET}@h/\u0661": "database",
    f"redis://:{SECRET}@h/{'9' * 30}": "database",
    f"redis://:{SECRET}@h?db=x": "db",
    f"redis://:{SECRET}@h?db=-1": "db",
    f"redis://:{SECRET}@h?db={'9' * 5000}": "db",
    f"redis://:{SECRET}@h?socket_timeout=nan": "socket_timeout",
    f"redis://:{SECRET}@h?socket_timeout=inf": "socket_timeout",
    f"redis://:{SECRET}@h?socket_timeout=-1": "socket_timeout",
    f"redis://:{SECRET}@h?socket_timeout=x": "socket_timeout",
    f"redis://:{SECRET}@h?socket_connect_timeout=-2": "socket_connect_timeout",
    f"redis://:{SECRET}@h?health_check_interval=-1": "health_check_interval",
    f"redis://:{SECRET}@h?health_check_interval={'9' * 5000}": "health_check_interval",
    f"redis://:{SECRET}@h?protocol=7": "protocol",
    f"redis://:{SECRET}@h?protocol=": "protocol",
    f"redis://:{SECRET}@h?max_connections=-1": "max_connections",
    f"redis://:{SECRET}@h?max_connections=1": "connections",
    f"redis://:{SECRET}@h?retry_on_timeout=1": "retry_on_timeout",
    f"redis://:{SECRET}@h?ssl_ca_certs=/x": "ssl_ca_certs",
    f"rediss://:{SECRET}@h?ssl_cert_reqs=perhaps": "ssl_cert_reqs",
    f"rediss://:{SECRET}@h?ssl_ca_certs=/nowhere/ca.crt": "ssl_ca_certs",
    f"redis://:{SECRET}%00@h%00": "host",
    f"redis://:{SECRET}@a..b": "host",
    f"redis://:{SECRET}@{'a' * 300}": "host",
    f"redis://{SECRET}%40h": "host",
    f"redis://:{SECRET} x@h": "%20",
    f"redis://:{SECRET}\n@h": "%20",
    f"redis://:{SECRET}\udcff@h": "text",
    f"redis://:{SECRET}@h:1,i:2": "redis+cluster",
    f"redis+cluster://:{SECRET}@a,,b": "comma",
    f"redis+cluster://:{SECRET}@": "host",
    f"redis+cluster://:{SECRET}@a/3": "database 0 only",
    f"redis+sentinel://:{SECRET}@a": "master",
    f"redis+sentinel://:{SECRET}@a/m/x": "database",
    "unix://": "socket",
    f"unix://me:{SECRET}@": "socket",
    f"unix://:{SECRET}@tmp/redis.sock": "unix:///",
    "unix:///run/%00": "socket",
    f"http://:{SECRET}@h": "redis://",
    f"redis+unix://:{SECRET}@h": "redis://",
    f"redis-sentinel://:{SECRET}@h": "redis+sentinel://",
    "localhost:6379": "redis://",
    "localhost": "redis://",
    f":{SECRET}@localhost": "redis://",
    f"redis:/:{SECRET}@h": "//",
    f"redis:{SECRET}": "//",
    f"://:{SECRET}@h": "redis://",
}

#: What is not text.
NO_TEXT = [
    f"redis://:{SECRET}@h".encode(),
    pathlib.Path(f"redis://:{SECRET}@h"),
    3,
    [f"redis://:{SECRET}@h"],
    {"url": SECRET},
    redis.Redis(password=SECRET),
]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in URL_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.unit
@pytest.mark.parametrize("url", FORMS)
def test_a_url_stands_for_what_redis_py_makes_of_it(url: str) -> None:
    base = BaseClient.make(url, None)
    found = base.client.connection_pool.connection_kwargs
    assert FORMS[url].items() <= found.items()
    assert SECRET not in base.address
    connection = Connection(url)
    connection.masters()
    connection.close()


@pytest.mark.unit
@pytest.mark.parametrize("url", SEVERAL)
def test_the_hosts_of_several_servers_have_ports(url: str) -> None:
    base = BaseClient.make(url, None)
    assert base.endpoint.hosts == SEVERAL[url]
    assert SECRET not in base.address


@pytest.mark.unit
@pytest.mark.parametrize("url", REFUSED)
def test_a_url_that_cannot_be_used_is_refused_by_name(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (
        lambda: Connection(url),
        lambda: WorkerClient(url),
        lambda: WorkerCommunicator(1, redis_url=url),
    ):
        with pytest.raises(InvalidArgument) as caught:
            make()
        assert REFUSED[url] in str(caught.value)
        assert SECRET not in texts(caught.value)
    if "\udcff" not in url:
        monkeypatch.setenv("RLBROKER_REDIS_URL", url.replace("\x00", ""))
        with pytest.raises(InvalidArgument) as caught:
            WorkerClient()
        assert SECRET not in texts(caught.value)


@pytest.mark.unit
@pytest.mark.parametrize("value", NO_TEXT, ids=lambda value: type(value).__name__)
def test_what_is_not_text_is_refused_without_being_shown(value: Any) -> None:
    for make in (lambda: WorkerClient(value), lambda: WorkerCommunicator(1, redis_url=value)):
        with pytest.raises(InvalidArgument, match="redis_url must be text") as caught:
            make()
        assert SECRET not in texts(caught.value)


COMMANDS = [
    ["status"], ["top"], ["workers"], ["missed"], ["report"], ["weights", "list"], ["experiences", "peek"], ["runs"],
    ["control", "list"], ["control", "pause"], ["dead", "list"], ["check"], ["doctor"], ["acl"], ["exporter"],
    ["bench"], ["prune"], ["worker"], ["learner"], ["demo"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_refuses_such_urls_in_one_line(command: list[str]) -> None:
    for url in (
        "redis://h:0",
        f"redis://me:{SECRET}#x@h",
        f"unix://:{SECRET}@tmp/a.sock",
        f"redis://:{SECRET}@a..b",
    ):
        found = CliRunner().invoke(app, [*command, "--url", url])
        if isinstance(found.exception, SystemExit):
            assert found.exit_code in (2, 3), (url, found.output, found.exception)
        else:  # `main` makes one line and the exit code 2 of it
            assert isinstance(found.exception, InvalidArgument)
            assert SECRET not in texts(found.exception)
        assert SECRET not in found.output
        assert "Traceback" not in found.output


def test_hosts_and_sockets_that_cannot_be_reached_are_named(tmp_path: pathlib.Path) -> None:
    for url in (
        "redis://:pw@127.0.0.1:1",
        "redis://no-such-host.invalid",
        "unix:///nowhere.sock",
        f"unix://{tmp_path}/{'x' * 200}.sock",
        f"unix://{tmp_path}",
    ):
        with pytest.raises(ConnectionFailed) as caught:
            WorkerClient(url, timeout=0.3)
        assert "pw" not in texts(caught.value)


def test_a_default_port_may_be_left_out_of_a_client(real_server: RealServer) -> None:
    client = redis.Redis.from_url("redis://127.0.0.1")
    connection = Connection(client=client, timeout_seconds=0.5)
    assert connection.address == "127.0.0.1:6379"
    assert connection.masters()[0].address == ("127.0.0.1", 6379)


@pytest.mark.unit
def test_a_client_whose_host_is_a_url_is_refused() -> None:
    client = redis.Redis(host=f"redis://:{SECRET}@h")
    with pytest.raises(InvalidArgument, match="from_url") as caught:
        WorkerClient(redis_client=client)
    assert SECRET not in texts(caught.value)


def test_a_url_in_upper_case_and_with_spaces_works(
    real_server: RealServer, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, rest = real_server.url.split("://")
    monkeypatch.setenv("REDIS_URL", f" {scheme.upper()}://{rest}\n")
    monkeypatch.setenv("RLBROKER_REDIS_URL", "  ")
    with WorkerCommunicator(1, run=run) as comm, WorkerClient(run=run) as worker:
        worker.send_experiences({"x": 1})
        assert len(comm.collect_experiences(timeout=5.0)) == 1
        found = CliRunner().invoke(app, ["status", "--run", run])
        assert found.exit_code == 0, found.output


def test_refusals_are_rlbroker_errors() -> None:
    assert issubclass(InvalidArgument, RlbrokerError)
