"""Commands in RESP: the server reads the same command, whatever the pieces."""

from __future__ import annotations

from typing import Any

import fakeredis
import numpy as np
import pytest

import rlbroker.backend.resp as resp_module
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


def test_hiredis_packs_only_text_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It crashes if a signal handler raises an exception while it packs a number."""
    packed: list[tuple[object, ...]] = []

    def pack(words: tuple[object, ...]) -> bytes:
        packed.append(words)
        return b""

    monkeypatch.setattr(resp_module, "pack_command", pack)
    list(pack_commands([("SET", 1, 0.5, True, np.float64(2.5), memoryview(b"x"), "y", b"z")], piece_bytes=1))
    assert packed == [("SET", "1", "0.5", "True", "2.5", b"x", "y", b"z")]
    assert all(type(word) in (str, bytes) for word in packed[0])


@pytest.mark.parametrize("wrong", [None, {}, [1], object()])
def test_what_is_no_argument_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="cannot be an argument of a command"):
        list(pack_commands([("SET", "x", wrong)], piece_bytes=1))
