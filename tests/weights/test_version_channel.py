"""The subscription on which a worker hears of new versions."""

from __future__ import annotations

import pytest
from conftest import Server, wait_until

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.keys import Keys
from rlbroker.backend.threads import BackgroundThread
from rlbroker.weights import version_channel
from rlbroker.weights.version_channel import VersionChannel


@pytest.mark.single_server("PUBLISH counts the subscribers of one node only")
def test_an_announcement_that_comes_with_the_confirmation_is_noticed_at_once(
    server: Server, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version_channel, "PING_SECONDS", 3600.0)  # the reply to a ping would end the wait too
    way = server.connection_settings()
    connection = Connection(way.get("redis_url"), client=way.get("redis_client"))
    channel, found = VersionChannel(connection, keys), list[int]()
    thread = BackgroundThread("listener", lambda: found.append(channel.wait(Deadline(3600.0), thread)))
    channel.subscribe()
    # Both are in the socket before the thread reads: the confirmation, and the announcement.
    wait_until("the server has the subscription", lambda: server.client.publish(keys.notify, 7))
    thread.start()
    wait_until("the announcement is read", lambda: 7 in found)
    assert thread.stop(5.0)
    channel.close()
    connection.close()
