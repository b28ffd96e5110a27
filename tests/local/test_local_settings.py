"""Tests of the arguments of the embedded server. No process is started."""

from typing import Any

import pytest

from rlbroker.errors import InvalidArgument
from rlbroker.local.embedded_server import RedisServer

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "arguments",
    [
        {"port": 6379},
        {"bind": "127.0.0.1", "port": 65536},
        {"bind": "127.0.0.1", "port": -1},
        {"bind": "localhost"},
        {"bind": "127.0.0.1\nport 1"},
        {"maxmemory_bytes": 0},
    ],
    ids=repr,
)
def test_invalid_server_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        RedisServer(**arguments)


def test_the_constructor_starts_no_process_and_writes_no_file() -> None:
    server = RedisServer(bind="127.0.0.1")
    assert not server.socket_path.parent.exists()
    assert server.pid is None
    assert server.network_url is None
    assert server.version is None


def test_two_servers_have_different_passwords_and_sockets() -> None:
    first, second = RedisServer(), RedisServer()
    assert first.url != second.url
    assert first.socket_path != second.socket_path
    assert "***" in first.redacted_url
    assert repr(first) == f"<RedisServer {first.redacted_url} stopped>"
