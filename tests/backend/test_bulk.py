"""Chunks arrive bit-exact, or the error says why not; over every kind of connection."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import RealServer, Server, spread
from servers import FaultyServer

from rlbroker import errors
from rlbroker.backend import bulk
from rlbroker.backend.bulk import ChunkReader, ChunkWriter
from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.keys import Keys
from rlbroker.local.embedded_server import RedisServer

NewServer = Callable[..., FaultyServer]

#: How long a step may take beyond its deadline.
GRACE_SECONDS = 1.0

#: Sizes at the boundaries: empty, around the line buffer, and usual chunks.
SIZES = (0, 1, 2, bulk.LINE_BYTES - 6, bulk.LINE_BYTES, bulk.LINE_BYTES + 1, 300_000, 4 << 20)


def reach(server: Server, timeout_seconds: float = 10.0) -> Connection:
    return Connection(client=server.another_client(), timeout_seconds=timeout_seconds)


@pytest.fixture
def connection(server: Server, keys: Keys) -> Iterator[Connection]:
    spread(keys, server)
    made = reach(server)
    yield made
    made.close()


@pytest.fixture
def real(real_server: RealServer) -> Iterator[Connection]:
    made = reach(real_server)
    yield made
    made.close()


def names(keys: Keys, count: int) -> list[str]:
    return [keys.chunk("1-1-1", number) for number in range(count)]


def values(sizes: Sequence[int]) -> list[bytes]:
    return [random.Random(size).randbytes(size) for size in sizes]


def in_parts(value: bytes) -> list[bytes | memoryview]:
    third = len(value) // 3
    view = memoryview(value)
    return [
        value[:third],
        view[third:third],
        view[third : 2 * third],
        memoryview(bytearray(view[2 * third :])),
    ]


def write(connection: Connection, pairs: dict[str, bytes]) -> None:
    ChunkWriter(connection).write(((key, in_parts(value)) for key, value in pairs.items()), expire_seconds=60)


def read(connection: Connection, pairs: dict[str, bytes]) -> list[bytes]:
    memory = [bytearray(len(value)) for value in pairs.values()]
    wanted = [(key, memoryview(one)) for key, one in zip(pairs, memory, strict=True)]
    assert list(ChunkReader(connection).read(wanted)) == list(range(len(pairs)))
    return [bytes(one) for one in memory]


def move(connection: Connection, pairs: dict[str, bytes]) -> None:
    write(connection, pairs)
    assert read(connection, pairs) == list(pairs.values())


@contextlib.contextmanager
def assert_within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds + GRACE_SECONDS


@pytest.mark.on_every_engine
def test_chunks_are_read_bit_exact_and_expire(server: Server, connection: Connection, keys: Keys) -> None:
    sizes = [*SIZES, *reversed(SIZES)]
    pairs = dict(zip(names(keys, len(sizes)), values(sizes), strict=True))
    move(connection, pairs)
    assert all(server.client.get(key) == value for key, value in pairs.items())
    assert all(0 < server.client.ttl(key) <= 60 for key in pairs)


def test_many_small_chunks_are_read_in_order(connection: Connection, keys: Keys) -> None:
    move(connection, {key: key.encode() for key in names(keys, 3000)})


def test_a_chunk_of_very_many_parts_is_stored_whole(connection: Connection, keys: Keys) -> None:
    parts = [bytes([number % 256]) * (number % 3) for number in range(5000)]
    ChunkWriter(connection).write([(keys.chunk("1-1-1", 0), parts)], expire_seconds=60)
    assert connection.execute("GET", keys.chunk("1-1-1", 0)) == b"".join(parts)


def test_parts_of_any_shape_are_sent_as_their_bytes(connection: Connection, keys: Keys) -> None:
    part = memoryview(bytes(range(64))).cast("I", (4, 4))
    ChunkWriter(connection).write([(keys.chunk("1-1-1", 0), [part])], expire_seconds=60)
    assert connection.execute("GET", keys.chunk("1-1-1", 0)) == bytes(range(64))


def test_no_chunks_are_valid(connection: Connection) -> None:
    move(connection, {})


@pytest.mark.on_every_engine
def test_a_missing_chunk_is_an_error_and_earlier_chunks_are_read(connection: Connection, keys: Keys) -> None:
    pairs = dict(zip(names(keys, 4), values([5, 1 << 20, 7, 9]), strict=True))
    write(connection, pairs)
    gone = list(pairs)[2]
    connection.execute("DEL", gone)
    memory = [bytearray(len(value)) for value in pairs.values()]
    reading = ChunkReader(connection).read(
        [(key, memoryview(one)) for key, one in zip(pairs, memory, strict=True)]
    )
    got = [next(reading), next(reading)]
    with pytest.raises(errors.WireError, match=f"{gone} is gone"):
        next(reading)
    assert got == [0, 1]
    assert memory[:2] == list(pairs.values())[:2]
    del pairs[gone]
    assert read(connection, pairs) == list(pairs.values())


@pytest.mark.parametrize("stored_bytes", [0, 99, 101, 3 << 20])
def test_a_chunk_of_another_length_is_refused_and_not_written_beyond_its_memory(
    connection: Connection, keys: Keys, stored_bytes: int
) -> None:
    key, other = names(keys, 2)
    write(connection, {key: b"x" * stored_bytes, other: b"y" * 10})
    around = bytearray(300)
    wanted = [(key, memoryview(around)[100:200]), (other, memoryview(bytearray(10)))]
    with pytest.raises(errors.WireError, match=f"has {stored_bytes} bytes instead of 100"):
        list(ChunkReader(connection).read(wanted))
    assert not any(around[:100]) and not any(around[200:])  # noqa: PT018
    assert read(connection, {other: b"y" * 10}) == [b"y" * 10]


def test_abandoned_reads_leave_no_half_read_connection(connection: Connection, keys: Keys) -> None:
    pairs = dict(zip(names(keys, 6), values([100_000] * 6), strict=True))
    write(connection, pairs)
    reader = ChunkReader(connection)
    wanted = [(key, memoryview(bytearray(100_000))) for key in pairs]
    older = reader.read(wanted)
    assert next(older) == 0
    others = []
    for _ in range(20):  # more than the pool has connections
        others.append(reader.read(wanted))
        assert next(others[-1]) == 0
    newer = reader.read(wanted)
    assert next(newer) == 0
    with contextlib.suppress(errors.ConnectionFailed):  # with fakeredis the read continues
        list(older)
    assert list(newer) == [1, 2, 3, 4, 5]
    reader.close()
    assert read(connection, pairs) == list(pairs.values())


def test_a_refusal_of_the_server_is_the_usual_error(connection: Connection, keys: Keys) -> None:
    key, other = names(keys, 2)
    connection.execute_all([("RPUSH", key, "no string"), ("EXPIRE", key, 60)])
    write(connection, {other: b"y"})
    with pytest.raises(errors.ServerFault, match="a key of another type"):
        list(
            ChunkReader(connection).read([(key, memoryview(bytearray(1))), (other, memoryview(bytearray(1)))])
        )
    assert read(connection, {other: b"y"}) == [b"y"]


def test_an_error_while_encoding_reaches_the_caller_unchanged(
    server: Server, connection: Connection, keys: Keys
) -> None:
    first, second, third = names(keys, 3)

    def encode() -> Iterator[tuple[str, list[bytes]]]:
        yield first, [b"1"]
        yield second, [b"2"]
        raise OSError("no room to encode")

    with pytest.raises(OSError, match="no room to encode") as caught:
        ChunkWriter(connection).write(encode(), expire_seconds=60)
    assert not isinstance(caught.value, errors.PeerError)
    assert [server.client.get(key) for key in (first, second, third)] == [b"1", b"2", None]


def test_chunks_are_encoded_while_earlier_ones_are_sent(real: Connection, keys: Keys) -> None:
    writer = ChunkWriter(real)
    unconfirmed_counts: list[int] = []

    def encode() -> Iterator[tuple[str, list[bytes]]]:
        for number, key in enumerate(names(keys, 10)):
            unconfirmed_counts.append(number - writer.confirmed)
            yield key, [bytes(bulk.WRITE_WINDOW_BYTES // 4)]

    writer.write(encode(), expire_seconds=60)
    assert writer.confirmed == 10
    assert max(unconfirmed_counts) == 4


def test_chunks_are_not_copied(real: Connection, keys: Keys) -> None:
    whole = random.Random(1).randbytes(16 << 20)
    back = memoryview(bytearray(16 << 20))
    places = [slice(start, start + (4 << 20)) for start in range(0, 16 << 20, 4 << 20)]
    real.execute("PING")  # so that redis-py's own buffer exists already
    tracemalloc.start()
    try:
        parts = [[memoryview(whole)[place]] for place in places]
        ChunkWriter(real).write(zip(names(keys, 4), parts, strict=True), expire_seconds=60)
        wanted = [(key, back[place]) for key, place in zip(names(keys, 4), places, strict=True)]
        assert list(ChunkReader(real).read(wanted)) == [0, 1, 2, 3]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert back == whole
    assert peak_bytes < 1 << 20


# Faults of the server


def test_after_a_full_server_a_write_continues_from_the_confirmed_chunks(
    new_server: NewServer, keys: Keys
) -> None:
    server = new_server("--maxmemory", "12mb", "--maxmemory-policy", "noeviction")
    connection = Connection(server.url)
    pairs = dict(zip(names(keys, 12), values([2 << 20] * 12), strict=True))
    writer = ChunkWriter(connection)
    with pytest.raises(errors.ServerOutOfMemory, match="has reached its maxmemory"):
        writer.write(((key, [value]) for key, value in pairs.items()), expire_seconds=60)
    done = writer.confirmed
    with server.client() as client:
        assert 0 < done < 12
        assert client.exists(*list(pairs)[:done]) == done
        client.config_set("maxmemory", 0)
    writer.write(((key, [value]) for key, value in list(pairs.items())[done:]), expire_seconds=60)
    assert writer.confirmed == 12 - done
    assert read(connection, pairs) == list(pairs.values())
    connection.close()


def test_a_server_crash_fails_reads_and_writes_and_a_restart_serves_them(
    new_server: NewServer, keys: Keys
) -> None:
    server = new_server()
    connection = Connection(server.url)
    pairs = dict(zip(names(keys, 8), values([4 << 20] * 8), strict=True))
    write(connection, pairs)
    wanted = [(key, memoryview(bytearray(len(value)))) for key, value in pairs.items()]
    reading = ChunkReader(connection).read(wanted)
    next(reading)
    server.kill()
    with pytest.raises(errors.ConnectionFailed):
        list(reading)
    server.start()

    def encode() -> Iterator[tuple[str, list[bytes]]]:
        for number, (key, value) in enumerate(pairs.items()):
            if number == 5:
                server.kill()
            yield key, [value]

    writer = ChunkWriter(connection)
    with pytest.raises(errors.ConnectionFailed):
        writer.write(encode(), expire_seconds=60)
    assert writer.confirmed <= 5
    server.start()
    move(connection, pairs)
    connection.close()


@pytest.mark.parametrize("deadline", [True, False])
def test_a_frozen_server_is_not_waited_for_beyond_the_deadline(
    new_server: NewServer, keys: Keys, deadline: bool
) -> None:
    server = new_server()
    connection = Connection(server.url, timeout_seconds=4.0 if deadline else 0.3)
    pairs = dict(zip(names(keys, 8), values([4 << 20] * 8), strict=True))
    write(connection, pairs)
    holds = within(Deadline(0.3)) if deadline else contextlib.nullcontext()
    reading = ChunkReader(connection).read([(key, memoryview(bytearray(4 << 20))) for key in pairs])
    next(reading)
    server.freeze()
    with assert_within(0.3), holds, pytest.raises(errors.ConnectionFailed, match="timed out"):
        list(reading)
    server.thaw()

    def encode() -> Iterator[tuple[str, list[bytes]]]:
        for number, (key, value) in enumerate(pairs.items()):
            if number == 1:
                server.freeze()
            yield key, [value]

    holds = within(Deadline(0.3)) if deadline else contextlib.nullcontext()
    with assert_within(0.3), holds, pytest.raises(errors.ConnectionFailed, match="timed out"):
        ChunkWriter(connection).write(encode(), expire_seconds=60)
    server.thaw()
    move(connection, pairs)
    connection.close()


def test_wrong_passwords_and_missing_rights_are_access_denied(keys: Keys) -> None:
    with RedisServer(bind="127.0.0.1") as server:
        assert server.network_url is not None
        address = server.network_url.partition("@")[2]
        connection = Connection(server.network_url)
        move(connection, dict(zip(names(keys, len(SIZES)), values(SIZES), strict=True)))
        with pytest.raises(errors.AccessDenied):
            move(Connection(f"redis://rlbroker:wrong@{address}"), {"k": b""})
        connection.execute("ACL SETUSER", "guest", "on", "nopass", "+@all", "-get", "-set", "~*")
        guest = Connection(f"redis://guest:any@{address}")
        with pytest.raises(errors.AccessDenied, match="may not run SET"):
            write(guest, {"k": b"1"})
        with pytest.raises(errors.AccessDenied, match="may not run GET"):
            read(guest, {"k": b"1"})
        connection.close()
        guest.close()


@pytest.fixture
def without_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks that redis-py moves fail the test."""

    def execute(self: Channel, *command: Any) -> Any:
        pytest.fail(f"redis-py runs {command[0]}")

    monkeypatch.setattr(Channel, "execute", execute)


@pytest.mark.usefixtures("without_fallback")
@pytest.mark.parametrize("protocol", [2, 3])
def test_both_protocols_carry_chunks(real_server: RealServer, keys: Keys, protocol: int) -> None:
    client = redis.Redis.from_url(real_server.url, protocol=protocol)
    connection = Connection(client=client)
    move(connection, dict(zip(names(keys, len(SIZES)), values(SIZES), strict=True)))
    with pytest.raises(errors.WireError, match="is gone"):
        read(connection, {"nothing": b""})
    connection.close()


@pytest.fixture
def tls_url(tmp_path: Path) -> Iterator[str]:
    """The URL of a server that speaks TLS only; needs the system's redis-server and openssl."""
    redis_server, openssl = shutil.which("redis-server"), shutil.which("openssl")
    if redis_server is None or openssl is None:
        pytest.skip("redis-server or openssl is not on the PATH: TLS is not tested")
    key, certificate, log = tmp_path / "key.pem", tmp_path / "certificate.pem", tmp_path / "log"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [redis_server, "--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--save", ""]
    command += ["--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-auth-clients", "no"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=tmp_path)
    try:
        while b"Ready to accept" not in log.read_bytes():
            if process.poll() is not None:
                pytest.skip(f"redis-server does not start with TLS: {log.read_text()[-300:]}")
            time.sleep(0.01)
        yield f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("without_fallback")
def test_tls_carries_chunks_too(tls_url: str, keys: Keys) -> None:
    connection = Connection(tls_url)
    sizes = [*SIZES, *[4 << 20] * 6]
    move(connection, dict(zip(names(keys, len(sizes)), values(sizes), strict=True)))
    connection.close()


class ScriptedServer:
    """A server that stores values and sends short replies byte by byte, or scripted replies."""

    def __init__(self) -> None:
        self.replies: dict[bytes, Callable[[socket.socket], None] | bytes] = {}
        self.connections = 0
        self._stored: dict[bytes, bytes] = {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError), client, client.makefile("rb") as stream:
            while line := stream.readline():
                words = []
                for _ in range(int(line[1:])):
                    words.append(stream.read(int(stream.readline()[1:])))
                    stream.readline()
                reply = self.replies.get(words[0]) or self._reply(words)
                if not isinstance(reply, bytes):
                    reply(client)
                elif len(reply) > 10_000:
                    client.sendall(reply)
                else:
                    for byte in reply:
                        client.sendall(bytes([byte]))

    def _reply(self, words: list[bytes]) -> bytes:
        if words[0] == b"SET":
            self._stored[words[1]] = words[2]
        if words[0] == b"GET":
            value = self._stored.get(words[1])
            return b"$-1\r\n" if value is None else b"$%d\r\n%b\r\n" % (len(value), value)
        return b"+OK\r\n"


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


def test_replies_may_arrive_byte_by_byte(scripted: ScriptedServer, keys: Keys) -> None:
    connection = Connection(scripted.url)
    sizes = [0, 1, 2, 5000, 3, 4095, 4096]
    move(connection, dict(zip(names(keys, len(sizes)), values(sizes), strict=True)))
    with pytest.raises(errors.WireError, match="is gone"):
        read(connection, {"nothing": b""})
    connection.close()


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", errors.ConnectionFailed),
        (b"-READONLY You can't write against a read only replica.\r\n", errors.ConnectionFailed),
        (b"-BUSY Redis is busy running a script\r\n", errors.ConnectionFailed),
        (b"-NOAUTH Authentication required.\r\n", errors.AccessDenied),
        (b"-NOPERM User x has no permissions\r\n", errors.AccessDenied),
        (b"-OOM command not allowed\r\n", errors.ServerOutOfMemory),
        (b"-MISCONF Redis is configured to save RDB snapshots\r\n", errors.ServerFault),
        (b"-ERR \xff\r\n", errors.ServerFault),
        (b"*1\r\n:1\r\n", errors.ServerFault),
        (b"$\xb2\r\n", errors.ServerFault),
        (b"$" + b"9" * 5000 + b"\r\n", errors.ServerFault),
        (b"\r\n", errors.ServerFault),
    ],
    ids=lambda value: value[1:8].decode(errors="replace").strip() if isinstance(value, bytes) else "",
)
def test_error_replies_become_errors_of_rlbroker(
    scripted: ScriptedServer, reply: bytes, expected: type[Exception]
) -> None:
    connection = Connection(scripted.url)
    scripted.replies = {b"GET": reply, b"SET": reply}
    with pytest.raises(errors.PeerError) as caught:
        write(connection, {"a": b"1", "b": b"2"})
    assert type(caught.value) is expected
    with pytest.raises(errors.PeerError) as caught:
        read(connection, {"a": b"1", "b": b"2"})
    assert type(caught.value) is expected
    scripted.replies = {}
    move(connection, {"a": b"1", "b": b"2"})
    connection.close()


@pytest.mark.parametrize("part", [b"", b"$1", b"$10\r\n", b"$10\r\nabc", b"$10\r\n0123456789\r"])
def test_a_connection_closed_within_a_reply_has_failed(scripted: ScriptedServer, part: bytes) -> None:
    def end(client: socket.socket) -> None:
        client.sendall(part)
        client.shutdown(socket.SHUT_RDWR)

    scripted.replies = {b"GET": end}
    connection = Connection(scripted.url)
    with pytest.raises(errors.ConnectionFailed, match="closed the connection"):
        read(connection, {"k": bytes(10)})
    connection.close()


def test_an_endless_line_does_not_fill_the_memory(scripted: ScriptedServer) -> None:
    scripted.replies = {b"GET": b"-ERR " + bytes(2 * bulk.LONGEST_LINE_BYTES)}
    connection = Connection(scripted.url)
    with pytest.raises(errors.ConnectionFailed, match="does not end"):
        read(connection, {"k": bytes(10)})
    connection.close()


def test_a_failed_write_waits_for_the_chunks_that_were_sent(scripted: ScriptedServer) -> None:
    done = []

    def store_late(client: socket.socket) -> None:
        time.sleep(0.1)  # the writer waits for the reply
        done.append(1)
        client.sendall(b"+OK\r\n")

    def encode() -> Iterator[tuple[str, list[bytes]]]:
        yield "a", [b"1"]
        yield "b", [b"2"]
        raise OSError("no room to encode")

    scripted.replies = {b"SET": store_late}
    connection = Connection(scripted.url)
    with pytest.raises(OSError, match="no room to encode"):
        ChunkWriter(connection).write(encode(), expire_seconds=60)
    assert done == [1, 1]
    connection.close()


@pytest.mark.parametrize(("window_bytes", "asked"), [(0, [2, 1, 1, 1]), (30, [3, 1, 1]), (1000, [5])])
def test_chunks_are_requested_ahead_within_the_window(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, window_bytes: int, asked: list[int]
) -> None:
    sent: list[int] = []
    send = bulk._Pipe.send

    def count(pipe: Any, commands: list[tuple[str, str]]) -> None:
        sent.append(len(commands))
        send(pipe, commands)

    connection = Connection(scripted.url)
    pairs = {f"k{number}": bytes(10) for number in range(5)}
    write(connection, pairs)
    monkeypatch.setattr(bulk, "READ_WINDOW_BYTES", window_bytes)
    monkeypatch.setattr(bulk._Pipe, "send", count)
    read(connection, pairs)
    assert sent == asked
    connection.close()


def test_a_trickling_chunk_is_not_waited_for_beyond_the_deadline(scripted: ScriptedServer) -> None:
    ended = threading.Event()

    def trickle(client: socket.socket) -> None:
        client.sendall(b"$1000000\r\n")
        while not ended.wait(0.02):
            client.sendall(b"x")

    scripted.replies = {b"GET": trickle}
    connection = Connection(scripted.url)
    with assert_within(0.3), within(Deadline(0.3)), pytest.raises(errors.ConnectionFailed, match="timed out"):
        read(connection, {"k": bytes(1_000_000)})
    ended.set()
    connection.close()


def test_ctrl_c_within_a_reply_closes_the_connection(scripted: ScriptedServer) -> None:
    def interrupt(client: socket.socket) -> None:
        client.sendall(b"$1000\r\nxxx")
        os.kill(os.getpid(), signal.SIGINT)

    scripted.replies = {b"GET": interrupt}
    connection = Connection(scripted.url)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            read(connection, {"k": bytes(1000)})
    finally:
        signal.signal(signal.SIGINT, before)
    assert scripted.connections == 1
    scripted.replies = {}
    move(connection, {"k": b"whole"})
    assert scripted.connections == 2
    connection.close()


def test_a_healthy_connection_is_used_again(scripted: ScriptedServer) -> None:
    connection = Connection(scripted.url)
    for _ in range(3):
        move(connection, {"k": b"v"})
    assert scripted.connections == 1
    connection.close()
