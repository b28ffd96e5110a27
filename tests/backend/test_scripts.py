"""Scripts: their text with includes, and loading them into servers that lack them."""

from __future__ import annotations

import fakeredis
import pytest
from conftest import RealServer

from rlbroker.backend.connection import Connection
from rlbroker.backend.scripts import Script
from rlbroker.errors import RunLost

ONE, TWO = Script("one", "return 1"), Script("two", "return 2")


@pytest.mark.unit
def test_an_include_is_replaced_by_its_file() -> None:
    script = Script.load("weights/lua/commit.lua")
    assert script.name == "commit"
    assert "-- include:" not in script.text
    assert "FENCED" in script.text, "the check that only the leading learner publishes is included"


@pytest.mark.unit
def test_scripts_are_loaded_only_where_they_are_missing() -> None:
    client = fakeredis.FakeRedis()
    connection = Connection(client=client)
    client.script_load(ONE.text)
    connection.load([ONE, TWO])
    assert client.script_exists(ONE.sha, TWO.sha) == [True, True]


def test_a_user_without_the_right_to_load_scripts_waits_for_the_learner(real_server: RealServer) -> None:
    admin = real_server.client
    admin.execute_command("ACL SETUSER", "poor", "on", ">word", "+@all", "-script", "~*")
    path = admin.connection_pool.connection_kwargs["path"]
    connection = Connection(f"unix://poor:word@{path}", timeout_seconds=0.2)
    try:
        for _ in range(2):
            with pytest.raises(RunLost, match="does not have rlbroker's scripts"):
                connection.run(TWO, ())
            with pytest.raises(RunLost, match="does not have rlbroker's scripts"):
                connection.execute_all([("PING",), TWO.call(())], strict=False)
        admin.script_load(TWO.text)
        assert connection.run(TWO, ()) == 2
    finally:
        connection.close()
        admin.acl_deluser("poor")
