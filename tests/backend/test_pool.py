"""The pool of connections: what a call drops closes, and makes room for another."""

from __future__ import annotations

import gc
import threading
from typing import Any

import fakeredis
import pytest
import redis

from rlbroker.backend.pool import ConnectionPool

pytestmark = pytest.mark.unit


@pytest.fixture
def pool() -> ConnectionPool:
    return ConnectionPool(
        timeout=0.05,
        max_connections=2,
        connection_class=fakeredis.FakeRedisConnection,
        server=fakeredis.FakeServer(),
    )


def test_a_connection_that_was_given_back_is_used_again(pool: ConnectionPool) -> None:
    first = pool.get_connection()
    assert pool.in_use == 1
    pool.release(first)
    assert pool.in_use == 0
    assert pool.get_connection() is first


def test_a_dropped_connection_makes_room(pool: ConnectionPool) -> None:
    kept = [pool.get_connection(), pool.get_connection()]
    with pytest.raises(redis.ConnectionError, match="all connections are in use"):
        pool.get_connection()
    kept.pop()
    gc.collect()  # a connection of fakeredis refers to itself
    assert pool.in_use == 1
    assert pool.get_connection().is_connected


def test_a_thread_waits_for_a_connection(pool: ConnectionPool) -> None:
    pool.timeout = 60.0
    one, _other = pool.get_connection(), pool.get_connection()
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(pool.get_connection()))
    waiting.start()
    pool.release(one)
    waiting.join()
    assert found == [one]


def test_a_connection_with_an_unread_reply_is_opened_anew(pool: ConnectionPool) -> None:
    connection = pool.get_connection()
    connection.send_command("ECHO", "unread")
    pool.release(connection)
    again = pool.get_connection()
    again.send_command("ECHO", "next")
    assert again.read_response() == b"next"
    pool.disconnect(inuse_connections=False)
    assert again.is_connected
    pool.disconnect()
    assert not again.is_connected
