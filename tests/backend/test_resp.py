"""Commands in RESP: the server reads the same command, whatever the pieces."""

from __future__ import annotations

from typing import Any

import fakeredis
import pytest

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection
from rlbroker.backend.resp import COPY_BYTES, pack_commands

pytestmark = pytest.mark.unit

LARGE = bytes(range(256)) * (COPY_BYTES // 256 + 1)


def resp(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("GET", "clé"), (b"GET", "clé".encode())),
        (("SCRIPT LOAD", "return 1"), (b"SCRIPT", b"LOAD", b"return 1")),
        (("SET", b"\r\n$3", 12), (b"SET", b"\r\n$3", b"12")),
        (("SET", "x", -0.5), (b"SET", b"x", b"-0.5")),
        (("SET", memoryview(b"abc"), memoryview(b"de")), (b"SET", b"abc", b"de")),
        (("SET", "x", (b"a", memoryview(b"bc"), b"")), (b"SET", b"x", b"abc")),
        (("SET", "x", ()), (b"SET", b"x", b"")),
        (("SET", "x", (b"head", memoryview(LARGE), b"tail")), (b"SET", b"x", b"head" + LARGE + b"tail")),
        (("SET", "x", (b"head", memoryview(LARGE))), (b"SET", b"x", b"head" + LARGE)),
        (("SET", "x", LARGE, "GET"), (b"SET", b"x", LARGE, b"GET")),
    ],
)
@pytest.mark.parametrize("piece_bytes", [7, 1000, 1 << 20])
def test_a_command_arrives_unchanged_in_pieces_of_any_size(
    command: Any, words: tuple[bytes, ...], piece_bytes: int
) -> None:
    pieces = list(pack_commands([command, ("PING",)], piece_bytes=piece_bytes))
    assert b"".join(pieces) == resp(*words) + resp(b"PING")
    assert max(map(len, pieces)) <= max(piece_bytes, COPY_BYTES) + 100


def test_large_arguments_are_not_copied() -> None:
    whole = memoryview(LARGE)
    assert any(
        isinstance(piece, memoryview) and piece.obj is LARGE
        for piece in pack_commands([("SET", "x", (b"head", whole))], piece_bytes=1 << 20)
    )


def test_an_argument_in_pieces_arrives_as_one_value() -> None:
    client = fakeredis.FakeRedis()
    channel = Channel(Connection(client=client))
    channel.execute_all([("SET", "x", (b"head", memoryview(LARGE), b"tail")), ("SET", "y", 1)], strict=True)
    assert client.get("x") == b"head" + LARGE + b"tail"
    assert client.get("y") == b"1"
    channel.close()
