"""An exception of a signal handler, at any point of a call: the next call gets its own replies, and nothing leaks."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from conftest import ClusterServer, RealServer, wait_until
from interrupts import Alarm, Points, interrupt_at

from rlbroker.backend.bulk import ChunkReader, ChunkWriter
from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.scripts import Script

#: A socket that redis-py was about to connect is closed by its finalizer, with a warning.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ECHO = Script("echo", "return ARGV[1]")

KEYS = Keys("interrupted")

#: Keys of several shards, of which a Cluster has some on each node.
SHARDED = [f"rlb:{{interrupted/s{number}}}:x" for number in range(8)]


def refused(connection: Connection) -> None:
    replies = connection.execute_all([("PING",), ("GET",), ("ECHO", "x")], strict=False)
    assert (replies[0], replies[2]) == (True, b"x")


def run_unknown_script(connection: Connection) -> None:
    connection.execute("SCRIPT FLUSH")
    assert connection.run(ECHO, (KEYS.meta,), (7,)) == b"7"


def use_channel(connection: Connection) -> None:
    channel = Channel(connection, KEYS.meta)
    assert channel.connect()
    assert channel.execute("GET", KEYS.meta) is None
    channel.send([("ECHO", 1), ("ECHO", 2)])
    assert channel.receive(1) + channel.receive(1) == [b"1", b"2"]
    channel.give_back()


def move_chunks(connection: Connection) -> None:
    chunks = [(key, bytes([number]) * 200_000) for number, key in enumerate(SHARDED[:2])]
    ChunkWriter(connection).write([(key, [value]) for key, value in chunks], expire_seconds=60)
    memory = {key: memoryview(bytearray(200_000)) for key, _ in chunks}
    assert list(ChunkReader(connection).read(list(memory.items()))) == list(range(len(chunks)))
    assert all(memory[key] == value for key, value in chunks)
    assert ChunkReader(connection).values(SHARDED[:2]) == dict(chunks)


#: Without --full, one in so many points of a call is interrupted.
STRIDES = {"function": 3, "line": 11}

CALLS: dict[str, Callable[[Connection], Any]] = {
    "execute": lambda connection: connection.execute("SET", KEYS.weights, 1.5, "EX", 60),
    "execute_all": lambda connection: connection.execute_all([("GET", key) for key in SHARDED]),
    "refused": refused,
    "run": run_unknown_script,
    "execute_at": lambda connection: connection.execute_at(connection.masters()[0], [("PING",), ("ECHO", 2)]),
    "execute_where_reachable": lambda connection: connection.execute_where_reachable(
        [("EXPIRE", key, 60) for key in SHARDED]
    ),
    "execute_on_keys": lambda connection: connection.execute_on_keys("EXISTS", SHARDED),
    "scan": lambda connection: list(connection.scan("rlb:{interrupted*")),
    "clock": lambda connection: connection.clock(KEYS.meta),
    "load": lambda connection: connection.load([ECHO]),
    "check_server": lambda connection: connection.check_server(),
    "channel": use_channel,
    "chunks": move_chunks,
}


def interrupt_everywhere(
    connection: Connection,
    call: Callable[[Connection], Any],
    points: Points,
    error: type[BaseException],
    full: bool,
) -> Iterator[str]:
    """Interrupt a call at its points, and yield each place after it was interrupted there."""
    call(connection)
    for point in itertools.count(1, 1 if full else STRIDES[points]):
        with interrupt_at(point, points, error) as interrupt:
            call(connection)
        yield interrupt.place
        if not interrupt.place:
            return


def assert_in_step(connection: Connection, numbers: Iterator[int], place: str) -> None:
    """Assert that replies belong to their commands, and that no connection is in use."""
    for _ in range(2):
        number = next(numbers)
        replies = connection.execute_all([("ECHO", number), ("GET", SHARDED[0]), ("ECHO", -number)])
        assert replies[::2] == [b"%d" % number, b"%d" % -number], place
    pools: list[Any] = [one.client.connection_pool for one in connection.masters()]
    # The thread that watches a Cluster's nodes uses a connection now and then.
    wait_until(f"no connection is in use: {place}", lambda: not any(pool.in_use for pool in pools))


@pytest.mark.parametrize("error", [KeyboardInterrupt, Alarm])
@pytest.mark.parametrize("points", ["function", "line"])
@pytest.mark.parametrize("call", CALLS)
def test_after_an_interrupt_each_command_gets_its_own_reply(
    real_server: RealServer, call: str, points: Points, error: type[BaseException], full: bool
) -> None:
    numbers = itertools.count()
    with closing(Connection(real_server.url)) as connection:
        for place in interrupt_everywhere(connection, CALLS[call], points, error, full):
            assert_in_step(connection, numbers, place)
    assert next(numbers) > 8, "so few places"


@pytest.mark.parametrize("call", ["execute_all", "run", "chunks"])
def test_after_an_interrupt_the_nodes_of_a_cluster_are_in_step(
    cluster: ClusterServer, call: str, full: bool
) -> None:
    numbers = itertools.count()
    with closing(Connection(cluster.url)) as connection:
        for place in interrupt_everywhere(connection, CALLS[call], "function", KeyboardInterrupt, full):
            assert_in_step(connection, numbers, place)


def test_an_interrupt_while_the_nodes_are_read_leaves_no_lock_held(
    cluster: ClusterServer, full: bool
) -> None:
    def refresh(connection: Connection) -> None:
        connection.servers.mark_stale()
        connection.execute("GET", KEYS.meta)

    numbers = itertools.count()
    with closing(Connection(cluster.url, timeout_seconds=5.0)) as connection:
        for place in interrupt_everywhere(connection, refresh, "line", KeyboardInterrupt, full):
            connection.servers.mark_stale()
            other = threading.Thread(target=connection.masters)
            other.start()
            other.join(60.0)
            assert not other.is_alive(), place
            assert_in_step(connection, numbers, place)
