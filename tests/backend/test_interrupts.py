"""An exception of a signal handler, at any point of a call: the next call gets its own replies, and nothing leaks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from conftest import RealServer
from interrupts import Alarm, Points, interrupt_at

from rlbroker.backend.bulk import ChunkReader, ChunkWriter
from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.scripts import Script

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
    connection: Connection, call: Callable[[Connection], Any], points: Points, error: type[BaseException]
) -> Iterator[str]:
    """Interrupt a call at each point, and yield each place after it was interrupted there."""
    call(connection)
    for point in itertools.count(1):
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
    assert [pool.in_use for pool in pools] == [0] * len(pools), place


@pytest.mark.parametrize("error", [KeyboardInterrupt, Alarm])
@pytest.mark.parametrize("points", ["function", "line"])
@pytest.mark.parametrize("call", CALLS)
def test_after_an_interrupt_each_command_gets_its_own_reply(
    real_server: RealServer, call: str, points: Points, error: type[BaseException]
) -> None:
    numbers = itertools.count()
    with closing(Connection(real_server.url)) as connection:
        for place in interrupt_everywhere(connection, CALLS[call], points, error):
            assert_in_step(connection, numbers, place)
    assert next(numbers) > 20, "so few places"
